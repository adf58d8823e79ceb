"""Bias modules: what makes a bias value from the inputs of an attention layer."""

from __future__ import annotations

import functools
import operator
from types import FunctionType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Int, Shaped

from pallas_attn.bias.base import as_bias, Bias, Sum, terms_of
from pallas_attn.layers.context import BiasContext
from pallas_attn.rules import kind


class BiasModule(nn.Module):
    """A module that makes a bias value: the base class.

    A subclass makes its parameters in `__call__`, from a `BiasContext`, and returns
    what `dot_product_attention` takes as a bias. `a + b` is a module too, of the sum;
    bias values may be among its terms. `reads` names the optional inputs that it takes
    from the layer's call: "pair", "coordinates".

    Its parameters lie where flax puts those of any module: made outside of modules, or
    as a field of the layer's parent, in the layer that has it, `params[layer]["bias"]`;
    made in a parent's `@nn.compact` method, beside the layer, under its own `name`
    ("ALiBi_0" if it has none: give it one). One module may serve several layers.

    Example:
        >>> import jax, jax.numpy as jnp, pallas_attn
        >>> from pallas_attn.linen import ALiBi, BiasModule, MultiHeadAttention
        >>> class Steep(BiasModule):
        ...     def __call__(self, context):
        ...         return pallas_attn.ALiBi(jnp.ones(context.num_heads))
        >>> layer = MultiHeadAttention(num_heads=2, bias=Steep() + ALiBi())
        >>> x = jnp.ones((1, 5, 8))
        >>> layer.init_with_output(jax.random.key(0), x)[0].shape
        (1, 5, 8)
    """

    reads: ClassVar[tuple[str, ...]] = ()

    def __call__(self, context: BiasContext) -> Bias:
        """The bias of a call.

        Args:
            context: The inputs of the layer.

        Returns:
            A bias value.
        """
        raise NotImplementedError

    @nn.nowrap
    def __add__(self, other: Any) -> BiasModule:
        return BiasSum((*_terms(self), *_terms(other)))

    @nn.nowrap
    def __radd__(self, other: Any) -> BiasModule:
        if isinstance(other, int) and other == 0:  # the start of sum(...)
            return self
        return BiasSum((*_terms(other), *_terms(self)))


class BiasSum(BiasModule):
    """The sum of bias modules and bias values, as `a + b` makes it.

    Args:
        terms: Modules, bias values, arrays.
    """

    terms: tuple[Any, ...] = ()

    def __call__(self, context: BiasContext) -> Bias:
        """The sum of the terms' values."""
        values = [bias_value(f"bias.terms[{i}]", term, context)
                  for i, term in enumerate(self.terms)]  # fmt: skip
        return functools.reduce(operator.add, values, Sum(()))


def bias_value(name: str, bias: Any, context: BiasContext) -> Bias:
    """What a module makes, or a value, of which a decode step has its rows.

    Raises:
        TypeError: if it is neither.
    """
    if isinstance(bias, BiasModule):
        made = bias(context)
        if not isinstance(made, Bias | np.ndarray | jax.Array | None):
            raise TypeError(
                f"`{name}`, {kind(bias)}, must return a bias value or an array; got "
                f"{kind(made)}."
            )
        return made
    # flax makes tuples of lists
    if isinstance(bias, nn.Module | type | FunctionType | list | tuple):
        raise TypeError(
            f"`{name}` must be a bias; got {kind(bias)}. Give a bias value, an array, "
            "a bias module (a BiasModule), or a sum of them, `a + b`."
        )
    value = as_bias(bias)
    return value if context.slot is None else context.slot.rows(value)


def read_by(bias: Any) -> frozenset[str]:
    """The optional inputs that a bias reads."""
    if isinstance(bias, BiasSum):
        return frozenset().union(*(read_by(term) for term in bias.terms))
    if not isinstance(bias, BiasModule):
        return frozenset()
    positions = getattr(bias, "position_unit", None) is not None
    return frozenset(bias.reads) - ({"coordinates"} if positions else frozenset())


def at_positions(
    table: Shaped[Array, "L N *rest"], positions: Int[Array, "*#B #N T"]
) -> Shaped[Array, "*#B T #N *rest"]:
    """Rows of a table where tokens stand, N = 1 shared; NaN where there is no row."""
    length, heads = table.shape[:2]
    inside = jnp.where(positions < 0, length, positions)
    if positions.shape[-2] == 1:  # heads stand in the same places: one read for all
        return table.at[inside[..., 0, :]].get(mode="fill", fill_value=jnp.nan)
    if heads == 1:
        found = table[:, 0].at[inside].get(mode="fill", fill_value=jnp.nan)
    else:
        head = jnp.arange(heads, dtype=jnp.int32)
        head = head.reshape(*(1 for _ in positions.shape[:-2]), heads, 1)
        head = jnp.broadcast_to(head, inside.shape)
        found = table.at[inside, head].get(mode="fill", fill_value=jnp.nan)
    return jnp.moveaxis(found, positions.ndim - 2, positions.ndim - 1)


def _terms(x: Any) -> tuple[Any, ...]:
    if isinstance(x, BiasSum):
        return x.terms
    if isinstance(x, BiasModule):
        return (x,)
    return terms_of(x)
