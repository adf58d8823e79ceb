"""Who may attend to whom, on whole axes, and what nobody may see."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_attn.bias.base import Added, Bias, homes
from pallas_attn.call import Call, NO_WEIGHT
from pallas_attn.positions import within


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Visibility:
    """The arrays that decide which key a query may attend to; None where there is none.

    Positions are either implicit (`offset` or `Call.offset`: query i stands at
    offset + i, key j at j) or explicit (both position arrays), never mixed.
    """

    offset: Int[Array, "#B"] | None = None
    query_positions: Int[Array, "#B #N T"] | None = None
    key_positions: Int[Array, "#B #N S"] | None = None
    query_lengths: Int[Array, " B"] | None = None  # within 0..T
    key_lengths: Int[Array, " B"] | None = None  # within 0..S
    query_segments: Int[Array, "B T"] | None = None
    key_segments: Int[Array, "B S"] | None = None
    mask: Bool[Array, "#B #N #T #S"] | None = None
    # of dropout, which hides no key but some weights: [2], or `dropout.seed_of_all`
    seed: Int[Array, "*BN words"] | None = None

    @property
    def placed(self) -> bool:
        """Whether positions are explicit."""
        return self.query_positions is not None


def positions(
    call: Call, visibility: Visibility
) -> tuple[Int[Array, "#B #N T"], Int[Array, "#B #N S"]]:
    """Positions of all queries and all keys, implicit ones written out."""
    if visibility.placed:
        assert visibility.query_positions is not None
        assert visibility.key_positions is not None
        return visibility.query_positions, visibility.key_positions
    queries = jnp.arange(call.T, dtype=jnp.int32)[None, None, :]
    keys = jnp.arange(call.S, dtype=jnp.int32)[None, None, :]
    if visibility.offset is not None:
        return queries + visibility.offset[:, None, None], keys
    return queries + jnp.int32(call.offset or 0), keys


def allowed(call: Call, visibility: Visibility) -> Bool[Array, "#B #N #T #S"]:
    """Which key each query may attend to, by position, length, segment and mask.

    Axes along which nothing varies have size 1; True everywhere without a condition.
    """
    conditions = []
    queries, keys = positions(call, visibility)
    queries, keys = queries[:, :, :, None], keys[:, :, None, :]
    if call.causal:
        conditions.append(keys <= queries)
    if call.window is not None:
        conditions += within(queries, keys, call.window)
    if visibility.query_lengths is not None:
        rows = jnp.arange(call.T, dtype=jnp.int32)[None, None, :, None]
        conditions.append(rows < visibility.query_lengths[:, None, None, None])
    if visibility.key_lengths is not None:
        cols = jnp.arange(call.S, dtype=jnp.int32)[None, None, None, :]
        conditions.append(cols < visibility.key_lengths[:, None, None, None])
    if visibility.query_segments is not None:
        assert visibility.key_segments is not None
        rows = visibility.query_segments[:, None, :, None]
        conditions.append(rows == visibility.key_segments[:, None, None, :])
    if visibility.mask is not None:
        conditions.append(visibility.mask)
    everyone = jnp.ones((1, 1, 1, 1), bool)
    return functools.reduce(jnp.logical_and, conditions, everyone)


def weighty(x: Array) -> Bool[Array, "*axes"]:
    """Whether a logit or a term's own value leaves a key any weight; NaN does."""
    return ~(x <= NO_WEIGHT)


def taken(values: list[Array]) -> Bool[Array, "#B #N #T #S"]:
    """Where a bias, one of its terms or their sum, leaves a key without weight.

    Whatever the score is: NaN there is as a mask would have it.
    """
    if not values:
        return jnp.zeros((1, 1, 1, 1), bool)
    whole = functools.reduce(jnp.add, values)
    return functools.reduce(jnp.logical_or, [x <= NO_WEIGHT for x in (*values, whole)])


def seen(places: Bool[Array, "#B #N T S"], x: Array, home: str, dtype: Any) -> Array:
    """A field in the dtype of scores, 0 where no place that is True reads it.

    So that NaN there reaches neither a score nor, as 0 * NaN, a gradient. Widened
    first: what many places add to the gradient of one entry is rounded once.
    """
    x = x.astype(dtype)
    match home:
        case "query":  # [#B, T, #N, ...]
            by = jnp.swapaxes(places.any(3), 1, 2)
        case "key":  # [#B, S, #N, ...]
            by = jnp.swapaxes(places.any(2), 1, 2)
        case (
            "pair" | "distance"
        ):  # [#B, #N, #T, #S]; what a whole row shares stays one number
            shared = tuple(axis for axis in (2, 3) if x.shape[axis] == 1)
            by = places.any(shared, keepdims=True)
        case _:
            return x
    by = by.reshape(by.shape + (1,) * (x.ndim - by.ndim))
    return jnp.where(by, x, jnp.zeros((), x.dtype))


def seen_added(places: Bool[Array, "#B #N T S"], added: Added, dtype: Any) -> Added:
    """All fields and factors of a bias, as `seen` has each."""

    def term(t: Bias) -> Any:
        fields = {
            name: seen(places, getattr(t, name), home, dtype)
            for name, home in homes(t).items()
        }
        return dataclasses.replace(t, **fields)

    return Added(
        tuple(term(t) for t in added.terms),
        tuple(
            (seen(places, a, "query", dtype), seen(places, b, "key", dtype))
            for a, b in added.products
        ),
    )
