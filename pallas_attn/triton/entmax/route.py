"""Which way a call goes: over tiles, or through lists of keys.

Lists hold the keys with weight of every query. With a top_k they always fit. Without
one they do where supports are short, which long rows of many scores mostly have: the
device looks, and takes the tiles where some row's does not fit.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_attn.normalizers.entmax import Entmax, Learned, Power, takes_power
from pallas_attn.problem import Problem
from pallas_attn.tiled.autodiff import (
    collected,
    columned,
    Made,
    operands,
    reduced,
)
from pallas_attn.tiled.operands import Operands, Wanted
from pallas_attn.tiled.plan import Plan, plan
from pallas_attn.triton.entmax import over_tiles
from pallas_attn.triton.entmax.blocks import settled
from pallas_attn.triton.entmax.call import sparse, SparseCall
from pallas_attn.triton.entmax.lists import passes as over_lists
from pallas_attn.triton.entmax.lists.operands import Lists
from pallas_attn.triton.entmax.operands import Dense, Residuals
from pallas_attn.types import Scalar


f32 = jnp.float32

# From so many keys on, plain entmax looks whether its supports are short: where their
# lists, numbers for each key of a row, are no larger than this.
LONG = 8192
LIST_BYTES, KEY_BYTES = 2**32, 24

# None where it is static.
Alpha = Float[Array, "#B #N"] | None

# What a forward pass leaves, as `Residuals` has it: m, level, dense, lists.
Left = tuple[Array, Array, Dense | None, Lists | None]


def prepared(
    problem: Problem,
) -> tuple[Operands, Alpha, SparseCall]:
    """The operands of the passes, alpha if it is an array, the call with its blocks."""
    ops, call = operands(problem)
    assert isinstance(problem.normalizer, Entmax)
    alpha, call = sparse(call, problem.normalizer)
    return ops, alpha, settled(call)


def forward(
    ops: Operands,
    alpha: Alpha,
    call: SparseCall,
    wanted: Wanted,
    wants_alpha: bool,
) -> tuple[tuple[Array, Array], Residuals]:
    """((output, tau), residuals)."""
    given, asked = ops, wanted
    ops, wanted = columned(ops, wanted, call)
    p = plan(call, ops.sight, ops.added, wanted, may_store=False)
    found = tiles = None
    if call.top_k is None and not _may_list(call, p):
        o, tiles = over_tiles.forward(ops, alpha, call, p)
        m, level = tiles.m, tiles.level
    else:
        found = over_lists.select(ops, alpha, call, p)
        o, m, level, tiles = _taken(ops, alpha, found, call, p)
    tau = _threshold_of(alpha, m, level, call)
    left = (m, level, tiles, found)
    return (o, tau), residuals(given, alpha, left, call, asked, wants_alpha)


def residuals(
    ops: Operands,
    alpha: Alpha,
    left: Left,
    call: SparseCall,
    wanted: Wanted,
    wants_alpha: bool,
) -> Residuals:
    """What the backward pass reads: what a forward pass left, and its operands."""
    columns, asked = columned(ops, wanted, call)
    products = ops.added.products
    return Residuals(columns, products, alpha, *left, asked, wants_alpha=wants_alpha)


def _may_list(call: SparseCall, p: Plan) -> bool:
    """Whether plain entmax tries lists; a bound leaves few blocks of tiles anyway."""
    sharp = call.alpha is not None and call.alpha >= 1.5
    size = call.B * call.N * call.T * over_lists.SHORT * KEY_BYTES
    return call.S >= LONG and sharp and not p.pruned and size <= LIST_BYTES


def _taken(
    ops: Operands, alpha: Alpha, found: Lists, call: SparseCall, p: Plan
) -> tuple[Array, Array, Array, Dense | None]:
    """(output, m, level, what tiles leave) by lists; by tiles if they do not fit."""

    def by_lists() -> tuple[Array, Array, Array]:
        return over_lists.output(found, ops.v, ops.sight, call), found.m, found.level

    if call.top_k is not None:
        return *by_lists(), None

    def by_tiles() -> tuple[Array, Array, Array, Dense]:
        o, tiles = over_tiles.forward(ops, alpha, call, p)
        return o, tiles.m, tiles.level, tiles

    blank = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(by_tiles)[3]
    )
    return lax.cond(found.fits, lambda: (*by_lists(), blank), by_tiles)


def backward(
    res: Residuals, do: Array, dtau: Array | None, call: SparseCall
) -> tuple[Operands, Array | None]:
    """The gradient of every operand and of alpha; None where nobody asked."""
    p = plan(call, res.ops.sight, res.ops.added, res.wanted, may_store=False)
    total = None
    if dtau is not None:
        dtau = jnp.where(res.m == jnp.inf, 0.0, dtau)
        total = dtau * residual_by_score(res.alpha, call)

    def by_tiles() -> tuple[Operands, Array | None]:
        assert res.dense is not None
        return over_tiles.backward(res, res.dense, do, dtau, total, call, p)

    def by_lists() -> tuple[Operands, Array | None]:
        assert res.lists is not None
        made = over_lists.backward(
            res.ops,
            res.alpha,
            res.lists,
            do,
            dtau,
            res.wanted,
            call,
            p,
            wants_alpha=res.wants_alpha,
        )
        every = Made(made.rows, made.cols, made.pairs, total)
        return collected(res, every, p, call), made.alpha

    if res.lists is None:
        grads, by_alpha = by_tiles()
    elif res.dense is None:
        grads, by_alpha = by_lists()
    else:
        grads, by_alpha = lax.cond(res.lists.fits, by_lists, by_tiles)
    if by_alpha is None:
        return grads, None
    assert res.alpha is not None
    return grads, reduced(by_alpha.sum(2), res.alpha, (0, 1))


def _threshold_of(alpha: Alpha, m: Array, level: Array, call: SparseCall) -> Array:
    a = _a(alpha, call)
    power = Power(call.alpha - 1) if takes_power(call.alpha) else Learned(a)
    tau = power.threshold(m * call.scale, level)
    is_lse = jnp.asarray(a == 0)
    return jnp.where(m == jnp.inf, jnp.where(is_lse, -jnp.inf, jnp.inf), tau)


def residual_by_score(alpha: Alpha, call: SparseCall) -> Array:
    """What the residual moves by when all scores do: a; of the log-sum-exp, 1."""
    a = _a(alpha, call)
    return jnp.where(a == 0, 1.0, a)


def _a(alpha: Alpha, call: SparseCall) -> Scalar:
    """Minus 1, alpha: a number, or [#B, #N, 1]."""
    if call.alpha is not None:
        return call.alpha - 1
    assert alpha is not None
    return alpha[..., None] - 1
