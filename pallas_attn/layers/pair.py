"""Biases of pair representations: what a call gives, and how heads read it."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_attn.bias.dense import DenseBias
from pallas_attn.layers.context import BiasContext
from pallas_attn.rules import array, floating, wrong_shape


def pair_of(context: BiasContext) -> Float[Array, "*#A T S channels"]:
    """The pair representation of a call.

    Raises:
        ValueError: if it is missing or has another shape.
        TypeError: if it is not floating.
    """
    if context.pair is None:
        raise ValueError(
            "`pair` must be given to the layer's call, for its bias is a PairBias; "
            "got None. Pass `pair` [*A, T, S, channels]."
        )
    pair = array("pair", context.pair)
    floating("pair", pair, "Cast it: `.astype(jnp.float32)`.")
    leading, T, S = pair.shape[:-3], context.T, context.S
    first = context.batch[: len(leading)]
    fits = len(leading) == len(first) and all(
        m in (1, n) for m, n in zip(leading, first, strict=True)
    )
    if pair.ndim < 3 or pair.shape[-3:-1] != (T, S) or not fits:
        rule = f"[*#A, T, S, channels] = [*#A, {T}, {S}, channels]"
        advice = f"*A are the first of the inputs' leading axes {context.batch}."
        wrong_shape("pair", pair, rule, advice)
    return pair


def of_heads(x: Float[Array, "*#A T S N"], context: BiasContext) -> DenseBias:
    """A number per pair and head as a bias, shared by the axes between *A and T."""
    leading = x.shape[:-3]
    shared = (1,) * (len(context.batch) - len(leading))
    x = jnp.moveaxis(x, -1, -3)
    return DenseBias(x.reshape(*leading, *shared, *x.shape[-3:]))
