"""What is static about a call, and the number that stands for no weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_attn.cards import LARGEST
from pallas_attn.config import Config


# A logit or a term's own value at or below this has weight 0. Finite, so that sums of
# terms never form inf - inf; far below the -65504, -1e9 and -1e4 of hand-made masks.
NO_WEIGHT = -1e30


def accumulator(dtype: Any) -> Any:
    """The dtype of scores, weights, sums and residuals, of operands' dtype."""
    return jnp.float64 if dtype == "float64" else jnp.float32


@dataclass(frozen=True)
class Call:
    """Everything static about one call, in the letters of GUIDE.md."""

    B: int
    N: int
    K: int
    T: int
    S: int
    H: int
    h: int
    scale: float  # > 0: canonical.py folds every other scale into the query
    dtype: str  # of query, key and value
    causal: bool = False
    window: tuple[int, int] | None = None  # (left, right), inclusive, in positions
    offset: int | None = 0  # position of query 0; None: Visibility.offset has it
    precision: lax.Precision | None = None
    soft_cap: float | None = None  # of scale q.k; None: there is none
    dropout: float = 0.0  # the rate; > 0: Visibility.seed is there
    dropout_shared: bool = False  # one mask for all batch entries and heads
    config: Config = Config()
    interpret: bool = False
    shared_kib: int = LARGEST  # of shared memory that one program may use

    @property
    def accumulator(self) -> Any:
        """The dtype of scores, weights, sums and residuals."""
        return accumulator(self.dtype)

    @property
    def G(self) -> int:
        """Query heads that share a key head."""
        return self.N // self.K

    @property
    def passes_keys(self) -> bool:
        """Whether a query may stand beyond all keys; positions are implicit."""
        if self.offset is None:
            return True
        before = self.offset < 0 and not self.causal  # a causal one sees no key
        try:
            return before or self.offset + self.T > self.S
        except jax.errors.InconclusiveDimensionOperation:  # of symbolic lengths
            return True

    @property
    def rows_apart(self) -> bool:
        """Whether what all keys of a row share may be a number beside its scores."""
        return True

    @property
    def rounds_alike(self) -> bool:
        """Whether all passes must round the parts of a score alike."""
        return self.exact

    @property
    def exact(self) -> bool:
        """Whether every dot is IEEE float32."""
        return self.dtype == "float32" and self.precision == lax.Precision.HIGHEST
