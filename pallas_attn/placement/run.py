"""A canonical call on its implementation, traced and compiled once for equal calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from pallas_attn.call import Call
from pallas_attn.canonical import Canonical
from pallas_attn.implementations import current_device, Device
from pallas_attn.placement import automatic, explicit
from pallas_attn.placement.explicit import layout_of
from pallas_attn.placement.names import named
from pallas_attn.placement.symbolic import is_symbolic, one_by_one
from pallas_attn.placement.varying import in_shard_map, lifted, varying


# An implementation's function of (query, key, value, bias, .., visibility, call).
Function = Callable[..., tuple[Any, ...]]

# Implementations that launch kernels.
KERNELS = ("triton", "triton_interpret")


def run(function: Function, given: Canonical, count: int) -> tuple[Any, ...]:
    """The first `count` results of a function of an implementation.

    Equal calls compile once, outside `jax.jit` too; a call without its residual has
    none that `jax_debug_infs` could look at.
    """
    *arrays, call = given.operands
    results = Results(function, given.implementation in KERNELS, count)
    static = (results, call, current_device())
    try:
        hash(jax.tree.structure(arrays))
    except TypeError:  # a bias with a static field that has no hash is traced each time
        return _placed(*static, arrays)
    return compiled(*static, arrays)


@dataclass(frozen=True)
class Results:
    """The first results of an implementation's function.

    kernels: whether it launches kernels, into which XLA cannot look.
    """

    function: Function
    kernels: bool
    count: int

    def __call__(self, *operands: Any) -> tuple[Any, ...]:
        """Them; of plain JAX under the checkpoint name."""
        made = tuple(self.function(*operands)[: self.count])
        return made if self.kernels else named(made)


def _placed(
    results: Results, call: Call, device: Device, arrays: list[Any]
) -> tuple[Any, ...]:
    """The results on one device, or each device its batch entries and heads."""
    if (layout := layout_of(arrays)) is not None:
        return explicit.spread(results, arrays, call, layout)
    if results.kernels and is_symbolic(call):
        return one_by_one(results, arrays, call)
    # an abstract device without a mesh: lowered for a machine that is not this one
    elsewhere = device.abstract and jax.sharding.get_abstract_mesh().size == 1
    alone = jax.device_count() == 1 or elsewhere or in_shard_map()
    if results.kernels and not alone:
        return automatic.attend(results, call, explicit.counted(arrays, call))
    return results(*lifted(arrays, varying(arrays)), call)


compiled: Any = jax.jit(_placed, static_argnums=(0, 1, 2))
