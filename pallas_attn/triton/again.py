"""Launches whose programs are run again, with care, where NaN came out of them.

A key that a bias takes away has weight 0, but 0 * NaN is NaN: what is not finite in it
reaches every sum of a tile. To ask of each pair whether it was taken away costs kernels
up to 2.8 times their time, and there is mostly nothing to find. So they run as if all
was finite, and each program leaves a flag that says whether its results are. A second
kernel looks at the flags, many in a program, ends at once where none is set, and runs
flagged programs again with `Sight.careful`: what they store replaces what was there.
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
from pallas_attn.triton.memory import load_number, load_where, store_number
from pallas_attn.triton.ptx import barrier
from pallas_attn.types import outline, Ref, Tree


i32 = jnp.int32

# A pytree with a `Sight` in it.
Inputs = TypeVar("Inputs")

# Flags that a program looks at, at most, and programs that share them, if there are so
# many: where all are set, a whole device works on them.
CARE, SHARING = 1024, 256


def launch_watched(
    kernel: Callable[..., None],
    grid: tuple[int, ...],
    inputs: tuple[Tree, ...],
    outputs: Made,
    call: Call,
    block: Block,
    **static: Hashable,
) -> Made:
    """As `launch`, and again with care where a bias may take keys away.

    outputs: not a tuple; the kernel says through its program's flag whether they are
    finite, and stores the same places when it is run again.
    """
    return launch_flagged(
        kernel, grid, inputs, outputs, call, block, strange=None, **static
    )[0]


def launch_flagged(
    kernel: Callable[..., None],
    grid: tuple[int, ...],
    inputs: tuple[Tree, ...],
    outputs: Made,
    call: Call,
    block: Block,
    *,
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
    each = min(CARE, pl.next_power_of_2(pl.cdiv(programs, SHARING)))
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
        return rerun(inputs, jax.tree.map(like, made), into=made, of_all=True), strange
    flags, made = launch(
        _noted,
        grid,
        inputs,
        (outline((programs,), i32), outputs),
        call,
        block,
        name=name,
        body=kernel,
        sizes=grid,
        **static,
    )
    told = outline((pl.cdiv(programs, each),), i32)
    outputs = (jax.tree.map(like, made), told)
    return rerun((careful(inputs), flags), outputs, into=made, of_all=False)


def _noted(
    *refs: Tree,
    call: Call,
    program: Program,
    body: Callable[..., None],
    sizes: tuple[int, ...],
    **static: Hashable,
) -> None:
    """A kernel, as a program that sets its flag, 0 at first, where one is not finite."""
    *operands, flags, out = refs
    number = _number_of(program.place, sizes)
    store_number(flags, (number,), 0)
    barrier(call)
    program = replace(program, flag=(flags, number))
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
    of_all: bool,
    **static: Hashable,
) -> None:
    """A kernel, as the flagged of the `each` programs that this one looks at.

    of_all: each flag is of all programs; else of one, and whether some are set is told.
    """
    programs, count = math.prod(sizes), flags.shape[0]
    first = program.place[0] * each
    at = jnp.arange(pl.next_power_of_2(count) if of_all else each, dtype=i32)
    at = at if of_all else first + at
    some = jnp.max(load_where(flags.at[at], at < count)) > 0
    if told is not None:
        store_number(told, program.place, some)

    def run(number: jax.Array) -> None:
        place = _place_of(number, sizes)
        body(*inputs, out, call=call, program=Program(place), **static)

    def look(number: jax.Array, state: jax.Array) -> jax.Array:
        flagged = some if of_all else load_number(flags, (number,)) > 0
        lax.cond(flagged, lambda: run(number), lambda: None)
        return state

    end = jnp.where(some, jnp.minimum(first + each, programs), first)
    lax.fori_loop(first, end, look, i32(0))


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
