"""The second pass: the output, which takes the last step of the threshold along."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_attn.normalizers.entmax import left_by, steps, TINY
from pallas_attn.tiled.operands import Operands
from pallas_attn.tiled.plan import Plan
from pallas_attn.triton.dropout import drop_on, rescale
from pallas_attn.triton.entmax.call import SparseCall
from pallas_attn.triton.entmax.power import fuses, power_of
from pallas_attn.triton.entmax.support import mark, Support
from pallas_attn.triton.entmax.sweep import sweep_of
from pallas_attn.triton.entmax.threshold import Found
from pallas_attn.triton.launch import Program
from pallas_attn.triton.memory import store_row
from pallas_attn.triton.programs import query_tile, report, Visits
from pallas_attn.triton.ptx import uniform
from pallas_attn.triton.tile import Tile, zeros
from pallas_attn.triton.visitor import Step
from pallas_attn.types import Ref


f32 = jnp.float32
i32 = jnp.int32

# What the last step may change sum u by: so many times what it may leave of sum p = 1.
# In 16 bits it is asked only of a from here on: u = p^(1 - a) of a weight that is all
# but 0 is then near 1, and the step may take the weight away.
SLOPE, SLOPE_IN_16_BITS = 1024, 16
STEEP = 0.75

# What rounding leaves of sum p = 1 in float32.
ROUNDED = 2.0**-20

# More sweeps than any row has needed.
MOST_SWEEPS = 20

# Of each row sum p, sum u, sum p v and sum u v.
Means = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
# The same, the bits of all, and sum u^2 / p where the digits of sum u are wanted.
Sums = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Output:
    """What the second pass makes.

    bits: as `Found` has them; None: the first pass found them.
    level, u, o2, visits: as `Dense` has them.
    """

    bits: Int[Array, "B N query_blocks words"] | None = None
    level: Float[Array, "B N T"]
    o: Float[Array, "B T N h"]
    o2: Float[Array, "B T N h"]
    u: Float[Array, "B N T"]
    visits: Int[Array, "B N query_blocks 2"]


class Search(NamedTuple):
    """What one sweep hands to the next.

    level, step: of the threshold that it was at, and how far to lower that.
    sums: without the bits, which are of the first sweep.
    n: how many sweeps there were; more: 1 if there shall be another.
    """

    level: jax.Array
    step: jax.Array
    sums: Means
    bits: jax.Array
    visits: Visits
    n: jax.Array
    more: jax.Array


def output_kernel(
    ops: Operands,
    alpha: Ref | None,
    found: Found,
    out: Output,
    *,
    call: SparseCall,
    program: Program,
    plan: Plan,
    words: int,
    tolerance: float,
) -> None:
    """Output, the mean of the values by u, sum u and the level of each row; the bits.

    One sweep gives sum p, sum u, sum p v and sum u v at a threshold that is nearly
    right, and below the true one: a block without weight there has none. The step that
    is left is taken on the output itself,
        o(L + step) = sum p v - (sum p - 1) / sum u * sum u v + O(step^2),
    whose weights add up to 1. Where that last part, F'' step^2 / 2, is above the
    tolerance, the step is taken and the sweep done again; and where sum u would move
    by much, F'' step / F' of it, if all digits of float32 are wanted.

    words: of the bits of a query block, to be marked here; 0 if the first pass did.
    """
    t0 = query_tile(ops.sight, call, plan, "forward", program)
    power = power_of(call, alpha, t0.b, t0.h, fused=fuses(call, ops))
    sweep, v_ref = sweep_of(t0, ops, plan), ops.v
    m, r = t0.stat(found.m, jnp.inf), t0.stat(found.r)
    steep = call.exact or call.alpha is None or call.alpha - 1 >= STEEP
    no_bend = jnp.zeros((t0.bq,), f32) if steep and not power.linear else None

    def add(level: jax.Array, t: Tile, state: Sums) -> Sums:
        p_sum, u_sum, p_v, u_v, bits, bent = state
        x, row, visible = sweep.scores(t)
        p, u = power.weights(x, (m - row)[:, None], level[:, None], call.scale)
        v, more = t.seen_keys(visible, t.keys(v_ref)), jnp.sum(u, 1)
        drop = drop_on(t)
        kept_p, kept_u = (p, u) if drop is None else (drop(p), drop(u))
        return (
            p_sum + jnp.sum(p, 1),
            u_sum + more,
            p_v + t.dot(kept_p.astype(v.dtype), v),
            u_v + t.dot(kept_u.astype(v.dtype), v),
            mark(bits, t.k0 // i32(t.bk), more) if words else bits,
            None if bent is None else bent + jnp.sum(_bends(p, u), 1),
        )

    nothing, empty = jnp.zeros((t0.bq,), f32), zeros(t0.bq, ops.v)
    bits = jnp.zeros((max(2, words),), i32)
    blank = (nothing, nothing, empty, empty, bits, no_bend)

    def over_blocks(level: jax.Array) -> tuple[Sums, Visits]:
        step: Step[Sums] = lambda t, s: add(level, t, s)
        if words:
            return sweep.far_loop(step, sweep.near_loop(step, blank)), sweep.visits
        assert found.bits is not None
        marked = Support(found.bits)
        return marked.over_keys(t0, ops, sweep.held, None, plan, step, blank)

    def remaining(p: jax.Array, u: jax.Array, bent: jax.Array | None) -> jax.Array:
        left = left_by(power, p, u, r)
        if bent is None:
            return left
        # o2 and sum u are of the threshold before the step
        u = jnp.maximum(u, TINY)
        # (1 - a) of it where all weights stay; where one goes that is d^(1/a), d below
        # the step, it takes u = p / d, which is at most u^2 / p times the step
        moved = (bent / u) * (jnp.abs(p - 1) / u)
        over = moved * (1 / (SLOPE if call.exact else SLOPE_IN_16_BITS))
        small = jnp.abs(p - 1) < ROUNDED
        if not call.exact:
            small = small | jnp.asarray(power.a < STEEP)
        return jnp.maximum(left, jnp.where(small, 0.0, over))

    def again(state: Search) -> Search:
        level, step, _, bits, _, n, _ = state
        level = power.lowered(level, step)
        sums, visits = over_blocks(level)
        p, u = sums[:2]
        step = jnp.where(p <= 0, 0.0, steps(power, p, u, r))
        left = jnp.where(p <= 0, 0.0, remaining(p, u, sums[5]))
        more = (jnp.max(left) > tolerance) & (n + 1 < MOST_SWEEPS)
        bits = jnp.where(n == 0, sums[4], bits)
        more = uniform(call, more.astype(i32))
        return Search(level, step, sums[:4], bits, visits, n + 1, more)

    level, none = t0.stat(found.level), i32(0)
    state = Search(level, nothing, blank[:4], bits, (none, none), none, i32(1))
    state = lax.while_loop(lambda s: s.more > 0, again, state)
    level, step, (p, u, p_v, u_v), bits, visits, _, _ = state
    u = jnp.maximum(u, TINY)
    if call.dropout:
        p_v, u_v = p_v * rescale(call), u_v * rescale(call)
    first_order = jnp.where(p <= 0, 0.0, (p - 1) / u)
    o = p_v - first_order[:, None] * u_v
    t0.put_rows(out.o, o)
    t0.put_rows(out.o2, u_v / u[:, None])
    t0.put_stat(out.u, u)
    t0.put_stat(out.level, power.lowered(level, step))
    i = t0.q0 // i32(t0.bq)
    if out.bits is not None:
        store_row(out.bits, (t0.b, t0.h, i), bits)
    report(out.visits, t0, i, visits)
    t0.note(o)  # o2 is not finite only where this is not


def _bends(p: jax.Array, u: jax.Array) -> jax.Array:
    """u^2 / p of every weight, 0 where there is none."""
    return jnp.where(p > 0, u * (u / jnp.where(p > 0, p, 1.0)), 0.0)
