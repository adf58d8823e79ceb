"""Softmax: how a row of scores becomes weights.

The kernels keep scores x in units of q.k: a weight is 2^(x mul - ref), with
mul = scale log2(e), one fused multiply-add. Statistics are in log2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_attn.call import NO_WEIGHT
from pallas_attn.flax_state import serializable
from pallas_attn.shown import with_fields


LOG2E = math.log2(math.e)
LN2 = 1 / LOG2E

# Where a bound on scores (in log2) takes the place of their maximum: weights reach
# 2^ROOM, so that their sums with values of 2^50 stay finite, and a row's largest score
# may lie SPREAD below what weights count from; else its true maximum is found first.
ROOM, SPREAD = 60.0, 100.0
# Up to this a bound, in log2, is right to a number beside which ROOM is large.
WIDEST = 2.0**24

Exp2 = Callable[[jax.Array], jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class Softmax:
    """P = exp(t - lse), lse = log(exp sink + sum exp t) over the visible keys.

    The residual of a call is lse, float32 [B, T, N] in natural units, differentiable.

    Args:
        sink: Floating [N] or [#B, N], one more score of every row, whose value is 0: it
            takes weight that no key gets. A leaf with a gradient. None: there is none.
            A row that sees no key has output 0 and lse = sink.

    Example:
        >>> import jax, pallas_attn
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 97, 8, 64))
        >>> output, lse = pallas_attn.dot_product_attention(
        ...     q, k, v, normalizer=pallas_attn.Softmax(), return_residual=True
        ... )
        >>> lse.shape
        (2, 97, 8)

    Sources: Dao et al., FlashAttention (arXiv 2205.14135), for lse and the tiles; Xiao
    et al., attention sinks (arXiv 2309.17453), and gpt-oss (arXiv 2508.10925), which
    learns a score per head.
    """

    family: ClassVar[str] = "softmax"

    sink: Float[Array, "*#B N"] | None = None

    @property
    def residual_is_lse(self) -> bool:
        """Whether a residual is the log-sum-exp: it is."""
        return True

    def __repr__(self) -> str:
        return "Softmax()" if self.sink is None else with_fields(self)


serializable(Softmax, ["sink"])


def lowest(scale: float) -> float:
    """Where a running maximum starts: a row of scores up to it attends to nothing."""
    return NO_WEIGHT * (1 - 1e-6) / scale


class Peak(NamedTuple):
    """The score that weights of a row count from, in units of q.k, [queries].

    Args:
        high: The score.
        low: What it lacks, where a row may have a term of its own as large as -1e9:
            beside that float32 has no room for the others. None: nothing.
    """

    high: jax.Array
    low: jax.Array | None

    def above(self, other: Peak) -> jax.Array:
        """By how much it is the larger."""
        more = self.high - other.high
        if self.low is None or other.low is None:
            return more
        return more + (self.low - other.low)


def peak(m: Peak, x: jax.Array, row: jax.Array) -> Peak:
    """The running maximum of x + row."""
    top = jnp.max(x, 1)
    high = top + row
    if m.low is None:
        return Peak(jnp.maximum(m.high, high), None)
    part = high - top  # what rounding took from the sum (Knuth)
    low = (top - (high - part)) + (row - part)
    more = (high > m.high) | ((high == m.high) & (low > m.low))
    return Peak(jnp.where(more, high, m.high), jnp.where(more, low, m.low))


def difference(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(a - b as rounded, what it lacks), exact together (Knuth); 0 beside inf, NaN."""
    rounded = a - b
    part = a - rounded
    lacks = (a - (rounded + part)) + (part - b)
    return rounded, jnp.where(lacks == lacks, lacks, 0.0)


def exponent(x: jax.Array, base: jax.Array, mul: float, large: bool) -> jax.Array:
    """(x - base) mul; as one multiply-add, unless scores may be large.

    Half a unit in the last place of a base of -1e9 is a factor of 2^64.
    """
    return (x - base) * mul if large else x * mul - base * mul


def rescaled(
    m: Peak, x: jax.Array, row: jax.Array, mul: float, exp2: Exp2, large: bool
) -> tuple[jax.Array, jax.Array, Peak]:
    """Online softmax: (weights of this tile, factor for what came before, maximum)."""
    new = peak(m, x, row)
    weights = relative(x, row, new, mul, exp2, large)
    return weights, exp2(m.above(new) * mul), new


def relative(
    x: jax.Array, row: jax.Array, base: Peak, mul: float, exp2: Exp2, large: bool
) -> jax.Array:
    """Weights of a tile relative to that of the score `base`."""
    if base.low is None:
        return exp2(exponent(x, (base.high - row)[:, None], mul, large))
    others, lacks = difference(base.high, row)
    # last: beside a large difference what it lacks would be lost
    more = (base.low + lacks) * mul
    return exp2(exponent(x, others[:, None], mul, large) - more[:, None])


def log_sum(reference: jax.Array, total: jax.Array) -> jax.Array:
    """log2 of a row's sum; +inf for an empty row, so that 2^(x - it) is 0 unmasked."""
    return jnp.where(total == 0, jnp.inf, reference + jnp.log2(total))


def score_gradient(p: jax.Array, dp: jax.Array, delta: jax.Array) -> jax.Array:
    """The gradient of the scores, dT = P (dP - delta); delta = <do, o> - dlse."""
    return p * (dp - delta)
