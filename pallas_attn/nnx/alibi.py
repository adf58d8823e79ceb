"""Modules of ALiBi and Co-ALiBi, with fixed or learned slopes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_attn.bias import alibi, co_alibi
from pallas_attn.layers import penalties
from pallas_attn.layers.context import BiasContext
from pallas_attn.nnx.bias import BiasModule, fixed, read


# num_heads and the exponent of the least slope -> slopes
Default = Callable[[int, float], Array]


class ALiBi(BiasModule):
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

    def __init__(
        self,
        num_heads: int,
        slopes: Any = None,
        learned: bool = False,
        bias_max: float = 8.0,
    ):
        self.num_heads = num_heads
        self.bias_max = bias_max
        _start(self, slopes, learned, alibi.alibi_slopes)

    def __call__(self, context: BiasContext) -> alibi.ALiBi:
        """The value of these slopes."""
        return alibi.ALiBi(_slopes(self, alibi.alibi_slopes))


class CoALiBi(BiasModule):
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

    def __init__(
        self,
        num_heads: int,
        slopes: Any = None,
        learned: bool = False,
        bias_max: float = 8.0,
    ):
        self.num_heads = num_heads
        self.bias_max = bias_max
        _start(self, slopes, learned, co_alibi.co_alibi_slopes)

    def __call__(self, context: BiasContext) -> co_alibi.CoALiBi:
        """The value of these slopes."""
        return co_alibi.CoALiBi(_slopes(self, co_alibi.co_alibi_slopes))


def _start(module: Any, slopes: Any, learned: bool, default: Default) -> None:
    """Sets what a module has of slopes: a parameter, or what was given."""
    first = _fixed(module, slopes, default, learned=learned)
    module.slopes = nnx.data(None) if learned else fixed(slopes)
    module.log_slopes = nnx.data(nnx.Param(jnp.log(first)) if learned else None)


def _slopes(module: Any, default: Default) -> Float[Array, " N"]:
    if module.log_slopes is not None:
        return jnp.exp(module.log_slopes.get_value())
    return _fixed(module, read(module.slopes), default, learned=False)


def _fixed(
    module: Any, given: Any, default: Default, *, learned: bool
) -> Float[Array, " N"]:
    make = lambda n: default(n, module.bias_max)
    return penalties.slopes(given, module.num_heads, make, learned=learned)
