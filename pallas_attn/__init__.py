"""Attention with biases, in Pallas: one function, forward and backward."""

from pallas_attn.api import (
    dot_product_attention as dot_product_attention,
    Sparsity as Sparsity,
    sparsity as sparsity,
    Visited as Visited,
    visited as visited,
)
from pallas_attn.bias.alibi import (
    ALiBi as ALiBi,
    alibi_slopes as alibi_slopes,
    linear_alibi_slopes as linear_alibi_slopes,
)
from pallas_attn.bias.base import (
    Bias as Bias,
    head_home as head_home,
    key_home as key_home,
    pair_home as pair_home,
    query_home as query_home,
)
from pallas_attn.bias.builders import (
    alibi_factors as alibi_factors,
    squared_distance_factors as squared_distance_factors,
    svd_factors as svd_factors,
    Truncation as Truncation,
)
from pallas_attn.bias.co_alibi import (
    co_alibi_slopes as co_alibi_slopes,
    CoALiBi as CoALiBi,
)
from pallas_attn.bias.dense import DenseBias as DenseBias
from pallas_attn.bias.factored import FactoredBias as FactoredBias
from pallas_attn.bias.forget_gate import ForgetGate as ForgetGate
from pallas_attn.config import Block as Block, Config as Config
from pallas_attn.normalizers.entmax import Entmax as Entmax
from pallas_attn.normalizers.softmax import Softmax as Softmax
