"""Masks as flax makes them."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Bool, Float

from pallas_attn.poison import poisoned
from pallas_attn.rules import array, kind, known


def truth(mask: Any) -> Bool[Array, ...] | None:
    """A mask as bool: flax's are 0 where a query may not attend, in any dtype.

    Raises:
        ValueError: if numbers are known, and one is not: a mask to be added to scores,
            0 where a query may attend, would say the opposite.
    """
    if mask is None:
        return None
    found = array("mask", mask)
    if found.dtype == bool:
        return found
    values = known(mask)
    if values is not None and values.size and not (values >= 0).all():
        raise ValueError(
            "`mask` must be bool, or 1 where a query may attend and 0 where it may "
            f"not; got {kind(values)} from {values.min()} on. What is to be added to "
            "the scores is a bias: `MultiHeadAttention(bias=...)`."
        )
    return found != 0


def spoiled(mask: Any, x: Float[Array, "*B T N h"]) -> Float[Array, "*B T N h"]:
    """The output; NaN where the mask, whose numbers may be traced, is below 0."""
    if mask is None:
        return x
    found = array("mask", mask)
    if found.dtype == bool or known(mask) is not None:
        return x
    wrong = (~(found >= 0)).any(tuple(range(-min(found.ndim, 3), 0)))  # of each batch
    left = (1,) * (x.ndim - 3 - wrong.ndim)
    return poisoned(x, wrong.reshape(*left, *wrong.shape, 1, 1, 1))
