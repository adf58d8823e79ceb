"""Softmax attention chunk by chunk: linear memory on any platform.

`lax.map` over `jax.checkpoint`-ed chunks of query rows. JAX differentiates it, twice
too and in forward mode; a backward keeps no scores but computes each chunk's again.
Operands of 16 bits are widened first: their products are exact, and what many chunks
add to the gradient of one key is summed in float32 and rounded once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from pallas_attn.bias.base import Added, has_tile, homes
from pallas_attn.bias.region import Region
from pallas_attn.call import Call
from pallas_attn.dropout import dropped, kept_on
from pallas_attn.nearest import from_nearest, shifted
from pallas_attn.normalizers.entmax import Entmax
from pallas_attn.normalizers.softmax import Softmax
from pallas_attn.poison import poisoned
from pallas_attn.problem import as_terms, Problem
from pallas_attn.visibility import allowed, seen_added, taken, Visibility, weighty
from pallas_attn.xla.chunks import (
    chunks,
    cut,
    cut_added,
    cut_visibility,
    may_hide,
    PAIRS,
)


class Logits(NamedTuple):
    """What the softmax of a chunk is taken of: t + shift, over the visible places."""

    t: Float[Array, "B N T S"]
    visible: Bool[Array, "B N T S"]
    shift: Float[Array, "B N T 1"] | float = 0.0


# (scores [B, N, T, S], places [#B, #N, #T, #S], the chunk's bias, its region)
LogitsOf = Callable[[Array, Array, Added, Region], Logits]


class Weights(NamedTuple):
    """What a chunk's values are summed with, and what is made of the sums."""

    e: Float[Array, "B N T S"]  # before dropout
    output: Callable[[Array], Array]  # of e v, [B, N, T, h]
    residual: Callable[[], Array]  # [B, N, T, 1]


# (logits, -inf where not visible; the chunk's normalizer)
WeightsOf = Callable[[Logits, Any], Weights]


def attend(problem: Problem) -> tuple[Float[Array, "B T N h"], Float[Array, "B T N"]]:
    """Attention of every query; the function of `reference.attention.attend`."""
    problem, shift = from_nearest(problem)
    o, lse = in_chunks(problem, sums)
    return o, shifted(lse, shift)


def sums(scores: Array, places: Array, added: Added, region: Region) -> Logits:
    """Scores with every term; what all keys of a query share is kept apart.

    Weights do not see it, and a shift of -1e9 would cost the scores their digits.
    """
    t, shift = scores, jnp.zeros_like(scores[..., :1])
    for part in added.parts_on(region):
        if jnp.ndim(part) < 4 or part.shape[3] == 1:
            shift = shift + part
        else:
            t = t + part
    visible = places & weighty(t + shift)
    fine = jnp.isfinite(shift)
    t = poisoned(t, ~fine & visible.any(3, keepdims=True))
    return Logits(t, visible, jnp.where(fine, shift, 0))


def softmax(logits: Logits, normalizer: Any) -> Weights:
    """Weights relative to the largest of a row; their sum divides the output."""
    t, _, shift = logits
    m = lax.stop_gradient(t).max(3, keepdims=True)
    nothing, below = -jnp.inf, None
    if normalizer.sink is not None:
        nothing = normalizer.sink[..., None, None]
        below = nothing - shift
        m = jnp.maximum(m, lax.stop_gradient(below))
    m = jnp.where(m == -jnp.inf, 0, m)
    e = jnp.exp(t - m)
    l = e.sum(3, keepdims=True)
    alive = l != 0  # of the largest score exp(0); NaN is alive
    l = l if below is None else l + jnp.exp(below - m)
    l = jnp.where(alive, l, 1)

    def residual() -> Array:
        top = m + shift
        if below is not None:  # beside a shift of -1e9 a sum would have no digits
            top = jnp.where(below == m, nothing, top)
            top = lax.stop_gradient(top) + (shift - lax.stop_gradient(shift))
        return jnp.where(alive, top + jnp.log(l), nothing)

    return Weights(e, lambda o: jnp.where(alive, o / l, 0), residual)


def in_chunks(
    problem: Problem, logits: LogitsOf, weights: WeightsOf = softmax
) -> tuple[Float[Array, "B T N h"], Float[Array, "B T N"]]:
    """Attention of every query, by logits that a chunk's scores and bias make.

    A chunk holds, in their order, all keys that a query of it may attend to.
    """
    query, call, visibility = problem.query, problem.call, problem.visibility
    added = as_terms(problem.bias)
    dtype = call.accumulator
    plan = chunks(call, visibility, added)
    key, value = (
        jnp.swapaxes(x.astype(dtype), 1, 2) for x in (problem.key, problem.value)
    )
    unknown = None
    if may_hide(call, visibility) or any(term.hides for term in added.terms):
        unknown = tuple(~jnp.isfinite(x).all(3) for x in (key, value))  # [B, K, S]
        key, value = (jnp.where(jnp.isfinite(x), x, 0) for x in (key, value))
    added = _widened(added, dtype, once=plan.batch == call.B)

    def run(keys: int, starts: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        small = dataclasses.replace(
            call, B=plan.batch, T=plan.rows, S=keys, offset=None
        )

        @jax.checkpoint
        def chunk(at: tuple[Array, Array, Array]) -> tuple[Array, Array]:
            sizes = (plan.batch, plan.rows, keys)
            place = dict(zip("BTS", zip(at, sizes, strict=True), strict=True))
            part = functools.partial(cut, place=place, runs=plan.runs)
            return _attend(
                part(query, "BTNH"),
                part(key, "BKSH"),
                part(value, "BKSh"),
                cut_added(added, call, place, plan.runs),
                cut_visibility(visibility, call, place, plan.runs),
                small,
                jax.tree.map(lambda x: part(x, "BKS"), unknown),
                logits,
                weights,
                jax.tree.map(lambda x: part(x, "BN"), problem.normalizer),
                first=(plan.entries(at[0], call), *at[1:]),
            )

        return lax.map(chunk, starts)

    def joined(*parts: Array) -> Array:
        """Each [starts, chunks, batch, rows, ...] as one [B, T, ...]."""
        x = plan.joined(jnp.concatenate(parts, axis=1))
        x = x.reshape(x.shape[0], -1, *x.shape[3:])
        if x.shape[1] == call.T:
            return x
        return jnp.concatenate([x[:, : call.T - plan.rows], x[:, -plan.rows :]], axis=1)

    each = call.B // plan.runs
    batches = np.zeros(1, np.int32)
    if plan.batch != call.B:
        batches = np.arange(0, each, plan.each, dtype=np.int32)
    parts = []
    for group in plan.groups:
        grid = (batches.size, group.rows_from.size)
        starts = (
            jnp.broadcast_to(batches[:, None], grid).ravel(),
            jnp.broadcast_to(group.rows_from[None, :], grid).ravel(),
            jnp.broadcast_to(group.keys_from[None, :], grid).ravel(),
        )
        out = run(group.keys, starts)
        parts.append(jax.tree.map(lambda x, g=grid: x.reshape(g + x.shape[1:]), out))
    return jax.tree.map(joined, *parts)


def _widened(added: Added, dtype: Any, once: bool) -> Added:
    """A bias in the dtype that sums its gradient, where several chunks add to it."""

    def field(x: Array, home: str) -> Array:
        # one value per pair is read by one chunk, unless batches share it
        pairs = home in PAIRS and x.ndim == 4
        per_chunk = pairs and x.shape[2] > 1 and (once or x.shape[0] > 1)
        return x if per_chunk else x.astype(dtype)

    terms = tuple(
        dataclasses.replace(
            term, **{n: field(getattr(term, n), h) for n, h in homes(term).items()}
        )
        for term in added.terms
    )
    return Added(terms, jax.tree.map(lambda x: x.astype(dtype), added.products))


def _attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S h"],
    added: Added,
    visibility: Visibility,
    call: Call,
    unknown: tuple[Array, Array] | None,  # keys, values that are not finite
    logits: LogitsOf,
    weights: WeightsOf,
    normalizer: Softmax | Entmax,
    first: tuple[Array, Array, Array],  # batch entries; query and key of the chunk
) -> tuple[Float[Array, "B T N h"], Float[Array, "B T N"]]:
    """One chunk, as a small call with positions written out."""
    precision = call.precision
    if precision is None and call.dtype == "float16":
        precision = lax.Precision.HIGHEST  # a GPU's TF32 would round weights to 11 bits
    dot = functools.partial(
        jnp.einsum, precision=precision, preferred_element_type=key.dtype
    )
    queries, keys = visibility.query_positions, visibility.key_positions
    assert queries is not None
    assert keys is not None
    region = Region(queries[..., :, None], keys[..., None, :], key.dtype)
    places = allowed(call, visibility)
    added = added.spread_out(call.T, call.S)
    added = seen_added(places, added, key.dtype)
    terms = [term for term in added.terms if has_tile(term)]
    if terms or added.products:
        values = lax.stop_gradient(added.on(region))
        places = places & ~taken(values)
        if len(values) > 1:  # where one takes a key away, another may be NaN
            added = seen_added(places, added, key.dtype)
    q = jnp.swapaxes(query.astype(key.dtype), 1, 2)
    lost = ~jnp.isfinite(q).all(3, keepdims=True)  # [B, N, T, 1]
    q = jnp.where(lost, 0, q).reshape(call.B, call.K, -1, call.H)
    spoiled = None
    if unknown is not None:
        of_keys, spoiled = (_seeing(x, places, call) for x in unknown)
        lost = lost | of_keys
    pairs = (call.B, call.N, call.T, call.S)
    scores = call.scale * dot("BKtH,BKSH->BKtS", q, key).reshape(pairs)
    # what a row sees of NaN meets it here, behind the cap's derivative: a product would
    # spread it over rows that see nothing of it, and over gradients
    scores = poisoned(_capped(scores, call.soft_cap), lost)

    t, visible, shift = logits(scores, places, added, region)
    t = jnp.where(visible, t, -jnp.inf)

    e, output, residual = weights(Logits(t, visible, shift), normalizer)
    e = dropped(call, kept_on(call, visibility.seed, first), e)
    o = dot("BKtS,BKSh->BKth", e.reshape(*q.shape[:3], call.S), value)
    o = output(o.reshape(*pairs[:3], call.h))
    if spoiled is not None:
        # 1 or NaN, in gradients too
        o = o * poisoned(jnp.ones(spoiled.shape, o.dtype), spoiled)
    o = o.astype(query.dtype)
    of_rows = residual()
    return jnp.swapaxes(o, 1, 2), jnp.swapaxes(of_rows[..., 0], 1, 2)


def _capped(scores: Float[Array, "*axes"], cap: float | None) -> Float[Array, "*axes"]:
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def _seeing(unknown: Bool[Array, "#B K S"], places: Array, call: Call) -> Array:
    """The rows that see a key of some, [B, N, T, 1]."""
    of_heads = jnp.repeat(unknown, call.G, 1)[:, :, None, :]
    return (places & of_heads).any(3, keepdims=True)
