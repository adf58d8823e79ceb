"""Linear biases of queries beyond all keys, counted from the nearest key."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_attn.bias.alibi import ALiBi, NearALiBi
from pallas_attn.bias.base import Added
from pallas_attn.problem import as_terms, Problem, sink_of
from pallas_attn.visibility import positions


def from_nearest(
    problem: Problem, *, lengths: bool = False
) -> tuple[Problem, Float[Array, "#B #N T"] | None]:
    """A problem whose ALiBi counts from the nearest key, and what that leaves out.

    All keys of a query share it, so that weights do not see it, unless there is a sink.
    A query 2^20 beyond has scores of 1e6 and more, of which float32 rounds the
    differences, and each tile its own; of the rest no number is larger than the keys
    are many.

    Args:
        problem: With implicit positions or not.
        lengths: Whether queries past `key_lengths` count as beyond all keys.

    Returns:
        The problem as it is, and None, where no query stands beyond all keys, or where
        weights see it.
    """
    call, arrays, added = problem.call, problem.visibility, as_terms(problem.bias)
    beyond = call.passes_keys or (lengths and arrays.key_lengths is not None)
    linear = any(type(term) is ALiBi for term in added.terms)
    if arrays.placed or not beyond or not linear or sink_of(problem) is not None:
        return problem, None
    dtype, keys = call.accumulator, jnp.full((1,), call.S, jnp.int32)
    last = (keys if arrays.key_lengths is None else arrays.key_lengths) - 1
    queries, _ = positions(call, arrays)
    nearest = jnp.clip(queries, 0, last[:, None, None])
    far = jnp.abs((queries - nearest).astype(dtype))
    # widened first: what scores and shift give a slope's gradient is rounded once
    terms = [
        replace(term, slopes=term.slopes.astype(dtype)) if type(term) is ALiBi else term
        for term in added.terms
    ]
    slopes = sum(
        (term.slopes for term in terms if type(term) is ALiBi), jnp.zeros((), dtype)
    )
    shift = -slopes[..., None] * far
    near = last[:, None].astype(dtype)
    terms = (
        NearALiBi(term.slopes, near) if type(term) is ALiBi else term for term in terms
    )
    return replace(problem, bias=Added(tuple(terms), added.products)), shift


def shifted(
    residual: Float[Array, "B T N"], shift: Float[Array, "#B #N #T"] | None
) -> Float[Array, "B T N"]:
    """Residuals of rows that see a key, with what was left out of their scores."""
    if shift is None:
        return residual
    # the cotangent of an empty row may be NaN
    alive = ~jnp.isinf(residual)
    whole = jnp.where(alive, residual, 0) + jnp.swapaxes(shift, 1, 2)
    return jnp.where(alive, whole, residual)
