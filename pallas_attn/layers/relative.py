"""Tables of relative positions: buckets of distances, and diagonals as matrices."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_attn.bias.dense import DenseBias
from pallas_attn.layers.context import BiasContext
from pallas_attn.layers.tables import of_pairs, row


def t5_buckets(
    num_buckets: int, max_distance: int, bidirectional: bool
) -> Int[np.ndarray, " distances"]:
    """T5's bucket of each query position minus key position, -D..D for max_distance D.

    Args:
        num_buckets: Of both directions together.
        max_distance: D; all beyond have the bucket of D.
        bidirectional: Whether keys after the query have buckets of their own.

    Returns:
        int32 [2 D + 1].

    Raises:
        ValueError: if a direction has fewer than 2 buckets, or all of its buckets hold
            one distance each.

    >>> print(t5_buckets(num_buckets=8, max_distance=16, bidirectional=False)[16:])
    [0 1 2 3 4 4 5 5 6 6 6 6 7 7 7 7 7]

    Source: Raffel et al., T5 (arXiv 1910.10683).
    """
    side = num_buckets // 2 if bidirectional else num_buckets
    exact = side // 2
    if side < 2 or (bidirectional and num_buckets % 2):
        raise ValueError(
            f"`num_buckets` must be at least 2 for each direction; got {num_buckets} "
            f"with bidirectional={bidirectional}. T5 has 32."
        )
    if max_distance <= exact:
        raise ValueError(
            f"`max_distance` must be larger than the {exact} distances that have a "
            f"bucket each; got {max_distance}. T5 has 128."
        )
    distance = np.arange(-max_distance, max_distance + 1)
    away = np.abs(distance) if bidirectional else np.maximum(distance, 0)
    # as T5X: a unit of float32 keeps exact powers from falling into the bucket below
    ratio = np.maximum(away, 1) / exact + np.finfo(np.float32).eps
    growth = (side - exact) / math.log(max_distance / exact)
    far = exact + (np.log(ratio) * growth).astype(np.int32)
    bucket = np.where(away < exact, away, np.minimum(far, side - 1))
    after = (distance < 0) * side if bidirectional else 0
    return (bucket + after).astype(np.int32)


def toeplitz(values: Float[Array, "... L"], T: int, S: int) -> Float[Array, "... T S"]:
    """The matrix with values[i - j + S - 1] at (i, j), of L = T + S - 1 diagonals.

    Rows of length L + 1, written one after the other and read as rows of length L, each
    begin one entry further to the left. Pads and reshapes alone: the gradient of a
    diagonal is a sum, not a scatter.
    """
    leading = values.shape[:-1]
    if T == 0 or S == 0:
        return jnp.zeros((*leading, T, S), values.dtype)
    L = T + S - 1
    padding = [(0, 0)] * len(leading) + [(0, 1)]
    row = jnp.pad(jnp.flip(values, axis=-1), padding)
    rows = jnp.broadcast_to(row[..., None, :], (*leading, T, L + 1))
    shifted = rows.reshape(*leading, T * (L + 1))[..., : T * L]
    return shifted.reshape(*leading, T, L)[..., T - 1 :]


def relative_bias(
    table: Float[Array, "N buckets"], context: BiasContext, buckets: Int[Array, " D"]
) -> DenseBias:
    """A number per head and bucket, where the distances of a call fall.

    Args:
        table: float32.
        context: Of the call.
        buckets: Of each query position minus key position, -D..D, as `t5_buckets`.
    """
    T, S, farthest = context.T, context.S, buckets.shape[0] // 2

    def bucket(distance: Int[Array, ...]) -> Int[Array, ...]:
        return buckets[jnp.clip(distance, -farthest, farthest) + farthest]

    if context.offset is None:
        pairs = context.query_positions[..., :, None] - row(context.key_positions)
        return DenseBias(of_pairs(table.T, bucket(pairs)))
    diagonals = jnp.arange(T + S - 1, dtype=jnp.int32) - (S - 1)
    diagonals = diagonals.reshape(*(1 for _ in context.batch), T + S - 1)
    chosen = jax.nn.one_hot(bucket(_start(context) + diagonals), table.shape[1])
    exact = jax.lax.Precision.HIGHEST
    along = jnp.einsum("nr,...lr->...nl", table, chosen, precision=exact)
    return DenseBias(toeplitz(along, T, S))


def _start(context: BiasContext) -> Any:
    """The position of query 0, beside an axis of distances."""
    offset = context.offset
    return offset if isinstance(offset, int) else jnp.asarray(offset)[..., None]
