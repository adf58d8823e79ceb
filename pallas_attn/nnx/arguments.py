"""What an nnx layer makes of its arguments: norms, hooks, streams of dropout."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from pallas_attn.rules import kind


def norm(
    by: Any, features: int, metadata: Any, *, rngs: nnx.Rngs, **fields: Any
) -> Any:
    """A norm of heads, of queries or of keys.

    Args:
        by: False; True: a layer norm, as flax's; "rms"; or a module, that is copied.
        features: H.
        metadata: Of the parameter "scale", of the norms that have a name here.
        rngs: Of that parameter.
        **fields: Its dtypes.

    Returns:
        A module; None: there is none.

    Raises:
        TypeError: if it is none of these.
    """
    if by is False:
        return None
    if isinstance(by, nnx.Module):
        return nnx.clone(by)
    fields |= {"scale_metadata": metadata, "rngs": rngs}
    if by is True:
        return nnx.LayerNorm(features, use_bias=False, **fields)
    if isinstance(by, str) and by == "rms":
        return nnx.RMSNorm(features, **fields)
    raise TypeError(
        '`normalize_qk` must be a bool, "rms" or an nnx module of [.., H]; got '
        f"{kind(by)}. `nnx.RMSNorm(H, epsilon=1e-6, rngs=rngs)` is one."
    )


def check_features(name: str, inputs: Array, features: int) -> None:
    """Inputs have the features that the layer was made for.

    Raises:
        ValueError: if they do not.
    """
    if inputs.shape[-1] != features:
        argument = "in_features" if name == "inputs_q" else "in_kv_features"
        raise ValueError(
            f"`{name}` must have the {argument} of its layer, {features}; got "
            f"{inputs.shape[-1]} features. Make the layer for its inputs."
        )


def hook(name: str, function: Any) -> Any:
    """A hook of a layer, as its attribute.

    What a function holds is not the layer's: copies of a layer, as `nnx.grad` and
    `nnx.jit` make them, would go on with the old one, and its gradient would be 0.

    Raises:
        TypeError: if it is a function that holds modules or variables.
    """
    if function is None or isinstance(function, nnx.Module):
        return nnx.data(function)
    for x in _held(function, set()):
        raise TypeError(
            f"`{name}` must be a module, or a function that holds none: the layer "
            f"would not see its parameters; got a function with {kind(x)}. Give a "
            "module whose `__call__` it is."
        )
    return function


def _held(x: Any, seen: set[int]) -> Iterator[Any]:
    """The modules and variables that a function is bound to, closes over or binds."""
    leaves = jax.tree.leaves(x, is_leaf=_is_state)
    for leaf in leaves:
        if _is_state(leaf):
            yield leaf
        elif callable(leaf) and id(leaf) not in seen:
            seen.add(id(leaf))
            names = ("__self__", "func", "args", "keywords", "__wrapped__")
            yield from _held([getattr(leaf, name, None) for name in names], seen)
            for cell in getattr(leaf, "__closure__", None) or ():
                with contextlib.suppress(ValueError):  # empty until it is assigned
                    yield from _held(cell.cell_contents, seen)


def _is_state(x: Any) -> bool:
    return isinstance(x, nnx.Module | nnx.Variable)


def stream(given: nnx.Rngs | nnx.RngStream | None, own: Any) -> nnx.RngStream:
    """Where dropout has its keys from, of a call that drops.

    Args:
        given: To the call.
        own: Of the layer, or None.

    Raises:
        ValueError: if there is none.
    """
    found = given.dropout if isinstance(given, nnx.Rngs) else given or own
    if found is None:
        raise ValueError(
            "`rngs` must be given to the call of a layer that keeps none; got None."
        )
    return found


def hashable(x: Any) -> Any:
    """A list as a tuple, so that it may be static."""
    return tuple(x) if isinstance(x, list) else x
