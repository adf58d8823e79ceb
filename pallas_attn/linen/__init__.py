"""Layers of Flax, modules that make biases, and one line for Flax's own layers."""

from pallas_attn.linen.alibi import ALiBi as ALiBi, CoALiBi as CoALiBi
from pallas_attn.linen.attention import MultiHeadAttention as MultiHeadAttention
from pallas_attn.linen.bias import (
    BiasContext as BiasContext,
    BiasModule as BiasModule,
)
from pallas_attn.linen.factored import (
    LearnedFactoredBias as LearnedFactoredBias,
    NeuralFactoredBias as NeuralFactoredBias,
    SquaredDistanceBias as SquaredDistanceBias,
)
from pallas_attn.linen.forget_gate import ForgetGate as ForgetGate
from pallas_attn.linen.neural_factors import NeuralFactors as NeuralFactors
from pallas_attn.linen.pair import PairBias as PairBias
from pallas_attn.linen.plug import as_flax_attention_fn as as_flax_attention_fn
from pallas_attn.linen.relative import (
    RelativePositionBias as RelativePositionBias,
    WindowRelativePositionBias as WindowRelativePositionBias,
)
