"""The forward pass: one query block of one head, over the key blocks it sees."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_attn.call import Call
from pallas_attn.normalizers.softmax import (
    LOG2E,
    log_sum,
    lowest,
    Peak,
    peak,
    relative,
    rescaled,
    ROOM,
    SPREAD,
    WIDEST,
)
from pallas_attn.tiled.block_ranges import covers
from pallas_attn.tiled.operands import Forward, Operands
from pallas_attn.tiled.plan import Plan
from pallas_attn.triton import schedule
from pallas_attn.triton.dropout import drop_on, rescale
from pallas_attn.triton.launch import Program
from pallas_attn.triton.programs import keys_of, query_tile, report
from pallas_attn.triton.pruning import far_keys, Pruning, visits
from pallas_attn.triton.ptx import exp2
from pallas_attn.triton.scores import reach_of, row_scores
from pallas_attn.triton.terms import hold
from pallas_attn.triton.tile import (
    at_keys,
    store_number,
    Tile,
    zeros,
)
from pallas_attn.types import Index, Scalar


f32 = jnp.float32
i32 = jnp.int32

# What a program has of its rows: output, largest score, sum of weights.
Sums = tuple[jax.Array, Peak, jax.Array]


def forward_kernel(
    ops: Operands,
    pruning: Pruning,
    out: Forward,
    *,
    call: Call,
    program: Program,
    plan: Plan,
) -> None:
    """Output and log2-sum of one query block."""
    t0 = query_tile(ops.sight, call, plan, "forward", program)
    w = keys_of(t0, plan.two)
    mul = call.scale * LOG2E
    q, qs = t0.rows(ops.q), [t0.rows(a) for a, _ in ops.added.products]
    held = hold(ops.added, t0, ("", "q"))

    def power(x: jax.Array) -> jax.Array:
        return exp2(call, x)

    def scores(t: Tile) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        return row_scores(t, q, qs, ops.k, ops.added, held, plan.large)

    def weighted(t: Tile, weights: jax.Array, visible: jax.Array | None) -> jax.Array:
        v, drop = t.seen_keys(visible, t.keys(ops.v)), drop_on(t)
        weights = weights if drop is None else drop(weights)
        return t.dot(weights.astype(v.dtype), v)

    def online(t: Tile, state: Sums) -> Sums:
        acc, m, l = state
        x, row, visible = scores(t)
        weights, old, m = rescaled(m, x, row, mul, power, plan.large)
        acc = acc * old[:, None] + weighted(t, weights, visible)
        return acc, m, l * old + jnp.sum(weights, 1)

    def near(j: Index, side: Scalar, state: Sums) -> Sums:
        return online(at_keys(t0, j, side, edge=True), state)

    veiled = ops.sight.veiled
    zero = jnp.zeros((t0.bq,), f32)
    start = Peak(zero + lowest(call.scale), zero if plan.rowed else None)
    state = (zeros(t0.bq, ops.v), start, zero)
    acc, m, l = w.near_loop(near, state)
    far = schedule.all_far(w.sides)
    if plan.pruned:
        reach = reach_of(call, q, qs)
        sums = jnp.where(t0.inside_rows(), m.high * mul + jnp.log2(l), jnp.inf)
        far = far_keys(t0, w, ops, held, pruning, reach, jnp.min(sums))
        assert out.reach is not None
        store_number(out.reach, (t0.b, t0.h, t0.q0 // i32(t0.bq)), reach)
    if plan.pruned and call.dtype != "float16":
        # A bound on the scores replaces the running maximum. Not in float16: its
        # weights end at 2^16, too near for a bound.
        #
        # Rare: scores that may spread further first get their true maximum, by a plain
        # loop that costs nothing where it does not run.
        least = jnp.min(m.high) * mul
        wide = ~(far.top - least <= ROOM + SPREAD)  # NaN too
        if plan.rowed:  # a bound as rounded may be far below what it bounds
            wide |= jnp.abs(least) > WIDEST

        def find(state: tuple[jax.Array, Peak]) -> tuple[jax.Array, Peak]:
            t, m = state
            x, row, _ = scores(at_keys(t0, *far.at(t), edge=veiled))
            return t + 1, peak(m, x, row)

        top = lax.while_loop(lambda s: wide & (s[0] < far.count), find, (i32(0), m))[1]
        lift = jnp.where(wide, -jnp.inf, far.top - ROOM)
        lift = lift * (1 / mul)
        base = Peak(jnp.maximum(top.high, lift), top.low)
        if top.low is not None:
            base = base._replace(low=jnp.where(lift > top.high, 0.0, top.low))
        old = power(m.above(base) * mul)

        def rest(
            j: Index, side: Scalar, state: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array]:
            acc, l = state
            t = at_keys(t0, j, side, edge=veiled)
            x, row, visible = scores(t)
            weights = relative(x, row, base, mul, power, plan.large)
            return acc + weighted(t, weights, visible), l + jnp.sum(weights, 1)

        acc, l = far.loop(rest, (acc * old[:, None], l * old))
    else:

        def further(j: Index, side: Scalar, state: Sums) -> Sums:
            return online(at_keys(t0, j, side, edge=veiled), state)

        acc, base, l = far.loop(further, (acc, m, l))
    if not covers(t0.frame.queries, call.T):
        inside = t0.inside_rows()
        acc, l = jnp.where(inside[:, None], acc, 0.0), jnp.where(inside, l, 0.0)
    if call.dropout:
        acc = acc * rescale(call)
    t0.put_rows(out.o, acc / jnp.where(l == 0, 1.0, l)[:, None])
    t0.put_stat(out.lse, log_sum(base.high * mul, l))
    if out.peak is not None and out.total is not None:
        total = jnp.log2(jnp.where(l == 0, 1.0, l))
        t0.put_stat(out.peak, jnp.where(l == 0, jnp.inf, base.high))
        t0.put_stat(out.total, total if base.low is None else total + base.low * mul)
    report(out.visits, t0, t0.q0 // i32(t0.bq), visits(w, far))
