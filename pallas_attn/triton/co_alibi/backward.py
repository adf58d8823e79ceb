"""The backward passes: rows from the left to the right, then cols in any order.

    dT = P (dP - delta);  C_ij = sum of dT_in over n <= j;  dS = dT - m g (1 - g) C
    dm = -sum dT z = -sum g C, the same double sum, taken by keys first

Rows hands cols two carries for each row and key block, the exponent that weights count
from (or, where sums are exact, the gates from the reference on, see `Reference`) and
the C before the block: with them a key block needs nothing of its neighbours.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax

from pallas_attn.call import Call
from pallas_attn.normalizers.softmax import LOG2E, score_gradient
from pallas_attn.triton.co_alibi.operands import Cols, Operands, Rows, Saved
from pallas_attn.triton.co_alibi.plan import key_tile, Plan, query_tile
from pallas_attn.triton.co_alibi.scan import (
    add,
    Exactly,
    from_reference,
    gates,
    less,
    negative,
    Reference,
    Slope,
    Sums,
    Triangles,
)
from pallas_attn.triton.dropout import drop_on, rescale
from pallas_attn.triton.launch import Program
from pallas_attn.triton.memory import load_blocks, load_number, store_number
from pallas_attn.triton.programs import key_runs, query_runs
from pallas_attn.triton.ptx import exp2, uniform
from pallas_attn.triton.scores import dots, uncapped
from pallas_attn.triton.tile import at_keys, at_queries, Tile, zeros
from pallas_attn.types import Index, Range, Ref, Tree


f32 = jnp.float32
i32 = jnp.int32

# Of each row: dq, C, the sum of g C, that of P z, and the gates that are left.
RowState = tuple[jax.Array, jax.Array, jax.Array, jax.Array, Exactly]
# dk and dv.
ColState = tuple[jax.Array, jax.Array]


def rows_kernel(
    ops: Operands,
    saved: Saved,
    ones: Triangles,
    *refs: Tree,
    call: Call,
    program: Program,
    plan: Plan,
) -> None:
    """For one query block: dq, its part of dm, and the carries of cols."""
    out: Rows
    carry: Ref
    *_, out, carry = refs  # before them, if a group stores into arrays: those
    t0 = query_tile(ops.sight, call, plan, "rows", saved.start, program)
    at, slope = key_runs(t0), Slope.of(ops.slopes, t0.b, t0.h)
    sums, mul = Sums.of(call, ones, flip=False), call.scale * LOG2E
    q, do, delta = t0.rows(ops.q), t0.rows(saved.do), t0.stat(saved.delta)
    base = t0.stat(saved.base, jnp.inf)
    every = t0.stat(saved.gates), t0.stat(saved.gates_low)
    u, log_sum = _reference(t0, saved, base), _log_sum(t0, saved)
    lead = _local(t0, saved.start, call)

    def step(j: Index, edge: bool, state: RowState) -> RowState:
        dq, c, gc, pz, z = state
        t = at_keys(t0, j, 0, edge)
        k, v = t.keys(ops.k), t.keys(ops.v)
        (s, bent), visible = dots(t, q, k, [], []), t.visible
        g = gates(t, s, visible)
        z = add(z, negative(sums.total(g)))
        right = z[0] + z[1]
        if u is None:
            e = base + slope.falls * right - slope.grows * less(every, z)
        else:
            e = u.ahead(z)
        t.put_carry(carry, (*lead, j), e, c)
        inside = sums.suffix(g)
        if log_sum is None:
            x = (s * mul - e[:, None]) - slope.log2 * inside
        else:
            x = from_reference(t, slope, s, inside, base, e) - log_sum[:, None]
        p = exp2(call, x if visible is None else jnp.where(visible, x, -jnp.inf))
        dp, drop = t.dot(do, v.T), drop_on(t)
        dp = dp if drop is None else drop(dp * rescale(call))
        dt = score_gradient(p, dp, delta[:, None])
        if visible is not None:
            dt = jnp.where(visible, dt, 0.0)
        pz = pz + jnp.sum(p * inside, 1) + right * jnp.sum(p, 1)
        weighed = g * (c[:, None] + sums.prefix(dt))
        ds = dt - (slope.m - slope.m * g) * weighed
        ds = ds if bent is None else uncapped(t, ds, bent, visible)
        dq = dq + t.dot(ds.astype(k.dtype), t.seen_keys(visible, k))
        return dq, c + jnp.sum(dt, 1), gc + jnp.sum(weighed, 1), pz, z

    zero = jnp.zeros((t0.bq,), f32)
    state = zeros(t0.bq, ops.q), zero, zero, zero, every
    i = t0.q0 // i32(plan.forward.block_q)
    first = uniform(call, load_number(saved.first, (t0.b, t0.h, i)))
    state = at.loop(step, state, veiled=ops.sight.veiled, within=(first, at.last))
    dq, c, gc, pz, _ = state
    t0.put_rows(out.dq, dq * call.scale)
    # A row of dT sums to dlse and what rounding (of o in delta) left beyond. That is a
    # multiple of P in dT, and z, which may be large, would multiply it.
    beyond = c if saved.dlse is None else c - t0.stat(saved.dlse)
    if out.beyond is not None:
        t0.put_stat(out.beyond, jnp.where(base == jnp.inf, 0.0, beyond))
    dm = jnp.where(base == jnp.inf, 0.0, beyond * pz - gc)
    t0.put_stat(out.dm, dm)
    i = t0.q0 // i32(t0.bq)
    store_number(out.visits, (t0.b, t0.h, i, i * 0), i32(at.last) - first)
    count = i32(at.last) - i32(at.first)
    store_number(out.visits, (t0.b, t0.h, i, i * 0 + 1), count)


def cols_kernel(
    ops: Operands,
    saved: Saved,
    carry: Ref,
    ones: Triangles,
    *refs: Tree,
    call: Call,
    program: Program,
    plan: Plan,
) -> None:
    """For one key block of one key head: dk and dv."""
    out: Cols
    *_, out = refs
    x0 = key_tile(ops.sight, call, plan, saved.start, program)
    sums = Sums.of(call, ones, flip=True)
    k, v = x0.keys(ops.k), x0.keys(ops.v)
    mul, ratio = call.scale * LOG2E, plan.forward.block_q // plan.cols.block_q
    j = x0.k0 // i32(x0.bk)

    def of_head(h: Index, state: ColState) -> ColState:
        t0 = replace(x0, h=h)
        at = query_runs(t0)  # each head's queries may stand elsewhere
        slope, lead = Slope.of(ops.slopes, t0.b, h), _local(t0, saved.start, call)
        start, stop = _visitors(saved.first, t0, j, ratio)

        def step(i: Index, edge: bool, state: ColState) -> ColState:
            dk, dv = state
            t = at_queries(t0, i, 0, edge)
            q, do, delta = t.rows(ops.q), t.rows(saved.do), t.stat(saved.delta)
            e, c = (t.carry(carry, (*lead, j), which) for which in (0, 1))
            log_sum = _log_sum(t, saved)
            base = None if log_sum is None else t.stat(saved.base, jnp.inf)
            # What rows did not write is whatever was there.
            first = load_number(saved.first, (t.b, h, i // ratio))
            (s, bent), visible = dots(t, q, k, [], []), t.visible
            real = t.inside_rows() & (first <= j)
            if visible is not None:
                real = real & (jnp.max(visible.astype(i32), 0) > 0)
            if base is None:
                e, c = jnp.where(real, e, jnp.inf), jnp.where(real, c, 0.0)
            else:
                base = jnp.where(real, base, jnp.inf)
                e, c = jnp.where(real, e, 0.0), jnp.where(real, c, 0.0)
            g = gates(t, s, visible)
            if base is None or log_sum is None:
                x = (s * mul - e[None, :]) - slope.log2 * sums.suffix(g)
            else:
                x = from_reference(t, slope, s, sums.suffix(g), base, e)
                x = x - log_sum[None, :]
            p = exp2(call, x if visible is None else jnp.where(visible, x, -jnp.inf))
            dp, drop = t.dot(v, do.T), drop_on(t)
            dp = dp if drop is None else drop(dp * rescale(call))
            dt = score_gradient(p, dp, delta[None, :])
            if visible is not None:
                dt = jnp.where(visible, dt, 0.0)
            weighed = g * (c[None, :] + sums.prefix(dt))
            ds = dt - (slope.m - slope.m * g) * weighed
            ds = ds if bent is None else uncapped(t, ds, bent, visible)
            p = p if drop is None else drop(p)
            q, do = t.seen_queries(visible, q), t.seen_queries(visible, do)
            dk = dk + t.dot(ds.astype(q.dtype), q)
            return dk, dv + t.dot(p.astype(do.dtype), do)

        state = at.loop(step, state, veiled=ops.sight.veiled, within=(start, stop))
        seen = jnp.maximum(
            jnp.minimum(i32(at.last), stop) - jnp.maximum(i32(at.first), start), 0
        )
        store_number(out.visits, (t0.b, h, j, j * 0), seen)
        count = i32(at.last) - i32(at.first)
        store_number(out.visits, (t0.b, h, j, j * 0 + 1), count)
        return state

    state = zeros(x0.bk, ops.k), zeros(x0.bk, ops.v)
    if call.G == 1:
        dk, dv = of_head(x0.h, state)
    else:
        dk, dv = lax.fori_loop(x0.h, x0.h + call.G, of_head, state)
    x0.put_keys(out.dk, x0.keep_keys(dk * call.scale))
    dv = dv * rescale(call) if call.dropout else dv
    x0.put_keys(out.dv, x0.keep_keys(dv))


def _log_sum(t: Tile, saved: Saved) -> jax.Array | None:
    return None if saved.counted is None else t.stat(saved.counted.log_sum)


def _reference(t: Tile, saved: Saved, base: jax.Array) -> Reference | None:
    counted = saved.counted
    if counted is None:
        return None
    right = t.stat(counted.right), t.stat(counted.right_low)
    return Reference(base, t.stat(counted.inside), right)


def _visitors(first: Ref, t: Tile, j: Index, ratio: int) -> Range:
    """The query blocks start..stop that may have visited key block j."""
    size = first.shape[-1]
    i = jnp.arange(max(2, 1 << (size - 1).bit_length()), dtype=i32)
    seen = (i < size) & (load_blocks(first, (t.b, t.h), i, i < size) <= j)
    start = uniform(t.call, jnp.min(jnp.where(seen, i, size)))
    stop = uniform(t.call, jnp.max(jnp.where(seen, i + 1, 0)))
    return start * ratio, stop * ratio


def _local(t: Tile, start: Ref | None, call: Call) -> tuple[Index, Index]:
    """Batch entry and query head, counted from the group's first."""
    if start is None:
        return t.b, t.h
    b, k = (load_number(start, (i32(n),)) for n in (0, 1))
    return t.b - b, t.h - k * call.G
