"""The bias that a pair representation makes."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx

from pallas_attn.bias.dense import DenseBias
from pallas_attn.layers.context import BiasContext
from pallas_attn.layers.pair import of_heads, pair_of
from pallas_attn.nnx.bias import BiasModule


class PairBias(BiasModule):
    """AlphaFold's bias from a pair representation: b_nij = W_n . LayerNorm(pair_ij).

    The layer's call takes the representation as `pair`, [*A, T, S, channels], where *A
    are the first of the inputs' leading axes *B. Those between share the bias.

    Args:
        num_heads: N.
        in_features: The channels of `pair`.
        kernel_init: Of the parameter "linear", [in_features, N], without a bias.
        epsilon: Of "layer_norm".
        dtype: Of the computation; None: of `pair` and the parameters.
        param_dtype: Of the parameters.
        rngs: Of the parameters.

    Returns:
        Of a call with a `BiasContext`: a `DenseBias` [*#A, 1, .., N, T, S].

    Raises:
        ValueError: if `pair` is missing or has another shape.
        TypeError: if it is not floating.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from pallas_attn.nnx import MultiHeadAttention, PairBias
        >>> rngs = nnx.Rngs(0)
        >>> layer = MultiHeadAttention(2, 8, bias=PairBias(2, 4, rngs=rngs), rngs=rngs)
        >>> alignment, pair = jnp.ones((3, 6, 5, 8)), jnp.ones((3, 5, 5, 4))
        >>> layer(alignment, pair=pair).shape
        (3, 6, 5, 8)

    Source: Jumper et al., AlphaFold (doi 10.1038/s41586-021-03819-2), algorithms 7, 13.
    """

    reads = ("pair",)

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        kernel_init: Any = nnx.initializers.lecun_normal(),
        epsilon: float = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.num_heads = num_heads
        kinds: Any = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.layer_norm = nnx.LayerNorm(in_features, epsilon=epsilon, **kinds)
        self.linear = nnx.Linear(
            in_features, num_heads, use_bias=False, kernel_init=kernel_init, **kinds
        )

    def __call__(self, context: BiasContext) -> DenseBias:
        """The bias of the call's pair representation."""
        return of_heads(self.linear(self.layer_norm(pair_of(context))), context)
