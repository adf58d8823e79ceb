"""The cache of a linen layer: variables of keys, values and whatever else is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Shaped

from pallas_attn.layers.cache import check_new, Slot, taken
from pallas_attn.shapes import Sizes


@dataclass(frozen=True)
class Variables:
    """The collection "cache" of an attention layer that is being called.

    Args:
        layer: The layer. `init` makes the variables, of the longest inputs.
    """

    layer: nn.Module

    def slot(self, sizes: Sizes, lengths: Any) -> Slot | None:
        """Where the new tokens go; None while the cache is made."""
        layer = self.layer
        check_new(sizes)
        there = layer.has_variable("cache", "cached_key")
        if not there and not layer.is_initializing():
            raise ValueError(
                "`decode` needs a cache; got variables without one. Make it: "
                "`layer.init(rng, inputs)['cache']`, with inputs as long as the "
                "longest sequence, and apply with mutable=['cache']."
            )
        zeros = lambda: jnp.zeros(sizes.leading, jnp.int32)
        index = layer.variable("cache", "cache_index", zeros)
        if not there:
            return None
        shape = layer.get_variable("cache", "cached_key").shape
        slot, index.value = taken(index.value, shape, sizes, lengths)
        return slot

    def kept(
        self, name: str, x: Shaped[Array, "*B T *rest"], slot: Slot | None
    ) -> Shaped[Array, "*B S *rest"]:
        """All that there is under a name: what is new, with what came before."""
        variable = self.layer.variable("cache", name, jnp.zeros, x.shape, x.dtype)
        if slot is None:
            return x
        variable.value = slot.written(variable.value, x)
        return variable.value

    def name_of(self, module: nn.Module, name: str) -> str:
        """A name that no other module takes: that of the module's place, before it."""
        own, path = self.layer.path, module.path
        below = path[len(own) :] if path[: len(own)] == own else path
        return "_".join((*below, name))
