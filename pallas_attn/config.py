"""Block sizes: what a user may set, and the shipped choice for each pass."""

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
        tiles: The backward pass that owns what varies along both (a dense bias).
        prune: Leave out key blocks that provably hold at most 2^-24 of the weight.
    """

    forward: Block | None = None
    rows: Block | None = None
    cols: Block | None = None
    tiles: Block | None = None
    prune: bool = True
