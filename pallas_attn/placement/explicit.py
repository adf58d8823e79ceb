"""On a mesh with explicit axes: each device attends to its batch entries and heads.

Types say how arrays are sharded. Where batch or heads are, the call runs inside
`jax.shard_map`, everything that is not along these axes whole on each device: no
collective but the sum of gradients of what devices share.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from pallas_attn.dropout import seed_of_all
from pallas_attn.letters import Axes, axes_of, leaves
from pallas_attn.problem import Problem
from pallas_attn.tracing.varying import lifted


Names = tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """A mesh, and its axes over which batch entries and heads lie; () for neither."""

    mesh: Any
    batch: Names
    heads: Names

    @property
    def entries(self) -> int:
        """Over how many parts the batch lies."""
        return math.prod(self.mesh.shape[a] for a in self.batch)

    @property
    def groups(self) -> int:
        """Over how many parts the heads lie."""
        return math.prod(self.mesh.shape[a] for a in self.heads)

    def spec(self, letters: str, shape: tuple[int, ...]) -> PartitionSpec:
        """How an array lies; what has size 1 is shared."""

        def names(letter: str, size: int) -> Names | None:
            if letter == "B" and size > 1:
                return self.batch or None
            if letter == "N" and size > 1:
                return self.heads or None
            if letter == "K" and size % self.groups == 0:
                return self.heads or None
            return None

        return PartitionSpec(*map(names, letters, shape))


def names_of(entry: Any) -> Names:
    """The mesh axes of an entry of a partition spec."""
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def layout_of(problem: Problem) -> Layout | None:
    """How a call lies on an explicit mesh; None: on none, or whole on each device.

    Raises:
        ValueError: if an array is sharded otherwise than by batch and heads.
    """
    mesh: Any = None
    found: dict[str, tuple[Names, str]] = {}
    for x, axes in leaves(problem):
        sharding: Any = jax.typeof(x).sharding
        for letter, entry in zip(axes.letters, sharding.spec, strict=False):
            if not (names := names_of(entry)):
                continue
            mesh = sharding.mesh
            _only_batch_and_heads(axes, letter, names)
            side = "B" if letter == "B" else "N"
            before, by = found.setdefault(side, (names, axes.name))
            if before != names:
                raise ValueError(
                    f"`{axes.name}` must be sharded as `{by}` is, {letter} over "
                    f"{before}; got {names}. Use jax.reshard on one of them."
                )
    if mesh is None:
        return None
    none: tuple[Names, str] = ((), "")
    return Layout(mesh, found.get("B", none)[0], found.get("N", none)[0])


def _only_batch_and_heads(axes: Axes, letter: str, names: Names) -> None:
    if letter in "BNK":
        return
    ways = "gather that axis with jax.reshard"
    if letter == "T":
        ways += (
            ", or call inside jax.shard_map with `query_offset` (or `query_positions`) "
            "saying where each shard's queries stand"
        )
    raise ValueError(
        f"`{axes.name}` must be sharded along batch and heads only, [{axes.letters}]; "
        f"got {letter} over {names}. To run it, {ways}."
    )


def spread(
    function: Callable[[Problem], Any], problem: Problem, layout: Layout
) -> tuple[Any, ...]:
    """The results of a function, each device its batch entries and heads.

    Results have the letters [B, T, N, ..] or, of two axes, [B, N].
    """
    problem = counted(problem)
    axes = axes_of(problem)
    specs = jax.tree.map(_spec, problem)
    explicit = {
        name
        for name, kind in zip(
            layout.mesh.axis_names, layout.mesh.axis_types, strict=True
        )
        if kind == AxisType.Explicit
    }
    wholes, tree = jax.tree.flatten(_bare(problem))
    shapes = jax.eval_shape(function, _bare(problem))
    letters = {2: "BN", 3: "BTN", 4: "BTNh"}
    outs = jax.tree.map(lambda x: layout.spec(letters[x.ndim], x.shape), shapes)

    def local(problem: Problem) -> tuple[Any, ...]:
        used = frozenset((*layout.batch, *layout.heads))
        arrays = jax.tree.leaves(lifted(problem, used))
        own = [
            _own(x, whole.shape, a.letters, layout)
            for x, a, whole in zip(arrays, axes, wholes, strict=True)
        ]
        mine = part(jax.tree.unflatten(tree, own), layout)
        return lifted(tuple(function(mine)), used)

    run = jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(specs,),
        out_specs=outs,
        axis_names=explicit,
    )
    return run(problem)


def part(problem: Problem, layout: Layout) -> Problem:
    """A device's part as a call of its own, of fewer batch entries and heads.

    Devices that share a key head each take it.
    """
    call, key, value = problem.call, problem.key, problem.value
    heads = math.lcm(call.K, layout.groups) // layout.groups
    if call.K > 1 and call.K % layout.groups:
        shared = math.lcm(call.K, layout.groups) // call.K
        first = lax.axis_index(layout.heads) * heads
        mine = (first + jnp.arange(heads, dtype=jnp.int32)) // shared
        key, value = (jnp.take(x, mine, 2, mode="clip") for x in (key, value))
    small = replace(
        call, B=call.B // layout.entries, N=call.N // layout.groups, K=heads
    )
    return replace(problem, key=key, value=value, call=small)


def counted(problem: Problem) -> Problem:
    """A problem of which parts will count entries and heads of the whole."""
    visibility = problem.visibility
    if visibility.seed is None:
        return problem
    seed = seed_of_all(visibility.seed, problem.call)
    return replace(problem, visibility=replace(visibility, seed=seed))


def _spec(x: Any) -> PartitionSpec:
    """How an array lies, as its type says."""
    sharding: Any = jax.typeof(x).sharding
    return PartitionSpec(*sharding.spec)


def _own(x: Any, shape: tuple[int, ...], letters: str, layout: Layout) -> Any:
    """A device's part of an array of a shape, which may lie on it whole.

    Cut here, so that its gradient is summed over devices and never gathered.
    """
    for axis, entry in enumerate(layout.spec(letters, shape)):
        names = names_of(entry)
        parts = math.prod(layout.mesh.shape[a] for a in names)
        if parts > 1 and x.shape[axis] == shape[axis]:
            size = shape[axis] // parts
            x = lax.dynamic_slice_in_dim(x, lax.axis_index(names) * size, size, axis)
    return x


def _bare(arrays: Any) -> Any:
    """Shapes and dtypes alone."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)
