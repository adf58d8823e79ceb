"""A sampled call evaluated: by any implementation, with gradients, and in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_attn.api import dot_product_attention, without_padding
from pallas_attn.bias.base import as_bias
from pallas_attn.bias.co_alibi import CoALiBi
from pallas_attn.bias.region import spread
from pallas_attn.canonical import canonical, Request
from pallas_attn.config import Block, Config
from pallas_attn.implementations import current_device, Implementation, resolve
from pallas_attn.lowering.lower import Kernel, lower
from pallas_attn.normalizers.entmax import Entmax
from pallas_attn.normalizers.softmax import Softmax
from pallas_attn.problem import Problem
from pallas_attn.reference import (
    attention as added_reference,
    co_alibi as contextual_reference,
    entmax as sparse_reference,
)
from pallas_attn.testing.cases import Case, Sample


REFERENCES = {
    "softmax": added_reference,
    "entmax": sparse_reference,
    "co_alibi": contextual_reference,
}

# Small blocks, unlike each other: several of each in a ragged case, and a confusion of
# the two axes or of two passes shows.
SMALL = Config(
    forward=Block(32, 16),
    rows=Block(16, 32),
    cols=Block(32, 32),
    tiles=Block(16, 16),
    tangent=Block(16, 32),
)
# The passes of Co-ALiBi have key blocks of one size; a query block of its forward pass
# is a whole number of those of the others.
SMALL_CONTEXTUAL = Config(
    forward=Block(32, 16),
    rows=Block(16, 16),
    cols=Block(32, 16),
)
# The passes of entmax share what is known of each block.
SMALL_ENTMAX = Config(
    forward=Block(32, 32),
    rows=Block(32, 32),
    cols=Block(32, 32),
)

# float32 laws hold at IEEE products: the default of a GPU is TF32.
EXACT: dict[str, Any] = {"precision": jax.lax.Precision.HIGHEST}


def small(bias: str, normalizer: str = "softmax") -> Config:
    """The small blocks of a case, by its names in `BIASES` and `NORMALIZERS`."""
    if normalizer.startswith("entmax"):
        return SMALL_ENTMAX
    return SMALL_CONTEXTUAL if bias.startswith("co_alibi") else SMALL


def kernel_implementation() -> Implementation:
    """The kernels as this machine can run them: compiled on a GPU, else interpreted."""
    choice = resolve(None, current_device(), dtype="float32", H=16, h=16)
    return "triton" if choice.name == "triton" else "triton_interpret"


def implementations() -> tuple[Implementation, ...]:
    """What the laws hold for, beside the reference that they compare with."""
    return ("xla", kernel_implementation())


def attention(settings: dict[str, Any], **options: Any) -> Callable[..., Any]:
    """(operands, conditions) -> (output, residual) of `dot_product_attention`.

    Args:
        settings: Python arguments of the call, from a `Sample`.
        **options: More of them: implementation, config, precision.
    """

    def attend(operands: dict[str, Any], conditions: dict[str, Any]) -> Any:
        return dot_product_attention(
            **operands, **conditions, **settings, **options, return_residual=True
        )

    return attend


def with_gradients(
    settings: dict[str, Any], *, residual: bool = True, **options: Any
) -> Callable[..., Any]:
    """(operands, conditions, cotangents) -> ((output, lse), gradients of operands).

    Args:
        settings: Python arguments of the call, from a `Sample`.
        residual: Whether the log-sum-exp has a cotangent.
        **options: More arguments of the call.
    """
    attend = attention(settings, **options)

    def evaluate(operands: Any, conditions: Any, cotangents: Any) -> Any:
        primals, pullback = jax.vjp(lambda x: attend(x, conditions), operands)
        do, dlse = cotangents
        if not residual:
            dlse = jnp.zeros_like(dlse)
        return primals, pullback((do, dlse.astype(primals[1].dtype)))[0]

    return evaluate


def values(sample: Sample, **options: Any) -> Any:
    """(output, lse), jitted."""
    attend = jax.jit(attention(sample.settings, **options))
    return attend(sample.operands, sample.conditions)


def gradients(sample: Sample, *, residual: bool = True, **options: Any) -> Any:
    """((output, lse), gradients), jitted."""
    evaluate = with_gradients(sample.settings, residual=residual, **options)
    return jax.jit(evaluate)(sample.operands, sample.conditions, sample.cotangents)


def tangents(settings: dict[str, Any], **options: Any) -> Callable[..., Any]:
    """(operands, conditions) -> tangents of (output, lse) along the operands."""
    attend = attention(settings, **options)

    def evaluate(operands: Any, conditions: Any) -> Any:
        along = lambda x: attend(x, conditions)
        return jax.jvp(along, (operands,), (operands,))[1]

    return evaluate


def truth(sample: Sample, *, residual: bool = True) -> Any:
    """((output, lse), gradients) by the dense reference in float64, as NumPy arrays.

    The operands are those of the sample: what a 16-bit sample is judged by is the
    meaning of its rounded numbers.
    """
    evaluate = with_gradients(
        sample.settings, residual=residual, implementation="reference"
    )
    return in_float64(evaluate, sample.operands, sample.conditions, sample.cotangents)


def written(sample: Sample) -> Any:
    """`truth` by the backward that the reference writes out: autodiff has no part."""

    def evaluate(operands: Any, conditions: Any, cotangents: Any) -> Any:
        def attend(operands: Any) -> Any:
            problem = called(**sample.settings, **conditions, **operands).problem
            o, lse = reference_of(problem).attend_with_written_backward(problem)
            return o, without_padding(lse, problem)

        primals, pullback = jax.vjp(attend, operands)
        return primals, pullback(cotangents)[0]

    return in_float64(evaluate, sample.operands, sample.conditions, sample.cotangents)


def called(**arguments: Any) -> Request:
    """A call of `dot_product_attention` as the implementations take it.

    Args:
        **arguments: Its arguments, with its defaults, and `canonical`'s own.
    """
    return canonical(**arguments)


def reference_of(problem: Problem) -> Any:
    """The module of the reference that takes a problem."""
    return REFERENCES[problem.family]


@functools.cache
def true_values(case: Case) -> Any:
    """(output, lse) of a case's sample in float64."""
    sample = case.sample()
    attend = attention(sample.settings, implementation="reference")
    return in_float64(attend, sample.operands, sample.conditions)


@functools.cache
def true_gradients(case: Case, residual: bool = True) -> Any:
    """`truth` of a case's sample, remembered for the next implementation."""
    return truth(case.sample(), residual=residual)


def textbook(
    operands: dict[str, Any],
    cap: Callable[[Array], Array] = lambda scores: scores,
    drop: Callable[[Array], Array] = lambda weights: weights,
) -> Any:
    """Causal attention as XLA computes it in the operands' own precision.

    As `jax.nn` writes it: products of 16-bit operands accumulated in float32, softmax
    (or what `normalizer` says) in float32, weights rounded before they meet the values.
    (`jax.nn` itself does not run in float16 on a CPU.)

    Args:
        operands: Of a `Sample`.
        cap: What a soft cap makes of the scaled products.
        drop: What dropout makes of the weights.
    """
    query, value = operands["query"], operands["value"]
    value = jnp.repeat(value, query.shape[2] // value.shape[2], 2)
    scores, seen = _causal_scores(operands)
    t = jnp.where(seen, cap(scores) + causal_bias(operands), -jnp.inf)
    weights = drop(_weights(t, operands.get("normalizer", Softmax())))
    weights = weights.astype(value.dtype)
    out = jnp.einsum(
        "BNTS,BSNh->BTNh", weights, value, preferred_element_type=jnp.float32
    )
    return out.astype(query.dtype)


def _weights(t: Array, normalizer: Softmax | Entmax) -> Array:
    if isinstance(normalizer, Softmax):
        if normalizer.sink is None:
            return jax.nn.softmax(t, -1)
        one = (*t.shape[:-1], 1)
        sink = jnp.broadcast_to(spread("head", normalizer.sink).astype(t.dtype), one)
        return jax.nn.softmax(jnp.concatenate([t, sink], -1), -1)[..., :-1]
    alpha = jnp.atleast_1d(jnp.asarray(normalizer.alpha, t.dtype))
    kept = sparse_reference.largest(jax.lax.stop_gradient(t), normalizer.top_k)
    t = jnp.where(kept, t, -jnp.inf)
    return sparse_reference.entmax(t, spread("head", alpha))[0]


def causal_bias(operands: dict[str, Any]) -> Array:
    """What the bias adds to causal scores, as an array [#B, #N, T, S]."""
    bias = as_bias(operands["bias"])
    if isinstance(bias, CoALiBi):
        scores, seen = _causal_scores(operands)
        gates = jnp.where(seen, jax.nn.sigmoid(scores), 0)
        from_here_on = jnp.flip(jnp.cumsum(jnp.flip(gates, -1), -1), -1)
        return -spread("head", bias.slopes) * from_here_on
    rows, cols = (
        jnp.arange(operands[name].shape[1], dtype=jnp.int32)
        for name in ("query", "key")
    )
    return bias.materialise(rows, cols)


def _causal_scores(operands: dict[str, Any]) -> tuple[Array, Array]:
    """Float32 q.k / sqrt(H), and which of them a causal softmax sees."""
    query, key = operands["query"], operands["key"]
    key = jnp.repeat(key, query.shape[2] // key.shape[2], 2)
    scores = jnp.einsum(
        "BTNH,BSNH->BNTS", query, key, preferred_element_type=jnp.float32
    )
    seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))[None, None]
    return scores / np.sqrt(np.float32(query.shape[-1])), seen


def kernels(case: Case, *, arch: int = 90, **options: Any) -> tuple[Kernel, ...]:
    """The kernels of a case's forward and backward, lowered for a GPU of `arch`."""
    sample = case.specs()
    return lower(
        with_gradients(sample.settings, implementation="triton", **options),
        sample.operands,
        sample.conditions,
        sample.cotangents,
        arch=arch,
    )


def in_float64(f: Callable[..., Any], *arguments: Any) -> Any:
    """F of the arguments with floats as float64, jitted, on the CPU."""
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        return jax.tree.map(np.asarray, jax.jit(f)(*widened(arguments)))


def widened(tree: Any) -> Any:
    """A tree of NumPy arrays, floats as float64."""

    def wide(x: Any) -> Any:
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        return np.asarray(x, np.float64 if floating else None)

    return jax.tree.map(wide, tree)
