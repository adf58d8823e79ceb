"""Blocks, groups of heads, and the runs of blocks that a program goes through."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_attn.call import Call
from pallas_attn.config import Block
from pallas_attn.tiled.summaries import Sight
from pallas_attn.triton.blocks import shipped_of_co_alibi
from pallas_attn.triton.launch import Program
from pallas_attn.triton.memory import load_number
from pallas_attn.triton.programs import frame_of, Grid
from pallas_attn.triton.tile import Tile
from pallas_attn.types import Ref


i32 = jnp.int32


@dataclass(frozen=True)
class Plan:
    """How a call is cut.

    All passes have key blocks of one size, and a query block of the forward pass is a
    whole number of those of rows and of cols.

    batch, heads: batch entries and key heads that the backward passes take at once.
    """

    forward: Block
    rows: Block
    cols: Block
    batch: int
    heads: int

    @property
    def block_k(self) -> int:
        """Keys of a tile, of every pass."""
        return self.forward.block_k


def plan(call: Call) -> Plan:
    """The user's blocks or the shipped ones; groups whose carries fit the budget."""
    forward, rows, cols = call.config.forward, call.config.rows, call.config.cols
    if forward is None or rows is None or cols is None:
        forward, rows, cols = shipped_of_co_alibi(call)
    return Plan(forward, rows, cols, *_groups(call, forward.block_k))


def carry_bytes(call: Call, block_k: int) -> int:
    """Bytes of the carries of one key head: two float32 per row and key block."""
    return 8 * call.G * call.T * pl.cdiv(call.S, block_k)


def _groups(call: Call, block_k: int) -> tuple[int, int]:
    """The most batch entries and key heads whose carries fit the budget."""
    most_heads = call.config.carry_mib * 2**20 // carry_bytes(call, block_k)

    def divisor(n: int, limit: int) -> int:
        return max(d for d in range(1, n + 1) if n % d == 0 and d <= max(1, limit))

    heads = divisor(call.K, most_heads)
    batch = divisor(call.B, most_heads // call.K) if heads == call.K else 1
    return batch, heads


def grid_of(call: Call, kernel: str, plan: Plan) -> Grid:
    """The programs of a pass; long ones first."""
    if kernel == "forward":
        blocks = pl.cdiv(call.T, plan.forward.block_q)
        return Grid(call.B, call.N, blocks, long_first=True)
    if kernel == "rows":
        blocks = pl.cdiv(call.T, plan.rows.block_q)
        return Grid(plan.batch, plan.heads * call.G, blocks, long_first=True)
    blocks = pl.cdiv(call.S, plan.block_k)
    return Grid(plan.batch, plan.heads, blocks, long_first=True)


def query_tile(
    sight: Sight,
    call: Call,
    plan: Plan,
    kernel: str,
    start: Ref | None,
    program: Program,
) -> Tile:
    """The query block that a program owns; start: of the group, (entry, head)."""
    grid, block = grid_of(call, kernel, plan), getattr(plan, kernel)
    b, h, i = grid.place(program)
    b, h = b + _number(start, 0), h + _number(start, 1) * call.G
    i = grid.blocks - 1 - i
    bq, bk = block.block_q, block.block_k
    where = frame_of(call, sight, b)
    return Tile(call, sight, where, b, h, i * bq, i * 0, bq, bk)


def key_tile(
    sight: Sight, call: Call, plan: Plan, start: Ref | None, program: Program
) -> Tile:
    """The key block that a program owns, of the first query head of its key head."""
    b, head, j = grid_of(call, "cols", plan).place(program)
    b, head = b + _number(start, 0), head + _number(start, 1)
    bq, bk = plan.cols.block_q, plan.block_k
    where = frame_of(call, sight, b)
    return Tile(call, sight, where, b, head * call.G, j * 0, j * bk, bq, bk, flip=True)


def _number(ref: Ref | None, i: int) -> jax.Array:
    return i32(0) if ref is None else load_number(ref, (i32(i),))
