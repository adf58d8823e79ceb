"""From the arguments of a call to what an implementation takes: checked, one B."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from pallas_attn.bias.base import Added, Bias, homes, terms_of
from pallas_attn.bias.region import Place
from pallas_attn.call import accumulator, Call
from pallas_attn.cards import shared_kib
from pallas_attn.checks import (
    arrays as check,
    bias as check_bias,
    options as check_static,
)
from pallas_attn.config import Config
from pallas_attn.implementations import current_device, Implementation, resolve
from pallas_attn.normalizers.entmax import Entmax
from pallas_attn.normalizers.softmax import Softmax
from pallas_attn.problem import Problem, sink_of
from pallas_attn.shapes import flattened, Sizes
from pallas_attn.visibility import positions, Visibility


# Axes of a field behind the leading ones.
RANKS = {"head": 1, "query": 2, "key": 2, "pair": 3, "diagonal": 2}

# Of scales beyond these a power of two is multiplied into the query: kernels divide by
# the scale what is added to scores, down to -1e30.
LEAST_SCALE, MOST_SCALE = 2.0**-20, 2.0**100


class Request(NamedTuple):
    """A call that has been checked: what is to be computed, by whom, in which shape."""

    problem: Problem
    implementation: str
    sizes: Sizes  # as given, before the leading axes became one

    @property
    def residual_of_nothing(self) -> Float[Array, "#B 1 #N"]:
        """The residual of a query that sees no key."""
        sink = sink_of(self.problem)
        if sink is not None:
            return sink[:, None, :]
        is_lse = jnp.atleast_2d(jnp.asarray(self.problem.normalizer.residual_is_lse))
        residual = jnp.where(is_lse, -jnp.inf, jnp.inf)[:, None, :]
        return residual.astype(self.problem.call.accumulator)


def canonical(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    query_offset: ArrayLike = 0,
    query_positions: ArrayLike | None = None,
    key_positions: ArrayLike | None = None,
    query_segment_ids: ArrayLike | None = None,
    key_segment_ids: ArrayLike | None = None,
    normalizer: Softmax | Entmax = Softmax(),
    logits_soft_cap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    precision: lax.PrecisionLike = None,
    implementation: Implementation | Sequence[Implementation] | None = None,
    config: Config | None = None,
    broadcast_dropout: bool = False,
) -> Request:
    """Checks every argument of `dot_product_attention`; flattens leading axes.

    broadcast_dropout: drop the same pairs in all batch entries and heads.
    """
    given = check_static.normalizer(normalizer)
    soft_cap = check_static.soft_cap(logits_soft_cap)
    rate = check_static.dropout_rate(dropout_rate)
    seed = check.dropout_seed(dropout_rng, rate)
    names = check_static.implementation(implementation)

    q, k, v, sizes = check.operands(query, key, value)
    q, positive = _scaled(q, check.scale(scale))
    offset = check.offset(query_offset, sizes)
    query_lengths, key_lengths = (
        check.lengths("query_seq_lengths", query_seq_lengths, sizes, sizes.T),
        check.lengths("key_value_seq_lengths", key_value_seq_lengths, sizes, sizes.S),
    )
    visibility = _visibility(
        sizes,
        mask=check.mask(mask, sizes),
        lengths=(query_lengths, key_lengths),
        segments=check.segments(query_segment_ids, key_segment_ids, sizes),
        positions=check.positions(query_positions, key_positions, offset, sizes),
        offset=offset,
        seed=seed,
    )
    bias = check_bias.given(bias, sizes)
    normalizer = _normalizer(given, sizes, accumulator(q.dtype))
    sparse = normalizer.family == Entmax.family
    if sparse and bias.family:
        check_static.no_contextual_entmax()
    device = current_device()
    choice = resolve(names, device, dtype=q.dtype.name, H=sizes.H, h=sizes.h)
    name = check_static.runnable(choice)
    config = check_static.config(config)
    if bias.family:
        config = check_static.scanning(config)
    if sparse:
        config = check_static.sparse(config)
    call = Call(
        B=sizes.B,
        N=sizes.N,
        K=sizes.K,
        T=sizes.T,
        S=sizes.S,
        H=sizes.H,
        h=sizes.h,
        scale=positive,
        dtype=q.dtype.name,
        causal=check_static.flag("is_causal", is_causal),
        window=check_static.window(local_window_size),
        offset=offset if isinstance(offset, int) else None,
        precision=check_static.precision(precision),
        soft_cap=soft_cap,
        dropout=rate,
        dropout_shared=check_static.flag("broadcast_dropout", broadcast_dropout),
        config=config,
        interpret=name == "triton_interpret",
        shared_kib=shared_kib(device.capability, device.kind),
    )
    place = _place(sizes, call, visibility, alone=_one_placed(bias))
    # lists of keys read an array, not its diagonals
    place = dataclasses.replace(place, diagonal=not (visibility.placed or sparse))
    bias = _bias(bias, sizes, place)
    q, k, v = (flattened(x, sizes.leading, 3) for x in (q, k, v))
    return Request(Problem(q, k, v, bias, normalizer, visibility, call), name, sizes)


def _normalizer(given: Softmax | Entmax, sizes: Sizes, dtype: Any) -> Softmax | Entmax:
    """What is softmax by another name as that; its array as [#B, N]."""
    if isinstance(given, Softmax):
        if given.sink is None:
            return given
        sink = check.sink(given.sink, sizes)
        return Softmax(flattened(sink, sizes.leading, 1, dtype).astype(dtype))
    alpha, top_k = check.alpha(given.alpha, sizes), given.top_k
    top_k = None if top_k is None or top_k >= sizes.S else int(top_k)
    if not isinstance(alpha, int | float):
        return Entmax(alpha.astype(dtype)[None], top_k)
    return Softmax() if alpha == 1 and top_k is None else Entmax(alpha, top_k)


def _scaled(
    q: Float[Array, "*B T N H"], scale: float | Array | None
) -> tuple[Float[Array, "*B T N H"], float]:
    """The query and a scale > 0 that together do what the given scale does."""
    if scale is None:
        return q, 1 / math.sqrt(q.shape[-1])
    if not isinstance(scale, int | float):
        wide = accumulator(q.dtype)
        return _times(q.astype(wide), scale.astype(wide)).astype(q.dtype), 1.0
    if scale < 0:
        q, scale = -q, -scale
    if scale == 0:
        return q * jnp.asarray(0, q.dtype), 1.0
    least = min(max(scale, LEAST_SCALE), MOST_SCALE)
    exponent = math.frexp(scale)[1] - math.frexp(least)[1]
    if exponent:  # exact, but for what is too small to matter
        factor = 2.0**exponent
        wide = q.astype(accumulator(q.dtype)) * factor
        return wide.astype(q.dtype), scale / factor
    return q, scale


def _times(q: Float[Array, "*B T N H"], scale: Array) -> Float[Array, "*B T N H"]:
    """The product; a number that is not finite adds nothing to the scale's gradient.

    It may be a query's that sees no key: its own gradient is 0, and 0 * NaN is NaN.
    """
    finite = jnp.isfinite(q)
    others = q * lax.stop_gradient(scale)
    return jnp.where(finite, jnp.where(finite, q, 0) * scale, others)


def _visibility(
    sizes: Sizes,
    *,
    mask: Array | None,
    lengths: tuple[Array | None, Array | None],
    segments: tuple[Array, Array] | None,
    positions: tuple[Array | None, Array | None],
    offset: int | Array,
    seed: Array | None,
) -> Visibility:
    def flat(x: Array | None, rank: int) -> Array | None:
        return None if x is None else flattened(x, sizes.leading, rank)

    query_positions, key_positions = positions
    if any(x is not None for x in positions):
        query_positions, key_positions = (
            jnp.arange(length, dtype=jnp.int32) if x is None else x
            for x, length in zip(positions, (sizes.T, sizes.S), strict=True)
        )
    query_segments, key_segments = segments or (None, None)
    return Visibility(
        offset=None if isinstance(offset, int) else flat(offset, 0),
        query_positions=flat(query_positions, 2),
        key_positions=flat(key_positions, 2),
        query_lengths=flat(lengths[0], 0),
        key_lengths=flat(lengths[1], 0),
        query_segments=flat(query_segments, 1),
        key_segments=flat(key_segments, 1),
        mask=flat(mask, 3),
        seed=seed,
    )


def _place(sizes: Sizes, call: Call, visibility: Visibility, *, alone: bool) -> Place:
    """Where the queries and keys stand, for biases whose axes are still as given."""

    def led(x: Any) -> Any:
        if x is None:
            return None
        shared = x.shape[0] == 1 != sizes.B
        front = (1,) * len(sizes.leading) if shared else sizes.leading
        return x.reshape(*front, *x.shape[1:])

    queries, keys = positions(call, visibility)
    offset = visibility.offset
    implicit = call.offset if offset is None else led(offset)
    return Place(
        led(queries),
        led(keys),
        offset=None if visibility.placed else implicit,
        key_lengths=led(visibility.key_lengths),
        query_segments=led(visibility.query_segments),
        key_segments=led(visibility.key_segments),
        causal=call.causal,
        alone=alone and visibility.mask is None,
        dtype=call.accumulator,
    )


def _one_placed(bias: Bias) -> bool:
    """Whether a bias is one term, which asks where it is."""
    terms = terms_of(bias)
    return len(terms) == 1 and terms[0].placed


def _bias(bias: Bias, sizes: Sizes, place: Place) -> Added | Bias:
    """What is added to the scores: terms and products, or a bias of its own family."""
    if not bias.family:
        return _added(bias, sizes, place)
    fields = check_bias.tiled("bias", bias, sizes)
    for name, home in homes(bias).items():
        flat = flattened(fields[name], sizes.leading, RANKS[home], place.dtype)
        fields[name] = flat.astype(place.dtype)
    return dataclasses.replace(bias, **fields)


def _added(bias: Bias, sizes: Sizes, place: Place) -> Added:
    """The terms and products of a bias, their leading axes as one."""

    def flat(x: Array, rank: int) -> Array:
        if x.dtype == jnp.float64:
            x = x.astype(place.dtype)
        return flattened(x, sizes.leading, rank, place.dtype)

    def sides(product: tuple[Array, Array]) -> tuple[Array, Array]:
        a, b = (flat(side, 3) for side in product)
        if a.dtype != b.dtype:
            a, b = (side.astype(place.dtype) for side in (a, b))
        return a, b

    def term(part: check_bias.Part, fields: dict[str, Array]) -> Bias:
        at = homes(part.term)
        away = "diagonal" if place.diagonal else "pair"
        ranks = {n: RANKS[away if at[n] == "distance" else at[n]] for n in fields}
        flats = {name: flat(x, ranks[name]) for name, x in fields.items()}
        return dataclasses.replace(part.term, **flats)

    parts = check_bias.parts(bias, place, sizes)
    return Added(
        tuple(term(x, x.fields) for x in parts if x.fields is not None),
        tuple(sides(x.product) for x in parts if x.product is not None),
    )
