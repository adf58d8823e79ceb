"""Bias modules: what makes a bias value from the inputs of an attention layer."""

from __future__ import annotations

from typing import Any, ClassVar

from flax import linen as nn

from pallas_attn.bias.base import Bias, terms_of
from pallas_attn.layers.bias import (
    check_given,
    check_made,
    inputs_read,
    total,
    value_of,
)
from pallas_attn.layers.context import BiasContext


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
        return total(self.terms, lambda name, term: bias_value(name, term, context))


def bias_value(name: str, bias: Any, context: BiasContext) -> Bias:
    """What a module makes, or a value, of which a decode step has its rows.

    Raises:
        TypeError: if it is neither.
    """
    if isinstance(bias, BiasModule):
        made = bias(context)
        check_made(name, bias, made)
        return made
    check_given(name, bias, "linen")
    return value_of(bias, context)


def read_by(bias: Any) -> frozenset[str]:
    """The optional inputs that a bias reads."""
    if isinstance(bias, BiasSum):
        return frozenset().union(*(read_by(term) for term in bias.terms))
    if not isinstance(bias, BiasModule):
        return frozenset()
    return inputs_read(bias)


def _terms(x: Any) -> tuple[Any, ...]:
    if isinstance(x, BiasSum):
        return x.terms
    if isinstance(x, BiasModule):
        return (x,)
    return terms_of(x)
