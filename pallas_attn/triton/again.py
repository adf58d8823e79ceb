"""Launches whose programs are run again, with care, where NaN came out of them.

A key that a bias takes away has weight 0, but 0 * NaN is NaN: what is not finite in it
reaches every sum of a tile. To ask of each pair whether it was taken away costs kernels
up to 2.8 times their time, and there is mostly nothing to find. So they run as if all
was finite, and each program leaves flags that say which of its rows are not: as a store
like any other, no flag has to be cleared beforehand, and no thread waits for another. A
second kernel looks at the flags of many programs, ends at once where none is set, and
runs flagged programs again with `Sight.careful`: what they store replaces what was
there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Int

from pallas_attn.call import Call
from pallas_attn.config import Block
from pallas_attn.tiled.summaries import Sight
from pallas_attn.triton.launch import launch, like, Made, Program
from pallas_attn.triton.memory import load_where, store_number
from pallas_attn.types import outline, Ref, Tree


i32 = jnp.int32

# A pytree with a `Sight` in it.
Inputs = TypeVar("Inputs")

# Programs that share the flags, at most: where all are set, a device is full of them.
SHARING = 256
# Flags that one of them looks at, at a time.
FLAGS = 4096


def launch_watched(
    kernel: Callable[..., None],
    grid: tuple[int, ...],
    inputs: tuple[Tree, ...],
    outputs: Made,
    call: Call,
    block: Block,
    *,
    own: int,
    **static: Hashable,
) -> Made:
    """As `launch`, and again with care where a bias may take keys away.

    outputs: not a tuple; the kernel says by `Tile.note` whether they are finite, and
        stores the same places when it is run again.
    own: the flags of a program, one for each of its queries or keys; a power of two.
    """
    return launch_flagged(
        kernel, grid, inputs, outputs, call, block, own=own, strange=None, **static
    )[0]


def launch_flagged(
    kernel: Callable[..., None],
    grid: tuple[int, ...],
    inputs: tuple[Tree, ...],
    outputs: Made,
    call: Call,
    block: Block,
    *,
    own: int,
    strange: Int[Array, " some"] | None = None,
    **static: Hashable,
) -> tuple[Made, Int[Array, " some"] | None]:
    """As `launch_watched`, and whether programs were run again: none if all are 0.

    strange: what another launch said, which is not finite wherever this one may not be:
        then all programs are run again or none. None: there was none.
    """
    name = kernel.__name__
    if not any(x.takes for x in _sights(inputs)):
        made = launch(
            kernel, grid, inputs, outputs, call, block, into=None, name=name, **static
        )
        return made, None
    programs = math.prod(grid)
    each = pl.next_power_of_2(pl.cdiv(programs, SHARING))
    rerun = functools.partial(
        launch,
        _flagged,
        (pl.cdiv(programs, each),),
        call=call,
        block=replace(block, num_stages=1),  # rare: quick to compile, not to run
        name=f"{name}_again",
        body=kernel,
        sizes=grid,
        each=each,
        **static,
    )
    if strange is not None:
        made = launch(
            kernel, grid, inputs, outputs, call, block, into=None, name=name, **static
        )
        inputs = (careful(inputs), strange)
        return rerun(inputs, jax.tree.map(like, made), into=made), strange
    flags, made = launch(
        _noted,
        grid,
        inputs,
        (outline((programs, own), jnp.int8), outputs),
        call,
        block,
        name=name,
        body=kernel,
        sizes=grid,
        **static,
    )
    told = outline((pl.cdiv(programs, each),), i32)
    both = (jax.tree.map(like, made), told)
    return rerun((careful(inputs), flags), both, into=made)


def _noted(
    *refs: Tree,
    call: Call,
    program: Program,
    body: Callable[..., None],
    sizes: tuple[int, ...],
    **static: Hashable,
) -> None:
    """A kernel, as a program that is told where its flags are."""
    *operands, flags, out = refs
    program = replace(program, flag=(flags, _number_of(program.place, sizes)))
    body(*operands, out, call=call, program=program, **static)


def _flagged(
    inputs: tuple[Tree, ...],
    flags: Ref,
    _: Tree,
    out: Tree,
    told: Ref | None = None,
    *,
    call: Call,
    program: Program,
    body: Callable[..., None],
    sizes: tuple[int, ...],
    each: int,
    **static: Hashable,
) -> None:
    """A kernel, as the flagged of the `each` programs that this one looks at.

    flags: [programs, rows]; or [some], of all programs together.
    told: where it says whether some are flagged.
    """
    programs, of_all = math.prod(sizes), len(flags.shape) == 1
    first = program.place[0] * each
    some = _any_of_all(flags) if of_all else _any(flags, first, each)
    if told is not None:
        store_number(told, program.place, some)

    def run(number: jax.Array) -> None:
        place = _place_of(number, sizes)
        body(*inputs, out, call=call, program=Program(place), **static)

    def look(number: jax.Array, state: jax.Array) -> jax.Array:
        flagged = some if of_all else _any(flags, number, 1)
        lax.cond(flagged, lambda: run(number), lambda: None)
        return state

    end = jnp.where(some, jnp.minimum(first + each, programs), first)
    lax.fori_loop(first, end, look, i32(0))


def _any_of_all(flags: Ref) -> jax.Array:
    count = flags.shape[0]
    at = jnp.arange(pl.next_power_of_2(count), dtype=i32)
    return jnp.max(load_where(flags.at[at], at < count)) > 0


def _any(flags: Ref, first: jax.Array, count: int) -> jax.Array:
    """Whether a flag is set of programs first .. first + count."""
    programs, own = flags.shape
    size = min(count, max(1, FLAGS // own))
    row = jnp.broadcast_to(jnp.arange(own, dtype=i32)[None, :], (size, own))

    def look(n: jax.Array, found: jax.Array) -> jax.Array:
        number = (first + n * size + jnp.arange(size, dtype=i32))[:, None]
        number = jnp.broadcast_to(number, row.shape)
        some = load_where(flags.at[number, row], number < programs)
        return jnp.maximum(found, jnp.max(some.astype(i32)))

    return lax.fori_loop(0, count // size, look, i32(0)) > 0


def careful(inputs: Inputs) -> Inputs:
    """The same inputs, to be read with care."""

    def one(x: Tree) -> Tree:
        return replace(x, careful=x.takes) if isinstance(x, Sight) else x

    return jax.tree.map(one, inputs, is_leaf=lambda x: isinstance(x, Sight))


def _sights(inputs: Tree) -> list[Sight]:
    leaves = jax.tree.leaves(inputs, is_leaf=lambda x: isinstance(x, Sight))
    return [x for x in leaves if isinstance(x, Sight)]


def _number_of(place: tuple[jax.Array, ...], sizes: tuple[int, ...]) -> jax.Array:
    """The number of a program, counted along the first axis of the grid first."""
    number = i32(0)
    for at, size in zip(reversed(place), reversed(sizes), strict=True):
        number = number * size + at
    return number


def _place_of(number: jax.Array, sizes: tuple[int, ...]) -> tuple[jax.Array, ...]:
    place = []
    for size in sizes:
        place.append(lax.rem(number, i32(size)))
        number = lax.div(number, i32(size))
    return tuple(place)
