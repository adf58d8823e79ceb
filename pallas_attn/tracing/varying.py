"""Inside `jax.shard_map`: over which mesh axes an array varies, as its type says.

Operands of a call are lifted to one set of axes before anything is differentiated, so
that JAX sums the gradient of what shards share over exactly the axes that share it.
"""

from __future__ import annotations

from typing import Any

import jax
from jax import lax


def varying(tree: Any) -> frozenset[Any]:
    """The mesh axes over which some array of a tree varies; none outside shard_map."""
    found = [jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(tree)]
    return frozenset().union(*found)


def lifted(tree: Any, axes: frozenset[Any]) -> Any:
    """The same arrays, varying over at least these axes."""
    if not axes:
        return tree

    def lift(x: Any) -> Any:
        lacking = tuple(sorted(axes - varying(x), key=str))
        return lax.pcast(x, lacking, to="varying") if lacking else x

    return jax.tree.map(lift, tree)


def over(shapes: Any, axes: frozenset[Any]) -> Any:
    """Shapes and dtypes of results that vary over these axes."""
    if not in_shard_map():
        return shapes
    mat = jax.sharding.ManualAxisType(varying=axes)

    def one(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=mat)

    return jax.tree.map(one, shapes)


def in_shard_map() -> bool:
    """Whether some axis of the current mesh is one that `jax.shard_map` maps."""
    manual = jax.sharding.AxisType.Manual
    return manual in jax.sharding.get_abstract_mesh().axis_types
