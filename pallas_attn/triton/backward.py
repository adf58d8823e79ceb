"""The backward passes: rows, cols and tiles. Each gradient has one owner."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_attn.bias.base import Bias
from pallas_attn.call import Call
from pallas_attn.tiled.block_ranges import covers
from pallas_attn.tiled.fields import Field, Values
from pallas_attn.tiled.operands import Cols, Operands, Rows
from pallas_attn.tiled.plan import Plan
from pallas_attn.triton.blocks import block_of
from pallas_attn.triton.dropout import rescale
from pallas_attn.triton.launch import Program
from pallas_attn.triton.programs import (
    frame_of,
    key_tile,
    queries_of,
    query_tile,
    report,
)
from pallas_attn.triton.row_weights import RowCotangents
from pallas_attn.triton.scores import times, weights_and_ds
from pallas_attn.triton.terms import hold, on_tile, pullback
from pallas_attn.triton.tile import at_queries, lasting, Tile, zeros
from pallas_attn.triton.visitor import Own, Visitor
from pallas_attn.types import Index, Ref


f32 = jnp.float32
i32 = jnp.int32

# Sums over keys: of dS, and per field of its gradient by dS and by U.
Sums = tuple[jax.Array, dict[Field, tuple[jax.Array, jax.Array]]]


class RowState(NamedTuple):
    """What a query block adds up over its key blocks, in the order of registers."""

    da: dict[int, jax.Array]
    dq: jax.Array
    sums: Sums | None


class ColState(NamedTuple):
    """What a key block adds up over its query blocks, in the order of registers.

    db, fields: of one query head.
    """

    db: dict[int, jax.Array]
    dk: jax.Array | None
    dv: jax.Array
    fields: Values


class HeadState(NamedTuple):
    """Of one key block, over the query heads of its key head: dk and dv.

    lasting: 0, or NaN of keys for which what each head owns was not finite; None: it
        owns nothing.
    """

    dk: jax.Array | None
    dv: jax.Array
    lasting: jax.Array | None


def rows_kernel(
    ops: Operands,
    cot: RowCotangents,
    blocks: Visitor,
    out: Rows,
    *,
    call: Call,
    program: Program,
    plan: Plan,
) -> None:
    """For one query block: dq, the query side of products, row-owned fields."""
    assert out.dq is not None
    assert out.visits is not None
    t0 = query_tile(ops.sight, call, plan, "rows", program, blocks.order)
    products = ops.added.products
    q, do = t0.rows(ops.q), t0.rows(cot.do)
    stats = cot.of_rows(t0)
    qs, held = [t0.rows(a) for a, _ in products], hold(ops.added, t0, ("", "q"))

    def step(t: Tile, state: RowState) -> RowState:
        k, v, ks = t.keys(ops.k), t.keys(ops.v), [t.keys(b) for _, b in products]
        t, terms = on_tile(ops.added, t, held)
        _, u, ds, dqk, visible = weights_and_ds(
            t, (q, k, v, do), (qs, ks), terms, stats
        )

        def add(x: jax.Array, y: jax.Array, ds: jax.Array) -> jax.Array:
            return x + times(t, ds, t.seen_keys(visible, y), k.dtype)

        dq = add(state.dq, k, dqk)
        da = {x: add(y, ks[x], ds) for x, y in state.da.items()}
        return RowState(da, dq, add_sums(state.sums, t, terms, u, ds))

    def add_sums(
        sums: Sums | None,
        t: Tile,
        terms: tuple[Bias, ...],
        u: jax.Array,
        ds: jax.Array,
    ) -> Sums | None:
        """Sums over keys: of dS, and per field of its gradient by dS and by U."""
        if sums is None:
            return None
        total, fields = sums
        back = pullback(terms, plan.row_fields, t)
        by_ds, by_u = back(ds), back(u)
        return total + jnp.sum(ds, 1), {
            f: (x + by_ds[f], y + by_u[f]) for f, (x, y) in fields.items()
        }

    summed = bool(plan.row_fields) or plan.exact_row_sums
    nothing = jnp.zeros((t0.bq,), f32)
    sums = nothing, dict.fromkeys(plan.row_fields, (nothing, nothing))
    dq, da = zeros(t0.bq, ops.q), {x: zeros(t0.bq, products[x][0]) for x in plan.da}
    state = RowState(da, dq, sums if summed else None)
    own = Own(q, qs, stats)
    state, visits = blocks.over_keys(t0, ops, held, own, plan, step, state)
    # In an empty row 0 may have met a query that is not finite.
    some = stats.attends
    # Of those too, for in tiles it may have met them likewise.
    noted = [state.dq]
    t0.put_rows(out.dq, jnp.where(some[:, None], state.dq * call.scale, 0.0))
    for x, y in state.da.items():
        y = jnp.where(some[:, None], y * call.scale, 0.0)
        t0.put_rows(out.da[x], y)
        noted.append(y)
    if state.sums is not None:
        # A row of dS adds up to dlse. What rounding (of o in delta) left beyond that is
        # a multiple of U in dS, and small beside dS only until a row is summed.
        total, fields = state.sums
        beyond = total if cot.dlse is None else total - t0.stat(cot.dlse)
        beyond = stats.in_units_of_u(beyond)
        for f, (x, y) in fields.items():
            grad = jnp.where(some, x - beyond * y, 0.0)
            t0.put_stat(out.fields[f], grad)
            noted.append(grad)
        if out.beyond is not None:
            t0.put_stat(out.beyond, jnp.where(some, beyond, 0.0))
    report(out.visits, t0, t0.q0 // i32(t0.bq), visits)
    t0.note(*noted)


def cols_kernel(
    ops: Operands,
    cot: RowCotangents,
    blocks: Visitor,
    out: Cols,
    *,
    call: Call,
    program: Program,
    plan: Plan,
) -> None:
    """For one key block of one key head: dk and dv.

    Per query head also the key side of products and the fields per key; and dS itself,
    if the plan stores it.
    """
    dk_ref, ds_ref, dv_ref, visits_ref = out.dk, out.ds, out.dv, out.visits
    assert dv_ref is not None
    assert visits_ref is not None
    x0 = key_tile(ops.sight, call, plan, "cols", program, blocks.order)
    first, bq, bk = x0.h, x0.bq, x0.bk
    products = ops.added.products
    k, v = x0.keys(ops.k), x0.keys(ops.v)
    if not plan.dk:  # where its weight is 0, a dS that is not finite shows in v alone
        x0.note(v, slot=1)
    ragged = not covers(x0.frame.keys, call.S)

    def transposed(x: jax.Array) -> jax.Array:
        return x if plan.flip else x.T

    def of_head(h: Index, state: HeadState) -> HeadState:
        t0 = replace(x0, h=h)
        ks, held = [t0.keys(y) for _, y in products], hold(ops.added, t0, ("", "k"))

        def step(t: Tile, state: ColState) -> ColState:
            q, do, qs = t.rows(ops.q), t.rows(cot.do), [t.rows(a) for a, _ in products]
            t, terms = on_tile(ops.added, t, held)
            p, _, ds, dqk, visible = weights_and_ds(
                t, (q, k, v, do), (qs, ks), terms, cot.of_rows(t)
            )
            low = ds.astype(q.dtype)
            grads = pullback(terms, plan.col_fields, t)(ds)
            if ds_ref is not None:
                kept = low if ds_ref.dtype == low.dtype else ds
                if ragged:
                    kept = transposed(t.keep_keys(transposed(kept)))
                t.put_pair(ds_ref, kept)

            def add(x: jax.Array, y: jax.Array, ds: jax.Array) -> jax.Array:
                y = t.seen_queries(visible, y)
                return x + times(t, transposed(ds), y, q.dtype)

            dk = None if state.dk is None else add(state.dk, q, dqk)
            do = t.seen_queries(visible, do)
            dv = state.dv + t.dot(transposed(p.astype(do.dtype)), do)
            db = {x: add(y, qs[x], ds) for x, y in state.db.items()}
            fields = {
                f: y + t.seen_keys(visible, grads[f]) for f, y in state.fields.items()
            }
            return ColState(db, dk, dv, fields)

        def clear(ref: Ref, i: Index) -> None:
            zero = jnp.zeros((bq, bk), f32)
            at_queries(t0, i, 0, edge=True).put_pair(ref, zero)

        db = {x: zeros(bk, products[x][1]) for x in plan.db}
        fields = {f: jnp.zeros((bk,), f32) for f in plan.col_fields}
        sums = ColState(db, state.dk, state.dv, fields)
        sums, visits = blocks.over_queries(t0, ops, held, plan, step, sums)
        if ds_ref is not None:  # no query of these blocks sees these keys
            span = queries_of(t0, plan.two_sided).span
            for lo, hi in ((0, span[0]), (span[1], pl.cdiv(call.T, bq))):
                if not (isinstance(lo, int) and isinstance(hi, int) and lo >= hi):
                    lax.fori_loop(
                        i32(lo), i32(hi), lambda i, _, ref=ds_ref: clear(ref, i), None
                    )
        for x, y in sums.db.items():
            t0.put_keys(out.db[x], t0.keep_keys(y * call.scale))
        for f, y in sums.fields.items():
            t0.put_key_stat(out.fields[f], t0.keep_keys(y))
        report(visits_ref, t0, t0.k0 // i32(bk), visits)
        owned = state.lasting
        for y in (*sums.db.values(), *sums.fields.values()):
            owned = lasting(y) if owned is None else owned + lasting(y)
        return HeadState(sums.dk, sums.dv, owned)

    owned = jnp.zeros((bk,), f32) if plan.db or plan.col_fields else None
    state = HeadState(zeros(bk, ops.k) if plan.dk else None, zeros(bk, ops.v), owned)
    if call.G == 1:
        state = of_head(first, state)
    else:
        state = lax.fori_loop(first, first + call.G, of_head, state)
    dk, dv, owned = state
    dv = dv * rescale(call) if call.dropout else dv
    x0.put_keys(dv_ref, x0.keep_keys(dv))
    if dk_ref is not None and dk is not None:
        x0.put_keys(dk_ref, x0.keep_keys(dk * call.scale))
    # A dS that is not finite shows in dk, and dv is finite where dS is.
    x0.note(dv if dk is None else dk, *([] if owned is None else [owned]))


def tiles_kernel(
    ops: Operands,
    cot: RowCotangents,
    blocks: Visitor,
    out: Ref,
    *,
    call: Call,
    program: Program,
    plan: Plan,
    field: Field,
    runs: int,
) -> None:
    """One tile of the gradient of a pair field, over one run of what shares it.

    It is summed in registers over the batch entries and heads that share the field;
    where tiles are few, `runs` programs share them, and their sums are added later.
    """
    block = block_of(call, plan, "tiles")
    bq, bk = block.block_q, block.block_k
    array = field.of(ops.added.terms)
    own_b, own_h = array.shape[:2]
    share = (call.B if own_b == 1 else 1) * (call.N if own_h == 1 else 1)
    j, i, g = program.place
    run, g = g % runs, g // runs
    b0, h0 = g // own_h, g % own_h
    each = pl.cdiv(share, runs)
    lo, hi = run * each, jnp.minimum(run * each + each, share)

    def at(b: Index, h: Index) -> Tile:
        where = frame_of(call, ops.sight, b)
        flag = program.flag
        return Tile(call, ops.sight, where, b, h, i * bq, j * bk, bq, bk, flag=flag)

    t0 = at(b0, h0)
    held = {field: t0.field(field.home, array)}

    def add(t: Tile, acc: jax.Array) -> jax.Array:
        t, terms = on_tile(ops.added, t, held)
        products = ops.added.products
        _, _, ds, _, visible = weights_and_ds(
            t,
            (t.rows(ops.q), t.keys(ops.k), t.keys(ops.v), t.rows(cot.do)),
            ([t.rows(a) for a, _ in products], [t.keys(x) for _, x in products]),
            terms,
            cot.of_rows(t),
        )
        grad = pullback(terms, (field,), t)(ds)[field]
        return acc + (grad if visible is None else jnp.where(visible, grad, 0.0))

    def body(y: Index, acc: jax.Array) -> jax.Array:
        b = b0 if own_b > 1 else (y if own_h > 1 else y // call.N)
        h = h0 if own_h > 1 else y % call.N
        return blocks.on_tile(at(b, h), add, acc)

    if call.causal and not t0.frame.placed and isinstance(t0.frame.offset, int):
        hi = jnp.where(t0.k0 <= t0.q0 + t0.frame.offset + bq - 1, hi, lo)
    acc = lax.fori_loop(i32(lo), i32(hi), body, jnp.zeros((bq, bk), f32))
    t0.put_pair(out, acc, run * own_b + b0, h0)
    t0.note(acc)
