"""Entmax of whole rows as a smooth function of its scores and of alpha in [1, 2].

A row is known by the log of its largest weight, in which alpha = 1 (softmax) is no
edge. What finds it is not here: each implementation searches in its own way, and gets
the derivatives of what it has found.

*Its derivative.* With a = alpha - 1 and u = p^(2 - alpha) on the support, 0 elsewhere,
dp = u (dt - dtau / a). The sum of p stays 1, so that

    dtau = a <u, dt> / sum u ;  dp = u (dt - <u, dt> / sum u)

At alpha = 1, u = p: that is softmax. For alpha < 2 a key enters the support with u = 0;
for alpha = 2, u is 1 on it: the weights have kinks where a score equals the threshold.
What top_k selects is constant in every derivative.

*Alpha.* log p = log(a t - tau) / a. Its derivative by alpha is, a shift of tau apart,
h = -(e^w - 1 - w) / a^2 with w = -a log p, near alpha = 1 about -log(p)^2 / 2, and

    dp/dalpha = p h - u <p, h> / sum u ;  dtau/dalpha = (<u, t> - sum p log p) / sum u
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from pallas_attn.normalizers.entmax import Entmax


# Series in w, to float64: (e^w - 1 - w) / w^2 for w < 1, and for |w| < 0.1 the
# quotients (e^w - 1) / w and log(1 + w) / w.
OF_H = [1 / math.factorial(n + 2) for n in range(18)]
OF_EXPM1 = [1 / math.factorial(n + 1) for n in range(10)]
OF_LOG1P = [(-1) ** n / (n + 1) for n in range(16)]

# (t [..., S], -inf where there is no weight; a [..., 1]) -> (p, residual [..., 1])
Solve = Callable[[Array, Array], tuple[Array, Array]]


def exponents(normalizer: Entmax, dtype: Any) -> Float[Array, "#B #N 1 1"]:
    """The exponents a = alpha - 1, shaped to broadcast against scores.

    A number has its 1 taken off before it is rounded: 1.001 is float32's but for 2^-24,
    and 0.001 but for 5e-5 if what is left of that. Of float32 alphas it is exact.
    """
    alpha = normalizer.alpha
    a = alpha - 1 if isinstance(alpha, int | float) else jnp.asarray(alpha, dtype) - 1
    return jnp.atleast_2d(jnp.asarray(a, dtype))[..., None, None]


def with_derivative(solve: Solve) -> Solve:
    """(p, residual) of a function, differentiable through its p any number of times."""
    differentiable = jax.custom_jvp(solve)

    def rule(primals: tuple[Array, Array], tangents: tuple[Any, Any]) -> Any:
        t, a = primals
        p, residual = differentiable(t, a)
        return (p, residual), _tangents(t, a, p, *tangents)

    differentiable.defjvp(rule, symbolic_zeros=True)
    return differentiable


def _tangents(t: Array, a: Array, p: Array, dt: Any, dalpha: Any) -> Any:
    """Those of p and of the residual."""
    u = slopes(p, a)
    total = total_of(u)
    dp, dresidual = jnp.zeros_like(p), jnp.zeros_like(total)
    if not isinstance(dt, SymbolicZero):
        mean = (u * dt).sum(-1, keepdims=True) / total
        dp += u * (dt - mean)
        dresidual += jnp.where(a == 0, 1, a) * mean
    if not isinstance(dalpha, SymbolicZero):
        ph = by_alpha(p, u, a)
        dp += dalpha * (ph - u * (ph.sum(-1, keepdims=True) / total))
        dresidual += dalpha * residual_by_alpha(t, p, u, a)
    empty = (p == 0).all(-1, keepdims=True)  # its cotangent may be NaN
    return dp, jnp.where(empty, 0, dresidual)


def slopes(p: Array, a: Array) -> Array:
    """The derivative u = p^(2 - alpha) of the weights, 0 off the support; NaN stays."""
    return jnp.where(p <= 0, 0, jnp.exp((1 - a) * _log(p)))


def by_alpha(p: Array, u: Array, a: Array) -> Array:
    """The derivative p h by alpha, at a fixed largest weight of a row without end.

    -(u - p (1 + w)) / a^2 with w = -a log p, which cancels where w is small.
    """
    q = -_log(p)
    w = a * q
    near = w < 1
    series = _polynomial(OF_H, jnp.where(near, w, 0))
    direct = (u - p * (1 + w)) / jnp.where(a == 0, 1, a * a)
    return -jnp.where(near, p * q * q * series, direct)


def residual_by_alpha(t: Array, p: Array, u: Array, a: Array) -> Array:
    """The derivative of tau by alpha; lse, where alpha is 1, is no function of it."""
    seen = jnp.where(p <= 0, 0, t)
    dtau = (u * seen - p * _log(p)).sum(-1, keepdims=True) / total_of(u)
    return jnp.where(a == 0, 0, dtau)


def _log(p: Array) -> Array:
    return jnp.log(jnp.where(p <= 0, 1, p))


def total_of(u: Array) -> Array:
    """The sum of a row's u, 1 where it is 0: what divides."""
    total = u.sum(-1, keepdims=True)
    return jnp.where(total == 0, 1, total)


def weights_below(y: Array, log_largest: Array, a: Array) -> Array:
    """The weights of scores that lie y <= 0 above the largest, whose weight is known.

    x - tau = a y + g with g = exp(a log_largest), so that

        log p = log_largest + log(1 + a y / g) / a
    """
    y = y * jnp.exp(-a * log_largest)
    off = a * y <= -1  # the log has no value there, and `jax_debug_nans` would say so
    p = jnp.exp(log_largest + _log1p_over(a, jnp.where(off, 0, y)))
    return jnp.where(off, 0, p)


def newton_step(p: Array, a: Array) -> Array:
    """How far to lower t against the threshold, for sum p = 1.

    Of the norm F^a, F = sum p: (F^a - 1) / (a F^(a-1) sum u).
    """
    total = p.sum(-1, keepdims=True)
    ratio = total / total_of(slopes(p, a))
    return jnp.where(total == 0, 0, ratio * _expm1_over(-a, jnp.log(total)))


def lowered(log_largest: Array, step: Array, a: Array) -> Array:
    """The log of the largest weight, after all of t has been lowered."""
    return log_largest - _log1p_over(-a, step * jnp.exp(-a * log_largest))


def residual_of(m: Array, log_largest: Array, a: Array) -> Array:
    """Tau, or lse where alpha is 1, by the largest score and its weight."""
    tau = jnp.where(a == 0, m - log_largest, a * m - jnp.exp(a * log_largest))
    return jnp.where(m == -jnp.inf, residual_of_nothing(a), tau)


def residual_of_nothing(a: Array) -> Array:
    """The residual of a row that sees no key."""
    return jnp.where(a == 0, -jnp.inf, jnp.inf)


def _log1p_over(a: Array, x: Array) -> Array:
    """The quotient log(1 + a x) / a: x where a is 0."""
    return _over(jnp.log1p, OF_LOG1P, a, x)


def _expm1_over(a: Array, x: Array) -> Array:
    """The quotient (exp(a x) - 1) / a: x where a is 0."""
    return _over(jnp.expm1, OF_EXPM1, a, x)


def _over(
    f: Callable[[Array], Array], series: Sequence[float], a: Array, x: Array
) -> Array:
    """f(a x) / a, smooth in a; by the series of f(w) / w where w = a x is small."""
    w = a * x
    near = jnp.abs(w) < 0.1
    far = jnp.where(near, 1, w)
    return x * jnp.where(near, _polynomial(series, jnp.where(near, w, 0)), f(far) / far)


def _polynomial(coefficients: Sequence[float], w: Array) -> Array:
    return functools.reduce(lambda s, c: s * w + c, reversed(coefficients), 0 * w)
