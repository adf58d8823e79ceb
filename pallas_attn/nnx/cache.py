"""The cache of an nnx layer: variables of keys, values and whatever else is kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from flax import nnx
from jaxtyping import Array, Shaped

from pallas_attn.layers.cache import check_new, Slot, taken
from pallas_attn.rules import kind
from pallas_attn.shapes import Sizes


@dataclass(frozen=True)
class Variables:
    """The variables `nnx.Cache` of an attention layer that is being called.

    Args:
        layer: The layer, whose `init_cache` made them.
    """

    layer: Any

    def slot(self, sizes: Sizes, lengths: Any) -> Slot:
        """Where the new tokens go."""
        check_new(sizes)
        index = self._variable("cache_index")
        shape = self._variable("cached_key").get_value().shape
        slot, following = taken(index.get_value(), shape, sizes, lengths)
        index.set_value(following)
        return slot

    def kept(
        self, name: str, x: Shaped[Array, "*B T *rest"], slot: Slot | None
    ) -> Shaped[Array, "*B S *rest"]:
        """All that there is under a name: what is new, with what came before."""
        variable = self._variable(name)
        assert slot is not None
        variable.set_value(slot.written(variable.get_value(), x))
        return variable.get_value()

    def name_of(self, module: Any, name: str) -> str:
        """A name that no other module takes: that of the module's place, before it."""
        return _name(self.layer, module, name)

    def _variable(self, name: str) -> nnx.Cache[Any]:
        variable = getattr(self.layer, name, None)
        if variable is None:
            raise ValueError(
                f"`decode` needs a cache; got a layer without `{name}`. Make it: "
                "`layer.init_cache(inputs.shape)`, with inputs as long as the longest "
                "sequence."
            )
        return variable


@dataclass(frozen=True)
class Shapes:
    """What a cache will have, learned from a call with the longest inputs.

    Args:
        layer: The layer.
        found: What was kept, by name; it grows.
    """

    layer: Any
    found: dict[str, Array] = field(default_factory=dict)

    def slot(self, sizes: Sizes, lengths: Any) -> None:
        """None: the cache is made."""
        check_new(sizes)

    def kept(
        self, name: str, x: Shaped[Array, "*B S *rest"], slot: Slot | None
    ) -> Shaped[Array, "*B S *rest"]:
        """What is new, which is all."""
        self.found[name] = x
        return x

    def name_of(self, module: Any, name: str) -> str:
        """A name that no other module takes: that of the module's place, before it."""
        return _name(self.layer, module, name)


def _name(layer: Any, module: Any, name: str) -> str:
    for path, node in nnx.iter_graph(layer):
        if node is module:
            return "_".join((*map(str, path), name))
    raise ValueError(
        "`context.kept` takes the module that is called, of the layer's bias; got "
        f"{kind(module)}, which is no part of the layer."
    )
