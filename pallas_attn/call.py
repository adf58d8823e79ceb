"""What a call is: its static facts, and the arrays that say who may see whom."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from pallas_attn.cards import LARGEST
from pallas_attn.config import Config


# A logit or a term's own value at or below this has weight 0. Finite, so that sums of
# terms never form inf - inf; far below the -65504, -1e9 and -1e4 of hand-made masks.
NO_WEIGHT = -1e30


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
    scale: float  # > 0: api.py folds every other scale into the query
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
    def G(self) -> int:
        """Query heads that share a key head."""
        return self.N // self.K


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Visibility:
    """The arrays that decide which key a query may attend to; None where there is none.

    Positions are either implicit (`offset` or `Call.offset`: query i stands at
    offset + i, key j at j) or explicit (both position arrays), never mixed.
    """

    offset: Int[Array, "#B"] | None = None
    query_positions: Int[Array, "#B #N T"] | None = None
    key_positions: Int[Array, "#B #N S"] | None = None
    query_lengths: Int[Array, " B"] | None = None  # within 0..T
    key_lengths: Int[Array, " B"] | None = None  # within 0..S
    query_segments: Int[Array, "B T"] | None = None
    key_segments: Int[Array, "B S"] | None = None
    mask: Bool[Array, "#B #N #T #S"] | None = None
    # of dropout, which hides no key but some weights: [2], or `dropout.seed_of_all`
    seed: Int[Array, "*BN words"] | None = None

    @property
    def placed(self) -> bool:
        """Whether positions are explicit."""
        return self.query_positions is not None


def positions(
    call: Call, visibility: Visibility
) -> tuple[Int[Array, "#B #N T"], Int[Array, "#B #N S"]]:
    """Positions of all queries and all keys, implicit ones written out."""
    if visibility.placed:
        assert visibility.query_positions is not None
        assert visibility.key_positions is not None
        return visibility.query_positions, visibility.key_positions
    queries = jnp.arange(call.T, dtype=jnp.int32)[None, None, :]
    keys = jnp.arange(call.S, dtype=jnp.int32)[None, None, :]
    if visibility.offset is not None:
        return queries + visibility.offset[:, None, None], keys
    return queries + jnp.int32(call.offset or 0), keys
