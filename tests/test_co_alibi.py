"""What the formula of Co-ALiBi says beyond the table of cases."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_attn import (
    ALiBi,
    co_alibi_slopes,
    CoALiBi,
    Config,
    dot_product_attention,
)
from pallas_attn.testing.cases import Case, normal, Sample
from pallas_attn.testing.evaluate import (
    EXACT,
    gradients,
    implementations,
    SMALL_CONTEXTUAL,
    truth,
)
from pallas_attn.testing.numerics import assert_formula, assert_zero


everywhere = pytest.mark.parametrize("implementation", implementations())
everywhere_and_dense = pytest.mark.parametrize(
    "implementation", [*implementations(), "reference"]
)
CAUSAL = {"is_causal": True}


def options(implementation) -> dict:
    return {"implementation": implementation, "config": SMALL_CONTEXTUAL, **EXACT}


def with_bias(sample, bias):
    return dataclasses.replace(sample, operands={**sample.operands, "bias": bias})


def scaled(sample, factor):
    """The same call with scores that are larger by a factor."""
    query = sample.operands["query"] * factor
    return dataclasses.replace(sample, operands={**sample.operands, "query": query})


@everywhere_and_dense
def test_a_row_to_check_by_eye(implementation):
    """s = [0, 1, 2], m = 1: z = [2.111856, 1.611856, .880797]."""
    key = jnp.array([0.0, 1.0, 2.0])[:, None, None]
    weights, lse = dot_product_attention(
        jnp.ones((1, 1, 1)),
        key,
        jnp.eye(3)[:, None, :],
        CoALiBi(jnp.ones(1)),
        scale=1.0,
        return_residual=True,
        **options(implementation),
    )
    # written with six digits
    np.testing.assert_array_equal(
        np.round(weights[0, 0], 6),
        np.array([0.032480, 0.145566, 0.821954], np.float32),
    )
    assert round(float(lse[0, 0]), 6) == 1.315273


@everywhere
def test_without_scores_it_is_alibi_of_half_the_slope(implementation):
    """Every gate is 1/2, so that z counts half the keys from j to i."""
    slopes = co_alibi_slopes(2)
    sample = Case("co_alibi", "causal").at(T=53).sample()
    empty = scaled(with_bias(sample, CoALiBi(slopes)), 0)
    got, _ = gradients(empty, **options(implementation))
    alibi = with_bias(empty, ALiBi(slopes / 2))
    output, lse = truth(alibi)[0]
    # z has one half more, that of the key itself: a shift of every row
    shift = np.asarray(slopes, np.float64) / 2
    assert_formula(got, (output, lse - shift))


@everywhere
def test_a_slope_of_0_is_no_bias(implementation):
    sample = Case("none", "causal lengths GQA").sample()
    none = with_bias(sample, CoALiBi(jnp.zeros(4)))
    got, grads = gradients(none, **options(implementation))
    del grads["bias"]
    want, true = truth(sample)
    assert_formula((got, grads), (want, {x: true[x] for x in grads}))


@pytest.mark.at_most(2)
@everywhere
@pytest.mark.parametrize("situation", ["full", "causal", "bottom-right", "lengths"])
@pytest.mark.parametrize(
    "slopes",
    [[1.0, 1.0], [-1.0, -1.0], [0.7, -0.2], [0.0, 0.3], [0.004, 8.0]],
    ids=str,
)
def test_slopes_of_any_sign_and_size(slopes, situation, implementation):
    sample = Case("co_alibi", situation).sample()
    sample = with_bias(sample, CoALiBi(jnp.array(slopes)))
    assert_formula(gradients(sample, **options(implementation)), truth(sample))


@pytest.mark.at_most(2)
@everywhere
@pytest.mark.parametrize("situation", ["full", "causal", "mask BNTS"])
@pytest.mark.parametrize("slope", [0.1, 1.0, -0.1])
def test_saturated_scores(slope, situation, implementation):
    """Scores at +-40: gates are 0 and 1, and their derivatives vanish."""
    sample = Case("co_alibi", situation).sample()
    query, key = (sample.operands[x][..., :1] for x in ("query", "key"))
    # one head dim and scale 1: each score is +-40
    operands = {
        **sample.operands,
        "query": 40 * jnp.sign(query),
        "key": jnp.sign(key),
        "bias": CoALiBi(jnp.full(2, slope)),
    }
    settings = {**sample.settings, "scale": 1.0}
    saturated = dataclasses.replace(sample, operands=operands, settings=settings)
    assert_formula(gradients(saturated, **options(implementation)), truth(saturated))


@everywhere
def test_large_scores(implementation):
    sample = scaled(Case("co_alibi", "causal").sample(), 12)
    assert_formula(gradients(sample, **options(implementation)), truth(sample))


@everywhere
@pytest.mark.parametrize("sizes", [{"T": 1}, {"S": 1}, {"T": 1, "S": 1}], ids=str)
def test_one_query_or_one_key(sizes, implementation):
    """A decode step; one key has weight 1 whatever its gate."""
    sample = Case("co_alibi", "bottom-right").at(**sizes).sample()
    got = gradients(sample, **options(implementation))
    assert_formula(got, truth(sample))


@everywhere
def test_gates_of_hidden_keys_do_not_count(implementation):
    """A hidden key, whatever it holds, is as if it were not there."""
    sample = Case("co_alibi").at(S=61).sample()
    hidden = jnp.arange(61) % 3 == 1
    operands = dict(sample.operands)
    for name in ("key", "value"):
        poison = jnp.where(hidden[:, None, None], jnp.nan, operands[name])
        operands[name] = poison
    mask = jnp.broadcast_to(~hidden, (1, 1, 1, 61))
    masked = dataclasses.replace(sample, operands=operands, conditions={"mask": mask})
    got, grads = gradients(masked, **options(implementation))
    kept = {**sample.operands, **{x: operands[x][:, ~hidden] for x in ("key", "value")}}
    want, true = truth(dataclasses.replace(sample, operands=kept))
    assert_zero({x: grads[x][:, hidden] for x in ("key", "value")})
    grads = {**grads, **{x: grads[x][:, ~hidden] for x in ("key", "value")}}
    assert_formula((got, grads), (want, true))


@everywhere
def test_sums_follow_storage_and_visibility_follows_positions(implementation):
    """Keys of reversed positions are summed from the right all the same."""
    sample = Case("co_alibi").at(T=45, S=45).sample()
    turned = jnp.arange(45, dtype=jnp.int32)[::-1]
    conditions = {"query_positions": turned, "key_positions": turned}
    placed = dataclasses.replace(sample, conditions=conditions, settings=CAUSAL)
    later = jnp.triu(jnp.ones((45, 45), bool))
    masked = dataclasses.replace(sample, conditions={"mask": later})
    assert_formula(gradients(placed, **options(implementation)), truth(masked))


@pytest.mark.at_most(2)
@everywhere
@pytest.mark.parametrize("name", ["key", "value"])
def test_nan_in_a_far_key_is_not_left_out(name, implementation):
    """However steep the slope, every row that may attend to it shows it."""
    sizes = {"B": 1, "T": 150, "S": 150}
    sample = Case("co_alibi", "causal").at(**sizes).sample()
    sample = with_bias(sample, CoALiBi(jnp.array([8.0, 0.1])))
    bad = sample.operands[name].at[:, 3, 0, :].set(jnp.nan)
    operands = {**sample.operands, name: bad}
    output, _ = jax.jit(
        lambda operands: dot_product_attention(
            **operands, **CAUSAL, return_residual=True, **options(implementation)
        )
    )(operands)
    assert np.isnan(output[:, 3:, 0]).all()
    clean = (slice(None), slice(None), 1)
    assert np.isfinite(output[clean]).all()


@pytest.mark.at_most(1)
@everywhere
@pytest.mark.parametrize("slope", [-0.5, -0.03, 0.0078, 0.5])
def test_long_rows(slope, implementation):
    """z is near 2^11 and float32 numbers there 2e-4 apart; no result is."""
    length, rows = 4096, 16
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v = (
        normal(key, 1, n, 1, 16)
        for key, n in zip(keys, (rows, length, length), strict=False)
    )
    sample = Sample(
        {"query": q, "key": k, "value": v, "bias": CoALiBi(jnp.array([slope]))},
        {},
        {**CAUSAL, "query_offset": length - rows},
        (normal(keys[3], 1, rows, 1, 16), normal(keys[4], 1, rows, 1)),
    )
    shipped = {**options(implementation), "config": Config()}
    assert_formula(gradients(sample, **shipped), truth(sample))


@everywhere
def test_nothing_of_the_slopes_of_a_row_with_one_key(implementation):
    """P = 1: the output does not depend on the slope."""
    sample = Case("co_alibi").sample()
    one = dataclasses.replace(
        sample,
        conditions={"mask": jnp.zeros((1, 1, 37, 53), bool).at[..., 20].set(True)},
    )
    _, grads = gradients(one, residual=False, **options(implementation))
    _, want = truth(one, residual=False)
    assert_formula(grads["bias"], want["bias"])


@pytest.mark.parametrize("num_heads", [1, 6, 8, 12])
def test_slopes_are_twice_those_of_alibi(num_heads):
    slopes = co_alibi_slopes(num_heads, bias_max=4.0)
    assert slopes.shape == (num_heads,)
    assert float(slopes.min()) == 2 * 2.0**-4
    with pytest.raises(ValueError, match="`num_heads` must be at least 1"):
        co_alibi_slopes(0)
