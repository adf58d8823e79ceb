"""Scores of a tile, the weights they become, and the gradient that comes back."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_attn.bias.base import Added, Bias
from pallas_attn.call import Call, NO_WEIGHT
from pallas_attn.normalizers.softmax import LOG2E, score_gradient
from pallas_attn.tiled.fields import Values
from pallas_attn.triton.dropout import drop_on, rescale
from pallas_attn.triton.ptx import apart, product
from pallas_attn.triton.row_weights import RowWeights
from pallas_attn.triton.terms import on_tile, parts
from pallas_attn.triton.tile import Tile
from pallas_attn.types import Ref


f32 = jnp.float32


def dots(
    t: Tile,
    q: jax.Array,
    k: jax.Array,
    qs: list[jax.Array],
    ks: list[jax.Array],
) -> tuple[jax.Array, jax.Array | None]:
    """(q.k, soft-capped, plus the products; the derivative of the cap or None).

    Oriented as the tile; without a cap, in one accumulator, unless that costs digits.
    """
    s, slope = capped(t.call, t.dot(k, q.T) if t.flip else t.dot(q, k.T))
    for a, b in zip(qs, ks, strict=True):
        more = t.dot(b, a.T) if t.flip else t.dot(a, b.T)
        s = apart(t.call, more) + apart(t.call, s)
    return s, slope


def capped(call: Call, s: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """(products q.k as the soft cap leaves them, its derivative or None).

    c tanh(scale s / c) is no larger than |scale s|, so that what bounds products by
    norms bounds them capped: |q| |k| + |A| |B| <= |[q, A]| |[k, B]|.
    """
    if call.soft_cap is None:
        return s, None
    # Not the tanh of one instruction: its 2^-11 of a score would show in float32.
    bent = jnp.tanh(s * (call.scale / call.soft_cap))
    return product(call, bent, call.soft_cap / call.scale), 1 - bent * bent


def uncapped(
    t: Tile, ds: jax.Array, slope: jax.Array, visible: jax.Array | None
) -> jax.Array:
    """The gradient of q.k from that of the capped scores."""
    dqk = ds * slope
    if visible is not None and t.sight.veiled:  # 0 * NaN of what nobody sees
        dqk = jnp.where(visible, dqk, 0.0)
    return dqk


def row_scores(
    t: Tile,
    q: jax.Array,
    qs: list[jax.Array],
    k: Ref,
    added: Added,
    held: Values,
    large: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(x, row, visible): scores x + row in units of q.k, x = -inf where hidden.

    q, qs: of the queries of the tile; k: the ref of all keys.
    large: what a whole row has may be so large that all passes must round it alike.
    """
    inverse = 1.0 / t.call.scale
    several = len(added.terms) + len(added.products) > 1
    x, _ = dots(t, q, t.keys(k), qs, [t.keys(b) for _, b in added.products])
    t, terms = on_tile(added, t, held)
    row, rest = parts(terms, t, large=large)
    for r in weightless(rest, several):
        # Not `+ r`: that would become the dot's accumulator, whose load Triton does
        # not pipeline.
        x = x - product(t.call, r, -inverse)
    visible = t.visible
    if visible is not None:
        x = jnp.where(visible, x, -jnp.inf)
    row = product(t.call, row, inverse, always=large)
    row = jnp.broadcast_to(row, (t.bq, 1)).reshape(t.bq)
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


def times(t: Tile, ds: jax.Array, y: jax.Array, dtype: DTypeLike) -> jax.Array:
    """The product dS y, dS rounded to the operands' dtype (TF32 if y has another)."""
    if y.dtype == dtype:
        return t.dot(ds.astype(dtype), y)
    return t.dot(ds, y.astype(f32))


class Graded(NamedTuple):
    """Of one tile: its weights, and the gradient of its scores.

    p: the weights that meet the values; what dropout keeps of them, without `rescale`.
    u: what dS is a multiple of, dS = U (dP - delta).
    ds: the gradient of the scores; dqk: of q.k in them, less by a soft cap's slope.
    """

    p: jax.Array
    u: jax.Array
    ds: jax.Array
    dqk: jax.Array
    visible: jax.Array | None


def weights_and_ds(
    t: Tile,
    operands: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    factors: tuple[list[jax.Array], list[jax.Array]],
    terms: tuple[Bias, ...],
    stats: RowWeights,
) -> Graded:
    """What a backward pass makes of one tile, given its q, k, v, do.

    With a full bias tile both dots are issued first, and its load is awaited while they
    run; without one, that would only cost registers.
    """
    q, k, v, do = operands

    def dp_dot() -> jax.Array:
        return t.dot(v, do.T) if t.flip else t.dot(do, v.T)

    s, slope = dots(t, q, k, *factors)
    row, rest = parts(terms, t, large=stats.large)
    rest = weightless(rest, len(terms) + len(factors[0]) > 1)
    dp = dp_dot() if any(r.shape == t.shape for r in rest) else None
    visible = t.visible
    p, u = stats.weights(t, s, row, rest, visible)
    dp, drop = dp_dot() if dp is None else dp, drop_on(t)
    if drop is not None:
        p, dp = drop(p), drop(dp * rescale(t.call))
    ds = score_gradient(u, dp, t.along_q(stats.delta))
    if visible is not None and t.sight.veiled:  # 0 * NaN of what nobody sees
        ds = jnp.where(visible, ds, 0.0)
    dqk = ds if slope is None else uncapped(t, ds, slope, visible)
    return Graded(p, u, ds, dqk, visible)
