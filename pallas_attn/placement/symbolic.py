"""In `jax.export` with a symbolic batch: kernels, of static grids, in a loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
from jax import lax

from pallas_attn.call import Call
from pallas_attn.letters import leaves
from pallas_attn.placement.explicit import counted
from pallas_attn.problem import Problem


def is_symbolic(call: Call) -> bool:
    """Whether some size of a call is known only when an exported program runs."""
    return not all(isinstance(n, int) for n in (call.B, call.T, call.S))


def one_by_one(
    function: Callable[[Problem], tuple[Any, ...]], problem: Problem
) -> tuple[Any, ...]:
    """The results of a function of a problem, batch entry after batch entry.

    Raises:
        NotImplementedError: if a length is symbolic.
    """
    for letter in "TS":
        if not isinstance(size := getattr(problem.call, letter), int):
            raise NotImplementedError(
                "`implementation`: kernels are exported for any batch, but for static "
                f'lengths; got {letter} = {size}. Use implementation="xla", or export '
                "once for each length."
            )
    problem = counted(problem)
    flat, tree = jax.tree.flatten(problem)
    own = [
        axes.letters[0] == "B" and not isinstance(x.shape[0], int)
        for x, axes in leaves(problem)
    ]

    def one(entry: list[Any]) -> tuple[Any, ...]:
        left = iter(entry)
        mixed = [next(left)[None] if o else x for x, o in zip(flat, own, strict=True)]
        mine = jax.tree.unflatten(tree, mixed)
        mine = replace(mine, call=replace(problem.call, B=1))
        return tuple(x[0] for x in function(mine))

    return lax.map(one, [x for x, o in zip(flat, own, strict=True) if o])
