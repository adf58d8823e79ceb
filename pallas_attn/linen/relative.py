"""Biases of relative positions: T5's buckets, and the windows of Swin."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from pallas_attn.bias.dense import DenseBias
from pallas_attn.layers.context import BiasContext
from pallas_attn.layers.relative import t5_buckets, toeplitz
from pallas_attn.linen.bias import at_positions, BiasModule
from pallas_attn.rules import known


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
        Of a call with a `BiasContext`: a `DenseBias` [#B, N, T, S], float32.

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
    def __call__(self, context: BiasContext) -> DenseBias:
        """The bias of the call's positions."""
        buckets = jnp.asarray(
            t5_buckets(self.num_buckets, self.max_distance, self.bidirectional)
        )
        N, T, S = context.num_heads, context.T, context.S
        table = self.param(
            "rel_embedding",
            self.embedding_init,
            (N, self.num_buckets),
            self.param_dtype,
        ).astype(jnp.float32)

        def bucket(distance: Int[Array, ...]) -> Int[Array, ...]:
            most = self.max_distance
            return buckets[jnp.clip(distance, -most, most) + most]

        if context.offset is None:
            pairs = context.query_positions[..., :, None] - _row(context.key_positions)
            return DenseBias(_of_pairs(table.T, bucket(pairs)))
        diagonals = jnp.arange(T + S - 1, dtype=jnp.int32) - (S - 1)
        diagonals = diagonals.reshape(*(1 for _ in context.batch), T + S - 1)
        chosen = jax.nn.one_hot(bucket(_start(context) + diagonals), self.num_buckets)
        exact = jax.lax.Precision.HIGHEST
        along = jnp.einsum("nr,...lr->...nl", table, chosen, precision=exact)
        return DenseBias(toeplitz(along, T, S))


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
        height, width = _pair("window", self.window)
        places, N = height * width, context.num_heads
        natural = isinstance(context.offset, int) and context.offset == 0
        _check_window(context, places, natural)
        make = self._continuous if self.continuous else self._table
        table = make(height, width, N).reshape(2 * height - 1, 2 * width - 1, N)
        across = toeplitz(jnp.moveaxis(table, -1, 0), width, width)
        pairs = toeplitz(jnp.moveaxis(across, 1, -1), height, height)
        # [N, row, row of the key, column, column of the key], less the order
        full = jnp.transpose(pairs, (0, 3, 1, 4, 2)).reshape(N, places, places)
        if natural and context.slot is None:
            return DenseBias(full.reshape(*(1 for _ in context.batch), *full.shape))
        queries = context.query_positions[..., :, None]
        keys = _row(context.key_positions)
        inside = (queries >= 0) & (queries < places) & (keys >= 0) & (keys < places)
        pair = jnp.where(inside, queries * places + keys, places**2)
        return DenseBias(_of_pairs(full.reshape(N, places**2).T, pair))

    def _table(self, height: int, width: int, N: int) -> Float[Array, "rows N"]:
        shape = ((2 * height - 1) * (2 * width - 1), N)
        name = "relative_position_bias_table"
        table = self.param(name, self.table_init, shape, self.param_dtype)
        return table.astype(jnp.float32)

    def _continuous(self, height: int, width: int, N: int) -> Float[Array, "rows N"]:
        trained = _pair("pretrained_window", self.pretrained_window or self.window)
        axes = [
            np.arange(1 - m, m, dtype=np.float32) / max(M - 1, 1)
            for m, M in zip((height, width), trained, strict=True)
        ]
        x = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
        x = np.sign(x) * np.log2(1 + 8 * np.abs(x)) / 3
        dense = {"dtype": jnp.float32, "param_dtype": self.param_dtype}
        hidden = nn.Dense(self.hidden_features, name="hidden", **dense)(jnp.asarray(x))
        table = nn.Dense(N, use_bias=False, name="heads", **dense)(nn.relu(hidden))
        return 16 * nn.sigmoid(table)


def _start(context: BiasContext) -> Any:
    """The position of query 0, beside an axis of distances."""
    offset = context.offset
    return offset if isinstance(offset, int) else jnp.asarray(offset)[..., None]


def _row(keys: Int[Array, "*#B #N S"]) -> Int[Array, "*#B #N 1 S"]:
    return keys[..., None, :]


def _of_pairs(
    table: Float[Array, "rows N"], row: Int[Array, "*#B #N T S"]
) -> Float[Array, "*#B N T S"]:
    """The rows of a table that pairs name; NaN where there is no such row."""
    T, S = row.shape[-2:]
    found = at_positions(table, row.reshape(*row.shape[:-2], T * S))
    return jnp.moveaxis(found, -1, -2).reshape(*row.shape[:-3], -1, T, S)


def _pair(name: str, window: int | tuple[int, int]) -> tuple[int, int]:
    pair = tuple(window) if isinstance(window, list | tuple) else (window, window)
    if len(pair) != 2 or not all(isinstance(m, int) and m >= 1 for m in pair):
        raise ValueError(
            f"`{name}` must be an int >= 1 or a pair of them; got {window!r}. Swin has "
            "7, Swin v2 8."
        )
    return pair


def _check_window(context: BiasContext, places: int, natural: bool) -> None:
    """The tokens are those of a window, or positions say which of it they are."""
    if context.offset is not None and places != context.S:
        raise ValueError(
            f"`window` must have as many places as there are keys, {context.S}; got "
            f"{places}. Cut the inputs into windows, one per entry of the batch."
        )
    if natural and context.slot is None and context.T != context.S:
        raise ValueError(
            f"`window` must have as many places as there are queries, {context.T}; got "
            f"{places}. Give positions in the window: `query_positions`."
        )
    sides = {"query_positions": context.query_positions,
             "key_positions": context.key_positions}  # fmt: skip
    for name, positions in sides.items():
        values = None if context.decode else known(positions)
        if values is not None and not ((values >= 0) & (values < places)).all():
            raise ValueError(
                f"`{name}` must be places of the window, 0..{places - 1}; got "
                f"{values.min()}..{values.max()}. Count rows first."
            )
