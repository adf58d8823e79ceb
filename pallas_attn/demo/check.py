"""Every bias against the float64 reference, and beside jax.nn."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_attn.api import dot_product_attention
from pallas_attn.benchmark.timing import interleaved, Timing
from pallas_attn.bias.alibi import ALiBi, alibi_slopes
from pallas_attn.bias.base import Bias
from pallas_attn.bias.co_alibi import co_alibi_slopes, CoALiBi
from pallas_attn.bias.dense import DenseBias
from pallas_attn.bias.factored import FactoredBias
from pallas_attn.bias.forget_gate import ForgetGate
from pallas_attn.testing.numerics import errors, FORMULA


@dataclass(frozen=True)
class Sizes:
    """Of the checked call; the letters are those of the README's legend."""

    B: int = 2
    T: int = 1024
    N: int = 2
    H: int = 64
    R: int = 8


@dataclass(frozen=True)
class Checked:
    """A bias: relative errors against float64, and milliseconds of ours and jax.nn's.

    Args:
        name: Of the bias.
        output_error: Of the output.
        gradient_error: The largest of its gradients', query's, key's and value's.
        milliseconds: Of "ours forward", "ours both" (with every gradient), "jax.nn
            forward" and "jax.nn both"; of ours alone where jax.nn has no such bias.
    """

    name: str
    output_error: float
    gradient_error: float
    milliseconds: dict[str, float]

    @property
    def passed(self) -> bool:
        """Whether every error is a rounding error."""
        return self.output_error <= FORMULA and self.gradient_error <= FORMULA


def biases(sizes: Sizes, seed: int) -> dict[str, Bias | None]:
    """One of every kind, by name."""
    B, T, N, R = sizes.B, sizes.T, sizes.N, sizes.R
    keys = iter(jax.random.split(jax.random.key(seed), 8))

    def random(*shape: int) -> Array:
        return jax.random.normal(next(keys), shape)

    alibi = ALiBi(alibi_slopes(N))
    factored = FactoredBias(random(B, T, N, R), random(B, T, N, R))
    return {
        "none": None,
        "dense [B,N,T,S]": DenseBias(random(B, N, T, T)),
        "dense [1,N,T,S]": DenseBias(random(1, N, T, T)),
        "dense [B,1,1,S]": DenseBias(random(B, 1, 1, T)),
        f"factored, rank {R}": factored,
        "factored, shared": FactoredBias(random(1, T, 1, R), random(1, T, 1, R)),
        "ALiBi": alibi,
        "ALiBi + factored": alibi + factored,
        "Co-ALiBi": CoALiBi(co_alibi_slopes(N)),
        "forget gate": ForgetGate(jax.nn.log_sigmoid(3 + random(B, T, N))),
    }


def check(sizes: Sizes, seed: int) -> Iterator[Checked]:
    """Checks and times causal attention with each of `biases`, output and gradients."""
    shape = (4, sizes.B, sizes.T, sizes.N, sizes.H)
    random = jax.random.normal(jax.random.key(seed + 1), shape)
    query, key, value, cotangent = random
    for name, bias in biases(sizes, seed).items():
        yield _checked(name, (query, key, value, bias), cotangent)


def _checked(name: str, operands: tuple[Any, ...], cotangent: Array) -> Checked:
    attends = {"ours": _ours, "jax.nn": _theirs}
    if isinstance(operands[3], CoALiBi):  # it is no array before the scores are known
        del attends["jax.nn"]
    runs = {}
    for who, attend in attends.items():
        both = jax.jit(functools.partial(_with_gradients, attend))
        runs[f"{who} forward"] = functools.partial(jax.jit(attend), *operands)
        runs[f"{who} both"] = functools.partial(both, operands, cotangent)
    found = errors(runs["ours both"](), _truth(operands, cotangent))
    queued = jax.local_devices()[0].platform != "cpu"
    milliseconds = {}
    for run, timing in interleaved(runs, queued=queued, repeats=5).items():
        assert isinstance(timing, Timing), timing
        milliseconds[run] = timing.median
    output_error = found.pop("['output']")
    return Checked(name, output_error, max(found.values()), milliseconds)


def _ours(query: Array, key: Array, value: Array, bias: Bias | None) -> Array:
    return dot_product_attention(query, key, value, bias, is_causal=True)


def _theirs(query: Array, key: Array, value: Array, bias: Bias | None) -> Array:
    dense = None
    if bias is not None:
        positions = jnp.arange(query.shape[1], dtype=jnp.int32)
        dense = bias.materialise(positions, positions)
    return jax.nn.dot_product_attention(query, key, value, dense, is_causal=True)


def _with_gradients(
    attend: Callable[..., Array], operands: tuple[Any, ...], cotangent: Array
) -> dict[str, Any]:
    output, pullback = jax.vjp(attend, *operands)
    return {"output": output, "gradients": pullback(cotangent)}


def _truth(operands: tuple[Any, ...], cotangent: Array) -> dict[str, Any]:
    """In float64, by the dense reference."""
    reference = functools.partial(
        dot_product_attention, is_causal=True, implementation="reference"
    )
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), (operands, cotangent))
        found = jax.jit(functools.partial(_with_gradients, reference))(*wide)
        return jax.tree.map(np.asarray, found)
