"""Launches whose programs are run again, with care, where NaN came out of them.

A key that a bias takes away has weight 0, but 0 * NaN is NaN: what is not finite in it
reaches every sum of a tile. To ask of each pair whether it was taken away costs kernels
up to 2.8 times their time, and there is mostly nothing to find. So they run as if all
was finite, and each program leaves a flag that says whether its results are. A second
kernel looks at the flags, many in a program, ends at once where none is set, and runs
flagged programs again with `Sight.careful`: what they store replaces what was there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Int

from pallas_attn.call import Call
from pallas_attn.config import Block
from pallas_attn.tiled.summaries import Sight
from pallas_attn.triton.launch import launch, like, Program
from pallas_attn.triton.tile import load_number, load_where


i32 = jnp.int32

# Flags that a program looks at, at most, and programs that share them, if there are so
# many: where all are set, a whole device works on them.
CARE, SHARING = 1024, 256


def launch_watched(
    kernel: Callable[..., None],
    grid: tuple[int, ...],
    inputs: tuple[Any, ...],
    outputs: Any,
    call: Call,
    block: Block,
    **static: Any,
) -> Any:
    """As `launch`, and again with care where a bias may take keys away.

    outputs: not a tuple; the kernel says through its program's flag whether they are
    finite, and stores the same places when it is run again.
    """
    return launch_flagged(kernel, grid, inputs, outputs, call, block, **static)[0]


def launch_flagged(
    kernel: Callable[..., None],
    grid: tuple[int, ...],
    inputs: tuple[Any, ...],
    outputs: Any,
    call: Call,
    block: Block,
    *,
    strange: Int[Array, 1] | None = None,
    **static: Any,
) -> tuple[Any, Int[Array, 1] | None]:
    """As `launch_watched`, and whether a program was run again.

    strange: what another launch said, which is not finite wherever this one may not be:
        then no program looks, and all are run again or none. None: there was none.
    """
    if not any(x.takes for x in _sights(inputs)):
        return launch(kernel, grid, inputs, outputs, call, block, **static), None
    programs, name = math.prod(grid), kernel.__name__
    static |= {"body": kernel, "sizes": grid}
    if strange is None:
        flags, made = launch(
            _noted,
            grid,
            inputs,
            (jax.ShapeDtypeStruct((programs,), i32), outputs),
            call,
            block,
            into=(jnp.zeros((programs,), i32), None),
            name=name,
            **static,
        )
        strange = jnp.max(flags, keepdims=True)
    else:
        made = launch(_unnoted, grid, inputs, outputs, call, block, name=name, **static)
        flags = strange
    each = min(CARE, pl.next_power_of_2(pl.cdiv(programs, SHARING)))
    made = launch(
        _flagged,
        (pl.cdiv(programs, each),),
        (careful(inputs), flags),
        jax.tree.map(like, made),
        call,
        replace(block, num_stages=1),  # rare: quick to compile, not to run
        into=made,
        name=f"{name}_again",
        each=each,
        **static,
    )
    return made, strange


def _noted(
    *refs: Any,
    call: Call,
    program: Program,
    body: Callable[..., None],
    sizes: tuple[int, ...],
    **static: Any,
) -> None:
    """A kernel, as a program whose flag is set where a result is not finite."""
    *operands, _, flags, out = refs
    program = replace(program, flag=(flags, _number_of(program.place, sizes)))
    body(*operands, out, call=call, program=program, **static)


def _unnoted(
    *refs: Any,
    call: Call,
    program: Program,
    body: Callable[..., None],
    sizes: tuple[int, ...],
    **static: Any,
) -> None:
    """A kernel, as a program without a flag."""
    del sizes
    body(*refs, call=call, program=program, **static)


def _flagged(
    inputs: tuple[Any, ...],
    flags: Any,
    _: Any,
    out: Any,
    *,
    call: Call,
    program: Program,
    body: Callable[..., None],
    sizes: tuple[int, ...],
    each: int,
    **static: Any,
) -> None:
    """A kernel, as the flagged of the `each` programs that this one looks at."""
    programs, own = math.prod(sizes), i32(flags.shape[0] > 1)  # or one flag for all
    first = program.place[0] * each
    number = first + jnp.arange(each, dtype=i32)
    some = jnp.max(load_where(flags.at[number * own], number < programs)) > 0

    def run(number: Any) -> None:
        place = _place_of(number, sizes)
        body(*inputs, out, call=call, program=Program(place), **static)

    def look(number: Any, state: Any) -> Any:
        flagged = load_number(flags, (number * own,)) > 0
        lax.cond(flagged, lambda: run(number), lambda: None)
        return state

    end = jnp.where(some, jnp.minimum(first + each, programs), first)
    lax.fori_loop(first, end, look, i32(0))


def careful(inputs: Any) -> Any:
    """The same inputs, to be read with care."""

    def one(x: Any) -> Any:
        return replace(x, careful=x.takes) if isinstance(x, Sight) else x

    return jax.tree.map(one, inputs, is_leaf=lambda x: isinstance(x, Sight))


def _sights(inputs: Any) -> list[Sight]:
    leaves = jax.tree.leaves(inputs, is_leaf=lambda x: isinstance(x, Sight))
    return [x for x in leaves if isinstance(x, Sight)]


def _number_of(place: tuple[Any, ...], sizes: tuple[int, ...]) -> Any:
    """The number of a program, counted along the first axis of the grid first."""
    number = i32(0)
    for at, size in zip(reversed(place), reversed(sizes), strict=True):
        number = number * size + at
    return number


def _place_of(number: Any, sizes: tuple[int, ...]) -> tuple[Any, ...]:
    place = []
    for size in sizes:
        place.append(lax.rem(number, i32(size)))
        number = lax.div(number, i32(size))
    return tuple(place)
