"""Softmax attention by Triton's passes: `tiled.autodiff` with `triton.passes`."""

from __future__ import annotations

from jaxtyping import Array, Float

from pallas_attn.problem import Problem
from pallas_attn.tiled import autodiff
from pallas_attn.triton import passes


def attend(
    problem: Problem, plain: autodiff.Plain
) -> tuple[Float[Array, "B T N h"], Float[Array, "B T N"]]:
    """Output and log-sum-exp; plain: the same without kernels, as `autodiff` has it."""
    return autodiff.attend(problem, passes, plain)


def visited_blocks(
    problem: Problem,
) -> tuple[Float[Array, "B N"], Float[Array, "B N"], Float[Array, "B N"]]:
    """The share of visible blocks that forward, rows and cols visit."""
    return autodiff.visited_blocks(problem, passes)
