"""Passes over lists: gathered vectors for queries, placed ones for keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_attn.config import Block
from pallas_attn.normalizers.entmax import Learned
from pallas_attn.normalizers.softmax import LOG2E
from pallas_attn.tiled.fields import Values
from pallas_attn.tiled.operands import Cols, Operands
from pallas_attn.tiled.plan import Plan
from pallas_attn.tiled.summaries import Sight
from pallas_attn.triton.dropout import Drop, drop_pairs, rescale
from pallas_attn.triton.entmax.call import SparseCall
from pallas_attn.triton.entmax.lists.operands import (
    ByQuery,
    Deltas,
    Entries,
    Lists,
)
from pallas_attn.triton.entmax.lists.pairs import (
    gather,
    gather_vectors,
    listed,
    Pairs,
    put_listed,
    row_tile,
    width_of,
)
from pallas_attn.triton.entmax.power import power_of
from pallas_attn.triton.launch import Program
from pallas_attn.triton.memory import load_number
from pallas_attn.triton.programs import frame_of
from pallas_attn.triton.ptx import uniform
from pallas_attn.triton.scores import capped, times
from pallas_attn.triton.terms import hold, on_tile, pullback
from pallas_attn.triton.tile import Tile
from pallas_attn.types import Index, Ref, Scalar, State


f32 = jnp.float32
i32 = jnp.int32

# Of each entry in flight, or each row, some sums by what they are of.
Sums = dict[str, jax.Array]
# dk and dv of one key block, over the query heads of its key head.
HeadState = tuple[jax.Array | None, jax.Array | None]


class RowState(NamedTuple):
    """What a query block adds up over its lists, in the order of registers."""

    da: dict[int, jax.Array]
    dq: jax.Array | None
    fields: Values


class ColState(NamedTuple):
    """What a key block adds up over its entries, in the order of registers.

    db, fields: of one query head.
    """

    db: dict[int, jax.Array]
    dk: jax.Array | None
    dv: jax.Array | None
    fields: Values


def over_lists(
    t0: Tile,
    lists: Lists,
    body: Callable[[Index, Pairs, State], State],
    state: State,
) -> State:
    """Run body(first, pairs, state) over the lists of a tile's queries.

    Some entries at a time, from `first` on.
    """
    count, ahead = t0.stat(lists.count, 0), t0.bk

    def some(n: Index, state: State) -> State:
        first = n * ahead
        ok = (first + jnp.arange(ahead, dtype=i32))[None, :] < count[:, None]
        key = listed(t0, lists.keys, first, ahead, ok)
        return body(first, Pairs.of(t0, key, ok), state)

    steps = (jnp.max(count) + (ahead - 1)) // ahead
    return lax.fori_loop(i32(0), steps, some, state)


def clear_lists(t0: Tile, ref: Ref) -> None:
    """Store 0 all over the lists of a tile's queries."""
    n = t0.bk
    exists = (t0.q0 + jnp.arange(t0.bq, dtype=i32) < t0.call.T)[:, None]

    def some(i: Index, state: jax.Array) -> jax.Array:
        place = i * n + jnp.arange(n, dtype=i32)
        ok = exists & (place < ref.shape[-1])[None, :]
        put_listed(t0, ref, i * n, jnp.zeros(ok.shape, f32), ok)
        return state

    lax.fori_loop(i32(0), i32(pl.cdiv(ref.shape[-1], n)), some, i32(0))


def _vectors(t0: Tile, ref: Ref) -> jax.Array:
    """A sum of vectors for each of the entries in flight; added up after the loop."""
    return jnp.zeros((t0.bq, t0.bk, width_of(ref)), f32)


def list_output_kernel(
    lists: Lists,
    v: Ref,
    sight: Sight,
    out: Ref,
    *,
    call: SparseCall,
    program: Program,
    cut: Block,
) -> None:
    """The output: sum p v."""
    t0 = row_tile(sight, call, cut, program)

    def add(first: Index, t: Pairs, acc: jax.Array) -> jax.Array:
        p, drop = listed(t0, lists.p, first, t0.bk, t.ok), _drop(t)
        p = p if drop is None else drop(p * rescale(call))
        return acc + p[:, :, None] * t.keys(v)

    t0.put_rows(out, jnp.sum(over_lists(t0, lists, add, _vectors(t0, v)), 1))


def _drop(t: Pairs) -> Drop | None:
    return drop_pairs(t, t.query, t.key)


def list_delta_kernel(
    lists: Lists,
    v: Ref,
    do: Ref,
    dtau: Ref | None,
    alpha: Ref | None,
    sight: Sight,
    out: Deltas,
    *,
    call: SparseCall,
    program: Program,
    cut: Block,
) -> None:
    """The numbers dP = <do, v>, delta = (sum u dP - total) / sum u, and dL/dalpha.

    total: what a row of dS adds up to, a times the residual's cotangent.

    With h as `Learned.by_alpha` has it, tau = a (m + L) - 1 and sum p = 1 makes L move
    by sum p h / sum u, so that a row has
        dL/dalpha = sum p h (dP - delta) + dtau (m + L)
    """
    t0 = row_tile(sight, call, cut, program)
    power = power_of(call, alpha, t0.b, t0.h)
    rows = t0.rows(do).astype(f32)[:, None, :]

    def add(first: Index, t: Pairs, state: Sums) -> Sums:
        u = listed(t0, lists.u, first, t0.bk, t.ok)
        dp, drop = jnp.sum(rows * t.keys(v), 2), _drop(t)
        dp = dp if drop is None else drop(dp * rescale(call))
        dp = jnp.where(t.ok, dp, 0.0)
        put_listed(t0, out.dp, first, dp, t.ok)
        new = {"u": u, "u dp": u * dp}
        if out.alpha is not None:
            assert isinstance(power, Learned)
            p = listed(t0, lists.p, first, t0.bk, t.ok)
            zero = jnp.zeros_like(p)
            log_p = power.functions.log2(jnp.where(p == 0, 1.0, p)) / LOG2E
            # Of a largest score with the weight p.
            ph = jnp.where(p == 0, 0.0, power.by_alpha(zero, zero, log_p, 1.0))
            new |= {"ph": ph, "ph dp": ph * dp}
        return {name: state[name] + x for name, x in new.items()}

    names = ("u", "u dp", "ph", "ph dp") if out.alpha is not None else ("u", "u dp")
    nothing = jnp.zeros((t0.bq, t0.bk), f32)
    sums = over_lists(t0, lists, add, dict.fromkeys(names, nothing))
    sums = {name: jnp.sum(x, 1) for name, x in sums.items()}
    some = t0.stat(lists.count, 0) > 0
    u = jnp.where(some, sums["u"], 1.0)
    mean = sums["u dp"] / u
    cotangent = total = jnp.zeros_like(u)
    if dtau is not None:
        cotangent = jnp.where(some, t0.stat(dtau), 0.0)
        total = cotangent * _residual_by_score(power.a)
    t0.put_stat(out.delta, mean - total / u)
    if out.alpha is None:
        return
    assert isinstance(power, Learned)
    dalpha = sums["ph dp"] - mean * sums["ph"]
    if dtau is not None:
        m = jnp.where(some, t0.stat(lists.m) * call.scale, 0.0)
        by_tau = m + power.lift(t0.stat(lists.level)) + power.a * sums["ph"] / u
        dalpha = dalpha + jnp.where(power.a == 0, 0.0, cotangent * by_tau)
    t0.put_stat(out.alpha, jnp.where(some, dalpha, 0.0))


def _residual_by_score(a: Scalar) -> Scalar:
    """What the residual moves by when all scores do: a, or 1 where it is lse."""
    if isinstance(a, float):
        return a or 1.0
    return jnp.where(a == 0, 1.0, a)


def list_rows_kernel(
    ops: Operands,
    lists: Lists,
    stats: Deltas,
    out: ByQuery,
    *,
    call: SparseCall,
    program: Program,
    plan: Plan,
    cut: Block,
) -> None:
    """The scores' gradients u (dP - delta), dq, the query side of products, fields.

    Under a soft cap also those of q.k in them, where somebody asks. Of a field along
    queries and keys, its gradient for every entry.
    """
    t0 = row_tile(ops.sight, call, cut, program)
    delta, products = t0.stat(stats.delta)[:, None], ops.added.products
    held = hold(ops.added, t0, ("", "q"))
    q = None if call.soft_cap is None else t0.rows(ops.q).astype(f32)[:, None, :]
    mine = plan.row_fields + tuple(out.pairs)
    if plan.tile_fields:  # `lists.backward` spreads whole lists
        for ref in (out.ds, *out.pairs.values()):
            clear_lists(t0, ref)

    def add(first: Index, t: Pairs, state: RowState) -> RowState:
        u = listed(t0, lists.u, first, t0.bk, t.ok)
        dp = listed(t0, stats.dp, first, t0.bk, t.ok)
        ds = jnp.where(t.ok, u * (dp - delta), 0.0)
        put_listed(t0, out.ds, first, ds, t.ok)
        t, terms = on_tile(ops.added, t, held)
        grads = pullback(terms, mine, t)(ds)
        for f, ref in out.pairs.items():
            put_listed(t0, ref, first, grads[f], t.ok)
        da = {
            x: y + ds[:, :, None] * t.keys(products[x][1]) for x, y in state.da.items()
        }
        fields, dq = {f: y + grads[f] for f, y in state.fields.items()}, state.dq
        if dq is not None or out.dqk is not None:
            k, slope = t.keys(ops.k), None
            if q is not None:
                _, slope = capped(call, jnp.sum(q * k, 2))
            # Without a pair the slope may be NaN, of a query that sees no key.
            dqk = ds if slope is None else jnp.where(t.ok, ds * slope, 0.0)
            if out.dqk is not None:
                put_listed(t0, out.dqk, first, dqk, t.ok)
            if dq is not None:
                dq = dq + dqk[:, :, None] * k
        return RowState(da, dq, fields)

    da = {x: _vectors(t0, products[x][1]) for x in out.da}
    fields = dict.fromkeys(plan.row_fields, jnp.zeros((t0.bq,), f32))
    dq = None if out.dq is None else _vectors(t0, ops.k)
    state = over_lists(t0, lists, add, RowState(da, dq, fields))
    if out.dq is not None and state.dq is not None:
        t0.put_rows(out.dq, jnp.sum(state.dq, 1) * call.scale)
    for x, y in state.da.items():
        t0.put_rows(out.da[x], jnp.sum(y, 1) * call.scale)
    some = t0.stat(lists.count, 0) > 0
    for f, y in state.fields.items():
        # what an empty row has for itself may be NaN
        t0.put_stat(out.fields[f], jnp.where(some, y, 0.0))


def list_cols_kernel(
    ops: Operands,
    do: Ref,
    entries: Entries,
    order: Ref,
    starts: Ref,
    out: Cols,
    *,
    call: SparseCall,
    program: Program,
    plan: Plan,
    cut: Block,
    width: int,
) -> None:
    """For one key block of one key head: dk and dv.

    Per query head also the key side of products and the fields per key. The entries of
    a key block are a run of `order`; vectors of their queries meet a matrix that has
    each number in the row of its key.
    """
    n_block, head, b = program.place
    blocks, n, bk = pl.cdiv(call.S, cut.block_k), cut.block_q, cut.block_k
    frame = frame_of(call, ops.sight, b)
    k0 = n_block * bk
    x0 = Tile(call, ops.sight, frame, b, head * call.G, k0 * 0, k0, n, bk)
    products = ops.added.products
    run = ((b * call.K + head) * blocks + n_block) * call.G

    def of_head(h: Index, state: HeadState) -> HeadState:
        at = run + (h - head * call.G)
        lo, hi = (uniform(call, load_number(starts, (at + n,))) for n in (0, 1))

        def step(i: Index, state: ColState) -> ColState:
            place = lo + i * n + jnp.arange(n, dtype=i32)
            ok = place < hi
            entry = gather(order, (place,), ok)
            query = entry // width % call.T
            key = gather(entries.keys, (entry,), ok)
            hit = jnp.arange(bk, dtype=i32)[:, None] == (key - x0.k0)[None, :]
            hit = hit & ok[None, :]

            def placed(x: jax.Array) -> jax.Array:
                return jnp.where(hit, x[None, :], 0.0)

            def vectors(ref: Ref) -> jax.Array:
                batch, heads = ref.shape[0], ref.shape[2]
                entry_b, head = b * i32(batch > 1), h // i32(call.N // heads)
                return gather_vectors(ref, entry_b, query, head, ok)

            db, dk, dv, fields = state
            if dv is not None:
                p, pairs = gather(entries.p, (entry,), ok), replace(x0, h=h)
                drop = drop_pairs(pairs, query, key)
                p = placed(p if drop is None else drop(p * rescale(call)))
                rows = vectors(do)
                dv = dv + x0.dot(p.astype(rows.dtype), rows)
            if entries.ds is None:
                return ColState(db, dk, dv, fields)
            ds = gather(entries.ds, (entry,), ok)

            def add(x: jax.Array, y: jax.Array, ds: jax.Array) -> jax.Array:
                return x + times(x0, placed(ds), y, ops.q.dtype)

            if dk is not None:
                dqk = ds
                if entries.dqk is not None:
                    dqk = gather(entries.dqk, (entry,), ok)
                dk = add(dk, vectors(ops.q), dqk)
            db = {x: add(y, vectors(products[x][0]), ds) for x, y in db.items()}
            if plan.col_fields:
                i, j, on = (x[:, None] for x in (query, key, ok))
                t = Pairs(call, ops.sight, frame, b, h, i, j, on)
                t, terms = on_tile(ops.added, t, {})
                grads = pullback(terms, plan.col_fields, t)(ds[:, None])
                fields = {
                    f: y + jnp.sum(placed(grads[f]), 1) for f, y in fields.items()
                }
            return ColState(db, dk, dv, fields)

        db = {x: _zeros(bk, products[x][0]) for x in out.db}
        fields = dict.fromkeys(plan.col_fields, jnp.zeros((bk,), f32))
        sums = ColState(db, *state, fields)
        sums = lax.fori_loop(i32(0), (hi - lo + (n - 1)) // n, step, sums)
        t = Tile(call, ops.sight, frame, b, h, x0.q0, x0.k0, n, bk)
        for x, y in sums.db.items():
            t.put_keys(out.db[x], y * call.scale)
        for f, y in sums.fields.items():
            t.put_key_stat(out.fields[f], y)
        return sums.dk, sums.dv

    dk = None if out.dk is None else _zeros(bk, ops.k)
    dv = None if out.dv is None else _zeros(bk, ops.v)
    state = dk, dv
    if call.G == 1:
        state = of_head(head, state)
    else:
        state = lax.fori_loop(x0.h, x0.h + call.G, of_head, state)
    dk, dv = state
    if out.dk is not None and dk is not None:
        x0.put_keys(out.dk, dk * call.scale)
    if out.dv is not None and dv is not None:
        x0.put_keys(out.dv, dv)


def _zeros(n: int, ref: Ref) -> jax.Array:
    return jnp.zeros((n, width_of(ref)), f32)
