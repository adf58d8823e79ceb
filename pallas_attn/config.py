"""Block sizes: what a user may set."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Block:
    """How one pass is cut into tiles and compiled.

    Args:
        block_q: Queries of a tile; a power of two, at least 16.
        block_k: Keys of a tile; a power of two, at least 16.
        num_warps: Warps of a program: 1, 2, 4, 8 or 16.
        num_stages: Depth of the software pipeline, at least 1.

    >>> Block(64, 32)
    Block(block_q=64, block_k=32, num_warps=4, num_stages=3)
    """

    block_q: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class Config:
    """Blocks for each pass (None: the shipped choice), and whether to prune.

    Args:
        forward: The forward pass.
        rows: The backward pass that owns what varies along queries (dq).
        cols: The backward pass that owns what varies along keys (dk, dv).
        tiles: The backward pass that owns what varies along both (a dense bias), or
            with the distance (a table): square then, of the smaller side.
        prune: Leave out key blocks that provably hold at most 2^-24 of the weight, and
            those that a mask hides.
        carry_mib: The most MiB of carries that Co-ALiBi's backward passes hand over; it
            goes through groups of heads to stay below, 8 T S / block_k bytes a head.
        tangent: The pass of forward mode, of softmax.

    >>> config = Config(forward=Block(64, 32), prune=False)
    >>> config.rows is None  # the shipped choice
    True
    """

    forward: Block | None = None
    rows: Block | None = None
    cols: Block | None = None
    tiles: Block | None = None
    prune: bool = True
    carry_mib: int = 512
    tangent: Block | None = None
