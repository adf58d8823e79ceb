"""Tables of relative positions: buckets of distances."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_attn.bias.relative import RelativeBias


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


def relative_bias(
    table: Float[Array, "N buckets"], buckets: Int[Array, " D"]
) -> RelativeBias:
    """A number per head and bucket, where distances fall.

    Args:
        table: float32.
        buckets: Of each query position minus key position, -D..D, as `t5_buckets`.
    """
    chosen = jax.nn.one_hot(buckets, table.shape[1], dtype=table.dtype)
    exact = jax.lax.Precision.HIGHEST
    numbers = jnp.einsum("nr,dr->nd", table, chosen, precision=exact)
    return RelativeBias(numbers, -(buckets.shape[0] // 2))
