"""Layers of linen and of nnx: the same bias modules in both, and what calls take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import linen as nn, nnx
from jaxtyping import Array

from pallas_attn import linen, nnx as native
from pallas_attn.bias.dense import DenseBias
from pallas_attn.bias.factored import FactoredBias


# Entries, heads of queries and of keys, features; LENGTH tokens fit into the cache, and
# a window of Swin has as many places; CHANNELS of a pair, coordinates of a point.
B, N, K, F = 2, 4, 2, 32
LENGTH, WINDOW, CHANNELS, POINT = 12, (3, 4), 5, 2


class Twins(NamedTuple):
    """A bias of a layer, in both libraries.

    Args:
        linen: The module, or a value.
        nnx: Makes it.
        inputs: What a call takes beside inputs, of LENGTH tokens, by a key.
    """

    linen: Any
    nnx: Callable[[nnx.Rngs], Any]
    inputs: Callable[[Array], dict[str, Array]]


def pairs(key: Array) -> dict[str, Array]:
    """A pair representation."""
    return {"pair": jax.random.normal(key, (B, LENGTH, LENGTH, CHANNELS))}


def points(key: Array) -> dict[str, Array]:
    """Coordinates of the tokens."""
    return {"query_coordinates": jax.random.normal(key, (B, LENGTH, POINT))}


def both(key: Array) -> dict[str, Array]:
    """Of all that calls take."""
    return pairs(key) | points(key)


def nothing(key: Array) -> dict[str, Array]:
    """A call takes its inputs alone."""
    return {}


def dense() -> DenseBias:
    """A bias value of LENGTH queries and keys."""
    return DenseBias(jax.random.normal(jax.random.key(7), (B, 1, LENGTH, LENGTH)))


def factored() -> Any:
    """A sum of values of LENGTH queries and keys."""
    q, k = jax.random.normal(jax.random.key(7), (2, 1, LENGTH, N, 3))
    return FactoredBias(q, k) + dense().bias


normal = nn.initializers.normal(1.0)
BIASES: dict[str, Twins] = {
    "none": Twins(None, lambda rngs: None, nothing),
    "alibi": Twins(
        linen.ALiBi(learned=True), lambda rngs: native.ALiBi(N, learned=True), nothing
    ),
    "co_alibi": Twins(
        linen.CoALiBi(learned=True),
        lambda rngs: native.CoALiBi(N, learned=True),
        nothing,
    ),
    "t5": Twins(
        linen.RelativePositionBias(8, 10, bidirectional=False),
        lambda rngs: native.RelativePositionBias(N, 8, 10, False, rngs=rngs),
        nothing,
    ),
    "swin": Twins(
        linen.WindowRelativePositionBias(WINDOW, table_init=normal),
        lambda rngs: native.WindowRelativePositionBias(N, WINDOW, rngs=rngs),
        nothing,
    ),
    "swin_v2": Twins(
        linen.WindowRelativePositionBias(WINDOW, continuous=True, hidden_features=16),
        lambda rngs: native.WindowRelativePositionBias(
            N, WINDOW, continuous=True, hidden_features=16, rngs=rngs
        ),
        nothing,
    ),
    "pair": Twins(
        linen.PairBias(), lambda rngs: native.PairBias(N, CHANNELS, rngs=rngs), pairs
    ),
    "factored": Twins(
        linen.LearnedFactoredBias(3, LENGTH, k_factor_init=normal),
        lambda rngs: native.LearnedFactoredBias(N, 3, LENGTH, rngs=rngs),
        nothing,
    ),
    "neural": Twins(
        linen.NeuralFactoredBias(3, (8,)),
        lambda rngs: native.NeuralFactoredBias(N, 3, POINT, (8,), rngs=rngs),
        points,
    ),
    "squared": Twins(
        linen.SquaredDistanceBias(),
        lambda rngs: native.SquaredDistanceBias(N),
        points,
    ),
    "squared_positions": Twins(
        linen.SquaredDistanceBias(position_unit=4.0),
        lambda rngs: native.SquaredDistanceBias(N, position_unit=4.0),
        nothing,
    ),
    "forget": Twins(
        linen.ForgetGate(kernel_init=normal),
        lambda rngs: native.ForgetGate(N, F, rngs=rngs),
        nothing,
    ),
    "forget_heads": Twins(
        linen.ForgetGate(data_dependent=False, decay_times=(2, 9)),
        lambda rngs: native.ForgetGate(
            N, F, data_dependent=False, decay_times=(2, 9), rngs=rngs
        ),
        nothing,
    ),
    "sum": Twins(
        linen.ALiBi()
        + linen.PairBias()
        + linen.ForgetGate()
        + linen.SquaredDistanceBias(),
        lambda rngs: (
            native.ALiBi(N)
            + native.PairBias(N, CHANNELS, rngs=rngs)
            + native.ForgetGate(N, F, rngs=rngs)
            + native.SquaredDistanceBias(N)
        ),
        both,
    ),
    "value": Twins(dense(), lambda rngs: dense(), nothing),
    "values": Twins(
        linen.ALiBi((0.5, 0.0, -0.1, 1.0)) + factored(),
        lambda rngs: native.ALiBi(N, [0.5, 0.0, -0.1, 1.0]) + factored(),
        nothing,
    ),
}
