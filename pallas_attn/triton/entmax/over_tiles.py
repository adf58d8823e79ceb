"""Entmax over tiles: slots, output, then the passes of softmax over the blocks left."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_attn.normalizers.entmax import Learned
from pallas_attn.tiled.autodiff import gradients
from pallas_attn.tiled.operands import Operands
from pallas_attn.tiled.plan import Plan
from pallas_attn.triton import passes
from pallas_attn.triton.again import launch_watched
from pallas_attn.triton.blocks import block_of
from pallas_attn.triton.entmax.alpha import alpha_kernel
from pallas_attn.triton.entmax.blocks import with_wide_keys
from pallas_attn.triton.entmax.call import SparseCall
from pallas_attn.triton.entmax.operands import Cotangents, Dense, Residuals
from pallas_attn.triton.entmax.output import Output, output_kernel
from pallas_attn.triton.entmax.power import fuses
from pallas_attn.triton.entmax.support import by_key, Support, words_of
from pallas_attn.triton.entmax.threshold import Found, slots_kernel
from pallas_attn.triton.preprocess import deltas
from pallas_attn.triton.programs import grid_of
from pallas_attn.types import outline


f32 = jnp.float32
i32 = jnp.int32

# What the last step of a threshold may leave of sum p = 1, in units of a dtype's own.
TOLERANCE = 1 / 16
CORNERS = 1 / 8  # at alpha = 2, where that is a bound which few rows come near to


def forward(
    ops: Operands, alpha: Array | None, call: SparseCall, p: Plan
) -> tuple[Array, Dense]:
    """The output, and what the backward passes need."""
    first = _slots(ops, alpha, call, p)
    out = _output(ops, alpha, first, call, p)
    bits = first.bits if p.pruned else out.bits
    assert bits is not None
    return out.o, Dense(first.m, out.level, out.u, out.o2, bits, out.visits)


def backward(
    res: Residuals,
    saved: Dense,
    do: Array,
    dtau: Array | None,
    total: Array | None,
    call: SparseCall,
    p: Plan,
) -> tuple[Operands, Array | None]:
    """The gradient of every operand, and dL/dalpha of each row if that is wanted.

    dtau: the residual's cotangent, 0 in empty rows; None: 0.
    total: what a row of dS adds up to, [B, N, T]; None: 0.
    """
    share = total
    if total is not None:
        share = total / jnp.where(saved.m == jnp.inf, 1.0, saved.u)
    delta = _delta(res, saved, do, share, call)
    rows = (saved.m, saved.level, saved.u, delta)
    fused = fuses(call, res.ops)
    cot = Cotangents(do, *rows, res.alpha, total, fused)
    support = Support(saved.bits)
    if p.cols:
        block = block_of(call, p, "cols")
        turned = by_key(saved.bits, pl.cdiv(call.S, block.block_k))
        support = replace(support, by_key=turned)
    grads = gradients(res, cot, support, total, call, p, passes)
    if not res.wants_alpha:
        return grads, None
    assert res.alpha is not None
    still = res.alpha[..., None] == 1  # the log-sum-exp does not know alpha
    expected = total
    if total is not None and share is not None:
        cot = replace(cot, delta=delta + jnp.where(still, share, 0.0))
        expected = jnp.where(still, 0.0, total)
    rows = launch_watched(
        alpha_kernel,
        grid_of(call, p, "rows").shape,
        (res.ops, cot, expected, support),
        outline(saved.m.shape, f32),
        call,
        block_of(call, p, "rows"),
        own=block_of(call, p, "rows").block_q,
        plan=p,
    )
    if dtau is not None:  # tau = a (m + L) - 1
        power = Learned(res.alpha[..., None] - 1)
        m = saved.m * call.scale + power.lift(saved.level)
        rows = rows + jnp.where(still | (saved.m == jnp.inf), 0.0, dtau * m)
    return grads, rows


def _slots(ops: Operands, alpha: Array | None, call: SparseCall, p: Plan) -> Found:
    """What the first pass finds; with the bits, where it looks at few blocks."""
    words = _words(call) if p.pruned else 0
    call = call if words else with_wide_keys(call)
    grid = grid_of(call, p, "forward")
    rows = outline((call.B, call.N, call.T), f32)
    bits = _bits(call, grid.blocks, words) if words else None
    outputs = Found(bits=bits, level=rows, m=rows, r=rows)
    return launch_watched(
        slots_kernel,
        grid.shape,
        (ops, alpha, passes.grains(ops, call, p)),
        outputs,
        call,
        block_of(call, p, "forward"),
        own=block_of(call, p, "forward").block_q,
        plan=p,
        words=words,
    )


def _output(
    ops: Operands, alpha: Array | None, found: Found, call: SparseCall, p: Plan
) -> Output:
    grid, words = grid_of(call, p, "forward"), 0 if p.pruned else _words(call)
    rows = outline((call.B, call.N, call.T), f32)
    o = (call.B, call.T, call.N, call.h)
    outputs = Output(
        bits=_bits(call, grid.blocks, words) if words else None,
        level=rows,
        o=outline(o, ops.q.dtype),
        o2=outline(o, f32),
        u=rows,
        visits=outline((call.B, call.N, grid.blocks, 2), i32),
    )
    share = CORNERS if call.alpha == 2 else TOLERANCE
    return launch_watched(
        output_kernel,
        grid.shape,
        (ops, alpha, found),
        outputs,
        call,
        block_of(call, p, "forward"),
        own=block_of(call, p, "forward").block_q,
        plan=p,
        words=words,
        tolerance=share * float(jnp.finfo(ops.q.dtype).eps),
    )


def _words(call: SparseCall) -> int:
    block = call.config.forward
    assert block is not None
    return words_of(pl.cdiv(call.S, block.block_k))


def _bits(call: SparseCall, blocks: int, words: int) -> Array:
    return outline((call.B, call.N, blocks, words), i32)


def _delta(
    res: Residuals,
    saved: Dense,
    do: Array,
    share_of_u: Array | None,
    call: SparseCall,
) -> Array:
    """The delta <do, o2> less what the residual's cotangent adds; 0 in empty rows."""
    return deltas(saved.o2, do, saved.m, share_of_u, res.ops.sight, call)[0]
