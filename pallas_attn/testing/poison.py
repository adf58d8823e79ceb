"""NaN and infinities in every number that no visible place reads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from pallas_attn.bias.base import as_bias, Bias, homes, Sum


def poisoned(places: Bool[np.ndarray, "B N T S"], home: str, x: Any) -> Any:
    """An array, NaN and inf where no visible place reads it.

    Args:
        places: Who may attend to whom.
        home: Of a field, or the operand's name; another name leaves x as it is.
        x: [#B, T, #N, ...], [#B, S, #N or K, ...] or [#B, #N, #T, #S].
    """
    by_place = {
        "query": lambda: np.swapaxes(places.any(3), 1, 2),
        "key": lambda: np.swapaxes(places.any(2), 1, 2),
        "pair": lambda: places,
    }
    by_place["value"] = by_place["key"]
    if home not in by_place:
        return x
    read = by_place[home]()
    if home in ("key", "value") and 1 < x.shape[2] < read.shape[2]:  # grouped heads
        read = read.reshape(*read.shape[:2], x.shape[2], -1).any(3)
    sizes = zip(x.shape, read.shape, strict=False)
    shared = tuple(axis for axis, (size, full) in enumerate(sizes) if size < full)
    read = read.any(shared, keepdims=True)
    read = read.reshape(read.shape + (1,) * (x.ndim - read.ndim))
    return jnp.where(read, x, bad(x))


def poisoned_bias(places: Bool[np.ndarray, "B N T S"], bias: Any) -> Bias:
    """A bias with every field so; places see its fields as they see operands."""
    bias = as_bias(bias)
    if isinstance(bias, Sum):
        return Sum(tuple(poisoned_bias(places, term) for term in bias.terms))
    fields = {
        name: poisoned(places, home, getattr(bias, name))
        for name, home in homes(bias).items()
    }
    return replace(bias, **fields)


def bad(x: Array) -> Array:
    """NaN and both infinities in turn, of the shape and dtype of an array."""
    turns = jnp.array([jnp.nan, jnp.inf, -jnp.inf], x.dtype)
    return jnp.resize(turns, x.shape)
