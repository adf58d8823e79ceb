"""Layers of Flax, modules that make biases, and one line for Flax's own layers."""

from pallas_attn.layers.context import BiasContext
from pallas_attn.linen.alibi import ALiBi, CoALiBi
from pallas_attn.linen.attention import MultiHeadAttention
from pallas_attn.linen.bias import BiasModule
from pallas_attn.linen.factored import (
    LearnedFactoredBias,
    NeuralFactoredBias,
    SquaredDistanceBias,
)
from pallas_attn.linen.forget_gate import ForgetGate
from pallas_attn.linen.neural_factors import NeuralFactors
from pallas_attn.linen.output_gate import OutputGate
from pallas_attn.linen.pair import PairBias
from pallas_attn.linen.plug import as_flax_attention_fn
from pallas_attn.linen.relative import RelativePositionBias, WindowRelativePositionBias


__all__ = [
    "ALiBi",
    "BiasContext",
    "BiasModule",
    "CoALiBi",
    "ForgetGate",
    "LearnedFactoredBias",
    "MultiHeadAttention",
    "NeuralFactoredBias",
    "NeuralFactors",
    "OutputGate",
    "PairBias",
    "RelativePositionBias",
    "SquaredDistanceBias",
    "WindowRelativePositionBias",
    "as_flax_attention_fn",
]
