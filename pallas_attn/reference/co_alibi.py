"""Co-ALiBi as its formula says: dense, and once with its written backward.

    s = scale q.k, soft-capped ;  g = sigmoid(s) on the visible keys, 0 elsewhere
    z_ij = sum_{n >= j} g_in ;  t = s - m z ;  P = softmax of t ;  o = P v

The dtypes and the rounding are those of `reference.attention`. A score s at or below
-1e30 hides its key, and has no gate; so does a logit t, whose gate was counted before.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_attn.bias.base import spread
from pallas_attn.bias.co_alibi import CoALiBi
from pallas_attn.call import Call, Visibility
from pallas_attn.reference.attention import (
    logit_cotangents,
    operand_cotangents,
    Rows,
    scores,
    seen_operands,
    softmax,
    widened,
)
from pallas_attn.visible import allowed, weighty


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K h"],
    bias: CoALiBi,
    visibility: Visibility,
    call: Call,
) -> tuple[Float[Array, "B T N h"], Float[Array, "B T N"]]:
    """Attention with Co-ALiBi, differentiated by JAX: the specification.

    Args:
        query: Any floating dtype; float64 makes everything float64.
        key: Of the same dtype; query head n reads key head n // (N // K).
        value: Of the same dtype.
        bias: Slopes [#B, #N].
        visibility: The arrays that decide who may attend to whom.
        call: The static facts.

    Returns:
        The output in the query's dtype, and the log-sum-exp of each row.
    """
    row, _, _ = rows(query, key, value, bias, visibility, call)
    return row.output.astype(query.dtype), row.lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend_with_written_backward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K h"],
    bias: CoALiBi,
    visibility: Visibility,
    call: Call,
) -> tuple[Float[Array, "B T N h"], Float[Array, "B T N"]]:
    """`attend`, with the backward written out: what the kernels compute, densely.

    t_in depends on s_ij in two ways: as t_ij = s_ij - ..., and for n <= j through the
    gate g_ij in z_in. With dT as in `reference.attention` and sigmoid' = g (1 - g):

        dS_ij = dT_ij - m g_ij (1 - g_ij) C_ij    where C_ij = sum_{n <= j} dT_in
        dm    = -sum_ij dT_ij z_ij
        dq, dk, dv from dS as there
    """
    return attend(query, key, value, bias, visibility, call)


def _forward(
    query: Array,
    key: Array,
    value: Array,
    bias: CoALiBi,
    visibility: Visibility,
    call: Call,
) -> tuple[tuple[Array, Array], Any]:
    operands = (query, key, value, bias, visibility)
    return attend(*operands, call), operands


def _backward(call: Call, operands: Any, cotangents: tuple[Array, Array]) -> Any:
    query, key, value, bias, visibility = operands
    row, g, z = rows(query, key, value, bias, visibility, call)
    do, dt = logit_cotangents(row, cotangents, call)

    c = jnp.cumsum(dt, 3)
    ds = dt - _slopes(bias, dt.dtype) * g * (1 - g) * c

    dm = -(dt * z).sum((2, 3))  # [B, N]
    shared = [axis for axis in (0, 1) if bias.slopes.shape[axis] == 1]
    dm = dm.sum(shared, keepdims=True).astype(bias.slopes.dtype)
    return (*operand_cotangents(row, do, ds, call), CoALiBi(dm), None)


attend_with_written_backward.defvjp(_forward, _backward)


def rows(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K h"],
    bias: CoALiBi,
    visibility: Visibility,
    call: Call,
) -> tuple[Rows, Float[Array, "B N T S"], Float[Array, "B N T S"]]:
    """The forward, with the gates g and their sums z.

    Visibility comes first, from the operands as they are; what no visible place reads
    (and may be NaN) is then replaced by 0 before it meets anything.
    """
    q, k, v = widened(query, key, value, call)
    places = allowed(call, visibility) & weighty(lax.stop_gradient(scores(q, k, call)))
    q, k, v = seen_operands(places, q, k, v)
    # a place that is not visible may still be NaN, which 0 * sigmoid' would pass on
    s = jnp.where(places, scores(q, k, call), 0)

    g = jnp.where(places, jax.nn.sigmoid(s), 0)
    z = lax.cumsum(g, axis=3, reverse=True)
    t = s - _slopes(bias, s.dtype) * z
    visible = places & weighty(lax.stop_gradient(t))
    return softmax(q, k, v, visible, t, visibility, call), g, z


def _slopes(bias: CoALiBi, dtype: Any) -> Float[Array, "#B #N 1 1"]:
    return spread("head", bias.slopes).astype(dtype)
