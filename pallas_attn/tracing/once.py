"""Functions that are differentiable once, by a rule of their own, and say so."""

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
        "`implementation`: the kernels are differentiable once, in reverse mode; use "
        'implementation="xla" for jvp and second derivatives.'
    )
