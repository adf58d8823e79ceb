"""The vocabulary of the checks: what an array must be, how what was found is told."""

from __future__ import annotations

from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from pallas_attn.shapes import Axis, fits, fits_from_the_right, spelled


FLOATS = ("float16", "bfloat16", "float32", "float64")


def array(
    name: str, x: Any, rule: str = "an array", advice: str = "Use jnp.asarray."
) -> Array:
    """Anything that JAX takes as an array; not a list, not None."""
    if not isinstance(x, list | tuple | None):
        try:
            found = jnp.asarray(x)
            return found.astype(found.dtype)  # not weakly typed
        except (TypeError, ValueError):
            pass
    raise TypeError(f"`{name}` must be {rule}; got {kind(x)}. {advice}")


def shape(name: str, x: Array, rule: list[Axis], advice: str) -> None:
    """An array of exactly these axes."""
    if not fits(x.shape, rule):
        wrong_shape(name, x, spelled(rule), advice)


def shape_from_the_right(name: str, x: Array, rule: list[Axis], advice: str) -> None:
    """An array of these axes; axes it lacks on the left are shared."""
    if not fits_from_the_right(x.shape, rule):
        aligned = f"{spelled(rule)}, fewer axes aligned to the right"
        wrong_shape(name, x, aligned, advice)


def floating(name: str, x: Array, advice: str) -> None:
    """An array of a dtype that attention computes in."""
    if x.dtype.name not in FLOATS:
        rule = "float16, bfloat16, float32 or float64"
        raise TypeError(f"`{name}` must be {rule}; got {x.dtype.name}. {advice}")


def integers(name: str, x: Any) -> Any:
    """Integers as NumPy or JAX holds them; of JAX's, int32 or weakly typed ones."""
    found = np.asarray(x) if isinstance(x, int | np.ndarray | np.generic) else x
    if not isinstance(found, np.ndarray):
        found = jnp.asarray(x) if isinstance(x, jax.Array) else array(name, x)
        if found.dtype != jnp.int32 and not (
            found.weak_type and jnp.issubdtype(found.dtype, jnp.integer)
        ):
            _wrong_integers(name, found.dtype)
    elif not np.issubdtype(found.dtype, np.integer):
        _wrong_integers(name, found.dtype)
    return found


def _wrong_integers(name: str, dtype: Any) -> NoReturn:
    raise TypeError(
        f"`{name}` must be int32; got {np.dtype(dtype).name}. Write "
        "`.astype(jnp.int32)`."
    )


def int32(name: str, x: Any) -> Array:
    """Integers as int32, those of NumPy only where they fit."""
    if isinstance(x, np.ndarray) and x.size:
        info = np.iinfo(np.int32)
        if x.min() < info.min or x.max() > info.max:
            raise ValueError(
                f"`{name}` must fit int32; got {x.min()}..{x.max()}. Number from 0."
            )
    return jnp.asarray(x).astype(jnp.int32)


def static_int(name: str, x: Any, rule: str) -> None:
    """An integer that is there when the call is traced."""
    if isinstance(x, bool) or not isinstance(x, int | np.integer):
        raise TypeError(
            f"`{name}` must be {rule}; got {kind(x)}. It is static: under jit, close "
            "over it or list it in static_argnames."
        )


def known(x: Any) -> np.ndarray | None:
    """The values of an array if they are there to be read."""
    if isinstance(x, Tracer):
        return None
    if isinstance(x, jax.Array):
        return np.asarray(jax.device_get(x)) if x.is_fully_addressable else None
    return np.asarray(x)


def wrong_shape(name: str, x: Any, rule: str, advice: str) -> NoReturn:
    """The error of every shape."""
    raise ValueError(f"`{name}` must be {rule}; got shape {x.shape}. {advice}")


def kind(x: Any) -> str:
    """What was found, in a few words."""
    if isinstance(x, Tracer):
        return f"a traced array of {x.dtype.name} {list(x.shape)}"
    if isinstance(x, np.ndarray | jax.Array):
        return f"an array of {x.dtype} {list(x.shape)}"
    if isinstance(x, type):
        return f"the class {x.__name__}"
    if x is None:
        return "None"
    if isinstance(x, bool | int | float | str) or (isinstance(x, tuple) and not x):
        return f"{x!r}"
    name = type(x).__name__
    return f"an {name}" if name[0] in "AEIOUaeiou" else f"a {name}"


def library_of(x: Any) -> str | None:
    """Of a module of flax, "linen" or "nnx"; flax is not imported for it."""
    for base in type(x).__mro__:
        for library in ("linen", "nnx"):
            if (
                base.__name__ == "Module"
                and base.__module__ == f"flax.{library}.module"
            ):
                return library
    return None
