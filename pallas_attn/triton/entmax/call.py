"""The static facts of a call with entmax."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from jaxtyping import Array, Float

from pallas_attn.call import Call
from pallas_attn.normalizers.entmax import Entmax


@dataclass(frozen=True, kw_only=True)
class SparseCall(Call):
    """A call, and what is static of its normalizer."""

    alpha: float | None  # None: it is an array
    top_k: int | None  # None: every visible key

    @property
    def rows_apart(self) -> bool:
        """No: a threshold is one number, which holds no more digits than a score."""
        return False

    @property
    def rounds_alike(self) -> bool:
        """Also where scores may be so large that a digit of theirs is all weight."""
        return self.exact or self.passes_keys


def sparse(
    call: Call, normalizer: Entmax
) -> tuple[Float[Array, "#B #N"] | None, SparseCall]:
    """(alpha if it is an array, the call with the rest of its normalizer)."""
    alpha, top_k = normalizer.alpha, normalizer.top_k
    facts = {x.name: getattr(call, x.name) for x in dataclasses.fields(call)}
    if isinstance(alpha, int | float):
        return None, SparseCall(**facts, alpha=alpha, top_k=top_k)
    return alpha, SparseCall(**facts, alpha=None, top_k=top_k)
