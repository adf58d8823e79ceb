"""The bias that a pair representation makes."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from pallas_attn.bias.dense import DenseBias
from pallas_attn.layers.context import BiasContext
from pallas_attn.layers.pair import of_heads, pair_of
from pallas_attn.linen.bias import BiasModule


class PairBias(BiasModule):
    """AlphaFold's bias from a pair representation: b_nij = W_n . LayerNorm(pair_ij).

    The layer's call takes the representation as `pair`, [*A, T, S, channels], where *A
    are the first of the inputs' leading axes *B. The axes between them and T (rows of
    an alignment, of a triangle) share the bias: it is never repeated along them, and
    its gradient is summed over them.

    Args:
        kernel_init: Of the parameter "linear", [channels, N], without a bias.
        epsilon: Of "layer_norm".
        dtype: Of the computation; None: of `pair` and the parameters.
        param_dtype: Of the parameters.

    Returns:
        Of a call with a `BiasContext`: a `DenseBias` [*#A, 1, .., N, T, S].

    Raises:
        ValueError: if `pair` is missing or has another shape.
        TypeError: if it is not floating.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from pallas_attn.linen import MultiHeadAttention, PairBias
        >>> layer = MultiHeadAttention(num_heads=2, bias=PairBias())
        >>> alignment, pair = jnp.ones((3, 6, 5, 8)), jnp.ones((3, 5, 5, 4))
        >>> layer.init_with_output(jax.random.key(0), alignment, pair=pair)[0].shape
        (3, 6, 5, 8)

    Source: Jumper et al., AlphaFold (doi 10.1038/s41586-021-03819-2), algorithms 7, 13.
    """

    kernel_init: Any = nn.initializers.lecun_normal()
    epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32

    reads = ("pair",)

    @nn.compact
    def __call__(self, context: BiasContext) -> DenseBias:
        """The bias of the call's pair representation."""
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = nn.LayerNorm(epsilon=self.epsilon, name="layer_norm", **kinds)(
            pair_of(context)
        )
        x = nn.Dense(
            context.num_heads,
            use_bias=False,
            kernel_init=self.kernel_init,
            name="linear",
            **kinds,
        )(x)
        return of_heads(x, context)
