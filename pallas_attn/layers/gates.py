"""Gates: of forgetting attention, between tokens, and of what attention puts out."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_attn.bias.forget_gate import ForgetGate
from pallas_attn.layers.context import BiasContext


def forgetting(
    module: Any, logits: Float[Array, "*B S N"], context: BiasContext
) -> ForgetGate:
    """Gates sigmoid(logits), with those that the layer's cache has.

    Args:
        module: The bias module, which is being called.
        logits: Of the call's new keys, any float.
        context: Of the call.
    """
    log_gate = jax.nn.log_sigmoid(logits.astype(jnp.float32))
    return ForgetGate(context.kept(module, "cached_log_gate", log_gate))


def decaying(times: tuple[float, float]) -> Any:
    """An initialiser with exp(-1 / time) = sigmoid(c), so c = -log(exp(1/time) - 1).

    Args:
        times: The first head's and the last's; those between are evenly spaced in
            their logarithm.

    Raises:
        ValueError: if a time is not positive.
    """
    if len(times) != 2 or not all(time > 0 for time in times):
        raise ValueError(
            f"`decay_times` must be (first, last), both positive; got {times}. They "
            "count tokens."
        )

    def init(key: Any, shape: tuple[int], dtype: Any) -> Float[Array, " N"]:
        first, last = (jnp.log(jnp.float32(time)) for time in times)
        time = jnp.exp(jnp.linspace(first, last, shape[0], dtype=jnp.float32))
        return -jnp.log(jnp.expm1(1 / time)).astype(dtype)

    return init


def gated(
    output: Float[Array, "*B T N h"], logits: Float[Array, "*B T N #h"]
) -> Float[Array, "*B T N h"]:
    """The output of attention times sigmoid(logits), of its dtype."""
    return output * jax.nn.sigmoid(logits).astype(output.dtype)
