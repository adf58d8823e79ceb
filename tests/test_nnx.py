"""The layer of nnx: numbers and gradients of the linen one, its cache, transforms."""

import copy
import functools
import inspect
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx

import pallas_attn
from pallas_attn import linen, nnx as native
from pallas_attn.testing.layers import B, BIASES, F, K, LENGTH, N, points
from pallas_attn.testing.numerics import assert_formula, assert_same_bits


OURS: dict[str, Any] = {
    "precision": jax.lax.Precision.HIGHEST,
    "implementation": "xla",
}


@pytest.fixture(autouse=True)
def full_precision():
    """Of the modules' own products too: the default of a GPU is TF32."""
    with jax.default_matmul_precision("highest"):
        yield


def layer_of(bias=None, rngs=None, **fields) -> Any:
    rngs = rngs or nnx.Rngs(0)
    given = OURS | {"rngs": rngs, "bias": bias(rngs) if callable(bias) else bias}
    return native.MultiHeadAttention(N, F, **given | fields)


def params_of(layer):
    return nnx.to_pure_dict(nnx.state(layer, nnx.Param))


def with_params(layer, params):
    """The layer with the parameters of a linen one."""
    state = nnx.state(layer, nnx.Param)
    nnx.replace_by_pure_dict(state, params)
    nnx.update(layer, state)
    return layer


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def both_ways(theirs, ours, params, *inputs, **extra):
    """Outputs and gradients of the parameters, of linen and of nnx."""

    @jax.jit
    def of_linen(params):
        def loss(params):
            output = theirs.apply({"params": params}, *inputs, **extra)
            return jnp.sum(jnp.sin(output)), output

        return jax.grad(loss, has_aux=True)(params)

    @nnx.jit
    def of_nnx(ours):
        def loss(ours):
            output = ours(*inputs, **extra)
            return jnp.sum(jnp.sin(output)), output

        return nnx.grad(loss, has_aux=True)(ours)

    want, (gradient, output) = of_linen(params), of_nnx(with_params(ours, params))
    return (nnx.to_pure_dict(gradient), output), want


@functools.cache
def twins(bias):
    """A linen and an nnx layer, parameters of the first, inputs, what goes with them."""
    row = BIASES[bias]
    first, second, third = jax.random.split(jax.random.key(11), 3)
    x = jax.random.normal(first, (B, LENGTH, F))
    extra = row.inputs(second)
    fields: Any = {"num_kv_heads": K, "is_causal": True}
    theirs: Any = linen.MultiHeadAttention(N, bias=row.linen, **fields, **OURS)
    params = jax.jit(theirs.init)(third, x, **extra)["params"]
    return theirs, layer_of(row.nnx, **fields), params, x, extra


@pytest.mark.parametrize("bias", BIASES)
def test_parameters_outputs_and_gradients_are_those_of_linen(bias):
    """From one checkpoint; what a bias learns has a gradient."""
    theirs, ours, params, x, extra = twins(bias)
    assert shapes(params_of(ours)) == shapes(params)
    got, want = both_ways(theirs, ours, params, x, **extra)
    assert_formula(got, want)
    learned = jax.tree.leaves(got[0].get("bias", {}))
    assert all(np.abs(leaf).max() > 0 for leaf in learned)


@nnx.jit
def step(layer, *inputs, **extra):
    return layer(*inputs, **extra)


def decoding(bias):
    """A layer with an empty cache, inputs, what goes with them, the full forward."""
    _, ours, params, x, extra = twins(bias)
    full = step(with_params(ours, params), x, **extra)
    layer: Any = nnx.view(nnx.clone(ours), decode=True)
    layer.init_cache(x.shape, **extra)
    return layer, x, extra, full


def decoded(layer, x, extra, cuts):
    """The outputs of steps that end at the cuts."""
    outputs, first = [], 0
    for last in cuts:
        rows = {name: field[:, first:last] for name, field in extra.items()}
        outputs.append(step(layer, x[:, first:last], **rows))
        first = last
    return jnp.concatenate(outputs, axis=1)


@pytest.mark.parametrize("bias", BIASES)
def test_token_by_token_is_the_full_forward(bias):
    layer, x, extra, full = decoding(bias)
    assert_formula(decoded(layer, x, extra, [5, *range(6, LENGTH + 1)]), full)
    assert layer.cache_index.get_value().tolist() == [LENGTH] * B
    theirs = linen.MultiHeadAttention(
        N, num_kv_heads=K, bias=BIASES[bias].linen, decode=True, **OURS
    )
    cache = jax.eval_shape(theirs.init, jax.random.key(0), x, **extra)["cache"]
    found = nnx.to_pure_dict(nnx.state(layer, nnx.Cache))
    assert shapes(found) == shapes(cache)
