"""Functions that have derivatives by rules around them alone, and say so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def once(run: Callable[..., Any]) -> Any:
    """The function, which refuses to be differentiated by JAX."""
    refusing: Any = jax.custom_jvp(run)
    refusing.defjvp(_refuse)
    return refusing


def _refuse(primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        "`implementation`: what kernels count, such as visited blocks, has no "
        "derivative; put jax.lax.stop_gradient around it."
    )
