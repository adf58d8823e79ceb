"""The passes as functions of whole arrays: shapes in, launches, shapes out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_attn.bias.diagonals import summed
from pallas_attn.call import Call
from pallas_attn.tiled.fields import along, Field, fields, turned
from pallas_attn.tiled.operands import (
    Cols,
    Forward,
    Moved,
    Moves,
    Operands,
    Residuals,
    Rows,
)
from pallas_attn.tiled.plan import Plan
from pallas_attn.tiled.split_factors import columns_of
from pallas_attn.tiled.summaries import extremes
from pallas_attn.triton.again import launch_flagged, launch_watched
from pallas_attn.triton.backward import cols_kernel, rows_kernel, tiles_kernel
from pallas_attn.triton.blocks import block_of
from pallas_attn.triton.diagonals import block_diagonals, diagonals_kernel
from pallas_attn.triton.ds_products import thin_cols_kernel, thin_rows_kernel
from pallas_attn.triton.forward import forward_kernel
from pallas_attn.triton.launch import like, Made
from pallas_attn.triton.operands import Cotangents, Known
from pallas_attn.triton.preprocess import deltas, norms
from pallas_attn.triton.programs import grid_of
from pallas_attn.triton.pruning import Grains, Pruning
from pallas_attn.triton.row_weights import RowCotangents
from pallas_attn.triton.shifted import laid
from pallas_attn.triton.shown import shown
from pallas_attn.triton.tangent import tangent_kernel
from pallas_attn.triton.visitor import Visitor
from pallas_attn.types import outline, Tree


f32 = jnp.float32

# Bytes of tiles along block diagonals that are made at a time.
SCRATCH = 4 * 2**20


def grains(ops: Operands, call: Call, p: Plan) -> Grains | None:
    """What bounds the scores of every grain; None where nothing is pruned."""
    if not p.pruned:
        return None
    sides = [b for _, b in ops.added.products]
    largest = norms(ops.k, ops.v, sides, ops.sight, call)
    vectors = {f: along(f, x) for f, x in fields(ops.added).items()}
    known = {f: extremes(x.astype(f32)) for f, x in vectors.items() if x is not None}
    return Grains(largest, known)


def forward(ops: Operands, grains: Grains | None, call: Call, p: Plan) -> Forward:
    """Output, log-sum-exp and what else the plan needs of them."""
    blocks = grid_of(call, p, "forward").blocks
    outputs = Forward(
        lse=_per_row(call),
        o=outline((call.B, call.T, call.N, call.h), ops.q.dtype),
        peak=_per_row(call) if p.large_scores else None,
        reach=outline((call.B, call.N, blocks), f32) if p.pruned else None,
        total=_per_row(call) if p.large_scores else None,
        visits=_visits(call, blocks),
    )
    inputs = (laid(ops, call), _listed(Pruning(grains), ops, call, p, "forward"))
    made = _run(forward_kernel, "forward", inputs, outputs, call, p)
    return replace(made, grains=grains)


def tangent(res: Residuals, moves: Moves, call: Call, p: Plan) -> Moved:
    """The tangents of output and log-sum-exp, pruned as the backward pass over rows."""
    outputs = Moved(lse=_per_row(call), o=like(res.o))
    pruning = Pruning(res.grains) if p.pruned else Pruning()
    known = Known(res.o, res.lse, res.peak, res.total, p.large_rows)
    blocks = _listed(pruning, res.ops, call, p, "tangent")
    inputs = (laid(res.ops, call), laid(moves, call), known, blocks)
    return _run(tangent_kernel, "tangent", inputs, outputs, call, p)


def cotangents(
    res: Residuals, do: Array, dlse: Array | None, call: Call, p: Plan
) -> tuple[Cotangents, Pruning]:
    """What the backward passes read beside the operands, and what they prune with."""
    delta, floors = deltas(res.o, do, res.lse, dlse, res.ops.sight, call)
    pruning = Pruning(res.grains, res.reach, floors) if p.pruned else Pruning()
    cot = Cotangents(do, res.lse, delta, res.peak, res.total, dlse, p.large_rows)
    return cot, pruning


def rows(
    ops: Operands, cot: RowCotangents, blocks: Visitor, call: Call, p: Plan
) -> Rows:
    """dq, the query sides of products, the fields per head and per query; visits.

    And what delta lacks, if the plan settles it.
    """
    products = ops.added.products
    outputs = Rows(
        beyond=_per_row(call) if p.exact_row_sums else None,
        da={x: columns_of(products[x][0], call.T, call) for x in p.da},
        dq=like(ops.q),
        fields={f: _per_row(call) for f in p.row_fields},
        visits=_visits(call, grid_of(call, p, "rows").blocks),
    )
    grid, block = grid_of(call, p, "rows").shape, block_of(call, p, "rows")
    made, strange = launch_flagged(
        rows_kernel,
        grid,
        (laid(ops, call), cot, _listed(blocks, ops, call, p, "rows")),
        outputs,
        call,
        block,
        own=block.block_q,
        plan=p,
    )
    return replace(made, strange=strange)


def cols(
    ops: Operands, cot: RowCotangents, blocks: Visitor, call: Call, p: Plan
) -> Cols:
    """dv, dk or dS, the key sides of products, the fields per key; visits."""
    if p.transpose_bias:
        ops = replace(ops, added=turned(ops.added))
    products = ops.added.products
    shape = (call.B, call.N, call.T, call.S)
    outputs = Cols(
        db={x: columns_of(products[x][1], call.S, call) for x in p.db},
        dk=like(ops.k) if p.dk else None,
        ds=outline(shape, p.store_dtype) if p.store_dtype else None,
        dv=like(ops.v),
        fields=dict.fromkeys(p.col_fields, outline((call.B, call.N, call.S), f32)),
        visits=_visits(call, grid_of(call, p, "cols").blocks),
    )
    if not p.store_dtype:  # every block has a dS
        blocks = _listed(blocks, ops, call, p, "cols")
    inputs = (laid(ops, call, flip=p.flip), cot, blocks)
    return _run(cols_kernel, "cols", inputs, outputs, call, p)


def tiles(
    ops: Operands,
    cot: RowCotangents,
    blocks: Visitor,
    field: Field,
    rows: Rows,
    call: Call,
    p: Plan,
) -> Array:
    """The gradient of a pair field; not finite only where what rows made is not.

    Few tiles (a short T) are split over runs of the batch so that the device is full:
    float32 partial sums, added in a fixed order.
    """
    x = fields(ops.added)[field]
    block = block_of(call, p, "tiles")
    b, h, t, s = x.shape
    down, across = pl.cdiv(t, block.block_q), pl.cdiv(s, block.block_k)
    share = (call.B if b == 1 else 1) * (call.N if h == 1 else 1)
    runs = min(pl.cdiv(1024, down * across * b * h), pl.cdiv(share, 8))
    out, _ = launch_flagged(
        tiles_kernel,
        (across, down, b * h * runs),
        (laid(ops, call), cot, blocks),
        outline((runs * b, h, t, s), f32 if runs > 1 else x.dtype),
        call,
        block,
        own=block.block_q,
        strange=rows.strange,
        plan=p,
        field=field,
        runs=runs,
    )
    if runs == 1:
        return out
    return out.reshape(runs, b, h, t, s).sum(0).astype(x.dtype)


def diagonals(
    ops: Operands,
    cot: RowCotangents,
    blocks: Visitor,
    field: Field,
    rows: Rows,
    call: Call,
    p: Plan,
) -> Array:
    """The gradient of a field along diagonals, of what block diagonals added up.

    Some heads after others where the tiles of all would be much beside the operands.
    """
    x = fields(ops.added)[field]
    block = block_of(call, p, "diagonals")
    n, (b, h) = block.block_q, x.shape[:2]
    first, count = block_diagonals(call, ops.sight, n)
    most = max(1, SCRATCH // (4 * b * count * n * n))
    each = max(d for d in range(1, min(most, h) + 1) if h % d == 0)

    def of_heads(start: Array | None) -> Array:
        made, _ = launch_flagged(
            diagonals_kernel,
            (b * each, count),  # the longest first
            (laid(ops, call), cot, blocks, start),
            outline((b, each, count, n, n), f32),
            call,
            block,
            own=n,
            strange=rows.strange,
            plan=p,
            field=field,
            first=first,
        )
        return summed(made, call.T, call.S, first)

    if each == h:
        return of_heads(None).astype(x.dtype)
    groups = lax.map(of_heads, jnp.arange(0, h, each, dtype=jnp.int32)[:, None])
    return jnp.moveaxis(groups, 0, 1).reshape(x.shape).astype(x.dtype)


def thin_rows(
    ds: Array, y: Array, out: Array, ops: Operands, call: Call, p: Plan
) -> Array:
    """Scale dS Y, shaped as `out`, for an array per key."""
    return _run(thin_rows_kernel, "thin_rows", (ds, y, ops.sight), like(out), call, p)


def thin_cols(
    ds: Array, y: Array, out: Array, ops: Operands, call: Call, p: Plan
) -> Array:
    """Scale dS^T Y, shaped as `out`, for an array per query."""
    return _run(thin_cols_kernel, "thin_cols", (ds, y, ops.sight), like(out), call, p)


def _run(
    kernel: Callable[..., None],
    name: str,
    inputs: Tree,
    outputs: Made,
    call: Call,
    p: Plan,
) -> Made:
    grid, block = grid_of(call, p, name), block_of(call, p, name)
    own = block.block_k if name.endswith("cols") else block.block_q
    own = 2 * own if name == "cols" and not p.dk else own  # v has flags of its own
    return launch_watched(
        kernel, grid.shape, inputs, outputs, call, block, own=own, plan=p
    )


def _listed(blocks: Visitor, ops: Operands, call: Call, p: Plan, name: str) -> Visitor:
    """A visitor that leaves out what a mask hides, if it is one that asks."""
    if not isinstance(blocks, Pruning):
        return blocks
    block = block_of(call, p, name)
    return replace(blocks, shown=shown(ops.sight, call, block, by_key=name == "cols"))


def _per_row(call: Call) -> Array:
    return outline((call.B, call.N, call.T), f32)


def _visits(call: Call, blocks: int) -> Array:
    return outline((call.B, call.N, blocks, 2), jnp.int32)
