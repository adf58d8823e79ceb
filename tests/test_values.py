"""Outputs and log-sum-exps are those of the dense reference in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_attn
from pallas_attn.testing.cases import Case, KINDS
from pallas_attn.testing.evaluate import (
    causal_bias,
    EXACT,
    gradients,
    implementations,
    small,
    textbook,
    true_values,
    values,
    widened,
)
from pallas_attn.testing.numerics import (
    assert_formula,
    assert_rounding,
    assert_same_bits,
    OUTPUT_RATIO,
)


everywhere = pytest.mark.parametrize("implementation", implementations())


@pytest.mark.at_most(5)
@everywhere
@pytest.mark.parametrize("bias", KINDS)
def test_float32_is_exact_alone(bias, implementation):
    """Where no gradient is asked for; test_gradients.py has every case with them."""
    case = Case(bias, "causal GQA")
    got = values(
        case.sample(), implementation=implementation, config=small(case.bias), **EXACT
    )
    assert_formula(got, true_values(case))


@pytest.mark.at_most(5)
@everywhere
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("bias", KINDS)
def test_16_bits_round_like_xla(bias, dtype, implementation):
    case = Case(bias, "causal").at(dtype=dtype)
    sample = case.sample()
    got, lse = values(sample, implementation=implementation, config=small(bias))
    assert got.dtype == dtype
    peer = jax.jit(textbook)(sample.operands)
    want, residual = true_values(case)
    assert_rounding(got, peer, want, OUTPUT_RATIO)
    # of products of 16 bits that are added up in float32
    np.testing.assert_allclose(lse, residual, rtol=0, atol=4e-3)


@pytest.mark.at_most(5)
@everywhere
@pytest.mark.parametrize("bias", KINDS)
def test_float32_agrees_with_jax_nn(bias, implementation):
    """The reference shares its handling of arguments with us; `jax.nn` does not."""
    sample = Case(bias, "causal").sample()
    got, _ = values(sample, implementation=implementation, config=small(bias), **EXACT)
    with jax.default_matmul_precision("highest"):
        assert_formula(got, jax.jit(jax_nn)(sample.operands))


@pytest.mark.parametrize("bias", sorted({*KINDS} - {"none", "co_alibi"}))
def test_a_bias_in_float64_is_written_out_in_float64(bias):
    drawn = widened(Case(bias).sample().operands["bias"])
    with jax.enable_x64(True):
        rows, cols = (jnp.arange(n, dtype=jnp.int32) for n in (37, 53))
        found = jax.tree.map(lambda x: jnp.asarray(x / 3), drawn).materialise(
            rows, cols
        )
        assert found.dtype == jnp.float64
        assert not np.array_equal(found, found.astype(jnp.float32))


@pytest.mark.at_most(3)
@everywhere
@pytest.mark.parametrize("bias", ["none", "dense", "factored", "alibi", "co_alibi"])
@pytest.mark.parametrize("leading", [(), (2, 3), (1, 2, 1)], ids=str)
def test_any_number_of_leading_axes(leading, bias, implementation):
    batch = int(np.prod(leading, dtype=int))
    sample = Case(bias, "causal").at(B=batch).sample()
    attend = lambda **arrays: pallas_attn.dot_product_attention(
        **arrays,
        is_causal=True,
        implementation=implementation,
        config=small(bias),
        **EXACT,
    )
    flat = jax.jit(attend)(**sample.operands)

    def led(x):
        return x.reshape(*leading, *x.shape[1:]) if x.ndim > 1 else x

    got = jax.jit(attend)(**jax.tree.map(led, sample.operands))
    assert got.shape == (*leading, *flat.shape[1:])
    assert_same_bits(got.reshape(flat.shape), flat)


@pytest.mark.at_most(2)
@everywhere
@pytest.mark.parametrize(
    ("bias", "normalizer"),
    [
        ("sum", "softmax"),
        ("sum", "sink"),
        ("co_alibi", "softmax"),
        ("sum", "entmax 1.5"),
        ("alibi", "entmax 1.5 top 33"),
        ("none", "entmax learned top 8"),
    ],
)
def test_float32_is_the_same_in_a_process_with_x64(bias, normalizer, implementation):
    """With jax_enable_x64 on, float32 operands give the same bits as without."""
    sample = Case(bias, "lengths", (), normalizer).sample()
    run = lambda: gradients(
        sample, implementation=implementation, config=small(bias, normalizer), **EXACT
    )
    before = run()
    with jax.enable_x64(True):
        after = run()
    assert_same_bits(after, before)


def jax_nn(operands):
    """`jax.nn` with the bias as an array; causal."""
    query, key, value = (operands[name] for name in ("query", "key", "value"))
    added = causal_bias(operands).astype(query.dtype)
    return jax.nn.dot_product_attention(query, key, value, added, is_causal=True)
