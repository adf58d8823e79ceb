"""Tables with a row per position, or per pair of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from pallas_attn.bias.lookup import entries


def at_positions(
    table: Shaped[Array, "L N *rest"], positions: Int[Array, "*#B #N T"]
) -> Shaped[Array, "*#B T #N *rest"]:
    """Rows of a table where tokens stand, N = 1 shared; NaN where there is no row."""
    heads = table.shape[1]
    if positions.shape[-2] == 1:  # heads stand in the same places: one read for all
        return entries(table, positions[..., 0, :])
    if heads == 1:
        found = entries(table[:, 0], positions)
    else:
        read = jax.vmap(entries, (1, -2), positions.ndim - 2)
        found = read(
            table,
            jnp.broadcast_to(
                positions, (*positions.shape[:-2], heads, positions.shape[-1])
            ),
        )
    return jnp.moveaxis(found, positions.ndim - 2, positions.ndim - 1)


def of_pairs(
    table: Float[Array, "rows N"], row: Int[Array, "*#B #N T S"]
) -> Float[Array, "*#B N T S"]:
    """The rows of a table that pairs name; NaN where there is no such row."""
    T, S = row.shape[-2:]
    found = at_positions(table, row.reshape(*row.shape[:-2], T * S))
    return jnp.moveaxis(found, -1, -2).reshape(*row.shape[:-3], -1, T, S)


def row(keys: Int[Array, "*#B #N S"]) -> Int[Array, "*#B #N 1 S"]:
    """Of keys, beside a column of queries."""
    return keys[..., None, :]
