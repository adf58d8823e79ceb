"""Fields with one number per distance: along the diagonals of a call, or written out.

With implicit positions query i and key j are i - j + offset apart, so that all a call
reads of a table lies along its T + S - 1 diagonals: diagonal i - j + S - 1.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_attn.bias.lookup import entries, taken
from pallas_attn.positions import LEAST, MOST


def diagonals(
    table: Float[Array, "*#B #N D"],
    first: int,
    offset: int | Int[Array, "*#B"],
    T: int,
    S: int,
) -> Float[Array, "*#B #N T+S-1"]:
    """The numbers of distances offset - (S - 1) .. offset + T - 1.

    Slices and pads alone: the gradient of an end of the table is a sum, no scatter.
    """
    D, count = table.shape[-1], max(T + S - 1, 0)
    ends = [
        jnp.broadcast_to(end, (*table.shape[:-1], count))
        for end in (table[..., :1], table[..., -1:])
    ]
    padded = jnp.concatenate([ends[0], table, ends[1]], -1)
    # entry count + d - first of it is that of distance d
    if isinstance(offset, int):
        start = min(max(count + offset - (S - 1) - first, 0), count + D)
        return padded[..., start : start + count]
    start = offset - jnp.int32(S - 1) - jnp.int32(first)
    start = jnp.clip(start, -count, D) + jnp.int32(count)
    leading = jnp.broadcast_shapes(table.shape[:-2], start.shape)
    along = jnp.arange(count, dtype=jnp.int32).reshape((1,) * start.ndim + (1, count))
    index = start[..., None, None] + along
    index = jnp.broadcast_to(index, (*leading, table.shape[-2], count))
    padded = jnp.broadcast_to(padded, (*leading, *padded.shape[-2:]))
    return taken(padded, index)


def written(
    table: Float[Array, "*#B #N D"],
    first: int,
    query_positions: Int[Array, "*#B #N T"],
    key_positions: Int[Array, "*#B #N S"],
) -> Float[Array, "*#B #N T S"]:
    """The numbers of the distances of all pairs."""
    last = first + table.shape[-1] - 1
    q, k = query_positions[..., :, None], key_positions[..., None, :]
    away = q - k
    away = jnp.where((away == LEAST) & (q > 0), MOST, away)  # 2^31 apart
    index = jnp.clip(away, max(first, LEAST), min(last, MOST)) - jnp.int32(first)
    rank = max(table.ndim - 1, index.ndim - 2)
    table = table.reshape((1,) * (rank + 1 - table.ndim) + table.shape)
    index = index.reshape((1,) * (rank + 2 - index.ndim) + index.shape)
    read = entries
    for a, b in zip(table.shape[-2::-1], index.shape[-3::-1], strict=True):
        read = _over(read, a, b)
    return read(table, index)


def _over(read: Any, a: int, b: int) -> Any:
    """A read for each element of a leading axis of table and indices; 1: shared."""
    axes = (None if a == 1 else 0, None if b == 1 else 0)
    first = lambda x, axis: x[0] if axis is None else x
    if axes == (None, None):
        return lambda table, index: read(table[0], index[0])[None]
    every = jax.vmap(read, axes)
    return lambda table, index: every(first(table, axes[0]), first(index, axes[1]))


def toeplitz(values: Float[Array, "... L"], T: int, S: int) -> Float[Array, "... T S"]:
    """The matrix with values[i - j + S - 1] at (i, j), of L = T + S - 1 diagonals.

    Rows of length L + 1, written one after the other and read as rows of length L, each
    begin one entry further to the left. Pads and reshapes alone: the gradient of a
    diagonal is a sum, not a scatter.
    """
    leading = values.shape[:-1]
    if T == 0 or S == 0:
        return jnp.zeros((*leading, T, S), values.dtype)
    L = T + S - 1
    padding = [(0, 0)] * len(leading) + [(0, 1)]
    row = jnp.pad(jnp.flip(values, axis=-1), padding)
    rows = jnp.broadcast_to(row[..., None, :], (*leading, T, L + 1))
    shifted = rows.reshape(*leading, T * (L + 1))[..., : T * L]
    return shifted.reshape(*leading, T, L)[..., T - 1 :]


def summed(
    tiles: Float[Array, "... classes n n"], T: int, S: int, first: int = 0
) -> Float[Array, "... T+S-1"]:
    """The sums of diagonals, of what tiles of n x n along block diagonals added up.

    Class c has the tiles of query block i and key block j with c + first = i - j + keys
    - 1 of `keys` key blocks; those before the first are 0. A row of a tile, its columns
    turned, begins one entry further to the right than the one before: then columns are
    diagonals.
    """
    *leading, classes, n, _ = tiles.shape
    flat = jnp.pad(jnp.flip(tiles, -1), [(0, 0)] * (tiles.ndim - 1) + [(0, n)])
    flat = flat.reshape(*leading, classes, 2 * n * n)[..., : n * (2 * n - 1)]
    each = flat.reshape(*leading, classes, n, 2 * n - 1).sum(-2)
    each = jnp.pad(each, [(0, 0)] * (each.ndim - 1) + [(0, 1)])
    low, high = each[..., :n], each[..., n:]
    none = jnp.zeros_like(low[..., :1, :])
    whole = jnp.concatenate([low, none], -2) + jnp.concatenate([none, high], -2)
    whole = whole.reshape(*leading, (classes + 1) * n)
    past = -S % n
    ends = (first * n, max(past + T + S - 1 - (first + classes + 1) * n, 0))
    whole = jnp.pad(whole, [(0, 0)] * len(leading) + [ends])
    return whole[..., past : past + T + S - 1]
