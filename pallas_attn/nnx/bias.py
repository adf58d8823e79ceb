"""Bias modules: what makes a bias value from the inputs of an attention layer."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_attn.bias.base import Bias, terms_of
from pallas_attn.layers.bias import (
    check_given,
    check_made,
    inputs_read,
    total,
    value_of,
)
from pallas_attn.layers.context import BiasContext
from pallas_attn.rules import kind, known


class BiasModule(nnx.Module):
    """A module that makes a bias value: the base class.

    A subclass has its parameters from its construction on, and makes of a `BiasContext`
    what `dot_product_attention` takes as a bias; variables in a value are read. `a + b`
    is a module too, of the sum, with the terms as "terms_0", "terms_1", ..: modules,
    bias values, arrays, variables. A subclass may set

    * `reads`, of the class: the optional inputs that it takes from the layer's call:
      "pair", "coordinates".
    * `num_heads`: N of the layers that it serves, which is then checked.

    What it makes of keys, [*B, S, ...], it keeps by `context.kept(self, name, x)`. One
    module may serve several layers; what it keeps lies in the cache of each.

    Example:
        >>> import jax, jax.numpy as jnp, pallas_attn
        >>> from flax import nnx
        >>> from pallas_attn.nnx import ALiBi, BiasModule, MultiHeadAttention
        >>> class Importance(BiasModule):  # b_ij = w_n . x_j
        ...     def __init__(self, num_heads, in_features, *, rngs):
        ...         self.of_key = nnx.Linear(in_features, num_heads, rngs=rngs)
        ...     def __call__(self, context):
        ...         of_key = self.of_key(context.inputs_kv)
        ...         of_key = context.kept(self, "importance", of_key)  # [B, S, N]
        ...         of_key = jnp.swapaxes(of_key, -1, -2)[..., None, :]
        ...         return pallas_attn.DenseBias(of_key)  # [B, N, 1, S]
        >>> rngs = nnx.Rngs(0)
        >>> bias = Importance(2, 8, rngs=rngs) + ALiBi(2, learned=True)
        >>> layer = MultiHeadAttention(2, 8, bias=bias, rngs=rngs)
        >>> layer(jnp.ones((1, 5, 8))).shape, layer.bias.terms_1.log_slopes.shape
        ((1, 5, 8), (2,))
    """

    reads: ClassVar[tuple[str, ...]] = ()
    num_heads: Any = None  # an int, or None

    def __call__(self, context: BiasContext) -> Any:
        """The bias of a call.

        Args:
            context: The inputs of the layer.

        Returns:
            A bias value.
        """
        raise NotImplementedError

    def __add__(self, other: Any) -> BiasModule:
        return BiasSum(*_terms(self), *_terms(other))

    def __radd__(self, other: Any) -> BiasModule:
        if isinstance(other, int) and other == 0:  # the start of sum(...)
            return self
        return BiasSum(*_terms(other), *_terms(self))


class BiasSum(BiasModule):
    """The sum of bias modules and bias values, as `a + b` makes it.

    Args:
        *terms: Modules, bias values, arrays, variables.
    """

    def __init__(self, *terms: Any):
        self.count = len(terms)
        for i, term in enumerate(terms):
            setattr(self, f"terms_{i}", held(f"bias.terms[{i}]", term))

    @property
    def terms(self) -> tuple[Any, ...]:
        """The terms in their order."""
        return tuple(getattr(self, f"terms_{i}") for i in range(self.count))

    def __call__(self, context: BiasContext) -> Bias:
        """The sum of the terms' values."""
        return total(self.terms, lambda name, term: bias_value(name, term, context))


def held(name: str, bias: Any) -> Any:
    """A bias as an attribute of a module: its arrays are data, variables or constants.

    Raises:
        TypeError: if it is none.
    """
    if bias is not None and not isinstance(bias, BiasModule):
        check_given(name, bias, "nnx")
    return nnx.data(jax.tree.map(_array, bias, is_leaf=_is_node))


def fixed(x: Any) -> Any:
    """Numbers as an attribute that is no part of a module's state, where they can be.

    Those of a variable or a trace are; None stays.
    """
    if x is None or isinstance(x, nnx.Variable):
        return nnx.data(x)
    values = known(x)
    return nnx.data(x) if values is None else _nested(values.tolist())


def read(x: Any) -> Any:
    """A value with what its variables hold."""
    return jax.tree.map(
        lambda leaf: leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf,
        x,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )


def bias_value(name: str, bias: Any, context: BiasContext) -> Bias:
    """What a module makes, or a value, of which a decode step has its rows.

    Raises:
        TypeError: if it is neither.
        ValueError: if a module has other heads.
    """
    if not isinstance(bias, BiasModule):
        return value_of(read(bias), context)
    if bias.num_heads not in (None, context.num_heads):
        raise ValueError(
            f"`{name}`, {kind(bias)}, must have the num_heads of its layer, "
            f"{context.num_heads}; got {bias.num_heads}."
        )
    made = read(bias(context))
    check_made(name, bias, made)
    return made


def read_by(bias: Any) -> frozenset[str]:
    """The optional inputs that a bias reads."""
    if isinstance(bias, BiasSum):
        return frozenset().union(*(read_by(term) for term in bias.terms))
    return inputs_read(bias) if isinstance(bias, BiasModule) else frozenset()


def _terms(x: Any) -> tuple[Any, ...]:
    if isinstance(x, BiasSum):
        return x.terms
    if isinstance(x, BiasModule | nnx.Variable):
        return (x,)
    return terms_of(x)


def _nested(x: Any) -> Any:
    """Lists, which are not hashable, as tuples."""
    return tuple(map(_nested, x)) if isinstance(x, list) else x


def _array(x: Any) -> Any:
    """A number as an array: what a module holds is an array or static."""
    return jnp.asarray(x) if isinstance(x, int | float) else x


def _is_node(x: Any) -> bool:
    return isinstance(x, nnx.Module | nnx.Variable)
