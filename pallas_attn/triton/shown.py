"""The blocks of pairs of which a mask shows any, some or all, as lists of them.

A mask is looked at once, before any pass. From then on a block that it hides is not
visited, and one that it shows whole is visited as if there was no mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Int

from pallas_attn.call import Call
from pallas_attn.config import Block
from pallas_attn.tiled.summaries import GRAIN, Sight
from pallas_attn.triton.memory import load_number
from pallas_attn.triton.ptx import uniform
from pallas_attn.triton.schedule import lead_of, Remaining, Stretch
from pallas_attn.triton.tile import Tile
from pallas_attn.types import Index, Scalar


f32 = jnp.float32
i32 = jnp.int32

# Kinds of blocks, by what of them is shown.
ANY, SOME, ALL = range(3)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Shown:
    """For each block of queries, or of keys, the others that it meets.

    at: those of each kind in order, and whatever after them.
    before: how many of each kind come before a block.
    order: of the own blocks, those first that meet the most, over batch and heads.
    by_key: the own blocks are of keys.
    """

    at: Int[Array, "#B #N own 3 others"]
    before: Int[Array, "#B #N own 3 others+1"]
    order: Int[Array, " own"]
    by_key: bool = field(metadata={"static": True})

    def of(self, t: Tile, kind: int, stretches: Sequence[Stretch]) -> Remaining:
        """The blocks of a kind in some stretches, for the own block of a tile."""
        stretches = [x for x in stretches if not _never(x)]
        if not stretches:
            return Remaining(0, lambda n: (n, 0))
        own = t.k0 // i32(t.bk) if self.by_key else t.q0 // i32(t.bq)
        lead = (*lead_of(self.at, t.call, t.b, t.h), own, i32(0) * own + kind)

        def before(block: Index) -> jax.Array:
            # what meets nothing may lie wholly beyond all others
            inside = jnp.clip(i32(0) * own + block, 0, self.before.shape[-1] - 1)
            return uniform(t.call, load_number(self.before, (*lead, inside)))

        parts = [(before(lo), before(hi), side) for lo, hi, side in stretches]
        count = sum([hi - lo for lo, hi, _ in parts], i32(0) * own)

        def at(n: Index) -> tuple[Index, Scalar]:
            place, side, done = n, parts[0][2], i32(0)
            for number, (lo, hi, of_part) in enumerate(parts):
                here = lo + (n - done)
                place = here if not number else jnp.where(n < done, place, here)
                if of_part is not side:
                    side = jnp.where(n < done, f32(side), f32(of_part))
                done = done + (hi - lo)
            # of no block at all the first is read nevertheless
            place = jnp.minimum(place, self.at.shape[-1] - 1)
            return load_number(self.at, (*lead, place)), side

        return Remaining(count, at, ahead=True)


def shown(sight: Sight, call: Call, block: Block, *, by_key: bool) -> Shown | None:
    """The lists for the blocks of a pass; None where no mask was looked at."""
    if sight.grains is None:
        return None
    some, every = sight.grains > 0, sight.grains == 2
    for axis, size, n in ((2, call.T, block.block_q), (3, call.S, block.block_k)):
        some = _by_blocks(some, axis, size, n, end=False)
        every = _by_blocks(every, axis, size, n, end=True)
    kinds = jnp.stack([some, some & ~every, every], -2)
    if by_key:
        kinds = jnp.stack([jnp.swapaxes(kinds[..., n, :], 2, 3) for n in range(3)], -2)
    size = kinds.shape[-1]
    # a cumulative sum, which XLA for GPUs takes longer for
    first, last = (lax.broadcasted_iota(i32, (size + 1, size), n) for n in (0, 1))
    lower = (last < first)[(None,) * 4]
    before = jnp.sum(kinds[..., None, :] & lower, -1, dtype=i32)
    place = lax.broadcasted_iota(i32, kinds.shape, 4)
    at = jnp.minimum(jnp.sort(jnp.where(kinds, place, size), -1), size - 1)
    work = _in_sight(kinds[..., ANY, :], call, block, by_key)
    order = jnp.argsort(-work.sum((0, 1, 3), dtype=i32), stable=True)
    return Shown(at, before, order.astype(i32), by_key)


def _never(stretch: Stretch) -> bool:
    """Whether a stretch has no block, known statically."""
    lo, hi, _ = stretch
    return isinstance(lo, int) and isinstance(hi, int) and lo >= hi


def _in_sight(
    kind: Bool[Array, "#B #N own others"], call: Call, block: Block, by_key: bool
) -> Bool[Array, "#B #N own others"]:
    """The blocks that causality leaves too, as far as it is static."""
    if not call.causal or not isinstance(call.offset, int):
        return kind
    shape = kind.shape[:1:-1] if by_key else kind.shape[2:]
    q, k = (lax.broadcasted_iota(i32, shape, axis) for axis in (0, 1))
    seen = k * block.block_k <= q * block.block_q + (block.block_q - 1 + call.offset)
    return kind & (seen.T if by_key else seen)[None, None]


def _by_blocks(
    x: Bool[Array, "#B #N rows columns"], axis: int, size: int, n: int, *, end: bool
) -> Bool[Array, "#B #N rows columns"]:
    """Grains of an axis as blocks of n entries; `end` is what lies past it.

    Any, or all for an end that is True.
    """
    count = pl.cdiv(size, n)
    if n < GRAIN:
        return lax.slice_in_dim(jnp.repeat(x, GRAIN // n, axis), 0, count, axis=axis)
    per = n // GRAIN
    ends = [(0, 0)] * x.ndim
    ends[axis] = (0, count * per - x.shape[axis])
    x = jnp.pad(x, ends, constant_values=end)
    x = x.reshape(*x.shape[:axis], count, per, *x.shape[axis + 1 :])
    return x.all(axis + 1) if end else x.any(axis + 1)
