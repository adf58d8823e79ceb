"""Bias modules: what makes a bias value from the inputs of an attention layer."""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from types import FunctionType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int, Shaped

from pallas_attn.bias.base import as_bias, Bias, Sum, terms_of
from pallas_attn.layers.cache import Slot
from pallas_attn.linen.decode import cached
from pallas_attn.rules import kind, wrong_shape


@dataclass(frozen=True)
class BiasContext:
    """What a bias module sees of a call of its attention layer.

    *B are the leading axes of the inputs; S counts the places of the cache where the
    layer decodes. Axes of positions are 1 where they are shared.

    Args:
        inputs_q: [*B, T, features].
        inputs_kv: [*B, S, features]; while decoding the new tokens alone, [*B, T, ..]:
            see `kept`.
        num_heads: N.
        query_positions: int32 [*#B, #N, T].
        key_positions: int32 [*#B, #N, S].
        offset: An int or int32 [*#B], the position of query 0, where queries stand one
            after the other and keys do from 0 on; None where positions were given.
        pair: Floating [*#A, T, S, channels], or None; *A are the first of *B.
        query_coordinates: Floating [*#B, T, d], or None.
        key_coordinates: Floating [*#B, S, d], or None.
        decode: Whether the layer has a cache.
        slot: Where new tokens go in it; None while it is made.
        layer: The attention layer, whose keys these are: its cache has what is kept.

    Example:
        >>> import jax, jax.numpy as jnp, pallas_attn
        >>> from flax import linen as nn
        >>> from pallas_attn.linen import BiasModule, MultiHeadAttention
        >>> class Importance(BiasModule):  # b_ij = w_n . x_j
        ...     @nn.compact
        ...     def __call__(self, context):
        ...         of_key = nn.Dense(context.num_heads)(context.inputs_kv)
        ...         of_key = context.kept(self, "importance", of_key)  # [B, S, N]
        ...         of_key = jnp.swapaxes(of_key, -1, -2)[..., None, :]
        ...         return pallas_attn.DenseBias(of_key)  # [B, N, 1, S]
        >>> layer = MultiHeadAttention(num_heads=2, bias=Importance())
        >>> x = jnp.ones((1, 5, 8))
        >>> layer.init_with_output(jax.random.key(0), x)[0].shape
        (1, 5, 8)
    """

    inputs_q: Float[Array, "*B T features"]
    inputs_kv: Float[Array, "*B S features"]
    num_heads: int
    query_positions: Int[Array, "*#B #N T"]
    key_positions: Int[Array, "*#B #N S"]
    offset: int | Int[Array, "*#B"] | None = None
    pair: Float[Array, "*#A T S channels"] | None = None
    query_coordinates: Float[Array, "*#B T d"] | None = None
    key_coordinates: Float[Array, "*#B S d"] | None = None
    decode: bool = False
    slot: Slot | None = None
    layer: nn.Module | None = None

    @property
    def batch(self) -> tuple[int, ...]:
        """The sizes of the leading axes."""
        return self.inputs_q.shape[:-2]

    @property
    def T(self) -> int:
        """Queries."""
        return self.inputs_q.shape[-2]

    @property
    def S(self) -> int:
        """Keys."""
        return self.key_positions.shape[-1]

    def kept(self, module: nn.Module, name: str, x: Array) -> Array:
        """What a module makes of every key: while decoding, with that of keys before.

        It lies in the cache of the attention layer: a module may serve several.

        Args:
            module: The bias module, which is being called.
            name: Of what is kept; the variable's name has the module's before it.
            x: [*B, S, ...], made of `inputs_kv`: while decoding [*B, T, ...].

        Returns:
            [*B, S, ...].
        """
        if not self.decode:
            return x
        layer = module if self.layer is None else self.layer
        return cached(layer, _kept_name(layer, module, name), x, self.slot)


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


def coordinates(
    context: BiasContext, position_unit: float | None
) -> tuple[Float[Array, "*#B T d"], Float[Array, "*#B S d"]]:
    """Points of queries and keys: those of the call, or positions on a line.

    Args:
        context: The inputs of the layer.
        position_unit: How many positions make a distance of 1; None: read coordinates.

    Returns:
        Two arrays with the leading axes of the inputs, each 1 or full.

    Raises:
        ValueError: if there are none, or a shape is wrong.
    """
    if position_unit is not None:
        for side in (context.query_positions, context.key_positions):
            if side.shape[-2] != 1:
                raise ValueError(
                    "`position_unit` needs positions that heads share; got positions "
                    f"of shape {side.shape}. Give coordinates to the layer's call."
                )
        query, key = context.query_positions, context.key_positions
        return _on_a_line(query, position_unit), _on_a_line(key, position_unit)
    query, key = context.query_coordinates, context.key_coordinates
    if query is None or key is None:
        name = "query_coordinates" if query is None else "key_coordinates"
        raise ValueError(
            f"`{name}` must be given to the layer's call, for its bias reads them; got "
            "None. Pass coordinates, or set `position_unit` to read positions."
        )
    return (
        _placed("query_coordinates", query, context.batch, context.T),
        _placed("key_coordinates", key, context.batch, context.S),
    )


def _on_a_line(
    positions: Int[Array, "*#B 1 T"], unit: float
) -> Float[Array, "*#B T 1"]:
    return positions[..., 0, :, None].astype(jnp.float32) / unit


def _placed(
    name: str, x: Any, batch: tuple[int, ...], length: int
) -> Float[Array, "*#B L d"]:
    x = jnp.asarray(x)
    leading = (1,) * (len(batch) + 2 - x.ndim) + x.shape[:-2]
    fits = len(leading) == len(batch) and all(
        m in (1, n) for m, n in zip(leading, batch, strict=True)
    )
    if x.ndim < 2 or not fits or x.shape[-2] != length:
        rule = f"[*#B, {length}, d] with *B = {batch}"
        wrong_shape(name, x, rule, "Give a point for each token.")
    return x.reshape(*leading, *x.shape[-2:])


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


def _kept_name(layer: nn.Module, module: nn.Module, name: str) -> str:
    """A name in the layer's cache that no other module takes."""
    own, path = layer.path, module.path
    below = path[len(own) :] if path[: len(own)] == own else path
    return "_".join((*below, name))


def _terms(x: Any) -> tuple[Any, ...]:
    if isinstance(x, BiasSum):
        return x.terms
    if isinstance(x, BiasModule):
        return (x,)
    return terms_of(x)
