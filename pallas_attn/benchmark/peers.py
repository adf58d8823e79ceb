"""What ours is timed against: jax.nn by its two backends, and ours without a sink."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_attn.api import dot_product_attention
from pallas_attn.bias.base import Bias
from pallas_attn.bias.dense import DenseBias
from pallas_attn.bias.factored import FactoredBias


Backend = Literal["cudnn", "xla"]


@dataclass(frozen=True)
class Peer:
    """Another implementation.

    Args:
        title: As it stands in a table.
        attend: (query, key, value, bias, causal=) -> output.
        biased: Whether it is given the case's bias. One that is not computes attention
            without a bias, and its gradients are those of query, key and value.
    """

    title: str
    attend: Callable[..., Array]
    biased: bool = True


def plain(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    bias: None,
    *,
    causal: bool,
    backend: Backend = "cudnn",
) -> Float[Array, "B T N H"]:
    """Attention without a bias."""
    del bias
    return jax.nn.dot_product_attention(
        query, key, value, is_causal=causal, implementation=backend
    )


def with_bias(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    bias: Bias | None,
    *,
    causal: bool,
    backend: Backend = "cudnn",
) -> Float[Array, "B T N H"]:
    """Attention with the bias as one array, written out where it is not one already."""
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        _array(bias, query.shape[1], key.shape[1]),
        is_causal=causal,
        implementation=backend,
    )


def concatenation(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N H"],
    bias: FactoredBias,
    *,
    causal: bool,
    backend: Backend = "cudnn",
) -> Float[Array, "B T N H"]:
    """The product of the factors as more columns of query and key.

        scale q.k + a.b = [scale q, a] . [k, b]

    The columns are rounded to the query's dtype and filled up to a multiple of 8; the
    value gets as many, of zeros, for jax.nn takes one head dim for all three.

    Source: FlashBias (arXiv 2505.12044), the form it recommends for training.
    """
    dtype, head_dim = query.dtype, query.shape[3]
    scale = 1 / math.sqrt(head_dim)
    output = jax.nn.dot_product_attention(
        _wide(query * jnp.asarray(scale, dtype), bias.q_factor.astype(dtype)),
        _wide(key, bias.k_factor.astype(dtype)),
        _wide(value, jnp.zeros_like(bias.k_factor, dtype)),
        scale=1.0,
        is_causal=causal,
        implementation=backend,
    )
    return output[..., :head_dim]


def without_more(*operands: Any, causal: bool) -> Float[Array, "B T N H"]:
    """Ours, whose rows have the scores of all their keys, and no other."""
    return dot_product_attention(*operands, is_causal=causal)


def _wide(x: Float[Array, "B L N H"], more: Float[Array, "B L N R"]) -> Array:
    width = x.shape[3] + more.shape[3]
    joined = jnp.concatenate([x, more], axis=-1)
    return jnp.pad(joined, [(0, 0)] * 3 + [(0, -width % 8)])


def _array(bias: Bias | None, T: int, S: int) -> Array | None:
    """The array of a dense bias as it is; of any other, its values."""
    if bias is None:
        return None
    if isinstance(bias, DenseBias):
        return bias.bias
    return bias.materialise(
        jnp.arange(T, dtype=jnp.int32), jnp.arange(S, dtype=jnp.int32)
    )


def _xla(*operands: Any, causal: bool) -> Array:
    return with_bias(*operands, causal=causal, backend="xla")


PEERS = {
    "cudnn": Peer("jax.nn cuDNN, no bias", plain, biased=False),
    "cudnn-bias": Peer("jax.nn cuDNN, the same bias", with_bias),
    "cudnn-concatenation": Peer("jax.nn cuDNN, concatenation", concatenation),
    "no-sink": Peer("ours, no sink", without_more),
    "no-mask": Peer("ours, no mask", without_more),
    "xla": Peer("jax.nn xla, the same bias", _xla),
}
