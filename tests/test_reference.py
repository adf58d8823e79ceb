"""The dense reference agrees with `jax.nn` and with its own written backward."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_attn
from pallas_attn.bias.base import Added
from pallas_attn.testing.cases import Case, KINDS, normal
from pallas_attn.testing.evaluate import called, reference_of, with_gradients
from pallas_attn.testing.numerics import assert_formula, assert_zero
from pallas_attn.visibility import allowed, seen, seen_added


# What both functions know, on [B, T, N, S] = [2, 37, 4, 53] and K = 2 unless said; no
# row is empty, of which they think differently.
SHARED = {
    "grouped heads": {},
    "multi-query": {"K": 1},
    "as many key heads": {"K": 4},
    "mask": {"mask": jax.random.bernoulli(jax.random.key(0), 0.7, (2, 4, 37, 53))},
    "mask over keys": {"mask": jnp.arange(53)[None, None, None] % 5 != 2},
    "causal": {"is_causal": True},
    "window": {"local_window_size": (9, 4)},
    "causal window": {"is_causal": True, "local_window_size": 7},
    "lengths": {
        "query_seq_lengths": jnp.array([20, 37], jnp.int32),
        "key_value_seq_lengths": jnp.array([53, 11], jnp.int32),
    },
    "scale": {"scale": 0.4},
    "bias": {"bias": normal(jax.random.key(1), 2, 4, 37, 53)},
    "bias over keys": {"bias": normal(jax.random.key(2), 1, 1, 1, 53)},
}
BACKWARDS = {
    "autodiff": lambda x: reference_of(x).attend(x),
    "written": lambda x: reference_of(x).attend_with_written_backward(x),
}


@pytest.mark.at_most(5)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64], ids=lambda x: x.__name__)
@pytest.mark.parametrize("features", SHARED)
def test_jax_nn_computes_the_same(features, dtype):
    options = dict(SHARED[features])
    keys = jax.random.split(jax.random.key(3), 4)
    heads = options.pop("K", 2)
    forms = ((37, 4, 16), (53, heads, 16), (53, heads, 16), (37, 4, 16))
    arrays = [normal(k, 2, *form) for k, form in zip(keys, forms, strict=True)]
    if "bias" in options:
        arrays.insert(3, options.pop("bias"))
    with jax.enable_x64(dtype == jnp.float64):
        *operands, cotangent = (x.astype(dtype) for x in arrays)

        def pull(attend, **more):
            f = lambda *x: attend(*x, **options, **more)
            output, pullback = jax.vjp(jax.jit(f), *operands)
            return output, pullback(cotangent)

        got = pull(pallas_attn.dot_product_attention, implementation="reference")
        with (
            jax.default_matmul_precision("highest"),
            jax.numpy_dtype_promotion("standard"),
            jax.numpy_rank_promotion("allow"),
        ):
            want = pull(jax.nn.dot_product_attention, implementation="xla")
        chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
        assert_formula(got, want)


@pytest.mark.at_most(5)
@pytest.mark.parametrize("situation", ["full", "empty rows", "all at once"])
@pytest.mark.parametrize("bias", KINDS)
def test_the_written_backward_is_the_derivative(bias, situation):
    """In float64, with cotangents of the output and of the log-sum-exp."""
    sample = Case(bias, situation).sample()
    with jax.enable_x64(True):
        problem = in_float64(problem_of(sample))
        problem = replace(problem, call=replace(problem.call, dtype="float64"))
        cotangents = in_float64(sample.cotangents)
        written, automatic = (
            pull(BACKWARDS[name], problem, cotangents)
            for name in ("written", "autodiff")
        )
        assert all(x.dtype == jnp.float64 for x in jax.tree.leaves(written))
        assert_formula(written, automatic)


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("situation", ["empty rows", "lengths"])
@pytest.mark.parametrize(
    "kind", ["none", "dense", "factored", "saturating", "co_alibi"]
)
def test_nan_where_nobody_looks(kind, situation, backward):
    """NaN in every number, and in every cotangent, that no visible place reads."""
    sample = Case(kind, situation).at(B=1, N=1, K=1).sample()
    problem = problem_of(sample)
    *arrays, bias = parts(problem)
    call = problem.call
    places = allowed(call, problem.visibility)
    places = jnp.broadcast_to(places, (1, 1, call.T, call.S))
    homes = ("query", "key", "key")
    ones = lambda tree: jax.tree.map(jnp.ones_like, tree)
    read = [
        seen(places, ones(x), home, x.dtype)
        for x, home in zip(arrays, homes, strict=True)
    ]
    ones_of_bias = ones(bias)
    if isinstance(bias, Added):  # Co-ALiBi has numbers per head alone: all are read
        ones_of_bias = seen_added(places, ones_of_bias, call.accumulator)
    read = (*read, ones_of_bias)
    rows = places.any(3)[:, 0, :, None]
    do, dlse = sample.cotangents

    clean = (*arrays, bias)
    poisoned = jax.tree.map(lambda x, r: jnp.where(r == 0, jnp.nan, x), clean, read)
    cotangents = (
        jnp.where(rows[..., None], do, jnp.nan),
        jnp.where(rows, dlse, jnp.inf),
    )
    attend = BACKWARDS[backward]
    got = pull(attend, with_parts(problem, *poisoned), cotangents)
    want = pull(attend, problem, sample.cotangents)
    chex.assert_tree_all_finite((got[0][0], got[1]))
    assert_formula(got, want)


@pytest.mark.parametrize("backward", BACKWARDS)
def test_a_row_that_a_bias_empties(backward):
    """A bias of -inf or -1e30 hides like a mask, where the query is infinite too."""
    problem = problem_of(Case("none").at(B=1, N=1, K=1).sample())
    query, key, value, _ = parts(problem)
    query, call = query.at[0, 5].set(jnp.inf), problem.call
    level = jnp.full((1, 1, call.T, call.S), -1e30).at[..., ::2].set(-jnp.inf)
    row = jnp.arange(call.T)[None, None, :, None] == 5
    bias = pallas_attn.DenseBias(jnp.where(row, level, 0.0))
    added = Added((bias,))
    cotangents = jnp.ones((1, call.T, 1, call.h)), jnp.ones((1, call.T, 1))
    problem = with_parts(problem, query, key, value, added)
    (output, lse), grads = pull(BACKWARDS[backward], problem, cotangents)
    chex.assert_tree_all_finite((output, grads))
    assert_zero((output[:, 5], grads[0][:, 5]))
    assert np.isneginf(lse[:, 5]).all()


def test_gradients_of_16_bits_are_rounded_once():
    """They are the float32 gradients of the same numbers, rounded."""
    sample = Case("dense", "causal").at(dtype=jnp.bfloat16).sample()
    evaluate = with_gradients(sample.settings, implementation="reference")
    narrow = (sample.operands, sample.conditions, sample.cotangents)
    _, got = evaluate(*narrow)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), narrow)
    (_, want) = evaluate(*wide)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, sample.operands)
    rounded = jax.tree.map(lambda x, y: x.astype(y.dtype), want, got)
    chex.assert_trees_all_equal(got, rounded)


def problem_of(sample):
    """A sampled call as implementations get it."""
    arguments = {**sample.operands, **sample.conditions, **sample.settings}
    return called(**arguments).problem


def parts(problem):
    """What has a gradient."""
    return problem.query, problem.key, problem.value, problem.bias


def with_parts(problem, query, key, value, bias):
    """A problem with other query, key, value and bias."""
    return replace(problem, query=query, key=key, value=value, bias=bias)


def in_float64(tree):
    """A tree with its floats as float64."""
    floating = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    return jax.tree.map(lambda x: x.astype(np.float64) if floating(x) else x, tree)


def pull(attend, problem, cotangents):
    """(output, lse) and the gradients of query, key, value and bias."""
    f = lambda *x: attend(with_parts(problem, *x))
    primals, pullback = jax.vjp(jax.jit(f), *parts(problem))
    return primals, pullback(cotangents)
