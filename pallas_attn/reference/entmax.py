"""Alpha-entmax attention as its formula says: dense, and once with written backward.

    t = scale q.k + b ;  x = (alpha - 1) t ;  p_j = max(0, x_j - tau)^(1 / (alpha - 1))
    o = P v    over the visible keys, of which the top_k largest t if that is given

*The threshold.* As tau grows from below, the sum of a row falls, strictly while it is
positive, from above 1 (already max x - 1 gives its largest entry the weight 1) to 0 at
max x. One tau makes it 1. Keys with x_j > tau are the support, the first ones of the
sorted row: key k is one of them if a threshold at x_k itself leaves a sum below 1. On
the support (sum p)^(alpha - 1) is the norm of x - tau of order 1 / (alpha - 1), which
is convex in tau, so that Newton's method from below never passes the root.

*Its derivative.* With a = alpha - 1 and u = p^(2 - alpha) on the support, 0 elsewhere,
dp = u (dt - dtau / a). The sum of p stays 1, so that

    dtau = a <u, dt> / sum u ;  dp = u (dt - <u, dt> / sum u)

At alpha = 1, u = p: that is softmax. For alpha < 2 a key enters the support with u = 0;
for alpha = 2, u is 1 on it: the weights have kinks where a score equals the threshold.
What top_k selects is constant in every derivative.

*Alpha.* log p = log(a t - tau) / a. Its derivative by alpha is, a shift of tau apart,
h = -(e^w - 1 - w) / a^2 with w = -a log p, near alpha = 1 about -log(p)^2 / 2, and

    dp/dalpha = p h - u <p, h> / sum u ;  dtau/dalpha = (<u, t> - sum p log p) / sum u

The dtypes and the rounding are those of `reference.attention`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int

from pallas_attn.bias.base import Added, spread
from pallas_attn.dropout import dropped
from pallas_attn.normalizers.entmax import Entmax
from pallas_attn.problem import Problem
from pallas_attn.reference import attention
from pallas_attn.reference.attention import (
    bias_cotangents,
    cotangent,
    einsum,
    forward_with,
    operand_cotangents,
    region,
    Rows,
    scores,
)
from pallas_attn.visible import seen_added


# Newton's steps: they double the digits that are right, once they are close.
STEPS = 40

# Series in w, to float64: (e^w - 1 - w) / w^2 for w < 1, and for |w| < 0.1 the
# quotients (e^w - 1) / w and log(1 + w) / w.
OF_H = [1 / math.factorial(n + 2) for n in range(18)]
OF_EXPM1 = [1 / math.factorial(n + 1) for n in range(10)]
OF_LOG1P = [(-1) ** n / (n + 1) for n in range(16)]

# (t [..., S], -inf where there is no weight; alpha [..., 1]) -> (p, residual [..., 1])
Solve = Callable[[Array, Array], tuple[Array, Array]]


def attend(problem: Problem) -> tuple[Float[Array, "B T N h"], Float[Array, "B T N"]]:
    """Attention with entmax, differentiated by JAX: the specification.

    Returns:
        The output in the query's dtype, and the residual of each row: tau, +inf where
        it sees nothing; where alpha is 1, the log-sum-exp.
    """
    row, _ = rows(problem)
    return row.output.astype(problem.query.dtype), row.lse


@jax.custom_vjp
def attend_with_written_backward(
    problem: Problem,
) -> tuple[Float[Array, "B T N h"], Float[Array, "B T N"]]:
    """`attend`, with the backward written out: what the kernels compute, densely.

    dP = D do v^T ;  delta = <u, dP> / sum u ;  dT = u (dP - delta + a dtau / sum u)
    dq, dk, dv, db from dT and P D as in `reference.attention`
    dalpha = sum_ij p h (dP - delta) + dtau (<u, t> - sum p log p) / sum u

    Where alpha is 1 the residual is the log-sum-exp, of which dT has u dlse / sum u and
    dalpha nothing.
    """
    return attend(problem)


def _backward(problem: Problem, cotangents: tuple[Array, Array]) -> Any:
    call, normalizer = problem.call, problem.normalizer
    assert isinstance(normalizer, Entmax)
    row, t = rows(problem)
    alive = jnp.swapaxes(row.visible.any(3), 1, 2)  # [B, T, N]
    do, dtau = (x.astype(t.dtype) for x in cotangents)
    do, dtau = jnp.where(alive[..., None], do, 0), jnp.where(alive, dtau, 0)
    dtau = jnp.swapaxes(dtau, 1, 2)[..., None]  # [B, N, T, 1]

    p, a = row.weights, exponents(normalizer, t.dtype) - 1
    u = slopes(p, a)
    total = _total(u)
    dp = dropped(call, row.keep, einsum("BTNh,BSNh->BNTS", do, row.v))
    delta = (u * dp).sum(3, keepdims=True) / total
    dt = u * (dp - delta + jnp.where(a == 0, 1, a) * dtau / total)
    dt = jnp.where(row.visible, dt, 0)

    dalpha, alpha = None, normalizer.alpha
    if not isinstance(alpha, int | float):
        of_p = (_by_alpha(p, u, a) * (dp - delta)).sum(3, keepdims=True)
        of_tau = dtau * _residual_by_alpha(t, p, u, a)
        dalpha = (of_p + of_tau).sum((2, 3))  # [B, N]
        shared = [axis for axis in (0, 1) if alpha.shape[axis] == 1]
        dalpha = dalpha.sum(shared, keepdims=True).astype(alpha.dtype)
    operands = operand_cotangents(row, do, dt, call)
    return (cotangent(problem, operands, bias_cotangents(problem, row, dt), dalpha),)


attend_with_written_backward.defvjp(forward_with(attend), _backward)


def sparsity_shares(
    problem: Problem,
) -> tuple[Float[Array, "B N"], Float[Array, "B N"]]:
    """The shares of visible pairs without weight, and of skipped blocks: none."""
    row, _ = rows(problem)
    count = lambda x: x.sum((2, 3), dtype=jnp.float32)
    visible, zero = count(row.visible), count(row.visible & (row.weights == 0))
    return zero / jnp.maximum(visible, 1), jnp.zeros_like(zero)


def rows(problem: Problem) -> tuple[Rows, Float[Array, "B N T S"]]:
    """The forward and its logits t; the residual stands where softmax has lse.

    What is visible, and what the logits are, does not depend on the normalizer.
    """
    call, normalizer = problem.call, problem.normalizer
    assert isinstance(normalizer, Entmax)
    assert isinstance(problem.bias, Added)
    row = attention.rows(problem)
    here = region(problem.visibility, call)
    values = seen_added(row.visible, problem.bias).on(here)
    t = jnp.where(row.visible, sum(values, scores(row.q, row.k, call)), -jnp.inf)
    t = jnp.where(largest(lax.stop_gradient(t), normalizer.top_k), t, -jnp.inf)

    p, residual = entmax(t, exponents(normalizer, t.dtype))
    output = einsum("BNTS,BSNh->BTNh", dropped(call, row.keep, p), row.v)
    alive = jnp.swapaxes(row.visible.any(3), 1, 2)
    output = jnp.where(alive[..., None], output, 0)
    lse = jnp.swapaxes(residual[..., 0], 1, 2)
    return row._replace(weights=p, output=output, lse=lse), t


def exponents(normalizer: Entmax, dtype: Any) -> Float[Array, "#B #N 1 1"]:
    """Alpha, shaped to broadcast against scores."""
    alpha = jnp.atleast_2d(jnp.asarray(normalizer.alpha, dtype))
    return spread("head", alpha)


def largest(t: Float[Array, "*rows S"], top_k: int | None) -> Bool[Array, "*rows S"]:
    """The top_k largest of a row, of equal ones those that come first; NaN too."""
    if top_k is None or top_k >= t.shape[-1]:
        return jnp.ones_like(t, bool)
    t = jnp.where(t == 0, 0.0, t)  # -0.0 is less to `top_k`
    values, places = lax.top_k(t, top_k)
    least = values.min(-1, keepdims=True)
    last = jnp.where(values == least, places, 0).max(-1, keepdims=True)
    return (t > least) | ((t == least) & (_places(t) <= last)) | jnp.isnan(t)


def with_derivative(solve: Solve) -> Solve:
    """(p, residual) of a function, differentiable through its p any number of times."""
    differentiable = jax.custom_jvp(solve)

    def rule(primals: tuple[Array, Array], tangents: tuple[Any, Any]) -> Any:
        t, alpha = primals
        p, residual = differentiable(t, alpha)
        return (p, residual), _tangents(t, alpha - 1, p, *tangents)

    differentiable.defjvp(rule, symbolic_zeros=True)
    return differentiable


def _tangents(t: Array, a: Array, p: Array, dt: Any, dalpha: Any) -> Any:
    """Those of p and of the residual."""
    u = slopes(p, a)
    total = _total(u)
    dp, dresidual = jnp.zeros_like(p), jnp.zeros_like(total)
    if not isinstance(dt, SymbolicZero):
        mean = (u * dt).sum(-1, keepdims=True) / total
        dp += u * (dt - mean)
        dresidual += jnp.where(a == 0, 1, a) * mean
    if not isinstance(dalpha, SymbolicZero):
        ph = _by_alpha(p, u, a)
        dp += dalpha * (ph - u * (ph.sum(-1, keepdims=True) / total))
        dresidual += dalpha * _residual_by_alpha(t, p, u, a)
    empty = (p == 0).all(-1, keepdims=True)  # its cotangent may be NaN
    return dp, jnp.where(empty, 0, dresidual)


def slopes(p: Array, a: Array) -> Array:
    """The derivative u = p^(2 - alpha) of the weights, 0 off the support; NaN stays."""
    return jnp.where(p <= 0, 0, jnp.exp((1 - a) * _log(p)))


def _by_alpha(p: Array, u: Array, a: Array) -> Array:
    """The derivative p h by alpha, at a fixed largest weight of a row without end.

    -(u - p (1 + w)) / a^2 with w = -a log p, which cancels where w is small.
    """
    q = -_log(p)
    w = a * q
    near = w < 1
    series = _polynomial(OF_H, jnp.where(near, w, 0))
    direct = (u - p * (1 + w)) / jnp.where(a == 0, 1, a * a)
    return -jnp.where(near, p * q * q * series, direct)


def _residual_by_alpha(t: Array, p: Array, u: Array, a: Array) -> Array:
    """The derivative of tau by alpha; lse, where alpha is 1, is no function of it."""
    seen = jnp.where(p <= 0, 0, t)
    dtau = (u * seen - p * _log(p)).sum(-1, keepdims=True) / _total(u)
    return jnp.where(a == 0, 0, dtau)


def _log(p: Array) -> Array:
    return jnp.log(jnp.where(p <= 0, 1, p))


def _total(u: Array) -> Array:
    total = u.sum(-1, keepdims=True)
    return jnp.where(total == 0, 1, total)


def by_sorting(t: Array, alpha: Array) -> tuple[Array, Array]:
    """The weights of a row and its residual, exact to rounding.

    The threshold is known by the log of the largest weight, in which alpha = 1 is no
    edge: see `weights_below`.
    """
    a = alpha - 1
    m = t.max(-1, keepdims=True)
    hidden = t == -jnp.inf
    y = t - jnp.where(m == -jnp.inf, 0, m)
    ordered = -jnp.sort(-y)
    support = _places(t) < _support(ordered, a)
    on_support = jnp.where(support, ordered, 0)

    def step(_: Any, log_largest: Array) -> Array:
        p = weights_below(on_support, log_largest, a)
        p = jnp.where(support, p, 0)
        return lowered(log_largest, newton_step(p, a), a)

    log_largest = lax.fori_loop(0, STEPS, step, jnp.zeros_like(y[..., :1] + a))
    p = weights_below(jnp.where(hidden, 0, y), log_largest, a)
    p = jnp.where(hidden, 0, p)
    return p, residual_of(m, log_largest, a)


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
    ratio = total / _total(slopes(p, a))
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


entmax = with_derivative(by_sorting)


def _support(ordered: Float[Array, "*rows S"], a: Array) -> Int[Array, "*rows 1"]:
    """How many of a row's scores, in descending order, are above its threshold.

    Bisected: the sum that a threshold at the k-th leaves grows with k.
    """

    def step(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        lowest, highest = ends
        middle = (lowest + highest + 1) // 2
        at = jnp.take_along_axis(ordered, jnp.maximum(middle - 1, 0), -1)
        above = jnp.where(ordered > at, ordered - at, 0)
        p = jnp.power(a * above, 1 / jnp.where(a == 0, 1, a))
        inside = p.sum(-1, keepdims=True) < 1
        return jnp.where(inside, middle, lowest), jnp.where(inside, highest, middle - 1)

    visible = (ordered != -jnp.inf).sum(-1, keepdims=True, dtype=jnp.int32)
    count = math.ceil(math.log2(ordered.shape[-1] + 1))
    return lax.fori_loop(0, count, step, (jnp.minimum(visible, 1), visible))[0]


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


def _places(t: Float[Array, "*rows S"]) -> Int[Array, "*rows S"]:
    return lax.broadcasted_iota(jnp.int32, t.shape, t.ndim - 1)
