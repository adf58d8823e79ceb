"""Scores of a tile, the weights they become, and the gradient that comes back."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_attn.call import Call, NO_WEIGHT
from pallas_attn.kernels.instructions import exp2
from pallas_attn.kernels.operands import RowStats
from pallas_attn.kernels.terms import parts
from pallas_attn.kernels.tile import Tile
from pallas_attn.normalizers.softmax import exponent, LOG2E, score_gradient


f32 = jnp.float32


def dots(t: Tile, q: Any, k: Any, qs: list[Any], ks: list[Any]) -> jax.Array:
    """q.k plus the products, in one accumulator, oriented as the tile."""
    s = t.dot(k, q.T) if t.flip else t.dot(q, k.T)
    for a, b in zip(qs, ks, strict=True):
        s = (t.dot(b, a.T) if t.flip else t.dot(a, b.T)) + s
    return s


def weightless(rest: list[jax.Array], several: bool) -> list[jax.Array]:
    """Parts of a score; of several terms, each alone can take a key's weight away."""
    if not several:  # one term's -1e30 is the score's own
        return rest
    return [jnp.where(r <= NO_WEIGHT, -jnp.inf, r) for r in rest]


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

    s = dots(t, q, k, *factors)
    row, rest = parts(terms, t)
    rest = weightless(rest, len(terms) + len(factors[0]) > 1)
    dp = dp_dot() if any(r.shape == t.shape for r in rest) else None
    mul, inverse = t.call.scale * LOG2E, 1.0 / t.call.scale
    if stats.peak is None or stats.total is None:
        e = s * mul
        for r in rest:
            e = e + r * LOG2E
        e = e - (t.along_q(stats.lse) - row * LOG2E)
    else:
        for r in rest:
            s = s - r * -inverse  # as the forward pass rounds it
        base = t.along_q(stats.peak) - row * inverse
        e = exponent(s, base, mul, large=True) - t.along_q(stats.total)
    visible = t.visible
    if visible is not None:
        e = jnp.where(visible, e, -jnp.inf)
    p = exp2(t.call, e)
    ds = score_gradient(p, dp_dot() if dp is None else dp, t.along_q(stats.delta))
    if visible is not None and t.sight.veiled:  # 0 * NaN of what nobody sees
        ds = jnp.where(visible, ds, 0.0)
    return p, ds, visible
