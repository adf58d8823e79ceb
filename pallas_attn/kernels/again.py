"""A second look, where a program ends with numbers that are not finite.

A bias of -inf takes a key away as a mask does, NaN included; but NaN - inf is NaN, and
so is 0 * NaN. To ask every tile would cost every call. So the passes do not ask, and a
program that NaN has reached goes over its blocks once more, in a plain loop that costs
nothing where it does not run, with all that the bias takes away masked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_attn.bias.base import Added
from pallas_attn.call import NO_WEIGHT
from pallas_attn.kernels.terms import Field, loaded, parts, with_fields
from pallas_attn.kernels.tile import at_keys, at_queries, Tile


f32 = jnp.float32
i32 = jnp.int32

# Keys, or queries, of a step of the second look: few, or it would need more registers
# than the first.
PART = 16


def spoiled(*arrays: jax.Array) -> jax.Array:
    """Whether some number is not finite; one multiply-add for each."""
    return functools.reduce(
        jnp.add, [jnp.sum(x.astype(f32) * 0.0) for x in arrays]
    ) != f32(0)


def again(wrong: jax.Array, redo: Callable[[], Any], state: Any) -> Any:
    """The state, or where it is wrong what `redo` makes of the blocks."""
    return lax.cond(wrong, redo, lambda: state)


def over_keys(t0: Tile, blocks: tuple[Any, Any], step: Any, state: Any) -> Any:
    """Run step(tile, state) over the key blocks of a range, in parts."""
    size = min(PART, t0.bk)
    small = replace(t0, bk=size)
    tile_at = lambda n: at_keys(small, n, 0, edge=True)
    return over(blocks, t0.bk // size, tile_at, step, state)


def over_queries(t0: Tile, blocks: tuple[Any, Any], step: Any, state: Any) -> Any:
    """Run step(tile, state) over the query blocks of a range, in parts."""
    size = min(PART, t0.bq)
    small = replace(t0, bq=size)
    tile_at = lambda n: at_queries(small, n, 0, edge=True)
    return over(blocks, t0.bq // size, tile_at, step, state)


def over(
    blocks: tuple[Any, Any],
    parts: int,
    tile_at: Callable[[Any], Tile],
    step: Any,
    state: Any,
) -> Any:
    """Run step(tile, state) over the parts of a range of blocks; not pipelined."""

    def one(carry: Any) -> Any:
        n, state = carry
        return n + 1, step(tile_at(n), state)

    first, last = (i32(n) * parts for n in blocks)
    return lax.while_loop(lambda c: c[0] < last, one, (first, state))[1]


def masked(t: Tile, added: Added, held: dict[Field, Any]) -> Tile:
    """The tile, blind to the pairs that a bias leaves without weight.

    By what it adds alone, a term or their sum: the score itself may be NaN.
    """
    row, rest = parts(with_fields(added, held | loaded(added, t, held)), t)
    return replace(t, taken=taken(t.shape, added, row, rest))


def taken(
    shape: tuple[int, ...], added: Added, row: Any, rest: list[jax.Array]
) -> jax.Array:
    """Which pairs the terms leave without weight, by their parts."""
    values = [jnp.broadcast_to(x, shape) for x in (row, *rest)]
    sums = [functools.reduce(jnp.add, values)]
    several = len(added.terms) + len(added.products) > 1
    low = [x <= NO_WEIGHT for x in (values + sums if several else sums)]
    return functools.reduce(jnp.logical_or, low)
