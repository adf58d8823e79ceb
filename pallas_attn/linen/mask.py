"""Masks as flax makes them."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Bool

from pallas_attn.checks.rules import array


def truth(mask: Any) -> Bool[Array, ...] | None:
    """A mask as bool: flax's are 0 where a query may not attend, in any dtype."""
    if mask is None:
        return None
    found = array("mask", mask)
    return found if found.dtype == bool else found != 0
