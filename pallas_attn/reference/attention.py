"""Softmax attention as the paper writes it: dense, and once with its written backward.

    t = scale q.k + b ;  P = softmax of t over the visible keys ;  o = P v

With a soft cap c, c tanh(scale q.k / c) + b is t. Dropout leaves P D in the place of P
once rows are normalized, D being 0 where `pallas_attn.dropout` says so and else
1 / (1 - rate).

Everything is float32 (float64 where the query is), its products at full precision
whatever `precision` says; results are rounded once, to the dtype of their operand.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from pallas_attn.bias.base import Added
from pallas_attn.bias.region import Region
from pallas_attn.call import Call
from pallas_attn.dropout import dropped, kept_on
from pallas_attn.problem import Problem, sink_of
from pallas_attn.visibility import (
    allowed,
    positions,
    seen,
    seen_added,
    taken,
    Visibility,
    weighty,
)


einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def attend(problem: Problem) -> tuple[Float[Array, "B T N h"], Float[Array, "B T N"]]:
    """Attention, differentiated by JAX: the specification.

    Returns:
        The output in the query's dtype, and the log-sum-exp of each row.
    """
    row = rows(problem)
    return row.output.astype(problem.query.dtype), row.lse


@jax.custom_vjp
def attend_with_written_backward(
    problem: Problem,
) -> tuple[Float[Array, "B T N h"], Float[Array, "B T N"]]:
    """`attend`, with the backward of the paper: what the kernels compute, densely.

    delta = <do, o> ;  dP = D do v^T ;  dT = P (dP - delta + dlse)
    dsink = sum over rows of exp(sink - lse) (dlse - delta)
    dS = dT (1 - tanh^2) of the soft cap ;  db = dT, summed to its shape
    dq = scale dS k ;  dk = scale dS^T q ;  dv = (P D)^T do
    """
    return attend(problem)


def forward_with(attend: Callable[[Problem], Any]) -> Callable[[Problem], Any]:
    """The forward rule of a written backward, which starts from the problem itself."""
    return lambda problem: (attend(problem), problem)


def _backward(problem: Problem, cotangents: tuple[Array, Array]) -> Any:
    row = rows(problem)
    do, dt = logit_cotangents(row, cotangents, problem.call)
    dbias = bias_cotangents(problem, row, dt)
    operands = operand_cotangents(row, do, dt, problem.call)
    return (
        cotangent(problem, operands, dbias, sink_cotangent(problem, row, cotangents)),
    )


attend_with_written_backward.defvjp(forward_with(attend), _backward)


def bias_cotangents(problem: Problem, row: Rows, dt: Float[Array, "B N T S"]) -> Added:
    """Those of the bias' fields, from that of the logits."""
    here = region(problem.visibility, problem.call)

    def bias(added: Added) -> Array:
        zero = jnp.zeros(dt.shape, dt.dtype)
        added = added.spread_out(*dt.shape[2:])
        return sum(seen_added(row.visible, added, dt.dtype).on(here), zero)

    assert isinstance(problem.bias, Added)
    return jax.vjp(bias, problem.bias)[1](dt)[0]


def cotangent(
    problem: Problem, operands: tuple[Array, Array, Array], bias: Any, array: Any = None
) -> Problem:
    """The cotangent of a problem, of its parts; its integers have none."""
    query, key, value = operands
    return replace(
        problem,
        query=query,
        key=key,
        value=value,
        bias=bias,
        normalizer=jax.tree.map(lambda _: array, problem.normalizer),
        visibility=jax.tree.map(lambda _: None, problem.visibility),
    )


class Rows(NamedTuple):
    """A forward with all that the paper gives a name, heads of keys written out."""

    q: Float[Array, "B T N H"]
    k: Float[Array, "B S N H"]
    v: Float[Array, "B S N h"]
    visible: Bool[Array, "B N T S"]
    weights: Float[Array, "B N T S"]  # P
    output: Float[Array, "B T N h"]
    lse: Float[Array, "B T N"]
    keep: Bool[Array, "#B #N T S"] | None  # where D is not 0; None: 1 everywhere


def rows(problem: Problem) -> Rows:
    """The forward.

    Visibility comes first, from the operands as they are; what no visible place reads
    (and may be NaN) is then replaced by 0 before it meets anything.
    """
    call, visibility, added = problem.call, problem.visibility, problem.bias
    assert isinstance(added, Added)
    added = added.spread_out(call.T, call.S)
    q, k, v = widened(problem)
    visible = lax.stop_gradient(_visible(q, k, added, visibility, call))
    q, k, v = seen_operands(visible, q, k, v)
    t, _ = _logits(q, k, seen_added(visible, added, q.dtype), visibility, call)
    return softmax(q, k, v, visible, t, problem)


def widened(
    problem: Problem,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S N H"], Float[Array, "B S N h"]]:
    """The operands in the accumulator's dtype, heads of keys written out."""
    call, dtype = problem.call, problem.call.accumulator
    k, v = (
        jnp.repeat(x.astype(dtype), call.G, axis=2)
        for x in (problem.key, problem.value)
    )
    return problem.query.astype(dtype), k, v


def seen_operands(
    places: Bool[Array, "#B #N T S"], q: Array, k: Array, v: Array
) -> tuple[Array, Array, Array]:
    """Query, key and value, 0 where no place that is True reads them."""
    operands = ((q, "query"), (k, "key"), (v, "key"))
    q, k, v = (seen(places, x, home, x.dtype) for x, home in operands)
    return q, k, v


def softmax(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N h"],
    visible: Bool[Array, "B N T S"],
    t: Float[Array, "B N T S"],
    problem: Problem,
) -> Rows:
    """From the logits on, whatever they are made of."""
    call, sink = problem.call, sink_of(problem)
    sink = -jnp.inf if sink is None else sink[..., None]
    t = jnp.where(visible, t, -jnp.inf)
    alive = visible.any(3)
    m = jnp.where(
        alive, jnp.maximum(lax.stop_gradient(t).max(3), lax.stop_gradient(sink)), 0
    )
    e = jnp.exp(t - m[..., None])
    l = jnp.where(alive, e.sum(3) + jnp.exp(sink - m), 1)
    weights = e / l[..., None]
    keep = kept_on(call, problem.visibility.seed)
    output = einsum("BNTS,BSNh->BTNh", dropped(call, keep, weights), v)
    output = jnp.where(jnp.swapaxes(alive, 1, 2)[..., None], output, 0)
    lse = jnp.where(alive, m + jnp.log(l), sink)
    return Rows(q, k, v, visible, weights, output, jnp.swapaxes(lse, 1, 2), keep)


def logit_cotangents(
    row: Rows, cotangents: tuple[Array, Array], call: Call
) -> tuple[Float[Array, "B T N h"], Float[Array, "B N T S"]]:
    """Those of the output, 0 in empty rows, and of the logits: do and dT."""
    alive = jnp.swapaxes(row.visible.any(3), 1, 2)  # [B, T, N]
    do, dlse = (x.astype(row.q.dtype) for x in cotangents)
    do, dlse = jnp.where(alive[..., None], do, 0), jnp.where(alive, dlse, 0)
    delta = (do * row.output).sum(3)
    dp = dropped(call, row.keep, einsum("BTNh,BSNh->BNTS", do, row.v))
    dt = row.weights * (dp + jnp.swapaxes(dlse - delta, 1, 2)[..., None])
    return do, jnp.where(row.visible, dt, 0)


def sink_cotangent(
    problem: Problem, row: Rows, cotangents: tuple[Array, Array]
) -> Float[Array, "#B #N"] | None:
    """That of the sink; None if there is none."""
    sink = sink_of(problem)
    if sink is None:
        return None
    do, dlse = (x.astype(row.q.dtype) for x in cotangents)
    alive = jnp.swapaxes(row.visible.any(3), 1, 2)
    delta = jnp.where(alive, (do * row.output).sum(3), 0)
    weight = jnp.exp(sink[:, None, :] - row.lse)
    weight = jnp.where(row.lse == -jnp.inf, 0, weight)
    whole = (weight * (dlse - delta)).sum(1)
    shared = [axis for axis in (0, 1) if sink.shape[axis] == 1]
    return whole.sum(shared, keepdims=True).astype(sink.dtype)


def operand_cotangents(
    row: Rows, do: Float[Array, "B T N h"], ds: Float[Array, "B N T S"], call: Call
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K h"]]:
    """Those of query, key and value, from those of the output and of the scores."""
    if call.soft_cap is not None:
        s = jnp.where(row.visible, scores(row.q, row.k, call), 0)
        ds = ds * (1 - (s / call.soft_cap) ** 2)
    dq = call.scale * einsum("BNTS,BSNH->BTNH", ds, row.k)
    dk = call.scale * einsum("BNTS,BTNH->BSNH", ds, row.q)
    dv = einsum("BNTS,BTNh->BSNh", dropped(call, row.keep, row.weights), do)
    dk, dv = (_shared_heads(x, call) for x in (dk, dv))
    return dq.astype(call.dtype), dk.astype(call.dtype), dv.astype(call.dtype)


def scores(
    q: Float[Array, "B T N H"], k: Float[Array, "B S N H"], call: Call
) -> Float[Array, "B N T S"]:
    """The scores s = scale q.k; c tanh(scale q.k / c) where there is a soft cap c."""
    return capped(call.scale * einsum("BTNH,BSNH->BNTS", q, k), call)


def capped(s: Float[Array, "*axes"], call: Call) -> Float[Array, "*axes"]:
    """Scaled products as the soft cap leaves them."""
    if call.soft_cap is None:
        return s
    return call.soft_cap * jnp.tanh(s / call.soft_cap)


def region(visibility: Visibility, call: Call) -> Region:
    """Where a term is evaluated: every query and every key."""
    queries, keys = positions(call, visibility)
    return Region(queries[..., :, None], keys[..., None, :], call.accumulator)


def _logits(
    q: Array, k: Array, added: Added, visibility: Visibility, call: Call
) -> tuple[Float[Array, "B N T S"], list[Float[Array, "#B #N #T #S"]]]:
    """Scores with every term, and each term's own value."""
    values = added.on(region(visibility, call))
    return sum(values, scores(q, k, call)), values


def _visible(
    q: Array, k: Array, added: Added, visibility: Visibility, call: Call
) -> Bool[Array, "B N T S"]:
    """Places that are allowed and that neither the bias nor the logit takes away."""
    t, values = _logits(q, k, added, visibility, call)
    return allowed(call, visibility) & weighty(t) & ~taken(values)


def _shared_heads(dx: Float[Array, "B S N x"], call: Call) -> Float[Array, "B S K x"]:
    """The sum over the query heads that share a key head."""
    return dx.reshape(*dx.shape[:2], call.K, call.G, -1).sum(3)
