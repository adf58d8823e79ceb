"""Scores of a tile, the weights they become, and the gradient that comes back."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_attn.call import Call, NO_WEIGHT
from pallas_attn.kernels.instructions import exp2, rounded
from pallas_attn.kernels.operands import RowStats
from pallas_attn.kernels.terms import parts
from pallas_attn.kernels.tile import Tile
from pallas_attn.normalizers.softmax import LOG2E, pace, score_gradient


f32 = jnp.float32


def dots(t: Tile, q: Any, k: Any, qs: list[Any], ks: list[Any]) -> jax.Array:
    """q.k plus the products, in one accumulator, oriented as the tile."""
    s = t.dot(k, q.T) if t.flip else t.dot(q, k.T)
    for a, b in zip(qs, ks, strict=True):
        s = (t.dot(b, a.T) if t.flip else t.dot(a, b.T)) + s
    return s


def added_to(
    t: Tile, terms: tuple[Any, ...], several: bool, large: bool
) -> tuple[Any, jax.Array | None]:
    """(row, rest): the terms' values in log2, apart as `terms.parts` tells them apart.

    Of several terms, each alone can take a key's weight away.
    """
    row, rest = parts(terms, t)
    if several:  # one term's -1e30 is the score's own
        rest = [jnp.where(r <= NO_WEIGHT, -jnp.inf, r) for r in rest]

    def in_log2(x: Any) -> Any:
        return rounded(t.call, x, LOG2E) if large else x * LOG2E

    total = sum([in_log2(r) for r in rest[1:]], in_log2(rest[0])) if rest else None
    return in_log2(row), total


def reach_of(call: Call, q: jax.Array, qs: list[jax.Array]) -> jax.Array:
    """The largest |scale [q, A]| in log2, above the rounding of any dot, TF32's too."""
    squares = sum([squared_norm(a) for a in qs], squared_norm(q))
    return jnp.sqrt(jnp.max(squares)) * (call.scale * LOG2E * (1 + 2.0**-8))


def squared_norm(x: jax.Array) -> jax.Array:
    """|x|^2 of every row, float32."""
    return jnp.sum(x.astype(f32) ** 2, 1)


def times(t: Tile, ds: jax.Array, y: jax.Array, dtype: Any) -> jax.Array:
    """The product dS y, dS rounded to the operands' dtype (TF32 if y has another)."""
    if y.dtype == dtype:
        return t.dot(ds.astype(dtype), y)
    return t.dot(ds, y.astype(f32))


def weights_and_ds(
    t: Tile,
    operands: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    factors: tuple[list[jax.Array], list[jax.Array]],
    terms: tuple[Any, ...],
    stats: RowStats,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(P, dS, visible) of one tile, given its q, k, v, do.

    With a full bias tile both dots are issued first, and its load is awaited while they
    run; without one, that would only cost registers.
    """
    q, k, v, do = operands

    def dp_dot() -> jax.Array:
        return t.dot(v, do.T) if t.flip else t.dot(do, v.T)

    large = stats.peak is not None and stats.total is not None
    s = dots(t, q, k, *factors)
    row, rest = added_to(t, terms, len(terms) + len(factors[0]) > 1, large)
    dp = dp_dot() if rest is not None and rest.shape == t.shape else None
    mul = t.call.scale * LOG2E
    reference = stats.peak if large else stats.lse
    base = t.along_q(reference) - row
    rest = -base if rest is None else rest - base
    if large:
        mul, rest = t.along_q(pace(reference, mul)), rest - t.along_q(stats.total)
    e = s * mul + rest
    visible = t.visible
    if visible is not None:
        e = jnp.where(visible, e, -jnp.inf)
    p = exp2(t.call, e)
    ds = score_gradient(p, dp_dot() if dp is None else dp, t.along_q(stats.delta))
    if visible is not None and t.sight.veiled:  # 0 * NaN of what nobody sees
        ds = jnp.where(visible, ds, 0.0)
    return p, ds, visible
