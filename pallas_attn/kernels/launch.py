"""How a kernel is started: the grid and its order, warps, stages, names."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_attn.call import Call
from pallas_attn.config import Block


# JAX warns when it lowers, outside any call of ours. Ends with another backend here.
warnings.filterwarnings(
    "ignore",
    message="The Pallas Triton backend is deprecated",
    category=DeprecationWarning,
)


@dataclass(frozen=True)
class Grid:
    """The programs of a pass, one per (batch entry, head, block), and their order.

    long_first: programs differ in length: heads go fastest, long ones start first.
    flock: batch entries that run side by side because they share a bias tile.
    """

    batch: int
    heads: int
    blocks: int
    long_first: bool
    flock: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """The launch grid, fastest axis first."""
        if self.flock > 1:
            return (self.flock, self.blocks, self.heads, self.batch // self.flock)
        if self.long_first:
            return (self.heads, self.batch, self.blocks)
        return (self.blocks, self.heads, self.batch)

    def place(self) -> tuple[Any, Any, Any]:
        """(batch entry, head, block) of this program."""
        if self.flock > 1:
            entry, block, head, group = (pl.program_id(i) for i in range(4))
            return group * self.flock + entry, head, block
        x, y, z = (pl.program_id(i) for i in range(3))
        return (y, x, z) if self.long_first else (z, y, x)


def launch(
    kernel: Callable[..., None],
    grid: tuple[int, ...],
    inputs: Any,
    outputs: Any,
    call: Call,
    block: Block,
    *,
    into: Any = None,
    **static: Any,
) -> Any:
    """Run kernel(*input_refs, *output_refs, call=..., **static) on every grid point.

    into: arrays like the outputs, which the kernel's stores change and the rest stays.
    """
    inputs = jax.tree.map(within_reach, inputs)
    assert all(within_reach(x) is x for x in jax.tree.leaves((outputs, into)))
    bound = functools.partial(kernel, call=call, **static)
    bound.__name__ = kernel.__name__  # pyright: ignore[reportAttributeAccessIssue]
    run = pl.pallas_call(
        bound,
        grid=grid,
        out_shape=outputs,
        interpret=call.interpret,
        name=kernel.__name__,
        input_output_aliases=_aliases(inputs, into),
        compiler_params=plgpu.CompilerParams(
            num_warps=block.num_warps, num_stages=block.num_stages
        ),
    )
    once: Any = jax.custom_jvp(run)
    once.defjvp(_refuse)
    return once(*inputs) if into is None else once(*inputs, into)


def _aliases(inputs: Any, into: Any) -> dict[int, int]:
    first = len(jax.tree.leaves(inputs))
    return {first + i: i for i in range(len(jax.tree.leaves(into)))}


def _refuse(primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        "`implementation`: the kernels are differentiable once, in reverse mode; use "
        'implementation="xla" for jvp and second derivatives.'
    )


def within_reach(x: Any) -> Any:
    """An array as it is, or wider where an offset would overflow.

    Pallas takes offsets of 64 bits for an array of more than 2^32 bytes, else signed
    ones of 32, counted in entries: those of 1 byte reach only the first 2^31.
    """
    if x.dtype.itemsize > 1 or not 2**31 < x.size <= 2**32:
        return x
    floats = jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype(jnp.bfloat16 if floats else jnp.int16)


def like(x: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of an array."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
