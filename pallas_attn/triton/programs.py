"""The programs of a pass, the block that each owns, and the blocks it meets."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_attn.call import Call
from pallas_attn.tiled.block_ranges import (
    covers,
    cut_evenly,
    keys_in_sight,
    most,
    queries_in_sight,
    Runs,
    runs,
)
from pallas_attn.tiled.plan import Plan
from pallas_attn.tiled.summaries import Frame, frame, Sight
from pallas_attn.triton import schedule
from pallas_attn.triton.blocks import block_of
from pallas_attn.triton.launch import Program
from pallas_attn.triton.memory import load_number, store_number
from pallas_attn.triton.ptx import uniform
from pallas_attn.triton.tile import Tile
from pallas_attn.types import Index, Ref


i32 = jnp.int32


@dataclass(frozen=True)
class Grid:
    """The programs of a pass, one per (batch entry, head, block), and their order.

    long_first: programs differ in length: heads go fastest, long ones start first.
    flock: batch entries that run side by side because they share a bias tile.
    """

    batch: int
    heads: int
    blocks: int
    long_first: bool
    flock: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """The launch grid, fastest axis first."""
        if self.flock > 1:
            return (self.flock, self.blocks, self.heads, self.batch // self.flock)
        if self.long_first:
            return (self.heads, self.batch, self.blocks)
        return (self.blocks, self.heads, self.batch)

    def place(self, program: Program) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(batch entry, head, block) of a program."""
        if self.flock > 1:
            entry, block, head, group = program.place
            return group * self.flock + entry, head, block
        x, y, z = program.place
        return (y, x, z) if self.long_first else (z, y, x)


def grid_of(call: Call, plan: Plan, kernel: str) -> Grid:
    """The programs of a pass: by key block for cols, by query block for the others."""
    block = block_of(call, plan, kernel)
    by_key = kernel.endswith("cols")
    return Grid(
        batch=call.B,
        heads=call.K if by_key else call.N,
        blocks=pl.cdiv(call.S, block.block_k)
        if by_key
        else pl.cdiv(call.T, block.block_q),
        long_first=call.causal or plan.pruned or plan.looked,
        flock=plan.batch_group,
    )


def frame_of(call: Call, sight: Sight, b: Index) -> Frame:
    """The frame of batch entry b, in uniform registers."""

    def number(ref: Ref, at: tuple[Index, ...]) -> jax.Array:
        return uniform(call, load_number(ref, at))

    found, seed = frame(call, sight, b, number), sight.arrays.seed
    if seed is None:
        return found
    *lead, count = seed.shape
    front = (i32(0),) * len(lead)
    words = tuple(number(seed, (*front, i32(i))) for i in range(count))
    return replace(found, seed=words)


def query_tile(
    sight: Sight,
    call: Call,
    plan: Plan,
    kernel: str,
    program: Program,
    order: Ref | None = None,
) -> Tile:
    """The query block that a program owns; its first key block.

    order: in which blocks are begun; None: where they lie.
    """
    grid, block = grid_of(call, plan, kernel), block_of(call, plan, kernel)
    b, h, i = grid.place(program)
    if order is not None:
        i = uniform(call, load_number(order, (i,)))
    elif call.causal:  # long programs first
        i = grid.blocks - 1 - i
    bq, bk = block.block_q, block.block_k
    where = frame_of(call, sight, b)
    flag = program.flag
    return Tile(call, sight, where, b, h, i * bq, i * 0, bq, bk, flag=flag)


def key_tile(
    sight: Sight,
    call: Call,
    plan: Plan,
    kernel: str,
    program: Program,
    order: Ref | None = None,
) -> Tile:
    """The key block that a program owns, of the first query head of its key head.

    order: as `query_tile` has it.
    """
    grid, block = grid_of(call, plan, kernel), block_of(call, plan, kernel)
    b, head, j = grid.place(program)
    j = j if order is None else uniform(call, load_number(order, (j,)))
    bq, bk = block.block_q, block.block_k
    where = frame_of(call, sight, b)
    flip = plan.flip and kernel == "cols"
    h, q0, k0 = head * call.G, j * 0, j * bk
    flag = program.flag
    return Tile(call, sight, where, b, h, q0, k0, bq, bk, flip=flip, flag=flag)


def keys_of(t: Tile, two: bool) -> schedule.Walk:
    """The key blocks that a query block visits."""
    span = schedule.hull(t.call, t.sight, t.b, t.h, t.q0, t.bq, t.bk, by_key=False)
    return schedule.over_keys(t.call, t.frame, t.q0, t.bq, t.bk, two, span)


def queries_of(t: Tile, two: bool) -> schedule.Walk:
    """The query blocks that a key block visits."""
    span = schedule.hull(t.call, t.sight, t.b, t.h, t.k0, t.bk, t.bq, by_key=True)
    return schedule.over_queries(t.call, t.frame, t.k0, t.bq, t.bk, two, span)


def key_runs(t: Tile) -> Runs:
    """The key blocks of a query block; all in the middle where arrays hide pairs."""
    call = t.call
    hull = schedule.hull(call, t.sight, t.b, t.h, t.q0, t.bq, t.bk, by_key=False)
    visited, whole = keys_in_sight(call, t.frame, t.q0, t.bq)
    if t.sight.veiled:
        return runs(t.bk, visited, visited, hull, low_edge=False, high_edge=False)
    window = call.window is not None
    edge = call.causal or window or _ragged(t)
    return runs(t.bk, visited, whole, hull, low_edge=window, high_edge=edge)


def query_runs(t: Tile) -> Runs:
    """The query blocks of a key block; past the last query a row's weights are 0."""
    call = t.call
    hull = schedule.hull(call, t.sight, t.b, t.h, t.k0, t.bk, t.bq, by_key=True)
    visited, whole = queries_in_sight(call, t.frame, t.k0, t.bk)
    if t.sight.veiled:
        return runs(t.bq, visited, visited, hull, low_edge=False, high_edge=False)
    window = call.window is not None
    ragged = _ragged(t)
    low_edge = call.causal or window or ragged
    # Past the end of an array nothing is read; past a length there may be anything.
    high_edge = window or not covers(t.frame.queries, call.T)
    found = runs(t.bq, visited, whole, hull, low_edge=low_edge, high_edge=high_edge)
    if not ragged:
        return found
    # A key block that the last key ends is masked everywhere.
    lo = jnp.where(t.k0 + t.bk > t.frame.keys[1], i32(found.hi), i32(found.lo))
    return Runs(found.first, most(found.lo, lo), found.hi, found.last)


def side_of(t: Tile) -> int:
    """The side of the diagonal that a call's blocks lie on: 1, or 0 for either."""
    return 1 if t.call.causal and not t.frame.placed else 0


def _ragged(t: Tile) -> bool:
    """Whether a key block may have keys that nobody sees at its end."""
    return not cut_evenly(t.frame.keys, t.call.S, t.bk)


# How many blocks a program visits, and how many there are to visit.
Visits = tuple[Index, Index]


def report(ref: Ref, t: Tile, n: jax.Array, visits: Visits) -> None:
    """Store what program n of its batch entry and head visited."""
    for place, count in enumerate(visits):
        store_number(ref, (t.b, t.h, n, i32(0) * n + place), count)
