"""The block that a program owns, and the walk over the blocks it meets."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_attn.call import Call
from pallas_attn.kernels import walk
from pallas_attn.kernels.instructions import uniform
from pallas_attn.kernels.operands import Operands, Pruning
from pallas_attn.kernels.plan import block_of, grid_of, Plan
from pallas_attn.kernels.terms import bound
from pallas_attn.kernels.tile import load_number, store_number, Tile
from pallas_attn.kernels.visible import frame, GRAIN, Sight


i32 = jnp.int32


def frame_of(call: Call, sight: Sight, b: Any) -> Any:
    """The frame of batch entry b, in uniform registers."""
    return frame(call, sight, b, lambda ref, at: uniform(call, load_number(ref, at)))


def query_tile(sight: Sight, call: Call, plan: Plan, kernel: str) -> Tile:
    """The query block that this program owns; its first key block."""
    grid, block = grid_of(call, plan, kernel), block_of(call, plan, kernel)
    b, h, i = grid.place()
    if call.causal:  # long programs first
        i = grid.blocks - 1 - i
    bq, bk = block.block_q, block.block_k
    where = frame_of(call, sight, b)
    return Tile(call, sight, where, b, h, i * bq, i * 0, bq, bk)


def key_tile(sight: Sight, call: Call, plan: Plan, kernel: str) -> Tile:
    """The key block that this program owns, of the first query head of its key head."""
    grid, block = grid_of(call, plan, kernel), block_of(call, plan, kernel)
    b, head, j = grid.place()
    bq, bk = block.block_q, block.block_k
    where = frame_of(call, sight, b)
    flip = plan.flip and kernel == "cols"
    return Tile(call, sight, where, b, head * call.G, j * 0, j * bk, bq, bk, flip=flip)


def keys_of(t: Tile, two: bool) -> walk.Walk:
    """The key blocks that a query block visits."""
    span = walk.hull(t.call, t.sight, t.b, t.h, t.q0, t.bq, t.bk, by_key=False)
    return walk.over_keys(t.call, t.frame, t.q0, t.bq, t.bk, two, span)


def queries_of(t: Tile, two: bool) -> walk.Walk:
    """The query blocks that a key block visits."""
    span = walk.hull(t.call, t.sight, t.b, t.h, t.k0, t.bk, t.bq, by_key=True)
    return walk.over_queries(t.call, t.frame, t.k0, t.bq, t.bk, two, span)


def far_keys(
    t: Tile,
    w: walk.Walk,
    ops: Operands,
    held: Any,
    pruning: Pruning,
    reach: Any,
    floor: Any,
) -> walk.Remaining:
    """The far blocks that remain, where every row's log2-sum is at least `floor`."""
    call, norms = t.call, pruning.norms
    p0 = t.q0 + t.frame.offset

    def weight(j: jax.Array, ok: jax.Array) -> tuple[jax.Array, Any]:
        lead = (t.b, t.h // i32(call.N // norms.shape[1]))
        norm = walk.of_blocks(norms, lead, j, ok, t.bk, GRAIN, jnp.maximum)
        k0 = j * t.bk
        most = bound(ops.added, held, p0, p0 + t.bq - 1, k0, k0 + t.bk - 1)
        return norm * reach + most, floor

    return walk.holes(call, w.sides, pl.cdiv(call.S, t.bk), t.bk, weight)


def far_queries(
    t: Tile, w: walk.Walk, ops: Operands, held: Any, pruning: Pruning, plan: Plan
) -> walk.Remaining:
    """The far blocks that remain, where a block's row sums are at least its floor."""
    call, lead = t.call, (t.b, t.h)
    norm = _norm_of_keys(pruning.norms, t)
    reach_block = block_of(call, plan, "forward").block_q

    def weight(i: jax.Array, ok: jax.Array) -> tuple[jax.Array, jax.Array]:
        q0 = i * t.bq + t.frame.offset
        reach = walk.of_blocks(
            pruning.reach, lead, i, ok, t.bq, reach_block, jnp.maximum
        )
        floor = walk.of_blocks(pruning.floors, lead, i, ok, t.bq, GRAIN, jnp.minimum)
        most = bound(ops.added, held, q0, q0 + t.bq - 1, t.k0, t.k0 + t.bk - 1)
        return reach * norm + most, floor

    return walk.holes(call, w.sides, pl.cdiv(call.T, t.bq), t.bq, weight)


def report(ref: Any, t: Tile, n: Any, w: walk.Walk, far: walk.Remaining) -> None:
    """How many blocks this program visited, and how many there were."""
    near = i32(w.near[1]) - i32(w.near[0])
    store_number(ref, (t.b, t.h, n, i32(0) * n), near + i32(far.count))
    store_number(ref, (t.b, t.h, n, i32(0) * n + 1), w.visible)


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
