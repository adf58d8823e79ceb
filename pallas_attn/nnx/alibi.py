"""Modules of ALiBi and Co-ALiBi, with fixed or learned slopes."""

from __future__ import annotations

from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_attn.bias import alibi, co_alibi
from pallas_attn.layers import penalties
from pallas_attn.layers.context import BiasContext
from pallas_attn.nnx.bias import BiasModule, fixed, read


class _Sloped(BiasModule):
    """A bias with a slope per head, that says which are its `default`."""

    default: ClassVar[Any]  # num_heads and the exponent of the least slope -> [N]

    def __init__(
        self,
        num_heads: int,
        slopes: Any = None,
        learned: bool = False,
        bias_max: float = 8.0,
    ):
        self.num_heads = num_heads
        self.bias_max = bias_max
        first = self._fixed(slopes, learned=learned)
        self.slopes = nnx.data(None) if learned else fixed(slopes)
        self.log_slopes = nnx.data(nnx.Param(jnp.log(first)) if learned else None)

    def _per_head(self) -> Float[Array, " N"]:
        if self.log_slopes is not None:
            return jnp.exp(self.log_slopes.get_value())
        return self._fixed(read(self.slopes), learned=False)

    def _fixed(self, given: Any, *, learned: bool) -> Float[Array, " N"]:
        make = lambda n: self.default(n, self.bias_max)
        return penalties.slopes(given, self.num_heads, make, learned=learned)


class ALiBi(_Sloped):
    """ALiBi: b_ij = -slope_n |query position i - key position j|.

    Learned slopes are exp(log_slopes): they stay penalties.

    Args:
        num_heads: N.
        slopes: Fixed slopes or the first ones, [N], or a variable that has fixed ones;
            None: `alibi_slopes(N, bias_max)`.
        learned: Whether they are the parameter "log_slopes", float32 [N].
        bias_max: The exponent of the least slope, 2^-bias_max.

    Returns:
        Of a call with a `BiasContext`: `pallas_attn.ALiBi`.

    Raises:
        ValueError: if `slopes` are not [N], or learned and not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from pallas_attn.nnx import ALiBi, MultiHeadAttention
        >>> bias = ALiBi(2, learned=True)
        >>> layer = MultiHeadAttention(
        ...     2, 8, bias=bias, is_causal=True, rngs=nnx.Rngs(0)
        ... )
        >>> gradient = nnx.grad(lambda layer: layer(jnp.eye(8)[None]).sum())(layer)
        >>> gradient["bias"]["log_slopes"].shape
        (2,)

    Source: Press et al., Train Short, Test Long (arXiv 2108.12409).
    """

    default = staticmethod(alibi.alibi_slopes)

    def __call__(self, context: BiasContext) -> alibi.ALiBi:
        """The value of these slopes."""
        return alibi.ALiBi(self._per_head())


class CoALiBi(_Sloped):
    """Co-ALiBi: b_ij = -slope_n z_ij, z_ij counting the keys from j on that match.

    It stands alone: no sum contains it. Learned slopes are exp(log_slopes).

    Args:
        num_heads: N.
        slopes: Fixed slopes or the first ones, [N], or a variable that has fixed ones;
            None: `co_alibi_slopes(N, bias_max)`.
        learned: Whether they are the parameter "log_slopes", float32 [N].
        bias_max: The exponent of ALiBi's least slope, 2^-bias_max.

    Returns:
        Of a call with a `BiasContext`: `pallas_attn.CoALiBi`.

    Raises:
        ValueError: if `slopes` are not [N], or learned and not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from pallas_attn.nnx import CoALiBi, MultiHeadAttention
        >>> layer = MultiHeadAttention(
        ...     2, 8, bias=CoALiBi(2), is_causal=True, rngs=nnx.Rngs(0)
        ... )
        >>> layer(jnp.ones((1, 5, 8))).shape
        (1, 5, 8)

    Source: Co-ALiBi (github.com/Nathancgy/Co-ALIBI).
    """

    default = staticmethod(co_alibi.co_alibi_slopes)

    def __call__(self, context: BiasContext) -> co_alibi.CoALiBi:
        """The value of these slopes."""
        return co_alibi.CoALiBi(self._per_head())
