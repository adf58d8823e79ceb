"""The backward passes: rows, cols, tiles, and thin passes over a stored dS."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_attn.call import Call
from pallas_attn.kernels import walk
from pallas_attn.kernels.forward import (
    Operands,
    dots,
    far_keys,
    frame_of,
    keys_of,
    query_tile,
    reach_of,
    report,
    weightless,
)
from pallas_attn.kernels.plan import Plan, block_of, grid_of
from pallas_attn.kernels.terms import (
    Field,
    bound,
    hold,
    home,
    on_tile,
    parts,
    pullback,
)
from pallas_attn.kernels.tile import Tile, at_keys, at_queries, exp2, load_number
from pallas_attn.kernels.visible import GRAIN
from pallas_attn.normalizers.softmax import LOG2E, score_gradient


f32 = jnp.float32
i32 = jnp.int32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cotangents:
    """What the backward passes read beside the operands."""

    do: Any  # [B, T, N, h]
    lse: Any  # [B, N, T], log2, +inf for empty rows
    delta: Any  # [B, N, T]


def weights_and_ds(
    t: Tile,
    operands: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    factors: tuple[list[jax.Array], list[jax.Array]],
    terms: tuple[Any, ...],
    lse: jax.Array,
    delta: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(P, dS, visible) of one tile, given its q, k, v, do.

    With a full bias tile both dots are issued first, and the bias is combined with lse
    while they run; without one, that would only cost registers.
    """
    q, k, v, do = operands

    def dp_dot() -> jax.Array:
        return t.dot(v, do.T) if t.flip else t.dot(do, v.T)

    s = dots(t, q, k, *factors)
    row, rest = parts(terms, t)
    rest = weightless(rest, len(terms) + len(factors[0]) > 1)
    minus = t.along_q(lse) - row * LOG2E
    full = [r for r in rest if r.shape == t.shape]
    dp = dp_dot() if full else None
    e = s * (t.call.scale * LOG2E)
    for r in rest:
        if r.shape != t.shape:
            e = e + r * LOG2E
    if full:
        e = e + (functools.reduce(jnp.add, [r * LOG2E for r in full]) - minus)
    else:
        e = e - minus
    visible = t.visible
    if visible is not None:
        e = jnp.where(visible, e, -jnp.inf)
    p = exp2(t.call, e)
    ds = score_gradient(p, dp_dot() if dp is None else dp, t.along_q(delta))
    if visible is not None and t.sight.veiled:  # 0 * NaN of what nobody sees
        ds = jnp.where(visible, ds, 0.0)
    return p, ds, visible


def rows_kernel(
    ops: Operands,
    cot: Cotangents,
    norms: Any,
    out: dict[str, Any],
    *,
    call: Call,
    plan: Plan,
) -> None:
    """dq of one query block, the query side of products, fields per head and per query."""
    t0 = query_tile(ops.sight, call, plan, "rows")
    w = keys_of(t0, plan.two)
    products = ops.added.products
    q, do = t0.rows(ops.q), t0.rows(cot.do)
    lse, delta = t0.stat(cot.lse, jnp.inf), t0.stat(cot.delta)
    qs, held = [t0.rows(a) for a, _ in products], hold(ops.added, t0, ("", "q"))

    def step(t: Tile, state: Any) -> Any:
        k, v, ks = t.keys(ops.k), t.keys(ops.v), [t.keys(b) for _, b in products]
        terms = on_tile(ops.added, t, held)
        _, ds, visible = weights_and_ds(t, (q, k, v, do), (qs, ks), terms, lse, delta)
        low = ds.astype(k.dtype)
        grads = pullback(terms, plan.row_fields, t, ds)

        def add(x: jax.Array, y: jax.Array) -> jax.Array:
            return x + t.dot(low, t.seen_keys(visible, y).astype(k.dtype))

        return dict(
            dq=add(state["dq"], k),
            da={x: add(y, ks[x]) for x, y in state["da"].items()},
            fields={f: y + grads[f] for f, y in state["fields"].items()},
        )

    def near(j: Any, side: Any, state: Any) -> Any:
        return step(at_keys(t0, j, side, edge=True), state)

    state = w.near_loop(
        near,
        dict(
            dq=_zeros(t0.bq, ops.q),
            da={x: _zeros(t0.bq, products[x][0]) for x in plan.da},
            fields={f: jnp.zeros((t0.bq,), f32) for f in plan.row_fields},
        ),
    )
    if plan.pruned:
        floor = jnp.min(jnp.where(t0.inside_rows(), lse, jnp.inf))
        far = far_keys(t0, w, ops, held, norms, reach_of(call, q, qs), floor)
    else:
        far = walk.all_far(w.sides)

    def rest(t: Any, state: Any) -> Any:
        return step(at_keys(t0, *far.at(t), edge=ops.sight.veiled), state)

    if w.sides:
        state = lax.fori_loop(i32(0), far.count, rest, state)
    some = lse < jnp.inf  # in an empty row 0 may have met a query that is not finite
    t0.put_rows(out["dq"], jnp.where(some[:, None], state["dq"] * call.scale, 0.0))
    for x, y in state["da"].items():
        t0.put_rows(out["da"][x], jnp.where(some[:, None], y * call.scale, 0.0))
    for f, y in state["fields"].items():
        t0.put_stat(out["fields"][f], jnp.where(some, y, 0.0))
    report(out["visits"], t0, t0.h, t0.q0 // i32(t0.bq), w, far)


def cols_kernel(
    ops: Operands,
    cot: Cotangents,
    norms: Any,
    reach: Any,
    floors: Any,
    out: dict[str, Any],
    *,
    call: Call,
    plan: Plan,
) -> None:
    """dk and dv of one key block of one key head.

    Per query head also the key side of products and the fields per key; and dS itself, if
    the plan stores it.
    """
    grid, block = grid_of(call, plan, "cols"), block_of(call, plan, "cols")
    b, head, j = grid.place()
    bq, bk = block.block_q, block.block_k
    where = frame_of(call, ops.sight, b)
    first = head * call.G
    x0 = Tile(call, ops.sight, where, b, first, j * 0, j * bk, bq, bk, flip=plan.flip)
    products = ops.added.products
    k, v = x0.keys(ops.k), x0.keys(ops.v)
    span = walk.hull(call, ops.sight, b, first, x0.k0, bk, bq, by_key=True)
    w = walk.over_queries(call, where, x0.k0, bq, bk, plan.two, span)
    ragged = not walk.covers(where.keys, call.S)

    def transposed(x: jax.Array) -> jax.Array:
        return x if plan.flip else x.T

    def far_queries(t0: Tile, held: Any) -> walk.Remaining:
        if not plan.pruned:
            return walk.all_far(w.sides)
        p0, lead = t0.k0, (b, t0.h)
        norm = _norm_of_keys(norms, t0)

        def weight(i: jax.Array, ok: jax.Array) -> tuple[jax.Array, jax.Array]:
            q0 = i * bq + where.offset
            length = walk.of_blocks(
                reach,
                lead,
                i,
                ok,
                bq,
                block_of(call, plan, "forward").block_q,
                jnp.maximum,
            )
            floor = walk.of_blocks(floors, lead, i, ok, bq, GRAIN, jnp.minimum)
            most = bound(ops.added, held, q0, q0 + bq - 1, p0, p0 + bk - 1)
            return length * norm + most, floor

        return walk.holes(call, w.sides, pl.cdiv(call.T, bq), bq, weight)

    def of_head(h: Any, state: Any) -> Any:
        t0 = replace(x0, h=h)
        ks, held = [t0.keys(y) for _, y in products], hold(ops.added, t0, ("", "k"))

        def step(t: Tile, state: Any) -> Any:
            q, do, qs = t.rows(ops.q), t.rows(cot.do), [t.rows(a) for a, _ in products]
            terms = on_tile(ops.added, t, held)
            lse, delta = t.stat(cot.lse, jnp.inf), t.stat(cot.delta)
            p, ds, visible = weights_and_ds(
                t, (q, k, v, do), (qs, ks), terms, lse, delta
            )
            low = ds.astype(q.dtype)
            grads = pullback(terms, plan.col_fields, t, ds)
            if plan.store:
                kept = low if out["ds"].dtype == low.dtype else ds
                if ragged:
                    kept = transposed(t.keep_keys(transposed(kept)))
                t.put_pair(out["ds"], kept)

            def add(x: jax.Array, y: jax.Array) -> jax.Array:
                y = t.seen_queries(visible, y).astype(q.dtype)
                return x + t.dot(transposed(low), y)

            new = {"dk": add(state["dk"], q)} if plan.dk else {}
            do = t.seen_queries(visible, do)
            return new | dict(
                dv=state["dv"] + t.dot(transposed(p.astype(do.dtype)), do),
                db={x: add(y, qs[x]) for x, y in state["db"].items()},
                fields={f: y + grads[f] for f, y in state["fields"].items()},
            )

        def near(i: Any, side: Any, state: Any) -> Any:
            return step(at_queries(t0, i, side, edge=True), state)

        def rest(t: Any, state: Any) -> Any:
            return step(at_queries(t0, *far.at(t), edge=ops.sight.veiled), state)

        def clear(i: Any, _: None) -> None:
            zero = jnp.zeros((bq, bk), f32)
            at_queries(t0, i, 0, edge=True).put_pair(out["ds"], zero)

        state = w.near_loop(
            near,
            state
            | dict(
                db={x: _zeros(bk, products[x][1]) for x in plan.db},
                fields={f: jnp.zeros((bk,), f32) for f in plan.col_fields},
            ),
        )
        far = far_queries(t0, held)
        if w.sides:
            state = lax.fori_loop(i32(0), far.count, rest, state)
        if plan.store:  # no query of these blocks sees these keys
            for lo, hi in ((0, w.span[0]), (w.span[1], pl.cdiv(call.T, bq))):
                if not (isinstance(lo, int) and isinstance(hi, int) and lo >= hi):
                    lax.fori_loop(i32(lo), i32(hi), clear, None)
        for x, y in state.pop("db").items():
            t0.put_keys(out["db"][x], t0.keep_keys(y * call.scale))
        for f, y in state.pop("fields").items():
            t0.put_key_stat(out["fields"][f], t0.keep_keys(y))
        report(out["visits"], t0, h, j, w, far)
        return state

    state = {"dv": _zeros(bk, ops.v)} | ({"dk": _zeros(bk, ops.k)} if plan.dk else {})
    if call.G == 1:
        state = of_head(first, state)
    else:
        state = lax.fori_loop(first, first + call.G, of_head, state)
    x0.put_keys(out["dv"], x0.keep_keys(state["dv"]))
    if plan.dk:
        x0.put_keys(out["dk"], x0.keep_keys(state["dk"] * call.scale))


def tiles_kernel(
    ops: Operands,
    cot: Cotangents,
    out: Any,
    *,
    call: Call,
    plan: Plan,
    field: Field,
    runs: int,
) -> None:
    """One tile of the gradient of a pair field, over one run of what shares it.

    It is summed in registers over the batch entries and heads that share the field; where
    tiles are few, `runs` programs share them, and their sums are added afterwards.
    """
    block = block_of(call, plan, "tiles")
    bq, bk = block.block_q, block.block_k
    array = getattr(ops.added.terms[field[0]], field[1])
    own_b, own_h = array.shape[:2]
    share = (call.B if own_b == 1 else 1) * (call.N if own_h == 1 else 1)
    j, i, g = (pl.program_id(axis) for axis in range(3))
    run, g = g % runs, g // runs
    b0, h0 = g // own_h, g % own_h
    each = pl.cdiv(share, runs)
    lo, hi = run * each, jnp.minimum(run * each + each, share)

    def at(b: Any, h: Any) -> Tile:
        where = frame_of(call, ops.sight, b)
        return Tile(call, ops.sight, where, b, h, i * bq, j * bk, bq, bk)

    t0 = at(b0, h0)
    held = {field: t0.field(home(ops.added, field), array)}

    def body(y: Any, acc: jax.Array) -> jax.Array:
        b = b0 if own_b > 1 else (y if own_h > 1 else y // call.N)
        h = h0 if own_h > 1 else y % call.N
        t = at(b, h)
        terms = on_tile(ops.added, t, held)
        products = ops.added.products
        _, ds, visible = weights_and_ds(
            t,
            (t.rows(ops.q), t.keys(ops.k), t.keys(ops.v), t.rows(cot.do)),
            ([t.rows(a) for a, _ in products], [t.keys(x) for _, x in products]),
            terms,
            t.stat(cot.lse, jnp.inf),
            t.stat(cot.delta),
        )
        if visible is not None and not t.sight.veiled:
            ds = jnp.where(visible, ds, 0.0)
        return acc + pullback(terms, (field,), t, ds)[field]

    if call.causal and not t0.frame.placed and isinstance(t0.frame.offset, int):
        hi = jnp.where(t0.k0 <= t0.q0 + t0.frame.offset + bq - 1, hi, lo)
    acc = lax.fori_loop(i32(lo), i32(hi), body, jnp.zeros((bq, bk), f32))
    t0.put_pair(out, acc, run * own_b + b0, h0)


def thin_rows_kernel(
    ds_ref: Any, y_ref: Any, sight: Any, out: Any, *, call: Call, plan: Plan
) -> None:
    """scale dS Y of one query block, from a stored dS and an array per key."""
    t0 = query_tile(sight, call, plan, "thin_rows")
    w = keys_of(t0, two=False)

    def step(t: Tile, acc: jax.Array) -> jax.Array:
        y = t.seen_keys(_veil(t), t.keys(y_ref))
        return acc + t.dot(t.pair(ds_ref).astype(y.dtype), y)

    acc = _thin_loop(w, t0, at_keys, step, _zeros(t0.bq, y_ref))
    t0.put_rows(out, acc * call.scale)


def thin_cols_kernel(
    ds_ref: Any, y_ref: Any, sight: Any, out: Any, *, call: Call, plan: Plan
) -> None:
    """scale dS^T Y of one key block, summed over the query heads of its key head."""
    grid, block = grid_of(call, plan, "thin_cols"), block_of(call, plan, "thin_cols")
    b, head, j = grid.place()
    bq, bk = block.block_q, block.block_k
    where = frame_of(call, sight, b)
    first = head * call.G
    t0 = Tile(call, sight, where, b, first, j * 0, j * bk, bq, bk)
    span = walk.hull(call, sight, b, first, t0.k0, bk, bq, by_key=True)
    w = walk.over_queries(call, where, t0.k0, bq, bk, False, span)

    def of_head(h: Any, acc: jax.Array) -> jax.Array:
        def step(t: Tile, acc: jax.Array) -> jax.Array:
            y = t.seen_queries(_veil(t), t.rows(y_ref))
            return acc + t.dot(t.pair(ds_ref).astype(y.dtype).T, y)

        return _thin_loop(w, replace(t0, h=h), at_queries, step, acc)

    acc = _zeros(bk, y_ref)
    if call.G == 1:
        acc = of_head(first, acc)
    else:
        acc = lax.fori_loop(first, first + call.G, of_head, acc)
    t0.put_keys(out, acc * call.scale)


def _thin_loop(w: walk.Walk, t0: Tile, place: Any, step: Any, acc: jax.Array) -> Any:
    acc = w.near_loop(lambda n, side, acc: step(place(t0, n, side, True), acc), acc)
    far = walk.all_far(w.sides)
    if not w.sides:
        return acc
    return lax.fori_loop(
        i32(0),
        far.count,
        lambda t, acc: step(place(t0, *far.at(t), t0.sight.veiled), acc),
        acc,
    )


def _veil(t: Tile) -> jax.Array | None:
    """Which pairs are visible, where 0 may meet what is not finite."""
    return t.visible if t.sight.veiled else None


def _norm_of_keys(norms: Any, t: Tile) -> jax.Array:
    """The largest norm of the keys of a block."""
    final = norms.shape[-1] - 1
    head = t.h // i32(t.call.N // norms.shape[1])
    grains = [
        jnp.minimum(t.k0 // i32(GRAIN) + r, final) for r in range(max(1, t.bk // GRAIN))
    ]
    return functools.reduce(
        jnp.maximum, [load_number(norms, (t.b, head, g)) for g in grains]
    )


def _zeros(n: int, ref: Any) -> jax.Array:
    """An accumulator of n rows as wide as an array, padded to a power of two."""
    return jnp.zeros((n, max(16, pl.next_power_of_2(ref.shape[-1]))), f32)
