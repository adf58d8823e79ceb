"""The shipped blocks of every pass but those over lists, and which block a pass has."""

from __future__ import annotations

from dataclasses import dataclass

from jax import lax

from pallas_attn.call import Call
from pallas_attn.cards import LARGE
from pallas_attn.config import Block
from pallas_attn.tiled.plan import Plan


def block_of(call: Call, plan: Plan, kernel: str) -> Block:
    """The block of a kernel: the user's, or the shipped choice."""
    user = getattr(call.config, kernel, None)
    if kernel == "diagonals":
        user = call.config.tiles
    load = Load(
        head_dim=max(call.H, call.h),
        dtype=call.dtype,
        exact=call.precision == lax.Precision.HIGHEST,
        length=call.T,
        dense=plan.dense,
        distances=plan.distances,
        looked=plan.looked,
        own=bool(plan.stored_fields),
        bent=plan.nonlinear,
        free=not (plan.dense or call.causal or plan.pruned),
        columns=plan.columns,
        small=call.shared_kib < LARGE,
    )
    block = user or shipped(kernel, load)
    return square(block) if kernel == "diagonals" else block


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
    distances: bool = False  # a number per distance is added
    looked: bool = False  # blocks that a mask hides are left out
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
    if load.looked and not load.dense and kernel in ("forward", "rows"):
        # a smaller block is hidden, or shown whole, more often
        return Block(64, 64, 4, 2 if wide else 3)
    thin = load.free and load.head_dim <= 32 and load.head_dim + load.columns <= 64
    match kernel:
        case "forward":
            if wide and (load.free or load.dense or load.distances):
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
        case "tangent":  # twice the operands of the forward pass
            if not wide:  # not timed
                return Block(64, 64, 4, 2)
            beside = load.dense or load.distances or load.columns  # does not fit then
            return Block(64, 32, 4, 2) if beside else Block(128, 64, 8, 2)
        case "thin_rows":
            return Block(128, 64, 4, 4)
        case "thin_cols":
            return Block(64, 128)
        case _:
            assert kernel in ("tiles", "diagonals")
            return Block(64, 64)


def square(block: Block) -> Block:
    """A block with as many queries as keys."""
    n = min(block.block_q, block.block_k)
    return Block(n, n, block.num_warps, block.num_stages)


def _widest(kernel: str) -> Block:
    """Head dims of 129 to 256, 16-bit."""
    if kernel.startswith("thin"):
        return Block(64, 64, 8, 2)
    if kernel == "tangent":
        return Block(32, 32, 8, 2)
    return Block(16, 64, 8, 2) if kernel == "cols" else Block(64, 32, 8, 2)


def _small(kernel: str, load: Load) -> Block | None:
    """Of a card with 99 KiB, where another may not fit; None: the others' does."""
    if kernel == "tangent":
        return Block(32, 32, 8, 1) if load.head_dim > 128 else Block(32, 32, 4, 2)
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
    tall = kernel in ("forward", "rows", "tangent")
    return Block(32, 64, 4, 2) if tall else Block(32, 32, 4, 2)


def _float32(kernel: str, load: Load) -> Block:
    """float32 takes twice the shared memory; IEEE dots keep operands in registers."""
    if load.head_dim > 128:
        small = load.exact or load.small or kernel == "tangent"
        return Block(16, 16, 8, 1) if small else Block(32, 32, 8, 1)
    if load.exact:
        return Block(32, 16, 8, 2) if load.head_dim > 64 else Block(32, 32, 8, 2)
    narrow = load.head_dim <= 64
    match kernel:
        case "tangent":
            return Block(32, 32, 8, 2) if narrow else Block(32, 16, 8, 2)
        case "forward" | "thin_rows":
            return Block(64, 64 if narrow else 32, 8, 2)
        case "thin_cols":
            return Block(64 if narrow else 32, 64, 8, 2)
        case "cols" if load.small and not narrow:
            return Block(16, 32, 8, 2)
        case _:
            return Block(64 if narrow else 32, 32, 8, 2)


def shipped_of_entmax(call: Call) -> tuple[Block, Block, Block]:
    """(forward, rows, cols) of entmax: a bit of its support stands for one size."""
    widest, small = max(call.H, call.h), call.shared_kib < LARGE
    if call.dtype == "float32":
        exact = call.precision == lax.Precision.HIGHEST
        size = 16 if widest > 128 or ((exact or small) and widest > 64) else 32
        return _three(Block(size, size, 4, 1 if exact else 2))
    if widest > 128:
        return _three(Block(32, 32, 8, 2))
    if small:  # fits beside float32 biases and products; not timed
        return _three(Block(64, 32, 4, 2))
    if widest > 64:
        return Block(64, 64, 4, 3), Block(64, 64, 4, 4), Block(64, 64, 4, 2)
    return _three(Block(64, 64, 4, 3))


def shipped_of_co_alibi(call: Call) -> tuple[Block, Block, Block]:
    """(forward, rows, cols) of Co-ALiBi.

    Measured on an H200 in bfloat16, heads of 64 and 128.
    """
    widest = max(call.H, call.h)
    if call.dtype == "float32":
        if widest > 128:
            return _three(Block(16, 16, 4, 1))
        if call.precision == lax.Precision.HIGHEST:
            return _three(Block(32, 16 if widest > 64 else 32, 4, 1))
        return _three(Block(32, 32, 4, 2))
    if widest > 128:
        return Block(64, 32, 8, 2), Block(32, 32, 8, 2), Block(32, 32, 8, 2)
    if widest > 64:
        return Block(64, 64, 4, 2), Block(64, 64, 4, 2), Block(32, 64, 4, 3)
    return _three(Block(64, 64, 4, 3))


def _three(block: Block) -> tuple[Block, Block, Block]:
    return block, block, block
