"""Numbers of a table at indices, their gradients summed in a fixed order.

JAX's own gradient of an indexed read is a scatter: where two indices meet, a GPU adds
in another order each time, and the same step gives other bits.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from pallas_attn.call import accumulator


# Up to so many (index, row) pairs are compared; above, indices are sorted.
COMPARED = 2**24


@jax.custom_jvp
def entries(
    table: Shaped[Array, "*any"], index: Int[Array, "*places"]
) -> Shaped[Array, "*places ..."]:
    """table[index] of a table [L, *rest], NaN where it has no such row.

    What a row is read for is added up in float32 or wider, in an order that indices
    alone fix.
    """
    inside = jnp.where(index < 0, table.shape[0], index)
    return table.at[inside].get(mode="fill", fill_value=jnp.nan)


@entries.defjvp
def _along(primals: Any, tangents: Any) -> tuple[Any, Any]:
    """In operations whose transposes add nothing up but by a sum."""
    (table, index), moved = primals, tangents[0]
    count, rest = table.shape[0], table.shape[1:]
    places, rows = index.reshape(-1), moved.reshape(count, -1)
    rows = rows.astype(accumulator(rows.dtype))
    small = count * places.size * rows.shape[1] <= COMPARED
    found = (_compared if small else _sorted)(rows, places)
    found = found.astype(moved.dtype).reshape(*index.shape, *rest)
    return entries(table, index), found


def _compared(
    rows: Float[Array, "L R"], index: Int[Array, " n"]
) -> Float[Array, "n R"]:
    """Each row where its index is, 0 where there is none."""
    own = jnp.arange(rows.shape[0], dtype=index.dtype)
    here = (index[:, None] == own[None, :])[:, None, :]
    return jnp.sum(jnp.where(here, rows.T[None], 0.0), -1)


def _sorted(rows: Float[Array, "L R"], index: Int[Array, " n"]) -> Float[Array, "n R"]:
    """The same, by sorted indices: equal ones are beside each other.

    A row goes to the last of its places, and from there to the 1, 2, 4, ... before it.
    The transpose adds up in a tree.
    """
    L, n = rows.shape[0], index.size
    order = jnp.argsort(index, stable=True)
    own, placed = jnp.arange(L, dtype=index.dtype), index[order]
    last = jnp.searchsorted(placed, own, side="right").astype(jnp.int32) - 1
    exists = placed[jnp.maximum(last, 0)] == own
    apart = n + jnp.arange(L, dtype=jnp.int32)  # past the end, each for itself
    found = jnp.zeros((n, rows.shape[1]), rows.dtype)
    found = found.at[jnp.where(exists, last, apart)].add(
        rows, mode="drop", unique_indices=True
    )
    for step in reversed([1 << i for i in range(max(n - 1, 0).bit_length())]):
        same = (placed[:-step] == placed[step:])[:, None]
        before = found[:-step] + jnp.where(same, found[step:], 0.0)
        found = jnp.concatenate([before, found[-step:]])
    back = jnp.argsort(order)  # a permutation has one
    return found.at[back].get(mode="promise_in_bounds", unique_indices=True)


def taken(x: Shaped[Array, "*axes n"], index: Int[Array, "*axes m"]) -> Array:
    """Entries along the last axis; no two alike, so that a gradient adds nothing up.

    Of what a map varies in the index alone there is one copy for each of its elements:
    their gradients would meet in one, in whatever order a GPU adds them.
    """
    none = jnp.sum(index, -1, keepdims=True) * 0
    return jnp.take_along_axis(
        x + none.astype(x.dtype), index, axis=-1, mode="promise_in_bounds"
    )
