"""Layers of Flax nnx, and modules that make biases."""

from pallas_attn.layers.context import BiasContext
from pallas_attn.nnx.alibi import ALiBi, CoALiBi
from pallas_attn.nnx.attention import MultiHeadAttention
from pallas_attn.nnx.bias import BiasModule
from pallas_attn.nnx.factored import (
    LearnedFactoredBias,
    NeuralFactoredBias,
    SquaredDistanceBias,
)
from pallas_attn.nnx.forget_gate import ForgetGate
from pallas_attn.nnx.output_gate import OutputGate
from pallas_attn.nnx.pair import PairBias
from pallas_attn.nnx.relative import RelativePositionBias, WindowRelativePositionBias


__all__ = [
    "ALiBi",
    "BiasContext",
    "BiasModule",
    "CoALiBi",
    "ForgetGate",
    "LearnedFactoredBias",
    "MultiHeadAttention",
    "NeuralFactoredBias",
    "OutputGate",
    "PairBias",
    "RelativePositionBias",
    "SquaredDistanceBias",
    "WindowRelativePositionBias",
]
