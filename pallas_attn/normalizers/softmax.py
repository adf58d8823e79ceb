"""Softmax: how a row of scores becomes weights.

The kernels keep a score in two parts: a dot s, and `rest`, the sum of what is added to
it, in log2 (None if nothing is). It is s mul + rest with mul = scale log2(e), and its
weight 2^(s mul + (rest - reference)). Statistics are in log2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_attn.call import NO_WEIGHT


LOG2E = math.log2(math.e)

# Scores may lie this far (in log2) below a bound on them before 2^(score - bound) is
# too coarse, and the true maximum is found first.
SPREAD = 100.0

Exp2 = Callable[[jax.Array], jax.Array]


@dataclass(frozen=True)
class Softmax:
    """P = exp(t - lse), lse = log sum exp t over the visible keys.

    The residual of a call is lse, float32 [B, T, N] in natural units, differentiable.
    """


def lowest() -> float:
    """Where a running maximum starts: a row of scores up to it attends to nothing."""
    return NO_WEIGHT * (1 - 1e-6) * LOG2E


def tops(s: jax.Array, rest: jax.Array | None, mul: float) -> jax.Array:
    """The largest score of every row of a tile, [queries]."""
    return jnp.max(s, 1) * mul if rest is None else jnp.max(s * mul + rest, 1)


def pace(reference: jax.Array, mul: float) -> jax.Array:
    """What a dot is multiplied with where scores may be large, mul or almost 0.

    Beside 2^32 a dot is lost in rounding; 2^(what is left of it) need not be finite.
    """
    return jnp.where(jnp.abs(reference) < 2.0**32, mul, mul * 2.0**-64)


def rescaled(
    m: jax.Array,
    tile: tuple[jax.Array, jax.Array | None],
    row: jax.Array,
    mul: float,
    exp2: Exp2,
    large: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Online softmax: (weights of this tile, factor for what came before, maximum)."""
    new = jnp.maximum(m, tops(*tile, mul) + row)
    by = pace(new, mul)[:, None] if large else mul
    return referred(tile, row, new, by, exp2), exp2(m - new), new


def referred(
    tile: tuple[jax.Array, jax.Array | None],
    row: jax.Array,
    reference: jax.Array,
    mul: Any,
    exp2: Exp2,
) -> jax.Array:
    """Weights of a tile relative to 2^reference.

    The reference leaves `rest` before the dot is added: beside a bias of -1e9 it would
    be lost.
    """
    s, rest = tile
    base = (reference - row)[:, None]
    return exp2(s * mul + (-base if rest is None else rest - base))


def log_sum(reference: jax.Array, total: jax.Array) -> jax.Array:
    """log2 of a row's sum; +inf for an empty row, so that 2^(x - it) is 0 unmasked."""
    return jnp.where(total == 0, jnp.inf, reference + jnp.log2(total))


def score_gradient(p: jax.Array, dp: jax.Array, delta: jax.Array) -> jax.Array:
    """The gradient of the scores, dT = P (dP - delta); delta = <do, o> - dlse."""
    return p * (dp - delta)
