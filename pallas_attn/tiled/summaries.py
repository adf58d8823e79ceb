"""Who may see whom, as the kernels read it: lengths, segments, positions, masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int, Shaped

from pallas_attn.call import Call
from pallas_attn.dropout import Seed
from pallas_attn.positions import moved
from pallas_attn.types import Index, Range, Ref
from pallas_attn.visibility import Visibility


# Queries or keys behind one stored extreme or norm.
GRAIN = 64

# Of fewer pairs a mask is not looked at beforehand: it would take longer than a pass.
LOOKED_AT = 2**20

# One number of an array, at an index.
Load = Callable[[Ref, tuple[Index, ...]], jax.Array]

i32 = jnp.int32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Extremes:
    """The least and the largest entry of every grain of a vector [#B, #N, length].

    Or of some ranges of it, as numbers.
    """

    least: Shaped[Array, "#B #N grains"]
    most: Shaped[Array, "#B #N grains"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sight:
    """The arrays of a Visibility, and what rules out whole blocks.

    grains: of a grain of queries and one of keys, how much a mask shows: 0 nothing, 1
        some pairs, 2 all; None: there is none, or nobody looked.
    takes: whether a bias may take keys away, as a mask hides them.
    careful: whether to ask so of every pair: NaN there is then as a mask would have it.
    """

    arrays: Visibility
    segments: tuple[Extremes, Extremes] | None = None  # of queries, of keys
    positions: tuple[Extremes, Extremes] | None = None
    grains: Int[Array, "#B #N rows columns"] | None = None
    takes: bool = field(default=False, metadata={"static": True})
    careful: bool = field(default=False, metadata={"static": True})

    @property
    def veiled(self) -> bool:
        """Whether any tile may have invisible pairs in places that only arrays tell."""
        return self.veiled_beside_mask or self.arrays.mask is not None

    @property
    def veiled_beside_mask(self) -> bool:
        """Whether there may be such pairs where a mask shows all."""
        arrays = self.arrays
        segments = arrays.query_segments is not None
        return self.careful or arrays.placed or segments


@dataclass(frozen=True)
class Frame:
    """Of one batch entry: where query 0 stands, and the ranges that matter.

    Entries are Python ints where they are static. Every query in `queries` may see some
    key and every key in `keys` is seen by some query, as far as offset, causality,
    window and lengths tell; what lies outside is never read. Of a length of 0 alone the
    other range is whole: no block of either then has any of the other to meet.
    """

    offset: Index
    queries: Range
    keys: Range
    placed: bool = False  # positions are arrays; the offset means nothing
    seed: Seed | None = None  # of dropout


def sight(
    call: Call, visibility: Visibility, *, takes: bool = False, looked: bool = False
) -> Sight:
    """What the kernels get of a Visibility.

    takes: as `Sight` has it.
    looked: whether to look at a mask, if it is large.
    """
    segments = positions = None
    if visibility.query_segments is not None:
        assert visibility.key_segments is not None
        segments = (
            extremes(visibility.query_segments[:, None, :]),
            extremes(visibility.key_segments[:, None, :]),
        )
    if visibility.query_positions is not None and (call.causal or call.window):
        assert visibility.key_positions is not None
        positions = (
            extremes(visibility.query_positions),
            extremes(visibility.key_positions),
        )
    mask, grains = visibility.mask, None
    looked = looked and call.config.prune and call.T * call.S >= LOOKED_AT
    if mask is not None and looked and mask.shape[2:] == (call.T, call.S):
        grains = grains_of(mask)
    return Sight(visibility, segments, positions, grains, takes)


def grains_of(mask: Bool[Array, "#B #N T S"]) -> Int[Array, "#B #N rows columns"]:
    """How much is shown of each grain of queries and of keys: 0 nothing, 2 all, else 1.

    In one read of the mask: its pairs are counted.
    """
    count, whole = mask, []
    for axis in (3, 2):
        n = count.shape[axis]
        ends = [(0, 0)] * 4
        ends[axis] = (0, -n % GRAIN)
        count = jnp.pad(count, ends)
        split = (*count.shape[:axis], -1, GRAIN, *count.shape[axis + 1 :])
        count = count.reshape(split).sum(axis + 1, dtype=jnp.int32)
        start = GRAIN * jnp.arange(count.shape[axis], dtype=jnp.int32)
        whole.append(jnp.minimum(n - start, GRAIN))
    size = whole[1][:, None] * whole[0][None, :]
    return jnp.where(count == 0, 0, jnp.where(count == size[None, None], 2, 1)).astype(
        jnp.int8
    )


def extremes(x: Shaped[Array, "#B #N length"]) -> Extremes:
    """The least and the largest entry of every grain, of integers or floats.

    Infinite where an entry is NaN, which a kernel's own maximum would pass over.
    """
    pad = -x.shape[-1] % GRAIN
    floats = jnp.issubdtype(x.dtype, jnp.floating)
    low, high = (-jnp.inf, jnp.inf) if floats else _limits_of(x.dtype)

    def grains(fill: float) -> Array:
        known = jnp.where(jnp.isnan(x), -fill, x) if floats else x
        padded = jnp.pad(known, ((0, 0), (0, 0), (0, pad)), constant_values=fill)
        return padded.reshape(*x.shape[:2], -1, GRAIN)

    return Extremes(grains(high).min(-1), grains(low).max(-1))


def _limits_of(dtype: DTypeLike) -> tuple[int, int]:
    return jnp.iinfo(dtype).min, jnp.iinfo(dtype).max


def frame(call: Call, sight: Sight, b: Index, load: Load) -> Frame:
    """The frame of batch entry b; `load(ref, index)` reads one number."""
    arrays = sight.arrays

    def length(ref: Ref | None, size: int) -> Index:
        return size if ref is None else load(ref, (b * i32(ref.shape[0] > 1),))

    queries = length(arrays.query_lengths, call.T)
    keys = length(arrays.key_lengths, call.S)
    if arrays.placed:
        return Frame(0, (0, queries), (0, keys), placed=True)
    offset = call.offset
    if arrays.offset is not None:
        offset = load(arrays.offset, (b * i32(arrays.offset.shape[0] > 1),))
    assert offset is not None
    first_query, last_query, first_key, last_key = 0, queries, 0, keys
    if call.causal:
        # The last query sees keys up to its own position; all after 0 see key 0.
        last_key = least(last_key, most(offset + queries, 0))
        first_query = most(first_query, 0 - offset)
    if call.window:
        left, right = call.window
        first_key = most(first_key, moved(offset, -left))
        last_key = least(last_key, most(moved(offset + queries, right), 0))
        first_query = most(first_query, moved(0 - offset, -right))
        last_query = least(last_query, most(moved(keys - offset, left), 0))
    if not isinstance(queries, int) and (call.causal or call.window):
        last_key = jnp.where(queries > 0, last_key, 0)  # no query, no key
    return Frame(offset, (first_query, last_query), (first_key, last_key))


def least(a: Index, b: Index) -> Index:
    """The smaller of two integers, static if both are."""
    if isinstance(a, int) and isinstance(b, int):
        return min(a, b)
    return jnp.minimum(i32(a), i32(b))


def most(a: Index, b: Index) -> Index:
    """The larger of two integers, static if both are."""
    if isinstance(a, int) and isinstance(b, int):
        return max(a, b)
    return jnp.maximum(i32(a), i32(b))
