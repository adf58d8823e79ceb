"""How a kernel is started: its operands, warps, stages, its name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.extend.core import jaxpr_as_fun
from jaxtyping import Array

from pallas_attn.call import Call
from pallas_attn.config import Block
from pallas_attn.tracing.once import once
from pallas_attn.tracing.varying import in_shard_map, lifted, over, varying
from pallas_attn.types import Index, outline, Ref, Tree


# What a kernel makes: a pytree, of outlines before.
Made = TypeVar("Made")

# JAX warns when it lowers, outside any call of ours. Ends with another backend here.
warnings.filterwarnings(
    "ignore",
    message="The Pallas Triton backend is deprecated",
    category=DeprecationWarning,
)


@dataclass(frozen=True)
class Program:
    """Which program of a launch a kernel is run as.

    place: its number along each axis of the grid.
    flag: (ref, row): where it says of what it owns whether results are finite; None:
        nobody asks.
    """

    place: tuple[jax.Array, ...]
    flag: tuple[Ref, Index] | None = None


def launch(
    kernel: Callable[..., None],
    grid: tuple[int, ...],
    inputs: Tree,
    outputs: Made,
    call: Call,
    block: Block,
    *,
    into: Tree = None,
    name: str = "",
    **static: Hashable,
) -> Made:
    """Run kernel(*input_refs, *output_refs, call=, program=, **static) on a grid.

    into: arrays like the outputs, or like the first of them, which the kernel's stores
        change and the rest stays.
    name: of the kernel, where it is not its function's.
    """
    inputs = jax.tree.map(within_reach, inputs)
    assert all(within_reach(x) is x for x in jax.tree.leaves((outputs, into)))
    axes = varying(inputs)
    inputs, into = lifted(inputs, axes), lifted(into, axes)
    name = name or kernel.__name__

    def bound(*refs: Tree) -> None:
        program = Program(tuple(pl.program_id(axis) for axis in range(len(grid))))
        kernel(*refs, call=call, program=program, **static)

    bound.__name__ = name
    run = pl.pallas_call(
        bound,
        grid=grid,
        out_shape=over(outputs, frozenset() if call.interpret else axes),
        interpret=call.interpret,
        name=name,
        input_output_aliases=_aliases(inputs, into),
        compiler_params=plgpu.CompilerParams(
            num_warps=block.num_warps, num_stages=block.num_stages
        ),
    )
    run = once(run)
    operands = inputs if into is None else (*inputs, into)
    return interpreted(run, operands, axes) if call.interpret else run(*operands)


def interpreted(run: Tree, operands: Tree, axes: frozenset[str]) -> Tree:
    """The results of an interpreted kernel, which vary over mesh axes as asked.

    The interpreter's loops mix what varies with constants that do not, and JAX refuses
    their types. So it is traced on types that vary over nothing.
    """
    if not in_shard_map():
        return run(*operands)
    bare = jax.tree.map(like, operands)
    traced, shapes = jax.make_jaxpr(jax.jit(run), return_shape=True)(*bare)
    flat = jaxpr_as_fun(traced)(*jax.tree.leaves(operands))
    return lifted(jax.tree.unflatten(jax.tree.structure(shapes), flat), axes)


def _aliases(inputs: Tree, into: Tree) -> dict[int, int]:
    first = len(jax.tree.leaves(inputs))
    return {first + i: i for i in range(len(jax.tree.leaves(into)))}


def within_reach(x: Array) -> Array:
    """An array as it is, or wider where an offset would overflow.

    Pallas takes offsets of 64 bits for an array of more than 2^32 bytes, else signed
    ones of 32, counted in entries: those of 1 byte reach only the first 2^31.
    """
    if x.dtype.itemsize > 1 or not 2**31 < x.size <= 2**32:
        return x
    floats = jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype(jnp.bfloat16 if floats else jnp.int16)


def like(x: Array) -> Array:
    """The shape and dtype of an array."""
    return outline(x.shape, x.dtype)
