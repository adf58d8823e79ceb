"""Biases of low rank: learned, neural, and squared distances."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

from pallas_attn.bias.builders import squared_distance_factors
from pallas_attn.bias.factored import FactoredBias
from pallas_attn.layers import penalties
from pallas_attn.layers.context import BiasContext, coordinates
from pallas_attn.layers.factors import aligned, check_positions, of_positions
from pallas_attn.linen.bias import BiasModule
from pallas_attn.linen.neural_factors import NeuralFactors


class LearnedFactoredBias(BiasModule):
    """A learned bias of rank R: b_ij = sum_r q_factor[i, n, r] k_factor[j, n, r].

    i and j are positions. Its memory is (T + S) N R, whatever T S is. The factors of
    keys start at 0, and with them the bias.

    Args:
        rank: R.
        max_length: Positions are 0..max_length - 1.
        shared: Whether heads share one bias.
        q_factor_init: Of the parameter "q_factor", [max_length, #N, R].
        k_factor_init: Of the parameter "k_factor", [max_length, #N, R].
        param_dtype: Of the parameters.

    Returns:
        Of a call with a `BiasContext`: a `FactoredBias`.

    Raises:
        ValueError: if a position is known to lie outside. One that is not known makes
            the rows and keys of that token NaN.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from pallas_attn.linen import LearnedFactoredBias, MultiHeadAttention
        >>> bias = LearnedFactoredBias(rank=4, max_length=16)
        >>> layer = MultiHeadAttention(num_heads=2, bias=bias)
        >>> params = layer.init(jax.random.key(0), jnp.ones((1, 5, 8)))["params"]
        >>> params["bias"]["q_factor"].shape
        (16, 2, 4)

    Source: FlashBias (arXiv 2505.12044), learned positional biases.
    """

    rank: int
    max_length: int
    shared: bool = False
    q_factor_init: Any = nn.initializers.normal(1.0)
    k_factor_init: Any = nn.initializers.zeros_init()
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, context: BiasContext) -> FactoredBias:
        """The factors of the call's positions."""
        heads = 1 if self.shared else context.num_heads
        shape = (self.max_length, heads, self.rank)
        check_positions(context, self.max_length)
        q = self.param("q_factor", self.q_factor_init, shape, self.param_dtype)
        k = self.param("k_factor", self.k_factor_init, shape, self.param_dtype)
        return of_positions(q, k, context)


class NeuralFactoredBias(BiasModule):
    """A bias of rank R whose factors are networks: b_ij = sum_r f(x_i)_nr g(y_j)_nr.

    The layer's call takes x, y as `query_coordinates` [*#B, T, d] and `key_coordinates`
    [*#B, S, d] (in self-attention those of the queries). `NeuralFactors.fit` makes
    parameters that stand for a known bias; they are this module's "factors".

    Args:
        rank: R.
        hidden: The widths of the hidden layers, of each side.
        position_unit: Read positions instead: how many make a distance of 1.

    Returns:
        Of a call with a `BiasContext`: a `FactoredBias`.

    Raises:
        ValueError: if coordinates are missing, or a shape is wrong.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from pallas_attn.linen import MultiHeadAttention, NeuralFactoredBias
        >>> layer = MultiHeadAttention(num_heads=2, bias=NeuralFactoredBias(rank=4))
        >>> x, mesh = jnp.ones((3, 5, 8)), jnp.ones((3, 5, 2))
        >>> layer.init_with_output(
        ...     jax.random.key(0), x, query_coordinates=mesh
        ... )[0].shape
        (3, 5, 8)

    Source: FlashBias (arXiv 2505.12044), neural decomposition.
    """

    rank: int
    hidden: tuple[int, ...] = (64, 64)
    position_unit: float | None = None

    reads = ("coordinates",)

    @nn.compact
    def __call__(self, context: BiasContext) -> FactoredBias:
        """The factors at the call's points."""
        points = coordinates(context, self.position_unit)
        networks = NeuralFactors(
            context.num_heads, self.rank, self.hidden, name="factors"
        )
        return aligned(networks(*points), context)


class SquaredDistanceBias(BiasModule):
    """A penalty on squared distances: b_ij = -w_n |x_i - y_j|^2.

    The layer's call takes the points x, y as `query_coordinates` [*#B, T, d] and
    `key_coordinates` [*#B, S, d] (in self-attention those of the queries). Learned
    weights are exp(log_weights): they stay penalties.

    Args:
        weights: Fixed weights or the first ones, [N]; None: 1. A tuple keeps the module
            hashable.
        learned: Whether they are the parameter "log_weights", float32 [N].
        position_unit: Read positions instead: how many make a distance of 1.

    Returns:
        Of a call with a `BiasContext`: a `FactoredBias` of rank d + 2.

    Raises:
        ValueError: if coordinates are missing, a shape is wrong, or a learned weight
            is not positive.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from pallas_attn.linen import MultiHeadAttention, SquaredDistanceBias
        >>> layer = MultiHeadAttention(num_heads=2, bias=SquaredDistanceBias())
        >>> x, mesh = jnp.ones((3, 5, 8)), jnp.ones((3, 5, 2))
        >>> layer.init_with_output(
        ...     jax.random.key(0), x, query_coordinates=mesh
        ... )[0].shape
        (3, 5, 8)

    Source: FlashBias (arXiv 2505.12044), neural solvers of PDEs.
    """

    weights: Any = None
    learned: bool = True
    position_unit: float | None = None

    reads = ("coordinates",)

    @nn.compact
    def __call__(self, context: BiasContext) -> FactoredBias:
        """The factors of the call's points."""
        points = coordinates(context, self.position_unit)
        bias = squared_distance_factors(*points, self._weights(context.num_heads))
        return aligned(bias, context)

    def _weights(self, num_heads: int) -> Array:
        weights = penalties.weights(self.weights, num_heads, learned=self.learned)
        if not self.learned:
            return weights
        return jnp.exp(self.param("log_weights", lambda key: jnp.log(weights)))
