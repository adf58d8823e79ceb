"""A small causal character model: positions by ALiBi, or by a learned table."""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from pallas_attn.api import dot_product_attention
from pallas_attn.bias.alibi import ALiBi, alibi_slopes


class CharacterModel(nn.Module):
    """Pre-norm transformer, from characters to the logits of the next ones.

    Args:
        alphabet: Number of characters.
        trained_length: Rows of the learned table of positions; None: ALiBi instead.
        width: Features of a character.
        heads: Attention heads.
        layers: Transformer layers.
    """

    alphabet: int
    trained_length: int | None = None
    width: int = 96
    heads: int = 4
    layers: int = 2

    @nn.compact
    def __call__(self, characters: Int[Array, "B T"]) -> Float[Array, "B T alphabet"]:
        """Logits of each next character."""
        x = nn.Embed(self.alphabet, self.width)(characters)
        if self.trained_length is not None:
            # past its end every position shares the last row: the kindest of the ways
            # to leave the trained range, for a new row would be untrained noise
            position = jnp.arange(characters.shape[1], dtype=jnp.int32)
            last = jnp.int32(self.trained_length - 1)
            table = nn.Embed(self.trained_length, self.width)
            x = x + table(jnp.minimum(position, last))[None]
        for _ in range(self.layers):
            attention = Attention(self.heads, alibi=self.trained_length is None)
            x = x + attention(nn.LayerNorm()(x))
            hidden = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width)(hidden)
        return nn.Dense(self.alphabet)(nn.LayerNorm()(x))


class Attention(nn.Module):
    """Causal self-attention, with ALiBi or without any bias."""

    heads: int
    alibi: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B T width"]) -> Float[Array, "B T width"]:
        """A mixture of what each position may look back at."""
        features = (self.heads, x.shape[-1] // self.heads)
        query, key, value = (nn.DenseGeneral(features)(x) for _ in range(3))
        bias = ALiBi(alibi_slopes(self.heads)) if self.alibi else None
        output = dot_product_attention(query, key, value, bias, is_causal=True)
        return nn.DenseGeneral(x.shape[-1], axis=(-2, -1))(output)
