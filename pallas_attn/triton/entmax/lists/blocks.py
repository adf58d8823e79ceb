"""How the passes over lists are cut."""

from __future__ import annotations

from dataclasses import replace

from jax import lax
from jax.experimental import pallas as pl

from pallas_attn.config import Block
from pallas_attn.tiled.plan import Plan
from pallas_attn.triton.blocks import block_of
from pallas_attn.triton.entmax.call import SparseCall
from pallas_attn.triton.entmax.support import WORD


# Numbers of a row that a program has in flight at a time.
AHEAD = 4


def capacity(k: int) -> int:
    """The candidates of a row that a list of k holds: slots bound the k-th from below.

    A row with more takes the exact and slow way to its bound.
    """
    return max(16, pl.next_power_of_2(k + k // 2 + 8))


def sweep_block(call: SparseCall, plan: Plan) -> Block:
    """Of the pass over tiles."""
    block = block_of(call, plan, "forward")
    # IEEE products keep their operands in registers, beside slots or words.
    warps = 8 if call.precision == lax.Precision.HIGHEST else block.num_warps
    return replace(block, num_warps=warps)


def keys_of_word(block_k: int) -> int:
    """Keys that a word of candidates has a bit for."""
    return min(WORD, block_k)


def gather_block(widest: int) -> Block:
    """Of the passes that gather vectors for the queries of a program."""
    return Block(max(2, min(8, 512 // widest)), AHEAD, 1, 2)


def select_block(length: int) -> Block:
    """Of the pass that holds whole lists in registers: few, so that many programs run.

    They are chains of short steps that wait for each other.
    """
    return Block(max(1, 128 // length), length, max(1, min(16, length // 512)), 1)


def cols_block(call: SparseCall, widest: int, exact: bool) -> Block:
    """Of the pass over the lists of a key block: entries of a step, keys of a block."""
    if widest > 128:
        return Block(16, 32, 8, 1) if exact else Block(32, 32, 8, 1)
    if exact:
        return Block(32, 32, 4, 1)
    if call.dtype == "float32":
        return Block(32, 32, 4, 1)
    # One stage: with more, ptxas waits for each product.
    return Block(64, 32, 4, 1)
