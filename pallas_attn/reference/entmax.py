"""Alpha-entmax attention as its formula says: dense, and once with written backward.

    t = scale q.k + b ;  x = (alpha - 1) t ;  p_j = max(0, x_j - tau)^(1 / (alpha - 1))
    o = P v    over the visible keys, of which the top_k largest t if that is given

*The threshold.* As tau grows from below, the sum of a row falls, strictly while it is
positive, from above 1 (already max x - 1 gives its largest entry the weight 1) to 0 at
max x. One tau makes it 1. Keys with x_j > tau are the support, the first ones of the
sorted row: key k is one of them if a threshold at x_k itself leaves a sum below 1. On
the support (sum p)^(alpha - 1) is the norm of x - tau of order 1 / (alpha - 1), which
is convex in tau, so that Newton's method from below never passes the root.

Its derivatives, by the scores and by alpha, stand in `normalizers.smooth`. The dtypes
and the rounding are those of `reference.attention`.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_attn.bias.base import Added
from pallas_attn.dropout import dropped
from pallas_attn.normalizers.entmax import Entmax
from pallas_attn.normalizers.smooth import (
    by_alpha,
    exponents,
    lowered,
    newton_step,
    residual_by_alpha,
    residual_of,
    slopes,
    total_of,
    weights_below,
    with_derivative,
)
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
from pallas_attn.visibility import seen_added


# Newton's steps: they double the digits that are right, once they are close.
STEPS = 40


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

    p, a = row.weights, exponents(normalizer, t.dtype)
    u = slopes(p, a)
    total = total_of(u)
    dp = dropped(call, row.keep, einsum("BTNh,BSNh->BNTS", do, row.v))
    delta = (u * dp).sum(3, keepdims=True) / total
    dt = u * (dp - delta + jnp.where(a == 0, 1, a) * dtau / total)
    dt = jnp.where(row.visible, dt, 0)

    dalpha, alpha = None, normalizer.alpha
    if not isinstance(alpha, int | float):
        of_p = (by_alpha(p, u, a) * (dp - delta)).sum(3, keepdims=True)
        of_tau = dtau * residual_by_alpha(t, p, u, a)
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
    values = seen_added(row.visible, problem.bias, here.dtype).on(here)
    t = jnp.where(row.visible, sum(values, scores(row.q, row.k, call)), -jnp.inf)
    t = jnp.where(largest(lax.stop_gradient(t), normalizer.top_k), t, -jnp.inf)

    p, residual = entmax(t, exponents(normalizer, t.dtype))
    output = einsum("BNTS,BSNh->BTNh", dropped(call, row.keep, p), row.v)
    alive = jnp.swapaxes(row.visible.any(3), 1, 2)
    output = jnp.where(alive[..., None], output, 0)
    lse = jnp.swapaxes(residual[..., 0], 1, 2)
    return row._replace(weights=p, output=output, lse=lse), t


def largest(t: Float[Array, "*rows S"], top_k: int | None) -> Bool[Array, "*rows S"]:
    """The top_k largest of a row, of equal ones those that come first; NaN too."""
    if top_k is None or top_k >= t.shape[-1]:
        return jnp.ones_like(t, bool)
    t = jnp.where(t == 0, 0.0, t)  # -0.0 is less to `top_k`
    values, places = lax.top_k(t, top_k)
    least = values.min(-1, keepdims=True)
    last = jnp.where(values == least, places, 0).max(-1, keepdims=True)
    return (t > least) | ((t == least) & (_places(t) <= last)) | jnp.isnan(t)


def by_sorting(t: Array, a: Array) -> tuple[Array, Array]:
    """The weights of a row and its residual, exact to rounding, a = alpha - 1.

    The threshold is known by the log of the largest weight, in which alpha = 1 is no
    edge: see `weights_below`.
    """
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


def _places(t: Float[Array, "*rows S"]) -> Int[Array, "*rows S"]:
    return lax.broadcasted_iota(jnp.int32, t.shape, t.ndim - 1)
