"""The blocks of entmax's passes: one size, because a bit stands for one."""

from __future__ import annotations

from dataclasses import replace

from jax import lax

from pallas_attn.cards import LARGE
from pallas_attn.config import Block
from pallas_attn.triton.entmax.call import SparseCall


def settled(call: SparseCall) -> SparseCall:
    """The call with the blocks of every pass in its config: the user's or the shipped.

    checks/options.py sees to it that a user gives all of one size, or none.
    """
    config = call.config
    if config.forward is None or config.rows is None or config.cols is None:
        forward, rows, cols = _shipped(call)
        config = replace(config, forward=forward, rows=rows, cols=cols)
    return replace(call, config=replace(config, tiles=config.rows))


def with_wide_keys(call: SparseCall) -> SparseCall:
    """The call whose forward block has twice the keys, for twice the slots."""
    block = call.config.forward
    assert block is not None
    wide = replace(block, block_k=2 * block.block_k, num_warps=2 * block.num_warps)
    return replace(call, config=replace(call.config, forward=wide))


def _shipped(call: SparseCall) -> tuple[Block, Block, Block]:
    """(forward, rows, cols)."""
    widest, small = max(call.H, call.h), call.shared_kib < LARGE
    if call.dtype == "float32":
        exact = call.precision == lax.Precision.HIGHEST
        size = 16 if widest > 128 or ((exact or small) and widest > 64) else 32
        return _alike(Block(size, size, 4, 1 if exact else 2))
    if widest > 128:
        return _alike(Block(32, 32, 8, 2))
    if small:  # fits beside float32 biases and products; not timed
        return _alike(Block(64, 32, 4, 2))
    if widest > 64:
        return Block(64, 64, 4, 3), Block(64, 64, 4, 4), Block(64, 64, 4, 2)
    return _alike(Block(64, 64, 4, 3))


def _alike(block: Block) -> tuple[Block, Block, Block]:
    return block, block, block
