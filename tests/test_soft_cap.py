"""The soft cap: of the scaled products alone, and its derivative."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import pytest

import pallas_attn
from pallas_attn.testing.cases import Case
from pallas_attn.testing.evaluate import (
    EXACT,
    gradients,
    implementations,
    kernel_implementation,
    small,
    textbook,
    true_gradients,
    truth,
    values,
    written,
)
from pallas_attn.testing.jaxprs import kernel_names
from pallas_attn.testing.numerics import (
    assert_formula,
    assert_moved_at_most,
    assert_rounded_apart,
    assert_rounding,
    GRADIENT_RATIO,
    OUTPUT_RATIO,
)


everywhere = pytest.mark.parametrize("implementation", implementations())
KERNELS = kernel_implementation()
CAP = 0.9


def with_cap(sample, cap):
    return dataclasses.replace(
        sample, settings={**sample.settings, "logits_soft_cap": cap}
    )


@pytest.mark.parametrize("bias", ["none", "sum"])
def test_the_reference_caps_products_and_nothing_else(bias):
    """C tanh(scale q.k / c) + b, biases and masks as they are."""
    case = Case(bias, "mask BNTS")
    sample = case.sample()
    got, _ = values(with_cap(sample, CAP), implementation="reference")
    query, key, value = (sample.operands[x] for x in ("query", "key", "value"))
    rows, cols = (jnp.arange(x.shape[1], dtype=jnp.int32) for x in (query, key))
    added = sample.operands["bias"]
    added = 0.0 if added is None else added.materialise(rows, cols)
    with jax.default_matmul_precision("highest"):
        scores = jnp.einsum("BTNH,BSNH->BNTS", query, key) / 4
        t = CAP * jnp.tanh(scores / CAP) + added
        t = jnp.where(sample.conditions["mask"], t, -jnp.inf)
        want = jnp.einsum("BNTS,BSNh->BTNh", jax.nn.softmax(t), value)
    assert_formula(got, want)


# "soft cap" and "dropout GQA soft cap" are situations of the table: every law there
# holds for some bias with them; test_dropout.py has all biases, and entmax.


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@everywhere
def test_16_bits_round_like_xla(implementation, dtype):
    sample = with_cap(Case("alibi", "causal").at(dtype=dtype).sample(), CAP)
    options = {"implementation": implementation, "config": small("alibi")}
    (got, _), grads = gradients(sample, residual=False, **options)
    peer_of = functools.partial(textbook, cap=lambda s: CAP * jnp.tanh(s / CAP))

    def pull(operands, do):
        output, pullback = jax.vjp(peer_of, operands)
        return output, pullback(do)[0]

    peer, theirs = jax.jit(pull)(sample.operands, sample.cotangents[0])
    (want, _), true = truth(sample, residual=False)
    assert_rounding(got, peer, want, OUTPUT_RATIO)
    assert_rounding(grads, theirs, true, GRADIENT_RATIO)


@pytest.mark.parametrize(
    ("bias", "normalizer"),
    [
        ("sum", "softmax"),
        ("sum", "sink"),
        ("co_alibi", "softmax"),
        ("saturating", "entmax 1.5"),
        ("sum", "entmax learned top 8"),
    ],
)
def test_the_written_backward_is_the_derivative(bias, normalizer):
    """In float64, with cotangents of the output and of the residual; dropout's too."""
    case = Case(bias, "dropout GQA soft cap", (), normalizer)
    assert_formula(written(case.sample()), true_gradients(case))


@pytest.mark.parametrize(("bias", "cap"), [("sum", 1e9), ("co_alibi", 1e20)])
@everywhere
def test_a_large_cap_is_none(implementation, bias, cap):
    sample = Case(bias, "causal").sample()
    options = {"implementation": implementation, "config": small(bias), **EXACT}
    got = values(with_cap(sample, cap), **options)
    assert_formula(got, values(sample, **options))


@pytest.mark.parametrize(("bias", "cap"), [("alibi", 1e-20), ("co_alibi", 1e-3)])
@everywhere
def test_a_small_cap_leaves_the_bias(implementation, bias, cap):
    """And finite gradients: no score is left, whatever the products are."""
    sample = Case(bias, "causal").sample()
    options = {"implementation": implementation, "config": small(bias), **EXACT}
    got, grads = gradients(with_cap(sample, cap), **options)
    chex.assert_tree_all_finite(grads)
    silent = {**sample.operands, "query": 0 * sample.operands["query"]}
    want = values(dataclasses.replace(sample, operands=silent), **options)
    for x, y in zip(got, want, strict=True):
        assert_moved_at_most(x, y, cap * 60)


@pytest.mark.parametrize("bias", ["alibi", "sum-alibi factored"])
def test_pruning_knows_what_a_cap_leaves(bias):
    """Products past the cap bound their capped values: nothing is missed."""
    case = Case(bias, "soft cap").at(B=1, T=260, S=260)
    sample = case.sample()
    options = {"implementation": KERNELS, **EXACT}
    config = dataclasses.replace(small(bias), prune=True)
    pruned = gradients(sample, config=config, **options)
    whole = gradients(
        sample, config=dataclasses.replace(config, prune=False), **options
    )
    assert_rounded_apart(pruned, whole, true_gradients(case))
    shares = pallas_attn.visited(
        **sample.operands, **sample.settings, config=config, **options
    )
    assert float(jnp.min(shares.forward)) < 1


def test_a_bias_of_all_pairs_is_its_own_pass():
    """Its gradient is that of capped scores: no stored one serves dq and dk too."""
    sample = Case("dense", "full").at(H=128, h=128).sample()

    def run(cap):
        attend = functools.partial(
            pallas_attn.dot_product_attention, implementation=KERNELS
        )
        f = lambda x: attend(**x, logits_soft_cap=cap)
        return kernel_names(
            lambda x, do: jax.vjp(f, x)[1](do), sample.operands, sample.cotangents[0]
        )

    assert any("thin" in name for name in run(None))
    capped = run(CAP)
    assert not any("thin" in name for name in capped)
    assert any("tiles" in name for name in capped)
