"""Modules of ALiBi and Co-ALiBi, with fixed or learned slopes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from pallas_attn.bias import alibi, co_alibi
from pallas_attn.layers import penalties
from pallas_attn.layers.context import BiasContext
from pallas_attn.linen.bias import BiasModule


class ALiBi(BiasModule):
    """ALiBi: b_ij = -slope_n |query position i - key position j|.

    Learned slopes are exp(log_slopes): they stay penalties.

    Args:
        slopes: Fixed slopes or the first ones, [N]; None: `alibi_slopes(N, bias_max)`.
            A tuple keeps the module hashable.
        learned: Whether they are the parameter "log_slopes", float32 [N].
        bias_max: The exponent of the least slope, 2^-bias_max.

    Returns:
        Of a call with a `BiasContext`: `pallas_attn.ALiBi`.

    Raises:
        ValueError: if `slopes` are not [N], or learned and not positive.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from pallas_attn.linen import ALiBi, MultiHeadAttention
        >>> layer = MultiHeadAttention(
        ...     num_heads=2, bias=ALiBi(learned=True), is_causal=True
        ... )
        >>> x = jnp.ones((1, 5, 8))
        >>> layer.init(jax.random.key(0), x)["params"]["bias"]["log_slopes"].shape
        (2,)

    Source: Press et al., Train Short, Test Long (arXiv 2108.12409).
    """

    slopes: Any = None
    learned: bool = False
    bias_max: float = 8.0

    @nn.compact
    def __call__(self, context: BiasContext) -> alibi.ALiBi:
        """The value of these slopes."""
        default = lambda n: alibi.alibi_slopes(n, self.bias_max)
        return alibi.ALiBi(_slopes(self, context.num_heads, default))


class CoALiBi(BiasModule):
    """Co-ALiBi: b_ij = -slope_n z_ij, z_ij counting the keys from j on that match.

    It stands alone: no sum contains it. Learned slopes are exp(log_slopes).

    Args:
        slopes: Fixed slopes or the first ones, [N]; None: `co_alibi_slopes(N,
            bias_max)`. A tuple keeps the module hashable.
        learned: Whether they are the parameter "log_slopes", float32 [N].
        bias_max: The exponent of ALiBi's least slope, 2^-bias_max.

    Returns:
        Of a call with a `BiasContext`: `pallas_attn.CoALiBi`.

    Raises:
        ValueError: if `slopes` are not [N], or learned and not positive.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from pallas_attn.linen import CoALiBi, MultiHeadAttention
        >>> layer = MultiHeadAttention(num_heads=2, bias=CoALiBi(), is_causal=True)
        >>> layer.init_with_output(jax.random.key(0), jnp.ones((1, 5, 8)))[0].shape
        (1, 5, 8)

    Source: Co-ALiBi (github.com/Nathancgy/Co-ALIBI).
    """

    slopes: Any = None
    learned: bool = False
    bias_max: float = 8.0

    @nn.compact
    def __call__(self, context: BiasContext) -> co_alibi.CoALiBi:
        """The value of these slopes."""
        default = lambda n: co_alibi.co_alibi_slopes(n, self.bias_max)
        return co_alibi.CoALiBi(_slopes(self, context.num_heads, default))


def _slopes(
    module: ALiBi | CoALiBi, num_heads: int, default: Callable[[int], Array]
) -> Float[Array, " N"]:
    """Fixed slopes, or those of the parameter."""
    learned = module.learned
    slopes = penalties.slopes(module.slopes, num_heads, default, learned=learned)
    if not learned:
        return slopes
    return jnp.exp(module.param("log_slopes", lambda key: jnp.log(slopes)))
