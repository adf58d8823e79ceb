"""Positions as integers: within +-2^30, they may be 2^31 apart, which int32 is not."""

from __future__ import annotations

from typing import overload

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from pallas_attn.types import Index


# No two positions are farther apart: a window from there on hides nothing.
UNBOUNDED = 2**31

# What may be added to a position, or to one past the end of a block, within int32.
NEAR = 2**30 - 2**26

LEAST, MOST = -(2**31), 2**31 - 1


def difference(
    q: Int[Array, "*#axes"], k: Int[Array, "*#axes"], dtype: DTypeLike
) -> Float[Array, "*axes"]:
    """Query position minus key position; the one that int32 wraps is told by its sign.

    Not a difference of floats, which would round positions beyond 2^24.
    """
    wrapped = q - k
    ends = jnp.where(q > 0, 2.0**31, -(2.0**31)).astype(dtype)
    return jnp.where(wrapped == LEAST, ends, wrapped.astype(dtype))


def within(
    q: Int[Array, "*#axes"], k: Int[Array, "*#axes"], window: tuple[int, int]
) -> list[Bool[Array, "*axes"]]:
    """The conditions of a window (left, right), inclusive; by comparisons alone."""
    left, right = window
    after = [] if left >= UNBOUNDED else [k >= moved(q, -left)]
    return after + ([] if right >= UNBOUNDED else [k <= moved(q, right)])


@overload
def moved(x: int, by: int) -> int: ...
@overload
def moved(x: Array, by: int) -> Array: ...
@overload
def moved(x: Index, by: int) -> Index: ...
def moved(x: Index, by: int) -> Index:
    """The integer x + by, at the ends of int32 where it would pass them.

    Static if x is; without a word more where `by` is of an ordinary size.
    """
    if isinstance(x, int):
        return min(max(x + by, LEAST), MOST)
    if abs(by) <= NEAR:
        return x + by
    by = min(max(by, -MOST), MOST)
    if by < 0:
        return jnp.maximum(x, LEAST - by) + by
    return jnp.minimum(x, MOST - by) + by
