"""Attention by tiled passes behind one custom_vjp."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_attn.bias.base import Added
from pallas_attn.call import Call, Visibility
from pallas_attn.config import Block
from pallas_attn.kernels.backward import (
    Cotangents,
    cols_kernel,
    rows_kernel,
    thin_cols_kernel,
    thin_rows_kernel,
    tiles_kernel,
)
from pallas_attn.kernels.forward import Operands, forward_kernel
from pallas_attn.kernels.launch import launch, like
from pallas_attn.kernels.plan import (
    Plan,
    Wanted,
    block_of,
    grid_of,
    is_row_constant,
    plan,
)
from pallas_attn.kernels.prepare import delta_kernel, norms_kernel
from pallas_attn.kernels.terms import (
    Field,
    fields,
    home,
    turned,
    with_columns,
    with_fields,
)
from pallas_attn.kernels.visible import GRAIN, Sight, sight


f32 = jnp.float32
LN2 = 0.6931471805599453


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K h"],
    added: Added,
    visibility: Visibility,
    call: Call,
) -> tuple[Float[Array, "B T N h"], Float[Array, "B T N"]]:
    """Output and log-sum-exp; differentiable once, in reverse mode."""
    if not 1e-6 < call.scale < 1e6:  # scores in units of q.k would leave float32
        query = (query.astype(f32) * call.scale).astype(query.dtype)
        call = replace(call, scale=1.0)
    ops = Operands(
        query, key, value, with_columns(added, call), sight(call, visibility)
    )
    o, lse = _attend(ops, call)
    return o, jnp.swapaxes(lse, 1, 2)


def visited_blocks(
    query: Array,
    key: Array,
    value: Array,
    added: Added,
    visibility: Visibility,
    call: Call,
) -> tuple[Float[Array, "B N"], Float[Array, "B N"], Float[Array, "B N"]]:
    """The share of visible blocks that forward, rows and cols visit."""
    ops = Operands(
        query, key, value, with_columns(added, call), sight(call, visibility)
    )
    first = _forward(ops, call)
    wanted = Wanted(qkv=True, fields=(), a=(), b=())
    p = plan(call, ops.sight, ops.added, wanted)
    cot, floors = _cotangents(ops, first, jnp.zeros_like(first["o"]), None, call, p)
    rows = _rows(ops, cot, first, call, p)
    cols = _cols(ops, cot, first, floors, call, p)

    def share(visits: Array) -> Array:
        count = visits.sum(2, dtype=jnp.int32).astype(f32)
        return jnp.where(count[..., 1] > 0, count[..., 0] / count[..., 1], 1.0)

    return share(first["visits"]), share(rows["visits"]), share(cols["visits"])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _attend(ops: Operands, call: Call) -> tuple[Array, Array]:
    out = _forward(ops, call)
    return out["o"], _natural(out["lse"])


def _attend_fwd(ops: Any, call: Call) -> Any:
    values = jax.tree.map(lambda x: x.value, ops)
    asked = jax.tree.map(lambda x: x.perturbed, ops)
    wanted = Wanted(
        qkv=asked.q or asked.k or asked.v,
        fields=tuple(f for f, x in fields(asked.added).items() if x),
        a=tuple(i for i, (a, _) in enumerate(asked.added.products) if a),
        b=tuple(i for i, (_, b) in enumerate(asked.added.products) if b),
    )
    out = _forward(values, call)
    return (out["o"], _natural(out["lse"])), (values, out, _Static(wanted))


def _attend_bwd(call: Call, residuals: Any, cotangents: Any) -> Any:
    ops, first, static = residuals
    do, dlse = cotangents
    if isinstance(do, SymbolicZero):
        do = jnp.zeros(do.shape, do.dtype)
    dlse = None if isinstance(dlse, SymbolicZero) else dlse
    return (_backward(ops, first, do, dlse, call, static.wanted),)


_attend.defvjp(_attend_fwd, _attend_bwd, symbolic_zeros=True)


@jax.tree_util.register_static
class _Static:
    """Static facts among the residuals."""

    def __init__(self, wanted: Wanted):
        self.wanted = wanted

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self.wanted == other.wanted

    def __hash__(self) -> int:
        return hash(self.wanted)


def _natural(lse: Array) -> Array:
    """Natural units; -inf for empty rows."""
    return jnp.where(lse < jnp.inf, lse * LN2, -jnp.inf)


def _forward(ops: Operands, call: Call) -> dict[str, Array]:
    """o, lse (log2, +inf for empty rows), and what later passes prune with."""
    p = plan(call, ops.sight, ops.added)
    norms = jnp.zeros((1, 1, 1), f32)
    if p.pruned:
        sides = [b for _, b in ops.added.products]
        heads = call.N if sides else call.K
        grid = (call.B, heads, pl.cdiv(call.S, GRAIN))
        norms = launch(
            norms_kernel,
            grid,
            (ops.k, ops.v, sides, ops.sight),
            jax.ShapeDtypeStruct(grid, f32),
            call,
            Block(GRAIN, GRAIN, 4, 1),
        )
    grid = grid_of(call, p, "forward")
    shape = (call.B, call.N, grid.blocks)
    outputs = {
        "o": jax.ShapeDtypeStruct((call.B, call.T, call.N, call.h), ops.q.dtype),
        "lse": _per_row(call),
        "visits": _visits(call, grid.blocks),
    }
    if p.pruned:
        outputs["reach"] = jax.ShapeDtypeStruct(shape, f32)
    out = _run(forward_kernel, "forward", (ops, norms), outputs, call, p)
    return {"reach": jnp.zeros((1, 1, 1), f32)} | out | {"norms": norms}


def _cotangents(
    ops: Operands,
    first: dict[str, Array],
    do: Array,
    dlse: Array | None,
    call: Call,
    p: Plan,
) -> tuple[Cotangents, Array]:
    """do, lse and delta; and the least lse of every grain of queries."""
    grid = (call.B, call.N, pl.cdiv(call.T, GRAIN))
    delta, floors = launch(
        delta_kernel,
        grid,
        (first["o"], do, first["lse"], dlse, ops.sight),
        (_per_row(call), jax.ShapeDtypeStruct(grid, f32)),
        call,
        Block(GRAIN, GRAIN, 4, 1),
    )
    return Cotangents(do, first["lse"], delta), floors


def _backward(
    ops: Operands,
    first: dict[str, Array],
    do: Array,
    dlse: Array | None,
    call: Call,
    wanted: Wanted,
) -> Operands:
    """The gradient of every operand; zeros where nobody asked."""
    p = plan(call, ops.sight, ops.added, wanted)
    cot, floors = _cotangents(ops, first, do, dlse, call, p)
    rows = _rows(ops, cot, first, call, p) if p.rows else {}
    cols = _cols(ops, cot, first, floors, call, p) if p.cols else {}
    ds, products = cols.get("ds"), ops.added.products

    def thin_rows(y: Array, like_: Any) -> Array:
        return _run(thin_rows_kernel, "thin_rows", (ds, y, ops.sight), like_, call, p)

    if p.own and not p.rows:
        rows = {
            "dq": thin_rows(ops.k, like(ops.q)),
            "da": {
                x: thin_rows(products[x][1], _side(products[x][0], call.T, call))
                for x in p.da
            },
        }
    if p.own and not p.dk:
        inputs = (ds, ops.q, ops.sight)
        cols["dk"] = _run(thin_cols_kernel, "thin_cols", inputs, like(ops.k), call, p)

    def field_gradient(f: Field, x: Array) -> Array | None:
        if f not in wanted.fields:
            return jnp.zeros_like(x)
        if f in p.own:
            return ds.astype(x.dtype)  # pyright: ignore[reportOptionalMemberAccess]
        if f in p.tile_fields:
            return _tiles(ops, cot, f, call, p)
        if is_row_constant(ops.added, f):
            return _row_constant(home(ops.added, f), x, dlse, first["lse"])
        g = rows["fields"][f] if f in p.row_fields else cols["fields"][f]
        return _to_field(home(ops.added, f), g, x, along_queries=f in p.row_fields)

    def side_gradient(i: int, side: int) -> Array:
        x = products[i][side]
        g = (rows.get("da", {}) if side == 0 else cols.get("db", {})).get(i)
        return jnp.zeros_like(x) if g is None else _reduced(g, x, (0, 2))

    grads = {f: field_gradient(f, x) for f, x in fields(ops.added).items()}
    sides = tuple(
        (side_gradient(i, 0), side_gradient(i, 1)) for i in range(len(products))
    )
    return Operands(
        rows.get("dq", jnp.zeros_like(ops.q)),
        cols.get("dk", jnp.zeros_like(ops.k)),
        cols.get("dv", jnp.zeros_like(ops.v)),
        Added(with_fields(ops.added, grads), sides),
        jax.tree.map(lambda _: None, ops.sight),
    )


def _rows(
    ops: Operands, cot: Cotangents, first: dict[str, Array], call: Call, p: Plan
) -> dict[str, Any]:
    products = ops.added.products
    outputs = {
        "dq": like(ops.q),
        "da": {x: _side(products[x][0], call.T, call) for x in p.da},
        "fields": {f: _per_row(call) for f in p.row_fields},
        "visits": _visits(call, grid_of(call, p, "rows").blocks),
    }
    return _run(rows_kernel, "rows", (ops, cot, first["norms"]), outputs, call, p)


def _cols(
    ops: Operands,
    cot: Cotangents,
    first: dict[str, Array],
    floors: Array,
    call: Call,
    p: Plan,
) -> dict[str, Any]:
    if p.turn:
        ops = replace(ops, added=turned(ops.added))
    products = ops.added.products
    per_key = jax.ShapeDtypeStruct((call.B, call.N, call.S), f32)
    outputs = {
        "dv": like(ops.v),
        "db": {x: _side(products[x][1], call.S, call) for x in p.db},
        "fields": {f: per_key for f in p.col_fields},
        "visits": _visits(call, grid_of(call, p, "cols").blocks),
    }
    if p.dk:
        outputs["dk"] = like(ops.k)
    if p.store:
        shape = (call.B, call.N, call.T, call.S)
        outputs["ds"] = jax.ShapeDtypeStruct(shape, p.store)
    inputs = (ops, cot, first["norms"], first["reach"], floors)
    return _run(cols_kernel, "cols", inputs, outputs, call, p)


def _tiles(ops: Operands, cot: Cotangents, field: Field, call: Call, p: Plan) -> Array:
    """The gradient of a pair field.

    Few tiles (a short T) are split over runs of the batch so that the device is full:
    float32 partial sums, added in a fixed order.
    """
    x = fields(ops.added)[field]
    block = block_of(call, p, "tiles")
    b, h, t, s = x.shape
    rows, cols = pl.cdiv(t, block.block_q), pl.cdiv(s, block.block_k)
    share = (call.B if b == 1 else 1) * (call.N if h == 1 else 1)
    runs = min(pl.cdiv(1024, rows * cols * b * h), pl.cdiv(share, 8))
    out = launch(
        tiles_kernel,
        (cols, rows, b * h * runs),
        (ops, cot),
        jax.ShapeDtypeStruct((runs * b, h, t, s), f32 if runs > 1 else x.dtype),
        call,
        block,
        plan=p,
        field=field,
        runs=runs,
    )
    if runs == 1:
        return out
    return out.reshape(runs, b, h, t, s).sum(0).astype(x.dtype)


def _run(kernel: Any, name: str, inputs: Any, outputs: Any, call: Call, p: Plan) -> Any:
    grid, block = grid_of(call, p, name), block_of(call, p, name)
    return launch(kernel, grid.shape, inputs, outputs, call, block, plan=p)


def _row_constant(home: str, x: Array, dlse: Array | None, lse: Array) -> Array:
    """The gradient of what shifts a whole row: the weights stay, lse moves along."""
    if dlse is None:
        return jnp.zeros_like(x)
    return _to_field(home, jnp.where(lse < jnp.inf, dlse, 0.0), x, along_queries=True)


def _to_field(home: str, g: Array, x: Array, along_queries: bool) -> Array:
    """[B, N, T] or [B, N, S] summed to a field's shape."""
    if home == "head":
        return _reduced(g.sum(2), x, (0, 1))
    if home == "pair":
        g = g[..., None] if along_queries else g[:, :, None, :]
        return _reduced(g, x, (0, 1, 2, 3))
    return _reduced(jnp.swapaxes(g, 1, 2), x, (0, 2))


def _reduced(g: Array, x: Array, axes: tuple[int, ...]) -> Array:
    """g summed over the axes where x has 1."""
    summed = [a for a in axes if x.shape[a] == 1 < g.shape[a]]
    return g.sum(summed, keepdims=True).astype(x.dtype)


def _per_row(call: Call) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((call.B, call.N, call.T), f32)


def _visits(call: Call, blocks: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((call.B, call.N, blocks, 2), jnp.int32)


def _side(x: Array, length: int, call: Call) -> jax.ShapeDtypeStruct:
    """The gradient of one side of a product before it is summed over shared axes."""
    whole = x.shape[0] == call.B and x.shape[2] == call.N
    shape = (call.B, length, call.N, x.shape[-1])
    return jax.ShapeDtypeStruct(shape, x.dtype if whole else f32)
