"""Outputs and every gradient are those of the dense reference in float64."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_attn
from pallas_attn.testing.cases import Case, cases, KINDS, Sample
from pallas_attn.testing.evaluate import (
    EXACT,
    gradients,
    implementations,
    SMALL,
    small,
    textbook,
    true_gradients,
    truth,
    widened,
    with_gradients,
    written,
)
from pallas_attn.testing.numerics import (
    assert_formula,
    assert_rounded_once,
    assert_rounding,
    assert_zero,
    GRADIENT_RATIO,
)


everywhere = pytest.mark.parametrize("implementation", implementations())
# the log-sum-exp has a cotangent in every other case
residuals = [(case, place % 2 == 0) for place, case in enumerate(cases())]


@pytest.mark.at_most(16)
@everywhere
@pytest.mark.parametrize(("case", "residual"), residuals, ids=str)
def test_float32_is_exact(case, residual, implementation):
    sample = case.sample()
    options = {"implementation": implementation, "config": small(case.bias), **EXACT}
    values, got = gradients(sample, residual=residual, **options)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, sample.operands)
    assert_formula((values, got), true_gradients(case, residual))


@pytest.mark.at_most(5)
@everywhere
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("bias", KINDS)
def test_16_bits_round_like_xla(bias, dtype, implementation):
    case = Case(bias, "causal").at(dtype=dtype)
    sample = case.sample()
    options = {"implementation": implementation, "config": small(bias)}
    _, got = gradients(sample, residual=False, **options)
    chex.assert_trees_all_equal_dtypes(got, sample.operands)
    pullback = jax.jit(lambda x, do: jax.vjp(textbook, x)[1](do)[0])
    peer = pullback(sample.operands, sample.cotangents[0])
    assert_rounding(got, peer, true_gradients(case, False)[1], GRADIENT_RATIO)


@pytest.mark.at_most(5)
@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("bias", KINDS)
def test_float64_never_goes_through_float32(bias, implementation):
    """Of no operand on its way in, of no gradient on its way back."""
    sample = Case(bias, "causal").sample()
    operands = jax.tree.map(lambda x: x / 3, widened(sample.operands))
    cotangents = widened(sample.cotangents)
    with jax.enable_x64(True):
        evaluate = jax.jit(
            with_gradients(sample.settings, implementation=implementation)
        )
        output, gradients = evaluate(operands, {}, cotangents)
        for x in jax.tree.leaves(gradients):
            assert not np.array_equal(x, x.astype(np.float32))
        leaves, tree = jax.tree.flatten(operands)
        for place, x in enumerate(leaves):
            moved = [*leaves[:place], x * (1 + 2.0**-36), *leaves[place + 1 :]]
            other, _ = evaluate(tree.unflatten(moved), {}, cotangents)
            assert not np.array_equal(output[0], other[0])


@pytest.mark.parametrize("implementation", [*implementations(), "reference"])
def test_a_narrow_shared_bias_is_summed_in_float32(implementation):
    """What many places add to one entry of its gradient is rounded once."""
    forms = ["11TS", "1NT1", "BNT1", "B11S"]
    drawn = [Case(f"dense-{form}", "lengths").sample() for form in forms]
    bias = sum(x.operands["bias"] for x in drawn)
    bias = jax.tree.map(lambda x: x.astype(jnp.bfloat16), bias)
    sample = replace(drawn[0], operands={**drawn[0].operands, "bias": bias})
    options = {"implementation": implementation, "config": SMALL, **EXACT}
    _, got = gradients(sample, **options)
    assert_rounded_once(got["bias"], truth(sample)[1]["bias"])


def shared_by(form, dtype, narrow):
    """Fields of every home, narrower than the operands, in a form of two batch axes."""
    T, S, N, H, R = 21, 37, 2, 16, 3
    rng = np.random.default_rng(11)
    draw = lambda shape, dtype: jnp.asarray(rng.standard_normal(shape), dtype)
    field = lambda *shape: draw((*form, *shape), narrow)
    wide = lambda *shape: draw((2, 3, *shape), dtype)
    bias = (
        pallas_attn.ALiBi(abs(field(N)))
        + pallas_attn.FactoredBias(field(T, N, R), field(S, 1, R))
        + pallas_attn.DenseBias(field(N, T, 1))
        + pallas_attn.DenseBias(field(1, T, S))
    )
    return Sample(
        {"query": wide(T, N, H), "key": wide(S, N, H), "value": wide(S, N, H),
         "bias": bias},
        {}, {}, (wide(T, N, H), wide(T, N)),
    )  # fmt: skip


@pytest.mark.parametrize("implementation", [*implementations(), "reference"])
@pytest.mark.parametrize("form", [(2, 1), (1, 3)], ids=str)
def test_a_narrow_field_of_some_leading_axes_is_summed_in_float32(form, implementation):
    """Of every home: it is written out, and the copies' gradients are rounded once."""
    sample = shared_by(form, jnp.float32, jnp.bfloat16)
    options = {"implementation": implementation, "config": SMALL, **EXACT}
    _, got = gradients(sample, **options)
    assert_rounded_once(got["bias"], truth(sample)[1]["bias"])


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("form", [(1, 1), (2, 1), (1, 3)], ids=str)
@pytest.mark.parametrize("narrow", [jnp.float32, jnp.bfloat16], ids=["float32", "bf16"])
def test_a_narrow_field_of_a_float64_call_is_summed_in_float64(
    narrow, form, implementation
):
    with jax.enable_x64(True):
        sample = shared_by(form, jnp.float64, narrow)
        evaluate = jax.jit(with_gradients({}, implementation=implementation))
        _, got = evaluate(sample.operands, {}, sample.cotangents)
    assert_rounded_once(got["bias"], truth(sample)[1]["bias"])


@pytest.mark.at_most(5)
@pytest.mark.parametrize("bias", KINDS)
def test_the_written_backward_is_that_of_autodiff(bias):
    """The third side of the triangle: the algebra that the kernels compute, densely."""
    case = Case(bias, "causal lengths GQA")
    assert_formula(written(case.sample()), true_gradients(case))


@everywhere
@pytest.mark.parametrize("form", ["BNT1", "1N11", "11T1", "1111"])
def test_what_shifts_a_row_has_no_gradient(form, implementation):
    """Exactly none from the kernels; the rounding of a sum of zero from "xla"."""
    sample = Case(f"dense-{form}", "lengths").sample()
    options = {"implementation": implementation, "config": SMALL, **EXACT}
    _, got = gradients(sample, residual=False, **options)
    if implementation != "xla":
        assert_zero(got["bias"])
    assert_formula(got["bias"], truth(sample, residual=False)[1]["bias"])


@pytest.mark.at_most(3)
@everywhere
@pytest.mark.parametrize("bias", ["none", "sum", "co_alibi"])
@pytest.mark.parametrize("name", ["query", "key", "value", "bias"])
def test_one_operand_alone(name, bias, implementation):
    """The gradient of one operand is the same whoever else wants one."""
    sample = Case(bias, "causal GQA").sample()
    if not jax.tree.leaves(sample.operands[name]):
        return
    attend = lambda operand: pallas_attn.dot_product_attention(
        **{**sample.operands, name: operand},
        is_causal=True,
        implementation=implementation,
        config=small(bias),
        **EXACT,
    )
    pull = lambda x, do: jax.vjp(attend, x)[1](do)[0]
    got = jax.jit(pull)(sample.operands[name], sample.cotangents[0])
    assert_formula(got, true_gradients(Case(bias, "causal GQA"), False)[1][name])
