"""Factors of biases of low rank: rows of tables, networks of points, distances."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_attn.bias.factored import FactoredBias
from pallas_attn.layers.context import BiasContext
from pallas_attn.layers.tables import at_positions
from pallas_attn.rules import array, floating, known, wrong_shape


def of_positions(
    q: Float[Array, "L heads R"], k: Float[Array, "L heads R"], context: BiasContext
) -> FactoredBias:
    """The rows of two tables at the positions of a call.

    Args:
        q: Of queries, a row for each position.
        k: Of keys.
        context: Of the call, which `check_positions` took.
    """
    if isinstance(context.offset, int):
        first, ones = context.offset, (1,) * len(context.batch)
        sides = q[first : first + context.T], k[: context.S]
        return FactoredBias(*(x.reshape(*ones, *x.shape) for x in sides))
    return FactoredBias(
        at_positions(q, context.query_positions),
        at_positions(k, context.key_positions),
    )


def check_positions(context: BiasContext, max_length: int) -> None:
    """Positions that are known have a row; those of padding in a cache may not.

    Raises:
        ValueError: if one has none.
    """
    if context.offset is not None and max_length < context.S:
        raise ValueError(
            f"`max_length` must be at least the {context.S} positions of the keys; "
            f"got {max_length}. Make the bias for the longest input."
        )
    if isinstance(context.offset, int):
        ends = {"query_offset": (context.offset, context.offset + context.T - 1)}
    else:
        ends = {
            name: (int(found.min()), int(found.max()))
            for name in ("query_positions", "key_positions")
            if not context.decode
            and (found := known(getattr(context, name))) is not None
            and found.size
        }
    for name, (first, last) in ends.items():
        if first < 0 or last >= max_length:
            raise ValueError(
                f"`{name}` must keep positions in 0..max_length - 1 = "
                f"{max_length - 1}; got {first}..{last}. Make the bias for "
                "the longest input."
            )


def points(name: str, x: Any) -> Float[Array, "*#B L d"]:
    """Coordinates that a network takes, float32.

    Raises:
        TypeError: if they are not floating.
        ValueError: if they have fewer than 2 axes.
    """
    found = array(name, x)
    floating(name, found, "Cast it: `.astype(jnp.float32)`.")
    if found.ndim < 2:
        rule = f"[..., {'T' if name == 'x_q' else 'S'}, d]"
        wrong_shape(name, found, rule, "Points on a line have d = 1: `x[:, None]`.")
    found = found[None] if found.ndim == 2 else found
    return found.astype(jnp.float32)


def aligned(bias: FactoredBias, context: BiasContext) -> FactoredBias:
    """Factors with the leading axes of the inputs."""
    rank = len(context.batch) + 3

    def fit(x: Array) -> Array:
        excess = max(x.ndim - rank, 0)
        return x.reshape((1,) * (rank - x.ndim) + x.shape[excess:])

    return FactoredBias(fit(bias.q_factor), fit(bias.k_factor))
