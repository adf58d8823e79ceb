"""The blocks of entmax's passes: of one size, because a bit stands for one."""

from __future__ import annotations

from dataclasses import replace

from pallas_attn.triton.blocks import shipped_of_entmax
from pallas_attn.triton.entmax.call import SparseCall


def settled(call: SparseCall) -> SparseCall:
    """The call with the blocks of every pass in its config: the user's or the shipped.

    checks/options.py sees to it that a user gives all of one size, or none.
    """
    config = call.config
    if config.forward is None or config.rows is None or config.cols is None:
        forward, rows, cols = shipped_of_entmax(call)
        config = replace(config, forward=forward, rows=rows, cols=cols)
    return replace(call, config=replace(config, tiles=config.rows))


def with_wide_keys(call: SparseCall) -> SparseCall:
    """The call whose forward block has twice the keys, for twice the slots."""
    block = call.config.forward
    assert block is not None
    wide = replace(block, block_k=2 * block.block_k, num_warps=2 * block.num_warps)
    return replace(call, config=replace(call.config, forward=wide))
