"""NaN on purpose, and computed only there: `jax_debug_nans` sees no other."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float


def poisoned(x: Float[Array, "*axes"], where: Bool[Array, "*#axes"]) -> Array:
    """An array with NaN in some places.

    Its bits are chosen as integers: a constant NaN would set off the alarm, and of
    0 / 0 XLA for CPU (jax 0.10) made 0 inside of some fusions.
    """
    bits = np.dtype(f"uint{8 * x.dtype.itemsize}")
    nan = np.array(np.nan, x.dtype).view(bits)
    chosen = jnp.where(where, nan, np.zeros((), bits))
    return x + lax.bitcast_convert_type(chosen, x.dtype)
