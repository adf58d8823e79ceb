"""Biases of relative positions: T5's buckets, and the windows of Swin."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_attn.bias.dense import DenseBias
from pallas_attn.bias.relative import RelativeBias
from pallas_attn.layers.context import BiasContext
from pallas_attn.layers.relative import relative_bias, t5_buckets
from pallas_attn.layers.window import (
    check_window,
    differences,
    log_spaced,
    sides,
    Window,
    window_bias,
)
from pallas_attn.nnx.bias import BiasModule


class RelativePositionBias(BiasModule):
    """T5's relative position bias: b_ij = table[n, bucket(j - i)].

    Half of the buckets (of each direction) hold one distance each; the rest grow
    logarithmically up to `max_distance`, and the last holds all beyond. Without
    `bidirectional` keys after the query share the bucket of distance 0.

    Args:
        num_heads: N.
        num_buckets: Of both directions together; even where `bidirectional`.
        max_distance: The distance from which on there is one bucket.
        bidirectional: Whether keys before and after the query are told apart (an
            encoder); False: a decoder.
        embedding_init: Of the parameter "rel_embedding", [N, num_buckets].
        param_dtype: Its dtype.
        rngs: Of the parameter.

    Returns:
        Of a call with a `BiasContext`: a `RelativeBias`, float32 [N, D].

    Raises:
        ValueError: if there are too few buckets, or no distance for the last.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from pallas_attn.nnx import MultiHeadAttention, RelativePositionBias
        >>> rngs = nnx.Rngs(0)
        >>> bias = RelativePositionBias(2, rngs=rngs)
        >>> layer = MultiHeadAttention(2, 8, bias=bias, rngs=rngs)
        >>> layer(jnp.ones((1, 5, 8))).shape, bias.rel_embedding.shape
        ((1, 5, 8), (2, 32))

    Source: Raffel et al., T5 (arXiv 1910.10683).
    """

    def __init__(
        self,
        num_heads: int,
        num_buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = True,
        *,
        embedding_init: Any = nnx.initializers.variance_scaling(
            1.0, "fan_avg", "uniform"
        ),
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.num_heads = num_heads
        self.buckets = (num_buckets, max_distance, bidirectional)
        t5_buckets(*self.buckets)  # raises
        shape = (num_heads, num_buckets)
        self.rel_embedding = nnx.Param(
            embedding_init(rngs.params(), shape, param_dtype)
        )

    def __call__(self, context: BiasContext) -> RelativeBias:
        """The bias of the call's positions."""
        table = self.rel_embedding.get_value().astype(jnp.float32)
        return relative_bias(table, jnp.asarray(t5_buckets(*self.buckets)))


class WindowRelativePositionBias(BiasModule):
    """Swin's bias of a window: b_ij = table[place of i - place of j in the window].

    Tokens are the window's places row by row, M_h x M_w of them. The table has a row
    per difference of places, (2 M_h - 1)(2 M_w - 1) of them. `continuous` is Swin v2:
    the table is 16 sigmoid(MLP(sign(x) log2(1 + 8 |x|) / 3)) of differences x in units
    of the (pretrained) window.

    Args:
        num_heads: N.
        window: M, or (M_h, M_w).
        continuous: Whether an MLP makes the table, "hidden" and "heads".
        hidden_features: Of the MLP.
        pretrained_window: The window that the MLP was trained with; None: `window`.
        table_init: Of the parameter "relative_position_bias_table", [rows, N].
        param_dtype: Of the parameters.
        rngs: Of the parameters.

    Returns:
        Of a call with a `BiasContext`: a `DenseBias` [#B, N, T, S], float32.

    Raises:
        ValueError: if S is not the number of places, or T is not S where no positions
            and no cache say which tokens the queries are, or a position is outside.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from pallas_attn.nnx import MultiHeadAttention
        >>> from pallas_attn.nnx import WindowRelativePositionBias
        >>> rngs = nnx.Rngs(0)
        >>> bias = WindowRelativePositionBias(2, window=3, rngs=rngs)
        >>> layer = MultiHeadAttention(2, 8, bias=bias, rngs=rngs)
        >>> layer(jnp.ones((4, 9, 8))).shape, bias.relative_position_bias_table.shape
        ((4, 9, 8), (25, 2))

    Source: Liu et al., Swin (arXiv 2103.14030) and Swin v2 (arXiv 2111.09883).
    """

    def __init__(
        self,
        num_heads: int,
        window: Window,
        *,
        continuous: bool = False,
        hidden_features: int = 512,
        pretrained_window: Window | None = None,
        table_init: Any = nnx.initializers.truncated_normal(0.02),
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.num_heads = num_heads
        self.window = sides("window", window)
        self.pretrained_window = sides("pretrained_window", pretrained_window or window)
        self.continuous = continuous
        if continuous:
            dense: Any = {"dtype": jnp.float32, "param_dtype": param_dtype}
            self.hidden = nnx.Linear(2, hidden_features, rngs=rngs, **dense)
            self.heads = nnx.Linear(
                hidden_features, num_heads, use_bias=False, rngs=rngs, **dense
            )
        else:
            shape = (differences(window), num_heads)
            self.relative_position_bias_table = nnx.Param(
                table_init(rngs.params(), shape, param_dtype)
            )

    def __call__(self, context: BiasContext) -> DenseBias:
        """The bias of all pairs of places, or of those that positions name."""
        check_window(context, self.window)
        return window_bias(self._table(), context, self.window)

    def _table(self) -> Float[Array, "rows N"]:
        if not self.continuous:
            return self.relative_position_bias_table.get_value().astype(jnp.float32)
        x = jnp.asarray(log_spaced(self.window, self.pretrained_window))
        return 16 * nnx.sigmoid(self.heads(nnx.relu(self.hidden(x))))
