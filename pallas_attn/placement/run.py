"""A problem on its implementation, traced and compiled once for equal ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from pallas_attn.canonical import Request
from pallas_attn.implementations import current_device, Device, functions_of
from pallas_attn.placement import automatic, explicit
from pallas_attn.placement.explicit import layout_of
from pallas_attn.placement.symbolic import is_symbolic, one_by_one
from pallas_attn.problem import Problem
from pallas_attn.tracing.names import named
from pallas_attn.tracing.varying import in_shard_map, lifted, varying


# An implementation's.
Function = Callable[[Problem], tuple[Any, ...]]

# Implementations that launch kernels.
KERNELS = ("triton", "triton_interpret")


def run(function: Function, given: Request, count: int) -> tuple[Any, ...]:
    """The first `count` results of a function of an implementation.

    Equal calls compile once, outside `jax.jit` too; a call without its residual has
    none that `jax_debug_infs` could look at.
    """
    results = Results(function, given.implementation in KERNELS, count)
    static = (results, current_device())
    try:
        hash(jax.tree.structure(given.problem))
    except TypeError:  # a bias with a static field that has no hash is traced each time
        return _placed(*static, given.problem)
    return compiled(*static, given.problem)


@dataclass(frozen=True)
class Results:
    """The first results of an implementation's function.

    kernels: whether it launches kernels, into which XLA cannot look.
    """

    function: Function
    kernels: bool
    count: int

    def __call__(self, problem: Problem) -> tuple[Any, ...]:
        """Them; of plain JAX under the checkpoint name."""
        made = tuple(self.function(problem)[: self.count])
        return made if self.kernels else named(made)

    def plain(self, problem: Problem) -> tuple[Any, ...]:
        """Those of attention, as "xla" computes them."""
        return tuple(functions_of("xla", problem.family).attend(problem)[: self.count])


def _placed(results: Results, device: Device, problem: Problem) -> tuple[Any, ...]:
    """The results on one device, or each device its batch entries and heads."""
    if (layout := layout_of(problem)) is not None:
        return explicit.spread(results, problem, layout)
    if results.kernels and is_symbolic(problem.call):
        return one_by_one(results, problem)
    # an abstract device without a mesh: lowered for a machine that is not this one
    elsewhere = device.abstract and jax.sharding.get_abstract_mesh().size == 1
    alone = jax.device_count() == 1 or elsewhere or in_shard_map()
    if results.kernels and not alone:
        return automatic.attend(results, explicit.counted(problem))
    return results(lifted(problem, varying(problem)))


compiled: Any = jax.jit(_placed, static_argnums=(0, 1))
