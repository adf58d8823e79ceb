"""The first pass: a lower bound of each row's threshold, from a few of its scores.

Every column of a tile is a slot, which keeps the two largest scores that a row has in
it: 2 block_k of its scores, the largest among them. No sort, no histogram. The
threshold of those alone can only be lower than that of the row, and is it where they
hold its support.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_attn.normalizers.entmax import curvature, Learned, newton, Power
from pallas_attn.normalizers.softmax import lowest
from pallas_attn.tiled.operands import Operands
from pallas_attn.tiled.plan import Plan
from pallas_attn.triton.entmax.call import SparseCall
from pallas_attn.triton.entmax.power import fuses, power_of
from pallas_attn.triton.entmax.support import mark
from pallas_attn.triton.entmax.sweep import Sweep, sweep_of
from pallas_attn.triton.launch import Program
from pallas_attn.triton.memory import store_row
from pallas_attn.triton.programs import query_tile
from pallas_attn.triton.pruning import Grains
from pallas_attn.triton.ptx import larger
from pallas_attn.triton.tile import Tile
from pallas_attn.types import Ref


f32 = jnp.float32
i32 = jnp.int32

# Of each slot of a row the largest score and the second.
Tops = tuple[jax.Array, jax.Array]

# Of one score, an array, or a tuple of such.
# Bounds are lowered by this share of the numbers that they come from: rounding.
ROUNDING = 1e-6

Parts = TypeVar("Parts")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Found:
    """What the first pass finds.

    bits: of every query block a bit for each key block with weight; None: it does not
        look for them.
    m: the largest score of a row, units of q.k; +inf for empty rows.
    level: of the slots' threshold; r: F F'' / F'^2 there.
    """

    bits: Int[Array, "B N query_blocks words"] | None = None
    level: Float[Array, "B N T"]
    m: Float[Array, "B N T"]
    r: Float[Array, "B N T"]


class Slots(NamedTuple):
    """What a sweep over a query block leaves.

    m: [bq], the largest score in units of q.k; inf where a query sees nothing.
    tops: twice [bq, block_k], scores in the same units.
    """

    sweep: Sweep
    m: jax.Array
    tops: Tops


def slots_kernel(
    ops: Operands,
    alpha: Ref | None,
    grains: Grains | None,
    out: Found,
    *,
    call: SparseCall,
    program: Program,
    plan: Plan,
    words: int,
) -> None:
    """The largest score of each row, the level of its slots, and F F'' / F'^2 there.

    With words also a bit for each key block with a score above that threshold: one more
    sweep, which pays where a bound leaves few blocks and fewer of them have weight.
    """
    t0 = query_tile(ops.sight, call, plan, "forward", program)
    power = power_of(call, alpha, t0.b, t0.h, fused=fuses(call, ops))
    slots = fill(t0, ops, grains, power, plan)
    level, r = slot_level(slots, power, call.scale)
    t0.put_stat(out.m, slots.m)
    t0.put_stat(out.level, level)
    t0.put_stat(out.r, r)
    if out.bits is not None:
        bits = above_threshold(slots, level, grains, power, words)
        store_row(out.bits, (t0.b, t0.h, t0.q0 // i32(t0.bq)), bits)


def above_threshold(
    slots: Slots,
    level: jax.Array,
    grains: Grains | None,
    power: Power | Learned,
    words: int,
) -> jax.Array:
    """The bits of the key blocks that hold a score above the threshold of its row.

    Or within rounding of it: beside -1e9 float32 has no threshold but m itself.
    """
    m, sweep = slots.m, slots.sweep.above(slots.m, level, grains, power)
    reach = power.reach(level) * ((1 + ROUNDING) / sweep.t0.call.scale)

    def look(t: Tile, bits: jax.Array) -> jax.Array:
        x, row, _ = sweep.scores(t)
        least = m - reach - (jnp.abs(m) + jnp.abs(row)) * ROUNDING
        least = jnp.where(m < jnp.inf, least, jnp.inf)
        above = power.functions.relu(x - (least - row)[:, None])
        return mark(bits, t.k0 // i32(t.bk), jnp.sum(above, 1))

    bits = sweep.near_loop(look, jnp.zeros((words,), i32))
    return sweep.far_loop(look, bits)


def fill(
    t0: Tile,
    ops: Operands,
    grains: Grains | None,
    power: Power | Learned,
    plan: Plan,
) -> Slots:
    """Sweep over the keys of a query block, all but those that a bound rules out.

    A weight is 0 where a score is 1 / a below another: the near blocks come first, and
    far ones whose bound is that far below every row's largest score are left out.
    """
    sweep = sweep_of(t0, ops, plan)
    most = jnp.maximum if t0.flag is None else functools.partial(larger, t0.call)

    def keep(t: Tile, tops: Tops) -> Tops:
        x = sweep.whole(t)
        first, second = tops
        return most(first, x), jnp.maximum(second, jnp.minimum(first, x))

    empty = jnp.full((t0.bq, t0.bk), -jnp.inf, f32)
    tops = sweep.near_loop(keep, (empty, empty))
    if plan.pruned:
        m = jnp.max(tops[0], 1)
        sweep = sweep.above(m, jnp.zeros_like(m) + power.level_of(1.0), grains, power)
    tops = sweep.far_loop(keep, tops)
    t0.note(jnp.where(tops[0] < jnp.inf, 0.0, jnp.inf))
    m = jnp.max(tops[0], 1)
    some = t0.inside_rows() & ~(m <= lowest(t0.call.scale))
    return Slots(sweep, jnp.where(some, m, jnp.inf), tops)


def slot_level(
    slots: Slots, power: Power | Learned, scale: float
) -> tuple[jax.Array, jax.Array]:
    """The level of the slots' own threshold, and the curvature F F'' / F'^2 near it.

    Newton's steps from above, half of them on the largest scores of the slots alone,
    whose threshold is a lower bound too.
    """
    m = slots.m[:, None]

    def total(
        f: Callable[[jax.Array, jax.Array, jax.Array, float], Parts],
        level: jax.Array,
        tops: tuple[jax.Array, ...],
    ) -> Parts:
        parts = [f(x, m, level[:, None], scale) for x in tops]
        return jax.tree.map(lambda *each: sum(jnp.sum(x, 1) for x in each), *parts)

    def lowered(
        level: jax.Array, tops: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        p, u = total(power.weights, level, tops)
        return power.lowered(level, newton(power.a, p, u)), p, u

    def steps(n: int, level: jax.Array, tops: tuple[jax.Array, ...]) -> jax.Array:
        return lax.fori_loop(0, n, lambda _, x: lowered(x, tops)[0], level)

    level = jnp.zeros_like(slots.m) + power.level_of(1.0)
    if power.linear:
        level = steps(3, steps(4, level, slots.tops[:1]), slots.tops)
        return level, jnp.zeros_like(level)
    level = steps(1, steps(2, level, slots.tops[:1]), slots.tops)
    w = total(power.bends, level, slots.tops)
    level, p, u = lowered(level, slots.tops)
    return level, curvature(power.a, p, u, w)
