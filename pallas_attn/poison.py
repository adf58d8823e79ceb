"""NaN on purpose, and computed only there: `jax_debug_nans` sees no other."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def poisoned(x: Float[Array, "*axes"], where: Bool[Array, "*#axes"]) -> Array:
    """An array with NaN in some places; a constant NaN would set off the alarm."""
    fine = (~where).astype(x.dtype)
    return x + jnp.zeros_like(fine) / fine
