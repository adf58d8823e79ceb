"""Co-ALiBi as its formula says: dense, and once with its written backward.

    s = scale q.k, soft-capped ;  g = sigmoid(s) on the visible keys, 0 elsewhere
    z_ij = sum_{n >= j} g_in ;  t = s - m z ;  P = softmax of t ;  o = P v

The dtypes and the rounding are those of `reference.attention`. A score s at or below
-1e30 hides its key, and has no gate; so does a logit t, whose gate was counted before.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_attn.bias.co_alibi import CoALiBi
from pallas_attn.bias.region import spread
from pallas_attn.problem import Problem
from pallas_attn.reference.attention import (
    cotangent,
    forward_with,
    logit_cotangents,
    operand_cotangents,
    Rows,
    scores,
    seen_operands,
    sink_cotangent,
    softmax,
    widened,
)
from pallas_attn.visibility import allowed, weighty


def attend(problem: Problem) -> tuple[Float[Array, "B T N h"], Float[Array, "B T N"]]:
    """Attention with Co-ALiBi, differentiated by JAX: the specification.

    Returns:
        The output in the query's dtype, and the log-sum-exp of each row.
    """
    row, _, _ = rows(problem)
    return row.output.astype(problem.query.dtype), row.lse


@jax.custom_vjp
def attend_with_written_backward(
    problem: Problem,
) -> tuple[Float[Array, "B T N h"], Float[Array, "B T N"]]:
    """`attend`, with the backward written out: what the kernels compute, densely.

    t_in depends on s_ij in two ways: as t_ij = s_ij - ..., and for n <= j through the
    gate g_ij in z_in. With dT as in `reference.attention` and sigmoid' = g (1 - g):

        dS_ij = dT_ij - m g_ij (1 - g_ij) C_ij    where C_ij = sum_{n <= j} dT_in
        dm    = -sum_ij dT_ij z_ij
        dq, dk, dv from dS as there
    """
    return attend(problem)


def _backward(problem: Problem, cotangents: tuple[Array, Array]) -> Any:
    bias, call = problem.bias, problem.call
    assert isinstance(bias, CoALiBi)
    row, g, z = rows(problem)
    do, dt = logit_cotangents(row, cotangents, call)

    c = jnp.cumsum(dt, 3)
    ds = dt - _slopes(bias, dt.dtype) * g * (1 - g) * c

    dm = -(dt * z).sum((2, 3))  # [B, N]
    shared = [axis for axis in (0, 1) if bias.slopes.shape[axis] == 1]
    dm = dm.sum(shared, keepdims=True).astype(bias.slopes.dtype)
    operands, dsink = (
        operand_cotangents(row, do, ds, call),
        sink_cotangent(problem, row, cotangents),
    )
    return (cotangent(problem, operands, CoALiBi(dm), dsink),)


attend_with_written_backward.defvjp(forward_with(attend), _backward)


def rows(
    problem: Problem,
) -> tuple[Rows, Float[Array, "B N T S"], Float[Array, "B N T S"]]:
    """The forward, with the gates g and their sums z.

    Visibility comes first, from the operands as they are; what no visible place reads
    (and may be NaN) is then replaced by 0 before it meets anything.
    """
    bias, call, visibility = problem.bias, problem.call, problem.visibility
    assert isinstance(bias, CoALiBi)
    q, k, v = widened(problem)
    places = allowed(call, visibility) & weighty(lax.stop_gradient(scores(q, k, call)))
    q, k, v = seen_operands(places, q, k, v)
    # a place that is not visible may still be NaN, which 0 * sigmoid' would pass on
    s = jnp.where(places, scores(q, k, call), 0)

    g = jnp.where(places, jax.nn.sigmoid(s), 0)
    z = lax.cumsum(g, axis=3, reverse=True)
    t = s - _slopes(bias, s.dtype) * z
    visible = places & weighty(lax.stop_gradient(t))
    return softmax(q, k, v, visible, t, problem), g, z


def _slopes(bias: CoALiBi, dtype: Any) -> Float[Array, "#B #N 1 1"]:
    return spread("head", bias.slopes).astype(dtype)
