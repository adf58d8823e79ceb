"""The dense weights of a call."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_attn import ALiBi, attention_weights, dot_product_attention, Softmax
from pallas_attn.linen import ALiBi as LinenALiBi, MultiHeadAttention
from pallas_attn.testing.cases import BIASES, Case, SITUATIONS
from pallas_attn.testing.evaluate import called, EXACT, reference_of
from pallas_attn.testing.numerics import assert_formula, assert_zero


NORMALIZED = ("softmax", "sink", "entmax 1.5", "entmax 2.0 top 3", "entmax learned")
TABLE = [
    *(Case(bias, "causal GQA") for bias in BIASES),
    *(Case("sum", situation, (), "sink") for situation in SITUATIONS),
    *(Case("co_alibi", situation) for situation in SITUATIONS),
    *(Case("alibi", "all at once", (), normalizer) for normalizer in NORMALIZED),
]


def of_case(case):
    """(Operands but the value, settings) of a case, and its sample."""
    sample = case.sample()
    operands = {k: v for k, v in sample.operands.items() if k != "value"}
    return operands, {**sample.settings, **sample.conditions}, sample


@pytest.mark.at_most(10)
@pytest.mark.parametrize("case", TABLE, ids=str)
def test_they_are_those_of_the_definition(case):
    """Where a query may not attend 0, and their products with values the output."""
    operands, settings, sample = of_case(case)
    got = jax.jit(lambda x: attention_weights(**x, **settings))(operands)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), sample.operands)
        problem = called(**wide, **settings, implementation="reference").problem
        found = reference_of(problem).rows(problem)
        row = found if hasattr(found, "weights") else found[0]
        visible = np.asarray(row.visible)
    assert_zero(jnp.where(visible, 0, got))
    output = dot_product_attention(
        **sample.operands, **settings, **EXACT, implementation="xla"
    )
    value = jnp.repeat(sample.operands["value"], row.k.shape[2] // row.v.shape[2], 2)
    value = jnp.repeat(value, output.shape[2] // value.shape[2], 2)
    product = jnp.einsum("bnts,bsnh->btnh", got, value, precision="highest")
    assert_formula(product, output)
    if "dropout" not in str(case):
        assert_formula(got, row.weights)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_they_are_float32_of_any_query(dtype):
    x = jax.random.normal(jax.random.key(1), (9, 2, 8), dtype)
    weights = attention_weights(x, x, ALiBi(jnp.ones(2)), is_causal=True)
    assert (weights.dtype, weights.shape) == (jnp.float32, (2, 9, 9))
    assert_formula(weights.sum(-1), jnp.ones((2, 9)))


def test_they_have_a_gradient():
    """That of the dense formula."""
    x = jax.random.normal(jax.random.key(1), (2, 9, 2, 8))
    at = jnp.arange(9.0)
    distance = jnp.abs(at[:, None] - at[None])[None, None]

    def dense(slopes):
        t = jnp.einsum("btnh,bsnh->bnts", x, x, precision="highest") / np.sqrt(8)
        return jax.nn.softmax(t - slopes[None, :, None, None] * distance, -1)

    entropy = lambda weights: jax.scipy.special.entr(weights).sum()
    ours = lambda slopes: entropy(attention_weights(x, x, ALiBi(slopes)))
    slopes = jnp.array([0.3, 0.7])
    assert_formula(
        jax.grad(ours)(slopes), jax.grad(lambda s: entropy(dense(s)))(slopes)
    )


def test_leading_axes_are_kept_and_no_key_is_no_weight():
    x = jnp.ones((3, 2, 5, 4, 8))
    assert attention_weights(x, x).shape == (3, 2, 4, 5, 5)
    assert attention_weights(x, x[:, :, :0]).shape == (3, 2, 4, 5, 0)
    assert attention_weights(x[:0], x[:0]).shape == (0, 2, 4, 5, 5)
    hidden = jnp.zeros((1, 1, 1, 5, 5), bool)
    assert_zero(attention_weights(x, x, None, hidden, normalizer=Softmax(jnp.ones(4))))


def test_a_wrong_argument_is_refused_as_in_the_call():
    x = jnp.ones((2, 5, 4, 8))
    with pytest.raises(ValueError, match="`key`"):
        attention_weights(x, x[..., :3])
    with pytest.raises(TypeError, match="unexpected keyword argument 'value'"):
        attention_weights(x, x, value=x)  # pyright: ignore[reportCallIssue]
    with pytest.raises(ValueError, match="`dropout_rng`"):
        attention_weights(x, x, dropout_rate=0.5)


def test_a_layer_keeps_them_before_dropout():
    """In the collection where flax's layer has them, and its output is the same."""
    x = jnp.asarray(np.random.default_rng(2).standard_normal((2, 9, 16)), jnp.float32)
    layer = MultiHeadAttention(
        num_heads=4, bias=LinenALiBi(), is_causal=True, dropout_rate=0.5
    )
    variables = layer.init(jax.random.key(0), x, deterministic=True)
    call = {"mutable": ["intermediates"], "rngs": {"dropout": jax.random.key(1)}}
    run: Any = functools.partial(layer.apply, variables, x, deterministic=False, **call)
    output, kept = run(sow_weights=True)
    (weights,) = kept["intermediates"]["attention_weights"]
    assert weights.shape == (2, 4, 9, 9)
    assert_formula(weights.sum(-1), jnp.ones((2, 4, 9)))
    plain, kept = run()
    assert "intermediates" not in kept
    np.testing.assert_array_equal(output, plain)
