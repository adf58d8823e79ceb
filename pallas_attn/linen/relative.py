"""Biases of relative positions: T5's buckets, and the windows of Swin."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from pallas_attn.bias.dense import DenseBias
from pallas_attn.bias.relative import RelativeBias
from pallas_attn.layers.context import BiasContext
from pallas_attn.layers.relative import relative_bias, t5_buckets
from pallas_attn.layers.window import (
    check_window,
    differences,
    log_spaced,
    window_bias,
)
from pallas_attn.linen.bias import BiasModule


class RelativePositionBias(BiasModule):
    """T5's relative position bias: b_ij = table[n, bucket(j - i)].

    Half of the buckets (of each direction) hold one distance each; the rest grow
    logarithmically up to `max_distance`, and the last holds all beyond. Without
    `bidirectional` keys after the query share the bucket of distance 0.

    The bias is written out, [#B, N, T, S], once for the batch; where positions count up
    its gradient is summed along diagonals, without a scatter.

    Args:
        num_buckets: Of both directions together; even where `bidirectional`.
        max_distance: The distance from which on there is one bucket.
        bidirectional: Whether keys before and after the query are told apart (an
            encoder); False: a decoder.
        embedding_init: Of the parameter "rel_embedding", [N, num_buckets], the name and
            layout of T5X.
        param_dtype: Its dtype.

    Returns:
        Of a call with a `BiasContext`: a `RelativeBias`, float32 [N, D].

    Raises:
        ValueError: if there are too few buckets, or no distance for the last.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from pallas_attn.linen import MultiHeadAttention, RelativePositionBias
        >>> layer = MultiHeadAttention(num_heads=2, bias=RelativePositionBias())
        >>> params = layer.init(jax.random.key(0), jnp.ones((1, 5, 8)))["params"]
        >>> params["bias"]["rel_embedding"].shape
        (2, 32)

    Source: Raffel et al., T5 (arXiv 1910.10683).
    """

    num_buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = True
    embedding_init: Any = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, context: BiasContext) -> RelativeBias:
        """The bias of the call's positions."""
        buckets = t5_buckets(self.num_buckets, self.max_distance, self.bidirectional)
        table = self.param(
            "rel_embedding",
            self.embedding_init,
            (context.num_heads, self.num_buckets),
            self.param_dtype,
        ).astype(jnp.float32)
        return relative_bias(table, jnp.asarray(buckets))


class WindowRelativePositionBias(BiasModule):
    """Swin's bias of a window: b_ij = table[place of i - place of j in the window].

    Tokens are the window's places row by row, M_h x M_w of them. The table has a row
    per difference of places, (2 M_h - 1)(2 M_w - 1) of them. `continuous` is Swin v2:
    the table is 16 sigmoid(MLP(sign(x) log2(1 + 8 |x|) / 3)) of differences x in units
    of the (pretrained) window, so that it carries over to other windows.

    Args:
        window: M, or (M_h, M_w).
        continuous: Whether an MLP makes the table.
        hidden_features: Of the MLP.
        pretrained_window: The window that the MLP was trained with; None: `window`.
        table_init: Of the parameter "relative_position_bias_table", [rows, N].
        param_dtype: Of the parameters.

    Returns:
        Of a call with a `BiasContext`: a `DenseBias` [#B, N, T, S], float32.

    Raises:
        ValueError: if S is not the number of places, or T is not S where no positions
            and no cache say which tokens the queries are, or a position is outside.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from pallas_attn.linen import MultiHeadAttention
        >>> from pallas_attn.linen import WindowRelativePositionBias
        >>> layer = MultiHeadAttention(
        ...     num_heads=2, bias=WindowRelativePositionBias(window=3)
        ... )
        >>> windows = jnp.ones((4, 9, 8))
        >>> params = layer.init(jax.random.key(0), windows)["params"]
        >>> params["bias"]["relative_position_bias_table"].shape
        (25, 2)

    Source: Liu et al., Swin (arXiv 2103.14030) and Swin v2 (arXiv 2111.09883).
    """

    window: int | tuple[int, int]
    continuous: bool = False
    hidden_features: int = 512
    pretrained_window: int | tuple[int, int] | None = None
    table_init: Any = nn.initializers.truncated_normal(0.02)
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, context: BiasContext) -> DenseBias:
        """The bias of all pairs of places, or of those that positions name."""
        check_window(context, self.window)
        make = self._continuous if self.continuous else self._table
        return window_bias(make(context.num_heads), context, self.window)

    def _table(self, N: int) -> Float[Array, "rows N"]:
        shape = (differences(self.window), N)
        name = "relative_position_bias_table"
        table = self.param(name, self.table_init, shape, self.param_dtype)
        return table.astype(jnp.float32)

    def _continuous(self, N: int) -> Float[Array, "rows N"]:
        x = jnp.asarray(log_spaced(self.window, self.pretrained_window))
        dense = {"dtype": jnp.float32, "param_dtype": self.param_dtype}
        hidden = nn.Dense(self.hidden_features, name="hidden", **dense)(x)
        table = nn.Dense(N, use_bias=False, name="heads", **dense)(nn.relu(hidden))
        return 16 * nn.sigmoid(table)
