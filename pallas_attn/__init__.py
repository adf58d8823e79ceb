"""Attention with biases, in Pallas: one function, forward and backward."""

from pallas_attn.api import (
    attention_weights,
    dot_product_attention,
    Sparsity,
    sparsity,
    Visited,
    visited,
)
from pallas_attn.bias.alibi import ALiBi, alibi_slopes, linear_alibi_slopes
from pallas_attn.bias.base import (
    Bias,
    distance_home,
    head_home,
    key_home,
    pair_home,
    query_home,
    Sum,
)
from pallas_attn.bias.builders import (
    alibi_factors,
    squared_distance_factors,
    svd_factors,
    Truncation,
)
from pallas_attn.bias.co_alibi import co_alibi_slopes, CoALiBi
from pallas_attn.bias.dense import DenseBias
from pallas_attn.bias.factored import FactoredBias
from pallas_attn.bias.forget_gate import ForgetGate
from pallas_attn.bias.relative import RelativeBias
from pallas_attn.config import Block, Config
from pallas_attn.normalizers.entmax import Entmax
from pallas_attn.normalizers.softmax import Softmax


__all__ = [
    "ALiBi",
    "Bias",
    "Block",
    "CoALiBi",
    "Config",
    "DenseBias",
    "Entmax",
    "FactoredBias",
    "ForgetGate",
    "RelativeBias",
    "Softmax",
    "Sparsity",
    "Sum",
    "Truncation",
    "Visited",
    "alibi_factors",
    "alibi_slopes",
    "attention_weights",
    "co_alibi_slopes",
    "distance_home",
    "dot_product_attention",
    "head_home",
    "key_home",
    "linear_alibi_slopes",
    "pair_home",
    "query_home",
    "sparsity",
    "squared_distance_factors",
    "svd_factors",
    "visited",
]

__version__ = "0.1.0"
