"""One value for a call: what every implementation takes."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
from jaxtyping import Array, Float

from pallas_attn.bias.base import Added, Bias
from pallas_attn.call import Call
from pallas_attn.normalizers.entmax import Entmax
from pallas_attn.normalizers.softmax import Softmax
from pallas_attn.visibility import Visibility


def as_terms(bias: Added | Bias) -> Added:
    """A bias as terms with fields; one of its own family as the only one."""
    return bias if isinstance(bias, Added) else Added((bias,))


def sink_of(problem: Problem) -> Float[Array, "#B #N"] | None:
    """The score that every row has beside those of its keys, if it has one."""
    normalizer = problem.normalizer
    return normalizer.sink if isinstance(normalizer, Softmax) else None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Problem:
    """A call with its arguments checked and its leading axes flattened to one B.

    A pytree: arrays are its leaves, `call` is static.

    Args:
        query: [B, T, N, H], floating; float64 makes everything float64.
        key: [B, S, K, H], of the same dtype; query head n reads key head n // G.
        value: [B, S, K, h], of the same dtype.
        bias: What is added to the scores, or a bias of its own family, such as
            Co-ALiBi with slopes [#B, #N].
        normalizer: How scores become weights. An array of it is [#B, #N], in the dtype
            of sums; what is softmax by another name is `Softmax()`.
        visibility: The arrays that decide who may attend to whom.
        call: The static facts.
    """

    query: Float[Array, "B T N H"]
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K h"]
    bias: Added | Bias
    normalizer: Softmax | Entmax
    visibility: Visibility
    call: Call = field(metadata={"static": True})

    @property
    def family(self) -> str:
        """Whose functions take it: the bias' own, or else the normalizer's."""
        return self.bias.family or self.normalizer.family
