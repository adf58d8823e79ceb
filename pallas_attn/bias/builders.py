"""Builders of low-rank biases: exact factors, and those of a truncated SVD."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_attn.bias.base import at_least_float32
from pallas_attn.bias.dense import DenseBias
from pallas_attn.bias.factored import FactoredBias
from pallas_attn.rules import (
    array,
    floating,
    int32,
    integers,
    kind,
    known,
    static_int,
    wrong_shape,
)


class Truncation(NamedTuple):
    """What a truncated SVD kept and lost, per head.

    Args:
        energy: [..., N], the share of the sum of squared singular values that is kept:
            1 - |bias - product|^2 / |bias|^2, in norms over all pairs.
        worst_error: [..., N], the largest |bias_ij - product_ij|.

    >>> _, error = svd_factors(jnp.ones((8, 97, 53)), rank=1, return_error=True)
    >>> error.energy.shape, bool((error.worst_error < 1e-5).all())
    ((1, 8), True)
    """

    energy: Float[Array, "*#B #N"]
    worst_error: Float[Array, "*#B #N"]


def alibi_factors(
    slopes: Any, query_length: int, key_length: int, *, query_offset: Any = 0
) -> FactoredBias:
    """ALiBi of a causal call as a product of two vectors per position.

    With i = query_offset + t and a position c halfway between the first and the last:

        slope (j - i) = [-slope (i - c), slope] . [1, j - c]

    That is -slope |i - j| only for j <= i: attend with `is_causal=True`. For keys after
    the query it is a reward, where `ALiBi` is a penalty. The two products cancel up to
    the distance, so each entry is off by at most slope (T + S) 2^-24 in float32, and
    in float16 by whole logits from a few thousand keys on: keep the factors in float32.
    `ALiBi(slopes)` counts distances in integers, reads less and is pruned; factors are
    for code that takes nothing else.

    Args:
        slopes: float32 [N], [#B, N], or [L, #B, N] for L layers; > 0 is a penalty.
        query_length: T.
        key_length: S.
        query_offset: The position of query 0; an int or an int32 scalar.

    Returns:
        Factors of rank 2, float32: `q_factor` [..., #B, T, N, 2], `k_factor`
        [..., 1, S, 1, 2]; #B is 1 for slopes [N].

    Raises:
        TypeError: if slopes are not float32 or float64, a length is no int, or the
            offset is no int32.
        ValueError: if slopes have no axis, a length is negative, or the offset is not a
            scalar.

    >>> from pallas_attn import alibi_slopes
    >>> bias = alibi_factors(alibi_slopes(2), query_length=3, key_length=3)
    >>> bias.q_factor.shape, bias.k_factor.shape
    ((1, 3, 2, 2), (1, 3, 1, 2))
    >>> positions = jnp.arange(3)
    >>> print(bias.materialise(positions, positions)[0, 0])
    [[ 0.      0.0625  0.125 ]
     [-0.0625  0.      0.0625]
     [-0.125  -0.0625  0.    ]]

    Source: FlashBias (arXiv 2505.12044), example 3.4; ALiBi (arXiv 2108.12409).
    """
    slope = _slopes(slopes)
    lengths = {"query_length": query_length, "key_length": key_length}
    for name, length in lengths.items():
        static_int(name, length, "an int >= 0")
        if length < 0:
            raise ValueError(f"`{name}` must be at least 0; got {length}.")
    offset = int32("query_offset", integers("query_offset", query_offset))
    if offset.ndim:
        advice = "Give one offset, or build the factors of each entry."
        wrong_shape("query_offset", offset, "an int or an int32 scalar", advice)
    *layers, batch, heads = (1, *slope.shape) if slope.ndim == 1 else slope.shape
    first = jnp.minimum(offset, 0)
    last = jnp.maximum(offset + query_length, key_length)
    centre = first + (last - first) // 2
    i = (offset + jnp.arange(query_length, dtype=jnp.int32) - centre).astype(
        slope.dtype
    )
    j = (jnp.arange(key_length, dtype=jnp.int32) - centre).astype(slope.dtype)
    slope = slope.reshape((*layers, batch, 1, heads))
    products = slope * jnp.expand_dims(-i, (*range(slope.ndim - 2), -1))
    keys = jnp.stack([jnp.ones_like(j), j], axis=-1)[:, None, :]
    return FactoredBias(
        jnp.stack([products, jnp.broadcast_to(slope, products.shape)], axis=-1),
        jnp.broadcast_to(keys, (*layers, 1, *keys.shape)),
    )


def squared_distance_factors(x_q: Any, x_k: Any, weight: Any = 1.0) -> FactoredBias:
    """A penalty on squared distance as a product of rank d + 2.

    With w = weight, y = x_k and all coordinates relative to one point c:

        b_ij = -w_i |x_i - y_j|^2 = w_i [2 x_i, -|x_i|^2, 1] . [y_j, 1, -|y_j|^2]

    c is halfway between the least and the largest coordinate, per axis: the terms that
    cancel are as small as they can be, so an entry is off by a few units of float32 at
    the weight times the squared extent of the points. Points that are not finite
    (padding) have no part in c. Gradients reach both sets of points and the weights.

    Args:
        x_q: Floating [..., #B, T, d], points of the queries; [T, d] is shared by B.
        x_k: Floating [..., #B, S, d], points of the keys.
        weight: Floating scalar, [N], or aligned to the right with [..., #B, #T, N]:
            one per head, or per query and head; > 0 is a penalty.

    Returns:
        Factors of at least float32: `q_factor` [..., #B, T, N, d + 2], `k_factor`
        [..., #B, S, 1, d + 2]; N is 1 for a scalar weight. Axes before #B (layers) are
        written out in both.

    Raises:
        TypeError: if an operand is not floating.
        ValueError: if points have fewer than 2 axes or sizes do not fit together.

    >>> x_q, x_k = jnp.array([[0.0, 0.0], [1.0, 0.0]]), jnp.array([[0.0, 2.0]])
    >>> bias = squared_distance_factors(x_q, x_k, jnp.array([1.0, 0.5]))
    >>> bias.q_factor.shape, bias.k_factor.shape
    ((1, 2, 2, 4), (1, 1, 1, 4))
    >>> print(bias.materialise(jnp.arange(2), jnp.arange(1))[0, :, :, 0])
    [[-4.  -5. ]
     [-2.  -2.5]]

    Source: FlashBias (arXiv 2505.12044), equation 4 and its neural PDE solvers.
    """
    x, y = _points("x_q", x_q), _points("x_k", x_k)
    if x.shape[-1] != y.shape[-1]:
        rule = f"[..., S, d] with the d of x_q, {x.shape[-1]}"
        wrong_shape("x_k", y, rule, "Both live in one space.")
    w = array("weight", weight)
    floating("weight", w, "Cast it: `.astype(jnp.float32)`.")
    dtype = at_least_float32(x, y, w)
    leading = max(x.ndim - 2, y.ndim - 2, w.ndim - 2, 1)
    x, y, w = (
        z.reshape((1,) * (leading + 2 - z.ndim) + z.shape).astype(dtype)
        for z in (x, y, w)
    )
    try:
        layers = np.broadcast_shapes(*(z.shape[: leading - 1] for z in (x, y, w)))
        np.broadcast_shapes(*(z.shape[:leading] for z in (x, y, w)))
        queries = np.broadcast_shapes(x.shape[:-1], w.shape[:-1])
    except ValueError:
        queries, layers = (), ()
    if queries[leading:] != x.shape[leading:-1]:
        raise ValueError(
            "`weight` [..., #B, #T, N], `x_q` [..., #B, T, d] and `x_k` "
            "[..., #B, S, d] must have leading axes that are equal or 1, and one T; "
            f"got {w.shape}, {x.shape} and {y.shape}. Give a shared axis the size 1."
        )
    centre = jax.lax.stop_gradient(_centre(x, y))
    x, y = x - centre, y - centre
    sides = (
        jnp.concatenate([2 * x, -_squared(x), jnp.ones_like(x[..., :1])], axis=-1),
        jnp.concatenate([y, jnp.ones_like(y[..., :1]), -_squared(y)], axis=-1),
    )
    q_factor, k_factor = (side[..., None, :] for side in sides)
    q_factor = w[..., None] * q_factor
    return FactoredBias(
        jnp.broadcast_to(q_factor, (*layers, *q_factor.shape[leading - 1 :])),
        jnp.broadcast_to(k_factor, (*layers, *k_factor.shape[leading - 1 :])),
    )


@overload
def svd_factors(
    bias: Any,
    rank: int | None = None,
    energy: float = 0.995,
    *,
    return_error: Literal[False] = False,
) -> FactoredBias: ...


@overload
def svd_factors(
    bias: Any,
    rank: int | None = None,
    energy: float = 0.995,
    *,
    return_error: Literal[True],
) -> tuple[FactoredBias, Truncation]: ...


def svd_factors(
    bias: Any,
    rank: int | None = None,
    energy: float = 0.995,
    *,
    return_error: bool = False,
) -> FactoredBias | tuple[FactoredBias, Truncation]:
    """The nearest bias of a given rank, head by head, as a product of factors.

    With bias = U diag(s) V^T of a head, s falling:

        q_factor = U_R sqrt(s_R)    k_factor = V_R sqrt(s_R)

    No product of rank R is nearer in squared error, and no entry is off by more than
    the first singular value that is left out.

    Args:
        bias: Floating [..., #N, T, S], finite, or a `DenseBias`; [T, S] is one head.
            Leading axes (layers, batch) are kept.
        rank: R; None: the least R that keeps `energy` in every head of every entry.
        energy: The share of the sum of squared singular values to keep, in (0, 1]; read
            where `rank` is None.
        return_error: Whether the truncation is returned too. It needs the product
            written out once, of the size of the bias.

    Returns:
        Factors of at least float32, `q_factor` [..., #B, T, #N, R] and `k_factor`
        [..., #B, S, #N, R] (#B is 1 for a bias without leading axes); with
        `return_error` a pair of them and a `Truncation`.

    Raises:
        TypeError: if the bias is not a floating array, or the rank no int.
        ValueError: if the bias has fewer than 2 axes or values that are not finite, the
            rank is not in 1..min(T, S), the energy is not in (0, 1], or `rank` is None
            where values are not known (under jit): it is a size of the result.

    >>> line = jnp.arange(4.0)
    >>> bias = -jnp.abs(line[:, None] - line[None])  # ALiBi without causality
    >>> factors, error = svd_factors(bias, rank=2, return_error=True)
    >>> factors.q_factor.shape, factors.k_factor.shape
    ((1, 4, 1, 2), (1, 4, 1, 2))
    >>> print(f"{error.energy[0, 0]:.3f} {error.worst_error[0, 0]:.3f}")
    0.958 0.632
    >>> svd_factors(bias, energy=0.98).q_factor.shape
    (1, 4, 1, 3)

    Source: FlashBias (arXiv 2505.12044), section 3; Eckart and Young (1936).
    """
    b = _heads(bias)
    if rank is not None:
        static_int("rank", rank, f"an int in 1..{min(b.shape[-2:])}, or None")
        if not 1 <= rank <= min(b.shape[-2:]):
            raise ValueError(
                f"`rank` must be in 1..min(T, S) = 1..{min(b.shape[-2:])}; got {rank}."
            )
    elif not 0 < energy <= 1:
        raise ValueError(f"`energy` must be in (0, 1]; got {energy!r}. Try 0.995.")
    values = known(b)
    if values is None and rank is None:
        raise ValueError(
            "`rank` must be given where the values of `bias` are not known, for it is "
            f"a size of the result; got None and {kind(b)}. Give a rank, or call "
            "svd_factors outside jit."
        )
    if values is not None and not np.isfinite(values).all():
        raise ValueError(
            "`bias` must be finite; got values that are not. Hide keys with `mask`, "
            "and factor what is left."
        )
    u, s, v = jnp.linalg.svd(b, full_matrices=False)
    if rank is None:
        rank = _rank_for(energy, np.asarray(s, np.float64))
    root = jnp.sqrt(s[..., None, :rank])
    q, k = u[..., :rank] * root, jnp.swapaxes(v, -1, -2)[..., :rank] * root
    factors = FactoredBias(jnp.swapaxes(q, -3, -2), jnp.swapaxes(k, -3, -2))
    if not return_error:
        return factors
    product = jnp.matmul(q, jnp.swapaxes(k, -1, -2), precision="highest")
    kept, whole = (jnp.sum(x**2, axis=-1) for x in (s[..., :rank], s))
    return factors, Truncation(
        energy=jnp.where(whole > 0, kept / jnp.where(whole > 0, whole, 1), 1),
        worst_error=jnp.max(jnp.abs(b - product), axis=(-2, -1)),
    )


def _slopes(slopes: Any) -> Float[Array, "*#B N"]:
    found = array("slopes", slopes)
    if found.dtype not in (jnp.float32, jnp.float64):
        raise TypeError(
            f"`slopes` must be float32 or float64; got {found.dtype.name}. In 16 bits "
            "factors of positions are off by whole logits: write "
            "`.astype(jnp.float32)`, or use ALiBi(slopes)."
        )
    if not found.ndim:
        wrong_shape("slopes", found, "[N] or [..., #B, N]", "One slope per head.")
    return found


def _points(name: str, x: Any) -> Float[Array, "*B L d"]:
    found = array(name, x)
    floating(name, found, "Cast it: `.astype(jnp.float32)`.")
    if found.ndim < 2:
        rule = f"[..., {'T' if name == 'x_q' else 'S'}, d]"
        wrong_shape(name, found, rule, "Points on a line have d = 1: `x[:, None]`.")
    return found


def _heads(bias: Any) -> Float[Array, "*#B #N T S"]:
    """The array of a bias, with an axis of heads and one of the batch."""
    found = array("bias", bias.bias if isinstance(bias, DenseBias) else bias)
    floating("bias", found, "Cast it: `.astype(jnp.float32)`.")
    if found.ndim < 2 or 0 in found.shape:
        rule = "[..., #N, T, S] without an empty axis"
        wrong_shape("bias", found, rule, "Give one value per pair.")
    shape = (1,) * (4 - found.ndim) + found.shape
    return found.reshape(shape).astype(at_least_float32(found))


def _centre(
    x: Float[Array, "*#B T d"], y: Float[Array, "*#B S d"]
) -> Float[Array, "*#B 1 d"]:
    """Halfway between extremes; one for all along leading axes that one side shares."""
    sizes = enumerate(zip(x.shape[:-2], y.shape[:-2], strict=True))
    over = (*(axis for axis, (m, n) in sizes if m != n), x.ndim - 2)

    def extreme(reduce: Any, pick: Any, least: float) -> Array:
        found = [
            reduce(z, axis=over, keepdims=True, initial=least, where=jnp.isfinite(z))
            for z in (x, y)
        ]
        return pick(*found)

    low = extreme(jnp.min, jnp.minimum, jnp.inf)
    high = extreme(jnp.max, jnp.maximum, -jnp.inf)
    return jnp.where(low <= high, low / 2 + high / 2, 0)


def _squared(x: Float[Array, "*B L d"]) -> Float[Array, "*B L 1"]:
    return jnp.sum(x**2, axis=-1, keepdims=True)


def _rank_for(energy: float, s: np.ndarray) -> int:
    """The least rank that keeps the energy in every row of singular values."""
    kept = np.cumsum(s**2, axis=-1)
    lacking = kept < energy * kept[..., -1:]
    return max(1, int(lacking.sum(axis=-1).max()) + 1)
