"""A field along diagonals as tiles can read it: by whole vectors.

Pair (i, j) has number i - j + S - 1 of a field. A tile that gathers it computes an
address for each pair, which takes longer than its products. So it reads copies, each
one entry further on than the one before. Where keys lie along the last axis of a tile,
query i = n m + s of n copies reads copy s, whose numbers are in the order of keys, from
a multiple of n on: aligned vectors, as of an array [T, S], at n numbers per diagonal in
place of one per pair. Where queries do, it is keys that have copies.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_attn.bias.base import Added
from pallas_attn.call import Call
from pallas_attn.tiled.fields import fields, Values, with_fields
from pallas_attn.tiled.operands import Moves, Operands
from pallas_attn.types import Index, Ref


VECTOR = 16  # bytes that a thread loads at most

i32 = jnp.int32
Ops = TypeVar("Ops", Operands, Moves)


def laid(ops: Ops, call: Call, *, flip: bool = False) -> Ops:
    """Operands, or their tangents, with the copies of all fields along diagonals.

    flip: for tiles of [keys, queries].
    """
    if isinstance(ops, Moves):
        return replace(ops, fields=_laid(ops.fields, call, flip=flip))
    values = _laid(fields(ops.added), call, flip=flip)
    added = Added(with_fields(ops.added, values), ops.added.products)
    return replace(ops, added=added)


def place(
    ref: Ref,
    call: Call,
    first: tuple[Index, Index],
    pair: tuple[Array, Array],
    *,
    flip: bool,
) -> Array:
    """Where pairs have their numbers in the copies of a field.

    first: of the tile's queries and keys, multiples of the copies.
    pair: queries and keys from there on, which broadcast against each other.
    """
    across, along = pair[::-1] if flip else pair
    outer, inner = first[::-1] if flip else first
    count = _count(ref.dtype)
    ahead, length = _sizes(call, count, flip=flip)
    n = jnp.full_like(across, count)  # `lax` has no signs to mend: vectors are seen
    copy = lax.rem(across, n) * i32(length) - lax.div(across, n) * n
    return (along + copy) + (inner - outer + i32(ahead))


def _laid(values: Values, call: Call, *, flip: bool) -> Values:
    copied = {f: _copies(x, call, flip) for f, x in values.items() if f.span == "d"}
    return values | copied


def _copies(
    x: Float[Array, "#B #N T+S-1"], call: Call, flip: bool
) -> Float[Array, "#B #N copies*length"]:
    """The copies of a field, one after another; 0 where no pair reads."""
    n = _count(x.dtype)
    ahead, length = _sizes(call, n, flip=flip)
    # entry e of copy s is number e - ahead - s + outer - 1, counted from the end where
    # keys are in order
    first = n + (call.S if flip else call.T) - 1 - ahead
    x = x if flip else jnp.flip(x, -1)
    padded = jnp.pad(x, ((0, 0), (0, 0), (n, length)))
    return jnp.concatenate(
        [padded[..., first - s : first - s + length] for s in range(n)], -1
    )


def _count(dtype: Any) -> int:
    """How many copies: numbers of a vector."""
    return VECTOR // jnp.dtype(dtype).itemsize


def _sizes(call: Call, n: int, *, flip: bool) -> tuple[int, int]:
    """How far on the first row reads beside the last; the length of a copy, of n."""
    outer, inner = (call.S, call.T) if flip else (call.T, call.S)
    ahead = (pl.cdiv(outer, n) - 1) * n
    return ahead, ahead + pl.cdiv(inner, n) * n
