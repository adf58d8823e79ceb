"""Scores of a tile, the weights they become, and the gradient that comes back."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_attn.bias.base import Added
from pallas_attn.call import Call, NO_WEIGHT
from pallas_attn.kernels.terms import Field, on_tile, parts
from pallas_attn.kernels.tile import Tile
from pallas_attn.normalizers.softmax import LOG2E, score_gradient


f32 = jnp.float32


def dots(t: Tile, q: Any, k: Any, qs: list[Any], ks: list[Any]) -> jax.Array:
    """q.k plus the products, in one accumulator, oriented as the tile."""
    s = t.dot(k, q.T) if t.flip else t.dot(q, k.T)
    for a, b in zip(qs, ks, strict=True):
        s = (t.dot(b, a.T) if t.flip else t.dot(a, b.T)) + s
    return s


def row_scores(
    t: Tile, q: jax.Array, qs: list[Any], k: Any, added: Added, held: dict[Field, Any]
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(x, row, visible): scores x + row in units of q.k, x = -inf where hidden.

    q, qs: of the queries of the tile; k: the ref of all keys.
    """
    inverse = 1.0 / t.call.scale
    several = len(added.terms) + len(added.products) > 1
    x = dots(t, q, t.keys(k), qs, [t.keys(b) for _, b in added.products])
    row, rest = parts(on_tile(added, t, held), t)
    for r in weightless(rest, several):
        # Not `+ r`: that would become the dot's accumulator, whose load Triton does
        # not pipeline.
        x = x - r * -inverse
    visible = t.visible
    if visible is not None:
        x = jnp.where(visible, x, -jnp.inf)
    row = jnp.broadcast_to(row * inverse, (t.bq, 1)).reshape(t.bq)
    return x, t.seen_queries(visible, row), visible


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
    stats: Any,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """(P, U, dS, visible) of one tile, given its q, k, v, do: dS = U (dP - delta).

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
    visible = t.visible
    p, u = stats.weights(t, s, row, rest, visible)
    ds = score_gradient(u, dp_dot() if dp is None else dp, t.along_q(stats.delta))
    if visible is not None and t.sight.veiled:  # 0 * NaN of what nobody sees
        ds = jnp.where(visible, ds, 0.0)
    return p, u, ds, visible
