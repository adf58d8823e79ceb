"""Entmax through lists of keys, whole arrays in and out: top-k, and short supports.

candidates (a bound for each row, and the keys above it) -> their scores -> the largest
k, their threshold and weights -> passes over the lists, whose work is that of k keys a
row. What keys own comes by one sort of all entries by key block.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_attn.config import Block
from pallas_attn.tiled.fields import fields, Values
from pallas_attn.tiled.operands import Cols, Operands, Rows, Wanted
from pallas_attn.tiled.plan import Plan
from pallas_attn.tiled.split_factors import columns_of
from pallas_attn.tiled.summaries import Sight
from pallas_attn.triton.again import careful, launch_watched
from pallas_attn.triton.entmax.call import SparseCall
from pallas_attn.triton.entmax.lists.blocks import (
    capacity,
    cols_block,
    gather_block,
    keys_of_word,
    select_block,
    sweep_block,
)
from pallas_attn.triton.entmax.lists.candidates import (
    list_again_kernel,
    list_candidates_kernel,
)
from pallas_attn.triton.entmax.lists.kernels import (
    list_cols_kernel,
    list_delta_kernel,
    list_output_kernel,
    list_rows_kernel,
)
from pallas_attn.triton.entmax.lists.operands import (
    ByQuery,
    Candidates,
    Deltas,
    Entries,
    Lists,
    Scores,
    Selected,
)
from pallas_attn.triton.entmax.lists.pairs import row_grid, width_of
from pallas_attn.triton.entmax.lists.select import (
    list_scores_kernel,
    list_select_kernel,
)
from pallas_attn.triton.entmax.power import fuses
from pallas_attn.triton.launch import launch, like, Made
from pallas_attn.triton.passes import grains
from pallas_attn.types import outline, Tree


f32 = jnp.float32
i32 = jnp.int32

# Keys that a row of plain entmax may have in a list, and that rows have on average.
SHORT, MEAN = 128, 40


class Gradients(NamedTuple):
    """What the backward passes make by lists.

    pairs: of `Plan.tile_fields`.
    alpha: dL/dalpha of each row, if that is wanted.
    """

    rows: Rows
    cols: Cols
    pairs: Values
    alpha: Float[Array, "B N T"] | None


def select(ops: Operands, alpha: Array | None, call: SparseCall, p: Plan) -> Lists:
    """The largest top_k scores of each row, or all with weight if there is no top_k."""
    length = SHORT if call.top_k is None else capacity(call.top_k)
    if call.B * call.N * call.T * length >= 2**31:
        raise NotImplementedError(
            f"`normalizer.top_k`: lists of {length} candidates for each of B N T = "
            f"{call.B * call.N * call.T} rows pass 2^31 numbers; split the batch."
        )
    words = candidates(ops, alpha, length, call, p)
    scores = _run(
        list_scores_kernel,
        (ops, words.lists),
        Scores(
            count=_per_row(call, i32),
            keys=_per_row(call, i32, length),
            row=_per_row(call, f32),
            x=_per_row(call, f32, length),
        ),
        call,
        gather_block(_widest(ops)),
        word=keys_of_word(sweep_block(call, p).block_k),
    )
    width = length if call.top_k is None else call.top_k
    out = _run(
        list_select_kernel,
        (scores, words.level, alpha, ops.sight),
        Selected(
            count=_per_row(call, i32),
            keys=_per_row(call, i32, width),
            level=_per_row(call, f32),
            m=_per_row(call, f32),
            p=_per_row(call, f32, width),
            u=_per_row(call, f32, width),
        ),
        call,
        select_block(length),
        fused=fuses(call, ops),
    )
    fits = jnp.array(True)
    if call.top_k is None:
        room = MEAN * call.B * call.N * call.T
        fits = jnp.all(words.keys <= length) & (out.count.sum(dtype=i32) <= room)
    return Lists(**vars(out), fits=fits)


def candidates(
    ops: Operands, alpha: Array | None, length: int, call: SparseCall, p: Plan
) -> Candidates:
    """At most `length` candidates of each row, as words of bits."""
    if call.alpha == 1.0:  # nothing is without weight: no bound rules a block out
        p = replace(p, pruned=False)
    block = sweep_block(call, p)
    words = length * (block.block_k // keys_of_word(block.block_k))
    outputs = Candidates(
        bound=_per_row(call, f32),
        count=_per_row(call, i32),
        keys=_per_row(call, i32),
        level=_per_row(call, f32),
        m=_per_row(call, f32),
        need=_per_row(call, i32),
        numbers=_per_row(call, i32, words),
        words=_per_row(call, i32, words),
    )
    out = launch_watched(
        list_candidates_kernel,
        row_grid(call, block).shape,
        (ops, alpha, grains(ops, call, p)),
        outputs,
        call,
        block,
        own=block.block_q,
        cut=block,
        plan=p,
    )
    redone = _run(  # which mostly has nothing to do: with care at once
        list_again_kernel,
        (careful(ops), out.bounds),
        outputs.lists,
        call,
        block,
        into=out.lists,
        plan=p,
        most=length,
    )
    return replace(out, **vars(redone))


def output(
    lists: Lists, v: Float[Array, "B S K h"], sight: Sight, call: SparseCall
) -> Float[Array, "B T N h"]:
    """The output, in the dtype of the values."""
    shape = outline((call.B, call.T, call.N, call.h), v.dtype)
    block = gather_block(width_of(v))
    return _run(list_output_kernel, (_refs(lists), v, sight), shape, call, block)


def backward(
    ops: Operands,
    alpha: Array | None,
    lists: Lists,
    do: Float[Array, "B T N h"],
    dtau: Float[Array, "B N T"] | None,
    wanted: Wanted,
    call: SparseCall,
    p: Plan,
    *,
    wants_alpha: bool = False,
) -> Gradients:
    """What `passes.rows`, `passes.cols` and `passes.tiles` make over tiles, by lists.

    Args:
        ops: The operands, products as columns.
        alpha: Where `call.alpha` is None.
        lists: Of the forward pass.
        do: The output's cotangent.
        dtau: The residual's.
        wanted: Which gradients somebody asked for.
        call: The static facts.
        p: Says who owns the gradients; it may not store dS.
        wants_alpha: Whether alpha's is asked for.
    """
    arrays = fields(ops.added)
    stats = _delta(ops, alpha, lists, do, dtau, call, wants_alpha)
    rows, cols, pairs = Rows(), Cols(), Values()
    scores = bool(wanted.q or wanted.k or p.da or p.db or p.row_fields)
    scores = scores or bool(p.col_fields or p.tile_fields)
    entries = Entries(keys=lists.keys, p=lists.p)
    if scores:
        made = _rows(ops, lists, stats, wanted, call, p)
        rows = Rows(da=made.da, dq=made.dq, fields=made.fields)
        entries = replace(entries, dqk=made.dqk, ds=made.ds)
        pairs = {
            f: _spread(made.pairs.get(f, made.ds), lists, arrays[f], call)
            for f in p.tile_fields
        }
    if wanted.k or wanted.v or p.db or p.col_fields:
        cols = _cols(ops, lists, entries, do, wanted, call, p)
    return Gradients(rows, cols, pairs, stats.alpha)


def _delta(
    ops: Operands,
    alpha: Array | None,
    lists: Lists,
    do: Array,
    dtau: Array | None,
    call: SparseCall,
    wants_alpha: bool,
) -> Deltas:
    outputs = Deltas(
        alpha=_per_row(call, f32) if wants_alpha else None,
        delta=_per_row(call, f32),
        dp=like(lists.p),
    )
    inputs = (_refs(lists), ops.v, do, dtau, alpha, ops.sight)
    return _run(list_delta_kernel, inputs, outputs, call, gather_block(width_of(ops.v)))


def _rows(
    ops: Operands,
    lists: Lists,
    stats: Deltas,
    wanted: Wanted,
    call: SparseCall,
    p: Plan,
) -> ByQuery:
    products = ops.added.products
    bent = wanted.k and call.soft_cap is not None
    outputs = ByQuery(
        da={x: columns_of(products[x][0], call.T, call) for x in p.da},
        dq=like(ops.q) if wanted.q else None,
        dqk=like(lists.p) if bent else None,
        ds=like(lists.p),
        fields=dict.fromkeys(p.row_fields, _per_row(call, f32)),
        pairs={f: like(lists.p) for f in p.tile_fields if not f.additive},
    )
    inputs = (ops, _refs(lists), replace(stats, alpha=None))
    block = gather_block(_widest(ops))
    return _run(list_rows_kernel, inputs, outputs, call, block, plan=p)


def _cols(
    ops: Operands,
    lists: Lists,
    entries: Entries,
    do: Array,
    wanted: Wanted,
    call: SparseCall,
    p: Plan,
) -> Cols:
    products = ops.added.products
    exact = call.precision == lax.Precision.HIGHEST
    block = cols_block(call, _widest(ops), exact)
    order, starts = by_key_block(lists, block.block_k, call)
    per_key = outline((call.B, call.N, call.S), f32)
    outputs = Cols(
        db={x: columns_of(products[x][1], call.S, call) for x in p.db},
        dk=like(ops.k) if wanted.k else None,
        dv=like(ops.v) if wanted.v else None,
        fields=dict.fromkeys(p.col_fields, per_key),
    )
    flat = jax.tree.map(lambda x: x.reshape(-1), entries)
    return launch(
        list_cols_kernel,
        (pl.cdiv(call.S, block.block_k), call.K, call.B),
        (ops, do, flat, order, starts),
        outputs,
        call,
        block,
        plan=p,
        cut=block,
        width=lists.keys.shape[-1],
    )


def by_key_block(
    lists: Lists, block_k: int, call: SparseCall
) -> tuple[Int[Array, " entries"], Int[Array, " runs"]]:
    """The entries sorted by batch entry, key head, key block and query head.

    The second value is where the run of each of these starts, and the end of the last.
    """
    blocks = pl.cdiv(call.S, block_k)
    runs = call.B * call.N * blocks
    place, exists = _entries(lists, call)
    row = place // lists.keys.shape[-1]
    head = row // call.T % call.N
    first = (row // (call.T * call.N) * call.K + head // call.G) * blocks
    key = lists.keys.reshape(-1).at[place].get(mode="promise_in_bounds")
    run = jnp.where(exists, (first + key // block_k) * call.G + head % call.G, runs)
    run, order = lax.sort((run, place), num_keys=1, is_stable=True)
    every = jnp.arange(runs + 1, dtype=i32)
    return order, jnp.searchsorted(run, every, method="scan_unrolled").astype(i32)


def _entries(lists: Lists, call: SparseCall) -> tuple[Array, Array]:
    """Places in the flat lists that hold every entry, and which of them exist.

    Lists of plain entmax are mostly room: their entries are counted off.
    """
    width = lists.keys.shape[-1]
    rows = call.B * call.N * call.T
    if call.top_k is not None:
        place = lax.iota(i32, rows * width)
        return place, place % width < jnp.repeat(lists.count.reshape(-1), width)
    count = lists.count.reshape(-1)
    end = jnp.cumsum(count, dtype=i32)
    place = lax.iota(i32, MEAN * rows)
    row = jnp.repeat(lax.iota(i32, rows), count, total_repeat_length=MEAN * rows)
    entry = place - (end - count)[row]
    return row * width + jnp.minimum(entry, width - 1), place < end[-1]


def _spread(g: Array, lists: Lists, x: Array, call: SparseCall) -> Array:
    """The entries' gradients of a field [#B, #N, T, S] in their places.

    What shares the field is added to it one after the other: each scatter meets every
    place once, and no larger array is made.
    """
    own_b, own_h = x.shape[:2]
    shared = (call.B // own_b) * (call.N // own_h)
    total = jnp.zeros(x.shape, x.dtype if shared == 1 else f32)
    place = [
        jnp.arange(n, dtype=i32).reshape((-1,) + (1,) * (3 - axis))
        for axis, n in enumerate((own_b, own_h, call.T))
    ]

    def add(n: Array, total: Array) -> Array:
        b = i32(0) if own_b > 1 else n // (call.N // own_h)
        h = i32(0) if own_h > 1 else n % (call.N // own_h)
        keys, some, count = (
            lax.dynamic_slice_in_dim(
                lax.dynamic_slice_in_dim(y, b, own_b, 0), h, own_h, 1
            )
            for y in (lists.keys, g, lists.count)
        )
        entry = lax.broadcasted_iota(i32, keys.shape, 3)
        # An entry that is none has a place of its own too, past the end.
        keys = jnp.where(entry < count[..., None], keys, call.S + entry)
        at = total.at[(*place, keys)]
        return at.add(some.astype(total.dtype), mode="drop", unique_indices=True)

    if shared == 1:
        return add(i32(0), total)
    return lax.fori_loop(i32(0), i32(shared), add, total).astype(x.dtype)


def _refs(lists: Lists) -> Lists:
    """Without what no kernel reads."""
    return replace(lists, fits=None)


def _widest(ops: Operands) -> int:
    arrays = [ops.k, ops.v, *(b for _, b in ops.added.products)]
    return max(width_of(x) for x in arrays)


def _per_row(call: SparseCall, dtype: DTypeLike, *more: int) -> Array:
    return outline((call.B, call.N, call.T, *more), dtype)


def _run(
    kernel: Callable[..., None],
    inputs: Tree,
    outputs: Made,
    call: SparseCall,
    block: Block,
    *,
    into: Made | None = None,
    **options: Hashable,
) -> Made:
    grid = row_grid(call, block).shape
    return launch(
        kernel,
        grid,
        inputs,
        outputs,
        call,
        block,
        into=into,
        name="",
        cut=block,
        **options,
    )
