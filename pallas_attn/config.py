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
        tiles: The backward pass that owns what varies along both (a dense bias).
        prune: Leave out key blocks that provably hold at most 2^-24 of the weight.
        carry_mib: The most MiB of carries that Co-ALiBi's backward passes hand over; it
            goes through groups of heads to stay below, 8 T S / block_k bytes a head.

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


@dataclass(frozen=True)
class Load:
    """What decides the shipped blocks of a call."""

    head_dim: int  # the larger of H and h
    dtype: str  # of query, key and value
    exact: bool  # IEEE float32 dots: no tensor cores
    length: int  # T
    dense: bool  # a full bias tile is added
    own: bool  # it has one entry per score: cols writes its gradient
    bent: bool  # a field along queries or keys is not simply added to the scores
    free: bool  # no dense bias, not causal, not pruned
    columns: int  # of all factored products
    small: bool = False  # 99 KiB of shared memory, not 163 or 227


def shipped(kernel: str, load: Load) -> Block:
    """The shipped block of a kernel.

    Measured on an H200 in bfloat16. Three stages are what Triton needs to keep two
    loads in flight; fewer only where shared memory or registers run out. What a card of
    99 KiB takes instead is made to fit, and was not timed.
    """
    if load.dtype == "float32":
        return _float32(kernel, load)
    if load.bent and load.head_dim <= 128:
        return _bent(kernel)
    if load.small and (block := _small(kernel, load)):
        return block
    if load.head_dim > 128:
        return _widest(kernel)
    wide = load.head_dim > 64
    thin = load.free and load.head_dim <= 32 and load.head_dim + load.columns <= 64
    match kernel:
        case "forward":
            if wide and (load.free or load.dense):
                return Block(128, 64, 8, 3)
            if wide and load.columns:  # a third stage leaves one program to an SM
                return Block(64, 64, 4, 2)
            tall = thin or (32 < load.head_dim <= 64 and (load.free or load.dense))
            return Block(128, 64) if tall else Block(64, 64)
        case "rows":
            if wide and load.length > 4096 and not load.dense:
                return Block(128, 64, 8, 3)
            if wide:
                return Block(64, 64, 4, 2)
            return Block(128, 64) if thin else Block(64, 64)
        case "cols":
            if wide:  # registers run out where a shared tile is beside dk and dv
                return Block(64, 64, 8 if load.dense and not load.own else 4, 2)
            return Block(64, 128) if thin else Block(64, 64)
        case "thin_rows":
            return Block(128, 64, 4, 4)
        case "thin_cols":
            return Block(64, 128)
        case _:
            assert kernel == "tiles"
            return Block(64, 64)


def _widest(kernel: str) -> Block:
    """Head dims of 129 to 256, 16-bit."""
    if kernel.startswith("thin"):
        return Block(64, 64, 8, 2)
    return Block(16, 64, 8, 2) if kernel == "cols" else Block(64, 32, 8, 2)


def _small(kernel: str, load: Load) -> Block | None:
    """Of a card with 99 KiB, where another may not fit; None: the others' does."""
    width = load.head_dim + load.columns  # of a key, with its side of all products
    if width > 128 and not kernel.startswith("thin"):
        return Block(16 if kernel == "cols" else 32, 32, 8, 2)
    if load.head_dim > 128:
        return None
    if kernel == "thin_rows":  # dS may be float32
        return Block(64, 64, 4, 3)
    if width > 64 and kernel != "thin_cols":
        return Block(64, 64, 4, 2)
    return Block(64, 64) if kernel == "forward" and load.dense else None


def _bent(kernel: str) -> Block:
    """A term's own arithmetic, and its derivatives, take registers of every score."""
    return Block(32, 64, 4, 2) if kernel in ("forward", "rows") else Block(32, 32, 4, 2)


def _float32(kernel: str, load: Load) -> Block:
    """float32 takes twice the shared memory; IEEE dots keep operands in registers."""
    if load.head_dim > 128:
        small = load.exact or load.small
        return Block(16, 16, 8, 1) if small else Block(32, 32, 8, 1)
    if load.exact:
        return Block(32, 16, 8, 2) if load.head_dim > 64 else Block(32, 32, 8, 2)
    narrow = load.head_dim <= 64
    match kernel:
        case "forward" | "thin_rows":
            return Block(64, 64 if narrow else 32, 8, 2)
        case "thin_cols":
            return Block(64 if narrow else 32, 64, 8, 2)
        case "cols" if load.small and not narrow:
            return Block(16, 32, 8, 2)
        case _:
            return Block(64 if narrow else 32, 32, 8, 2)
