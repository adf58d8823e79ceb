"""What nobody may see reaches nothing; rows that see nothing are zeros."""

from dataclasses import replace
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_attn
from pallas_attn.testing.cases import Case, KINDS
from pallas_attn.testing.evaluate import (
    attention,
    EXACT,
    gradients,
    implementations,
    SMALL,
    small,
    true_gradients,
    truth,
    values,
)
from pallas_attn.testing.numerics import assert_formula, assert_zero
from pallas_attn.testing.poison import poisoned, poisoned_bias


SITUATIONS = ["empty rows", "lengths", "all at once"]
# A logit or a term at or below -1e30 has weight 0.
WEIGHTLESS = [-jnp.inf, -3e38, -1e30]

everywhere = pytest.mark.parametrize("implementation", implementations())


@pytest.mark.at_most(3)
@everywhere
@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("bias", KINDS)
def test_poison_in_what_nobody_reads(bias, situation, implementation):
    """NaN in every number that no visible place reads changes no result."""
    case = Case(bias, situation)
    sample = case.sample()
    places = visible(sample, case.sizes)
    operands = {name: poisoned(places, name, x) for name, x in sample.operands.items()}
    bias = sample.operands["bias"]
    if isinstance(bias, pallas_attn.ForgetGate):
        operands["bias"] = poisoned_gates(sample, places, bias)
    else:
        operands["bias"] = poisoned_bias(places, bias)
    rows = np.swapaxes(places.any(3), 1, 2)
    do, dlse = sample.cotangents
    cotangents = (
        jnp.where(rows[..., None], do, jnp.nan),
        jnp.where(rows, dlse, jnp.inf),
    )
    bad = replace(sample, operands=operands, cotangents=cotangents)
    assert not all(np.isfinite(x).all() for x in jax.tree.leaves(operands))
    config = small(case.bias)
    got = gradients(bad, implementation=implementation, config=config, **EXACT)
    chex.assert_tree_all_finite(got[1])
    assert_formula(got, true_gradients(case))


@pytest.mark.at_most(3)
@everywhere
@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("bias", ["alibi", "co_alibi"])
def test_rows_that_see_nothing(bias, situation, implementation):
    case = Case(bias, situation)
    sample = case.sample()
    empty = ~np.swapaxes(visible(sample, case.sizes).any(3), 1, 2)
    assert empty.any()
    (output, lse), grads = gradients(
        sample, implementation=implementation, config=small(bias), **EXACT
    )
    assert_zero((output[empty], grads["query"][empty]))
    assert (np.isneginf(lse) == empty).all()


@everywhere
@pytest.mark.parametrize("weightless", WEIGHTLESS, ids=str)
def test_a_weightless_bias_is_a_mask(weightless, implementation):
    case = Case("dense", "mask BNTS")
    sample = case.sample()
    mask = sample.conditions["mask"].at[:, :, 5].set(False).at[..., 7].set(False)
    want = truth(replace(sample, conditions={"mask": mask}))
    bias = jnp.where(mask, sample.operands["bias"].bias, weightless)
    operands = {**sample.operands, "bias": pallas_attn.DenseBias(bias)}
    bad = replace(sample, operands=operands, conditions={})
    got = gradients(bad, implementation=implementation, config=SMALL, **EXACT)
    assert_formula(got, want)


@everywhere
def test_a_weightless_term_of_a_larger_sum(implementation):
    """Weight 0 is a term's own value at or below -1e30, whatever others add to it."""
    sample = Case("dense", "mask BNTS").sample()
    bias, mask = sample.operands["bias"].bias, sample.conditions["mask"]
    two = pallas_attn.DenseBias(jnp.where(mask, bias, -1e30)) + jnp.where(mask, 0, 2e30)
    operands = {**sample.operands, "bias": two}
    bad = replace(sample, operands=operands, conditions={})
    got = values(bad, implementation=implementation, config=SMALL, **EXACT)
    assert_formula(got, truth(sample)[0])


@everywhere
@pytest.mark.parametrize("level", [-65504.0, -1e9, -1e4])
def test_large_negative_numbers_are_ordinary(level, implementation):
    """A row of them is a shift: equal weights where the query is 0."""
    sample = Case("dense").sample()
    operands = {
        **sample.operands,
        "query": jnp.zeros_like(sample.operands["query"]),
        "bias": jnp.full_like(sample.operands["bias"].bias, level),
    }
    same = replace(sample, operands=operands)
    (output, lse), grads = gradients(same, implementation=implementation, **EXACT)
    mean = np.asarray(operands["value"], np.float64).mean(1, keepdims=True)
    assert_formula(output, np.broadcast_to(mean, output.shape))
    assert_formula(lse, np.full(lse.shape, level + np.log(53)))
    share = np.asarray(sample.cotangents[0], np.float64).sum(1, keepdims=True) / 53
    assert_formula(grads["value"], np.broadcast_to(share, grads["value"].shape))


@pytest.mark.at_most(4)
@everywhere
@pytest.mark.parametrize("sizes", [{"T": 0}, {"S": 0}, {"B": 0}, {"T": 0, "S": 0}])
@pytest.mark.parametrize("bias", ["none", "sum", "co_alibi"])
def test_empty_axes(bias, sizes, implementation):
    case = Case(bias, "causal").at(**sizes)
    sample = case.sample()
    options = {"implementation": implementation, "config": small(bias)}
    (output, lse), grads = gradients(sample, **options)
    s = case.sizes
    chex.assert_shape(output, (s.B, s.T, s.N, s.h))
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, sample.operands)
    assert_zero((output, grads))
    assert np.isneginf(lse).all()
    attend = attention(sample.settings, **options)
    jaxpr = jax.make_jaxpr(attend)(sample.operands, sample.conditions)
    assert "pallas_call" not in str(jaxpr)


@everywhere
@pytest.mark.parametrize("place", ["query", "key", "bias"])
def test_nan_in_a_visible_place(place, implementation):
    """NaN in exactly the rows where the reference has it."""
    sample = Case("dense", "causal").sample()
    operands = dict(sample.operands)
    if place == "bias":
        bias = operands["bias"].bias.at[0, 1, 20, 11].set(jnp.nan)
        operands["bias"] = pallas_attn.DenseBias(bias)
    else:
        operands[place] = operands[place].at[1, 11, 0, 3].set(jnp.nan)
    bad = replace(sample, operands=operands)
    got = values(bad, implementation=implementation, config=SMALL, **EXACT)
    want = values(bad, implementation="reference")
    assert np.isnan(want[0]).any()
    assert_formula(got, want)


@everywhere
@pytest.mark.parametrize("bias", ["alibi", "co_alibi"])
def test_nan_in_a_value_shows_in_every_row_that_sees_it(bias, implementation):
    sample = Case(bias, "causal").sample()
    value = sample.operands["value"].at[1, 30, 0].set(jnp.nan)
    bad = replace(sample, operands={**sample.operands, "value": value})
    output, lse = values(
        bad, implementation=implementation, config=small(bias), **EXACT
    )
    assert np.isnan(output[1, 30:, 0]).all()
    assert np.isfinite(lse).all()


def visible(sample, sizes):
    """[B, N, T, S]: who may attend to whom, written out from the arguments."""
    given = {**sample.conditions, **sample.settings}
    i = np.arange(sizes.T)[:, None] + given.get("query_offset", 0)
    j = np.arange(sizes.S)[None, :]
    places = np.ones((sizes.B, sizes.N, sizes.T, sizes.S), bool)
    if given.get("is_causal"):
        places &= j <= i
    if "local_window_size" in given:
        left, right = given["local_window_size"]
        places &= (i - j <= left) & (j - i <= right)
    if "query_seq_lengths" in given:
        rows = np.arange(sizes.T) < np.asarray(given["query_seq_lengths"])[:, None]
        cols = np.arange(sizes.S) < np.asarray(given["key_value_seq_lengths"])[:, None]
        places &= rows[:, None, :, None] & cols[:, None, None, :]
    if "query_segment_ids" in given:
        rows = np.asarray(given["query_segment_ids"])[:, None, :, None]
        places &= rows == np.asarray(given["key_segment_ids"])[:, None, None, :]
    if "mask" in given:
        places &= np.asarray(given["mask"])
    return places


def poisoned_gates(sample, places, bias):
    """Gates of keys that are not there, or that come after every query that sees one.

    Those of other segments are not read. A gate between the two of a visible pair is
    read though its own key is masked.
    """
    given = {**sample.conditions, **sample.settings}
    batch, _, queries, keys = places.shape
    i = np.arange(queries)[:, None] + given.get("query_offset", 0)
    m = np.arange(keys)[None, :]
    before = np.broadcast_to(m <= i, (batch, 1, queries, keys))
    if "query_segment_ids" in given:
        own, other = (
            np.asarray(given[f"{side}_segment_ids"]) for side in ("query", "key")
        )
        before = before & (own[:, None, :, None] == other[:, None, None, :])
    read = (places.any(3)[..., None] & before).any(2)
    lengths = np.asarray(given.get("key_value_seq_lengths", np.full(batch, keys)))
    read &= m[None] < lengths[:, None, None]
    gates = jnp.where(np.swapaxes(read, 1, 2), bias.log_gate, jnp.nan)
    return pallas_attn.ForgetGate(gates)


@pytest.mark.parametrize("implementation", ["reference", *implementations()])
@pytest.mark.parametrize(("N", "K"), [(1, 1), (2, 1), (2, 2), (4, 2)])
@pytest.mark.parametrize("name", ["key", "value"])
@pytest.mark.parametrize("h", [1, 4])
def test_a_nan_is_in_every_output_that_sees_it(h, name, N, K, implementation):
    given: dict[str, Any] = {
        "query": jnp.ones((1, 8, N, 4)),
        "key": jnp.ones((1, 16, K, 4)),
        "value": jnp.ones((1, 16, K, h)),
    }
    given[name] = given[name].at[0, 5].set(jnp.nan)
    odd = [jnp.arange(size)[None] % 2 for size in (8, 16)]
    every: dict[str, Any] = {"key_value_seq_lengths": jnp.array([13])}
    some: dict[str, Any] = {"query_segment_ids": odd[0], "key_segment_ids": odd[1]}
    for conditions, rows in ((every, slice(None)), (some, slice(1, None, 2))):
        output = pallas_attn.dot_product_attention(
            **given, **conditions, implementation=implementation
        )
        assert jnp.isnan(output[:, rows]).all(), list(conditions)
