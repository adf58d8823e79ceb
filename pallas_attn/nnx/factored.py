"""Biases of low rank: learned, neural, and squared distances."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_attn.bias.builders import squared_distance_factors
from pallas_attn.bias.factored import FactoredBias
from pallas_attn.layers import penalties
from pallas_attn.layers.context import BiasContext, coordinates
from pallas_attn.layers.factors import aligned, check_positions, of_positions, points
from pallas_attn.nnx.bias import BiasModule, fixed, read


class LearnedFactoredBias(BiasModule):
    """A learned bias of rank R: b_ij = sum_r q_factor[i, n, r] k_factor[j, n, r].

    i and j are positions. Its memory is (T + S) N R, whatever T S is. The factors of
    keys start at 0, and with them the bias.

    Args:
        num_heads: N.
        rank: R.
        max_length: Positions are 0..max_length - 1.
        shared: Whether heads share one bias.
        q_factor_init: Of the parameter "q_factor", [max_length, #N, R].
        k_factor_init: Of the parameter "k_factor", [max_length, #N, R].
        param_dtype: Of the parameters.
        rngs: Of the parameters.

    Returns:
        Of a call with a `BiasContext`: a `FactoredBias`.

    Raises:
        ValueError: if a position is known to lie outside. One that is not known makes
            the rows and keys of that token NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from pallas_attn.nnx import LearnedFactoredBias, MultiHeadAttention
        >>> rngs = nnx.Rngs(0)
        >>> bias = LearnedFactoredBias(2, rank=4, max_length=16, rngs=rngs)
        >>> layer = MultiHeadAttention(2, 8, bias=bias, rngs=rngs)
        >>> layer(jnp.ones((1, 5, 8))).shape, bias.q_factor.shape
        ((1, 5, 8), (16, 2, 4))

    Source: FlashBias (arXiv 2505.12044), learned positional biases.
    """

    def __init__(
        self,
        num_heads: int,
        rank: int,
        max_length: int,
        shared: bool = False,
        *,
        q_factor_init: Any = nnx.initializers.normal(1.0),
        k_factor_init: Any = nnx.initializers.zeros_init(),
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.num_heads = num_heads
        self.max_length = max_length
        shape = (max_length, 1 if shared else num_heads, rank)
        self.q_factor = nnx.Param(q_factor_init(rngs.params(), shape, param_dtype))
        self.k_factor = nnx.Param(k_factor_init(rngs.params(), shape, param_dtype))

    def __call__(self, context: BiasContext) -> FactoredBias:
        """The factors of the call's positions."""
        check_positions(context, self.max_length)
        q, k = self.q_factor.get_value(), self.k_factor.get_value()
        return of_positions(q, k, context)


class NeuralFactoredBias(BiasModule):
    """A bias of rank R whose factors are networks: b_ij = sum_r f(x_i)_nr g(y_j)_nr.

    The layer's call takes x, y as `query_coordinates` [*#B, T, d] and `key_coordinates`
    [*#B, S, d] (in self-attention those of the queries). Its "factors" have the
    parameters of `pallas_attn.linen.NeuralFactors`, whose `fit` makes such as stand for
    a known bias.

    Args:
        num_heads: N.
        rank: R.
        in_features: d; 1 where positions are read.
        hidden: The widths of the hidden layers, of each side.
        in_kv_features: d of the keys' coordinates; None: `in_features`.
        position_unit: Read positions instead: how many make a distance of 1.
        rngs: Of the parameters.

    Returns:
        Of a call with a `BiasContext`: a `FactoredBias`.

    Raises:
        ValueError: if coordinates are missing, or a shape is wrong.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from pallas_attn.nnx import MultiHeadAttention, NeuralFactoredBias
        >>> rngs = nnx.Rngs(0)
        >>> bias = NeuralFactoredBias(2, rank=4, in_features=2, rngs=rngs)
        >>> layer = MultiHeadAttention(2, 8, bias=bias, rngs=rngs)
        >>> layer(jnp.ones((3, 5, 8)), query_coordinates=jnp.ones((3, 5, 2))).shape
        (3, 5, 8)

    Source: FlashBias (arXiv 2505.12044), neural decomposition.
    """

    reads = ("coordinates",)

    def __init__(
        self,
        num_heads: int,
        rank: int,
        in_features: int = 1,
        hidden: tuple[int, ...] = (64, 64),
        *,
        in_kv_features: int | None = None,
        position_unit: float | None = None,
        rngs: nnx.Rngs,
    ):
        self.num_heads = num_heads
        self.position_unit = position_unit
        widths = (in_features, in_kv_features or in_features)
        self.factors = Networks(widths, hidden, (num_heads, rank), rngs=rngs)

    def __call__(self, context: BiasContext) -> FactoredBias:
        """The factors at the call's points."""
        x_q, x_k = coordinates(context, self.position_unit)
        return aligned(self.factors(x_q, x_k), context)


class Networks(nnx.Module):
    """Factors as functions of coordinates: a network of each side.

    Args:
        in_features: Of queries, and of keys.
        hidden: The width of each hidden layer.
        out_features: (N, R).
        activation: Of the hidden layers.
        rngs: Of the parameters.
    """

    def __init__(
        self,
        in_features: tuple[int, int],
        hidden: tuple[int, ...],
        out_features: tuple[int, int],
        *,
        activation: Callable[[Array], Array] = nnx.gelu,
        rngs: nnx.Rngs,
    ):
        of_query, of_key = in_features
        self.query = Network(of_query, hidden, out_features, activation, rngs=rngs)
        self.key = Network(of_key, hidden, out_features, activation, rngs=rngs)

    def __call__(
        self, x_q: Float[Array, "*#B T d"], x_k: Float[Array, "*#B S d"]
    ) -> FactoredBias:
        """The factors at these points."""
        return FactoredBias(
            self.query(points("x_q", x_q)), self.key(points("x_k", x_k))
        )


class Network(nnx.Module):
    """The network of queries, or of keys."""

    def __init__(
        self,
        in_features: int,
        hidden: tuple[int, ...],
        out_features: tuple[int, int],
        activation: Callable[[Array], Array],
        *,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        self.depth = len(hidden)
        for i, width in enumerate(hidden):
            setattr(self, f"hidden_{i}", nnx.Linear(in_features, width, rngs=rngs))
            in_features = width
        self.out = nnx.LinearGeneral(in_features, out_features, rngs=rngs)

    def __call__(self, x: Float[Array, "*B L d"]) -> Float[Array, "*B L N R"]:
        """The factors of these points."""
        for i in range(self.depth):
            x = self.activation(getattr(self, f"hidden_{i}")(x))
        return self.out(x)


class SquaredDistanceBias(BiasModule):
    """A penalty on squared distances: b_ij = -w_n |x_i - y_j|^2.

    The layer's call takes the points x, y as `query_coordinates` [*#B, T, d] and
    `key_coordinates` [*#B, S, d] (in self-attention those of the queries). Learned
    weights are exp(log_weights): they stay penalties.

    Args:
        num_heads: N.
        weights: Fixed weights or the first ones, [N], or a variable that has fixed
            ones; None: 1.
        learned: Whether they are the parameter "log_weights", float32 [N].
        position_unit: Read positions instead: how many make a distance of 1.

    Returns:
        Of a call with a `BiasContext`: a `FactoredBias` of rank d + 2.

    Raises:
        ValueError: if coordinates are missing, a shape is wrong, or a learned weight
            is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from pallas_attn.nnx import MultiHeadAttention, SquaredDistanceBias
        >>> layer = MultiHeadAttention(
        ...     2, 8, bias=SquaredDistanceBias(2), rngs=nnx.Rngs(0)
        ... )
        >>> layer(jnp.ones((3, 5, 8)), query_coordinates=jnp.ones((3, 5, 2))).shape
        (3, 5, 8)

    Source: FlashBias (arXiv 2505.12044), neural solvers of PDEs.
    """

    reads = ("coordinates",)

    def __init__(
        self,
        num_heads: int,
        weights: Any = None,
        learned: bool = True,
        position_unit: float | None = None,
    ):
        self.num_heads = num_heads
        self.position_unit = position_unit
        first = penalties.weights(weights, num_heads, learned=learned)
        self.weights = nnx.data(None) if learned else fixed(weights)
        self.log_weights = nnx.data(nnx.Param(jnp.log(first)) if learned else None)

    def __call__(self, context: BiasContext) -> FactoredBias:
        """The factors of the call's points."""
        at = coordinates(context, self.position_unit)
        return aligned(squared_distance_factors(*at, self._weights()), context)

    def _weights(self) -> Float[Array, " N"]:
        if self.log_weights is not None:
            return jnp.exp(self.log_weights.get_value())
        return penalties.weights(read(self.weights), self.num_heads, learned=False)
