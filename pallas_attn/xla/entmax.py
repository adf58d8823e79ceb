"""Entmax chunk by chunk: the chunks, masks and logits of `xla.attention`.

A chunk holds every key that its queries may attend to, so that their thresholds are
found within it: by Newton's method on whole rows, each of whose steps is one pass over
the chunk's scores. Its derivative is that of `normalizers.smooth`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from pallas_attn.nearest import from_nearest, shifted
from pallas_attn.normalizers.entmax import Entmax, newton, Power, takes_power
from pallas_attn.normalizers.smooth import (
    exponents,
    lowered,
    residual_of,
    residual_of_nothing,
    slopes,
    weights_below,
    with_derivative,
)
from pallas_attn.problem import Problem
from pallas_attn.xla.attention import in_chunks, Logits, sums, Weights


# Newton's method goes on while a row's sum is above 1 by more than rounding and falls.
# Rows take 2 to 10 steps.
MOST_STEPS = 64
ROUNDINGS = 4


def attend(problem: Problem) -> tuple[Float[Array, "B T N h"], Float[Array, "B T N"]]:
    """Attention of every query; the function of `reference.entmax.attend`."""
    problem, shift = from_nearest(problem)
    o, tau = in_chunks(problem, sums, _entmax)
    if shift is not None:
        assert isinstance(problem.normalizer, Entmax)
        a = exponents(problem.normalizer, shift.dtype)[..., 0]
        shift = jnp.where(a == 0, 1, a) * shift
    return o, shifted(tau, shift)


def sparsity_shares(
    problem: Problem,
) -> tuple[Float[Array, "B N"], Float[Array, "B N"]]:
    """The shares of visible pairs without weight, and of skipped blocks: none."""
    query = problem.query
    counting = replace(
        from_nearest(problem)[0],
        query=query.astype(jnp.promote_types(query.dtype, jnp.float32)),
        value=problem.value[..., :1],
        call=replace(problem.call, h=1),
    )
    zero, visible = in_chunks(counting, sums, _counted)
    zero, visible = (x.sum(1, dtype=jnp.float32) for x in (zero[..., 0], visible))
    return zero / jnp.maximum(visible, 1), jnp.zeros_like(zero)


def _entmax(logits: Logits, normalizer: Entmax) -> Weights:
    """The weights p of a chunk and its residual."""
    p, residual = _solved(logits, normalizer)
    a = exponents(normalizer, p.dtype)
    alive = logits.visible.any(3, keepdims=True)
    # the cotangent of an empty row may be NaN
    shifted = residual + jnp.where(a == 0, 1, a) * logits.shift
    residual = jnp.where(alive, shifted, residual)
    return Weights(p, lambda o: jnp.where(alive, o, 0), lambda: residual)


def _counted(logits: Logits, normalizer: Entmax) -> Weights:
    """For the output, a row's visible keys of weight 0; for its residual, all of them.

    A row has at most 2^24 keys: float32 counts them.
    """
    p, _ = _solved(logits, normalizer)
    count = lambda x: x.sum(3, keepdims=True, dtype=p.dtype)
    zero, visible = count(logits.visible & (p == 0)), count(logits.visible)
    return Weights(p, lambda o: zero, lambda: visible)


def _solved(
    logits: Logits, normalizer: Entmax
) -> tuple[Float[Array, "B N T S"], Float[Array, "B N T 1"]]:
    # Scores computed twice may round twice: the k-th is compared with itself.
    once = lax.optimization_barrier(lax.stop_gradient(logits.t))
    t = jnp.where(_largest(once, normalizer.top_k), logits.t, -jnp.inf)
    alpha = normalizer.alpha
    solve = functools.partial(
        _by_newton, static=alpha if isinstance(alpha, float) else None
    )
    return with_derivative(solve)(t, exponents(normalizer, t.dtype))


def _largest(t: Float[Array, "*rows S"], top_k: int | None) -> Bool[Array, "*rows S"]:
    """The top_k largest of a row; NaN too.

    All above the k-th, and of those equal to it as many of the first as there is room
    for: their count sees no difference between 0.0 and -0.0, as an order would.
    """
    if top_k is None or top_k >= t.shape[-1]:
        return jnp.ones_like(t, bool)
    least = lax.top_k(t, top_k)[0].min(-1, keepdims=True)
    above, equal = t > least, t == least
    room = top_k - above.sum(-1, keepdims=True, dtype=jnp.int32)
    first = jnp.cumsum(equal, -1, dtype=jnp.int32) <= room
    return above | (equal & first) | jnp.isnan(t)


def _by_newton(
    t: Array, a: Array, *, static: float | None
) -> tuple[Float[Array, "B N T S"], Float[Array, "B N T 1"]]:
    """The weights of a row and its residual, from the largest weight 1 down.

    a: alpha - 1; static: alpha, if it is a number.

    In a scan that is differentiated twice JAX inlines a function that has a derivative
    of its own, and differentiates what it finds. The search is no part of that, but the
    last step is: a step of Newton's method at the root has the root's derivative.
    """
    fixed = lax.stop_gradient((t, a))
    m = fixed[0].max(3, keepdims=True)
    base = jnp.where(m == -jnp.inf, 0, m)
    close = 1 + ROUNDINGS * float(jnp.finfo(t.dtype).eps)

    def power_of(a: Array) -> Power | Smooth:
        return Power(static - 1) if takes_power(static) else Smooth(a)

    def weights(t: Array, a: Array, level: Array) -> tuple[Array, Array]:
        """(p, u), 0 off the support in each derivative too."""
        power = power_of(a)
        gap = jnp.exp(a * level) if isinstance(power, Smooth) else level
        under = lax.stop_gradient(a * (t - base) + gap) <= 0
        hidden = under | (t == -jnp.inf)
        p, u = power.weights(jnp.where(hidden, base, t), base, level, 1.0)
        return jnp.where(hidden, 0, p), jnp.where(hidden, 0, u)

    def lowering(t: Array, a: Array, level: Array) -> tuple[Array, Array]:
        p, u = (x.sum(3, keepdims=True) for x in weights(t, a, level))
        return newton(a, p, u), p

    def searching(state: tuple[Array, ...]) -> Array:
        count, _, _, falling = state
        return (count < MOST_STEPS) & falling.any()

    def step(state: tuple[Array, ...]) -> tuple[Array, ...]:
        count, level, before, falling = state
        by, total = lowering(*fixed, level)
        falling &= (total > close) & (total < before)
        level = power_of(fixed[1]).lowered(level, jnp.where(falling, by, 0))
        return count + 1, level, total, falling

    first = jnp.zeros_like(base + fixed[1]) + power_of(fixed[1]).level_of(1.0)
    start = (jnp.int32(0), first, first + jnp.inf, first == first)
    level = lax.while_loop(searching, step, start)[1]

    last, _ = lowering(t, a, level)
    level = power_of(a).lowered(level, jnp.where(m == -jnp.inf, 0, last))
    p, _ = weights(t, a, level)
    residual = power_of(a).threshold(base, level)
    return p, jnp.where(m == -jnp.inf, residual_of_nothing(a), residual)


@dataclass(frozen=True)
class Smooth:
    """What `Power` is, of any alpha in [1, 2]; `level` is the log of the largest."""

    a: Array

    def level_of(self, weight: float) -> float:
        """The level at which the largest weight of a row is this."""
        return math.log(weight)

    def lowered(self, level: Array, step: Array) -> Array:
        """The level after all scores have moved down by a step."""
        return lowered(level, step, self.a)

    def threshold(self, m: Array, level: Array) -> Array:
        """The threshold, of the largest score and the level; lse where a is 0."""
        return residual_of(m, level, self.a)

    def weights(
        self, x: Array, m: Array, level: Array, scale: float
    ) -> tuple[Array, Array]:
        """(p, u) of scores x, the largest of a row m, both in units of 1 / scale."""
        p = weights_below((x - m) * scale, level, self.a)
        return p, slopes(p, self.a)
