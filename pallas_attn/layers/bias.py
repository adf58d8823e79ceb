"""The bias of a layer, whatever made its modules: what is one, and what it gives."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any

import jax
import numpy as np

from pallas_attn.bias.base import as_bias, Bias, Sum
from pallas_attn.layers.context import BiasContext
from pallas_attn.rules import kind, library_of


def check_made(name: str, module: Any, made: Any) -> None:
    """What a bias module made of a call is a bias value or an array.

    Raises:
        TypeError: if it is neither.
    """
    if not isinstance(made, Bias | np.ndarray | jax.Array | None):
        raise TypeError(
            f"`{name}`, {kind(module)}, must return a bias value or an array; got "
            f"{kind(made)}."
        )


def check_given(name: str, bias: Any, library: str) -> None:
    """What a layer has is a value or an array, where it is no bias module.

    Args:
        name: The argument.
        bias: What the layer has.
        library: Of the layer, "linen" or "nnx".

    Raises:
        TypeError: if it is neither.
    """
    found = library_of(bias)
    if found not in (None, library):
        raise TypeError(
            f"`{name}` must be a bias of pallas_attn.{library}; got {kind(bias)} of "
            f"flax.{found}. Modules have the same names in both."
        )
    # flax makes tuples of lists
    if found or isinstance(bias, type | FunctionType | list | tuple):
        raise TypeError(
            f"`{name}` must be a bias; got {kind(bias)}. Give a bias value, an array, "
            "a bias module (a BiasModule), or a sum of them, `a + b`."
        )


def value_of(bias: Any, context: BiasContext) -> Bias:
    """The value of an array or a value, of which a decode step has its rows."""
    value = as_bias(bias)
    return value if context.slot is None else context.slot.rows(value)


def total(terms: Iterable[Any], value: Callable[[str, Any], Bias]) -> Bias:
    """The sum of terms, each with a value of its name."""
    values = [value(f"bias.terms[{i}]", term) for i, term in enumerate(terms)]
    return functools.reduce(operator.add, values, Sum(()))


def inputs_read(module: Any) -> frozenset[str]:
    """The optional inputs that a bias module reads."""
    positions = getattr(module, "position_unit", None) is not None
    return frozenset(module.reads) - ({"coordinates"} if positions else frozenset())
