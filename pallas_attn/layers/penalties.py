"""Slopes and weights of penalties, fixed or first ones of learned exponentials."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_attn.rules import known, wrong_shape


def slopes(
    given: Any, num_heads: int, default: Callable[[int], Array], *, learned: bool
) -> Float[Array, " N"]:
    """Slopes per head.

    Args:
        given: Those of a module, [N], or None.
        num_heads: N.
        default: Makes those of N heads.
        learned: Whether they are the first of learned ones, exponentials.

    Raises:
        ValueError: if they are not [N], or learned and not positive.
    """
    if given is None:
        return default(num_heads)
    found = jnp.asarray(given, jnp.float32)
    if found.shape != (num_heads,):
        rule = f"[num_heads] = [{num_heads}]"
        wrong_shape("slopes", found, rule, "Give one slope per head.")
    least = _least(given) if learned else None
    if least is not None:
        raise ValueError(
            f"`slopes` must be positive where `learned` is True; got {least}. "
            "Learned slopes are exponentials; fixed ones may be 0 or rewards."
        )
    return found


def weights(given: Any, num_heads: int, *, learned: bool) -> Float[Array, " N"]:
    """Weights per head.

    Args:
        given: Those of a module, [N], or one for all; None: 1.
        num_heads: N.
        learned: Whether they are the first of learned ones, exponentials.

    Raises:
        ValueError: if they are not [N], or learned and not positive.
    """
    found = jnp.asarray(1.0 if given is None else given).astype(jnp.float32)
    if found.shape not in ((), (num_heads,)):
        rule = f"[num_heads] = [{num_heads}]"
        wrong_shape("weights", found, rule, "Give one weight per head.")
    least = _least(given) if learned and given is not None else None
    if least is not None:
        raise ValueError(
            "`weights` must be positive where `learned` is True; got "
            f"{least}. Learned weights are exponentials."
        )
    return jnp.broadcast_to(found, (num_heads,))


def _least(given: Any) -> Any:
    """The least of some numbers, if they are known and it is not positive."""
    found = known(given)
    return None if found is None or (found > 0).all() else found.min()
