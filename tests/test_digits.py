"""No digits are lost to the size of scores, of slopes or of the log-sum-exp."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_attn import (
    ALiBi,
    Bias,
    CoALiBi,
    DenseBias,
    dot_product_attention,
    Entmax,
    FactoredBias,
    Softmax,
)
from pallas_attn.testing.cases import Sample
from pallas_attn.testing.evaluate import (
    EXACT,
    gradients,
    implementations,
    SMALL,
    small,
    SMALL_CONTEXTUAL,
    SMALL_ENTMAX,
    truth,
)
from pallas_attn.testing.numerics import (
    assert_formula,
    NO_GRADIENT,
    ONLY_VALUE,
    ONLY_WEIGHT,
    SUM_OF_COTANGENTS,
)


T = 64
QUARTERS = np.random.default_rng(0).integers(-8, 9, (4, T, T)) / 4
DISTANCE = np.abs(np.subtract.outer(np.arange(T), np.arange(T)))

# What the scores of four heads add to quarters within +-2, [N, 1 or T, 1 or T], and the
# bias that takes it away again, or shifts whole rows. float32 holds every score and
# every partial sum, so that all is as exact as it is for small scores.
LOGITS = np.array([0.0, -120.0, 1e4, -1e6])[:, None, None]
SLOPES = np.array([0.25, 100.0, 1e4, 5e4])
TABLE: dict[str, tuple[np.ndarray, Bias | None, dict[str, Any]]] = {
    "logits": (LOGITS, None, {"is_causal": True}),
    "slopes": (
        SLOPES[:, None, None] * DISTANCE,
        ALiBi(jnp.asarray(SLOPES, jnp.float32)),
        {"is_causal": True},
    ),
    "slopes on both sides": (
        SLOPES[:, None, None] * DISTANCE,
        ALiBi(jnp.asarray(SLOPES, jnp.float32)),
        {},
    ),
}


def sample(name: str) -> Sample:
    """Queries are the unit vectors: a key holds its scores with every query."""
    added, bias, settings = TABLE[name]
    scores = jnp.asarray(QUARTERS + added, jnp.float32)
    assert np.array_equal(scores, QUARTERS + added)
    seeds = jax.random.split(jax.random.key(0), 3)
    value, do = (jax.random.normal(x, (1, T, 4, 16)) for x in seeds[:2])
    operands = {
        "query": jnp.broadcast_to(jnp.eye(T)[None, :, None, :], (1, T, 4, T)),
        "key": jnp.transpose(scores, (2, 0, 1))[None],
        "value": value,
        "bias": bias,
    }
    dlse = jax.random.normal(seeds[2], (1, T, 4))
    settings = {"scale": 1.0, "normalizer": Softmax(), **settings}
    return Sample(operands, {}, settings, (do, dlse))


def by_head(values: Any, grads: dict[str, Any]) -> list[Any]:
    """Each head's own leaves: a large one shall not hide the others."""
    output, lse = values
    return [
        (output[:, :, n], lse[:, :, n])
        + tuple(grads[x][:, :, n] for x in ("query", "key", "value"))
        for n in range(4)
    ]


@pytest.mark.at_most(3)
@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize("name", TABLE)
def test_large_scores_are_as_exact_as_small_ones(name, implementation):
    drawn = sample(name)
    options = {"implementation": implementation, "config": SMALL, **EXACT}
    assert_formula(by_head(*gradients(drawn, **options)), by_head(*truth(drawn)))


@pytest.mark.at_most(2)
@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("exponent", "size"), [(-22, 2.0**11), (36, 2.0**-6)])
@pytest.mark.parametrize("normalizer", [Softmax(), Entmax(1.5, 3)], ids=repr)
def test_no_scale_costs_digits(normalizer, exponent, size, dtype, implementation):
    """Queries and keys are as much smaller: scores stay, gradients are that multiple.

    size: of cotangents, for gradients that float16 holds.
    """
    seeds = jax.random.split(jax.random.key(0), 4)
    drawn = (jax.random.normal(x, (1, 17, 2, 16)) for x in seeds)
    q, k, v, do = ((jnp.round(4 * x) / 4).astype(dtype) for x in drawn)
    do = do * jnp.asarray(size, dtype)

    def found(exponent: int) -> Any:
        factor = jnp.asarray(2.0 ** (-exponent // 2), dtype)
        call = lambda q, k, v: dot_product_attention(
            q, k, v, scale=0.3 * 2.0**exponent, normalizer=normalizer,
            implementation=implementation, **EXACT,
        )  # fmt: skip
        output, pullback = jax.vjp(call, q * factor, k * factor, v)
        dq, dk, dv = pullback(do)
        return output, dq * factor, dk * factor, dv

    unit = float(jnp.finfo(dtype).eps)
    for got, want in zip(found(exponent), found(0), strict=True):
        got, want = (np.asarray(x, np.float64) for x in (got, want))
        assert np.abs(got - want).max() <= unit * np.abs(want).max()


def saturated(bias: Bias | None, causal: bool) -> Sample:
    """Each query has a key with all of its weight, by thousands, at any distance."""
    rng = np.random.default_rng(1)
    codes = rng.uniform(-40, 40, (1, T, 4, 32))
    order = rng.permutation(T)
    operands = {
        "query": jnp.asarray(codes[:, order], jnp.float32),
        "key": jnp.asarray(codes, jnp.float32),
        "value": jnp.asarray(rng.standard_normal((1, T, 4, 16)), jnp.float32),
        "bias": bias,
    }
    do, dlse = (rng.standard_normal((1, T, 4, *more)) for more in ((16,), ()))
    cotangents = (jnp.asarray(do, jnp.float32), jnp.asarray(dlse, jnp.float32))
    settings = {"scale": 1.0, "normalizer": Softmax(), "is_causal": causal}
    if causal:  # so that all keys come before all queries
        settings["query_offset"] = T
    return Sample(operands, {}, settings, cotangents)


def drawn_bias(*shape: int) -> jax.Array:
    """Numbers that no float32 score of thousands holds."""
    return jnp.asarray(np.random.default_rng(2).standard_normal(shape), jnp.float32)


FACTORED = FactoredBias(drawn_bias(1, T, 1, 5), drawn_bias(1, T, 1, 5))
SUM = DenseBias(drawn_bias(1, 1, T, T)) + FACTORED + DenseBias(drawn_bias(1, 4, T, 1))


@pytest.mark.at_most(2)
@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "bias",
    [
        None,
        ALiBi(jnp.asarray([0.3, 1.7, 7.7, 13.1], jnp.float32)),
        FACTORED,
        SUM,
        CoALiBi(jnp.asarray([0.3, -0.7, 1.7, 2.9], jnp.float32)),
    ],
    ids=["none", "alibi", "factored", "sum", "co_alibi"],
)
def test_a_weight_of_1_is_1_in_every_pass(bias, causal, implementation):
    """However a pass cuts its tiles: scores of thousands are rounded alike in all."""
    drawn = saturated(bias, causal)
    config = SMALL_CONTEXTUAL if isinstance(bias, CoALiBi) else SMALL
    options = {"implementation": implementation, "config": config, **EXACT}
    assert_formula(by_head(*gradients(drawn, **options)), by_head(*truth(drawn)))


ONLY_KEY = {
    "softmax": Softmax(),
    "entmax 1.25": Entmax(1.25),
    "entmax 1.5": Entmax(1.5),
    "entmax 2.0": Entmax(2.0),
    "entmax learned": Entmax(jnp.asarray([1.0, 1.3, 1.6, 2.0])),
    "entmax 1.5 top 8": Entmax(1.5, top_k=8),
}


@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("normalizer", ONLY_KEY)
@pytest.mark.parametrize("level", [-9984.0, -1.1e9, -3e11])
@pytest.mark.at_most(12)
def test_what_a_whole_row_has_leaves_its_only_key_all_weight(
    level, normalizer, dtype, implementation
):
    """A row's own -1e12 beside a key's -9984: float32 has no room for their sum.

    Nor is there room for an entmax threshold beside a key's -3e11.
    """
    rng = np.random.default_rng(3)
    query, key, value, do = (
        jnp.asarray(rng.standard_normal((1, 37, 4, 80)), dtype) for _ in range(4)
    )
    rows = jnp.asarray([-1e4, -1e9, 1e9, -1e12], jnp.float32)[None, :, None, None]
    bias = DenseBias(jnp.broadcast_to(rows * 1.1, (1, 4, 37, 1)))
    bias = bias + DenseBias(jnp.full((1, 1, 1, 37), level, jnp.float32))

    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return dot_product_attention(
            query, key, value, bias, local_window_size=0,
            config=small("dense", normalizer), implementation=implementation,
            normalizer=ONLY_KEY[normalizer],
        )  # fmt: skip

    output, back = jax.vjp(attend, query, key, value)
    dq, dk, dv = back(do)
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=ONLY_VALUE)
    close(output, value)
    close(dv, do)
    close(dq.astype(jnp.float32), np.zeros(dq.shape), atol=NO_GRADIENT)
    close(dk.astype(jnp.float32), np.zeros(dk.shape), atol=NO_GRADIENT)


@pytest.mark.at_most(2)
@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize("offset", [0, T, 2**20])
def test_so_is_one_of_entmax(offset, implementation):
    """Also of queries so far away that float32 holds no digit of their scores."""
    drawn = saturated(ALiBi(jnp.asarray([0.3, 1.7, 7.7, 13.1], jnp.float32)), False)
    drawn.settings.update(normalizer=Entmax(1.5), query_offset=offset)
    options = {"implementation": implementation, "config": SMALL_ENTMAX, **EXACT}
    assert_formula(by_head(*gradients(drawn, **options)), by_head(*truth(drawn)))


@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_an_only_key_2_30_away_has_all_weight(dtype, implementation):
    """An lse of 3e8, in whatever dtype: one float32 number would hold it to 16."""
    rng = np.random.default_rng(4)
    query, key, do = (
        jnp.asarray(rng.standard_normal((1, n, 4, 80)), dtype) for n in (37, 1, 37)
    )
    bias = ALiBi(jnp.asarray([0.3, 1.7, 7.7, 13.1], jnp.float32))

    def attend(value: jax.Array) -> jax.Array:
        return dot_product_attention(
            query, key, value, bias, query_offset=2**30 - T, config=SMALL,
            implementation=implementation, **EXACT,
        )  # fmt: skip

    output, back = jax.vjp(attend, key)
    # 1 but for the last digits of a power of two
    everywhere = jnp.broadcast_to(key, output.shape)
    np.testing.assert_allclose(output, everywhere, rtol=ONLY_WEIGHT, atol=0)
    want = np.sum(np.asarray(do, np.float64), 1, keepdims=True)
    rtol, atol = SUM_OF_COTANGENTS
    np.testing.assert_allclose(back(do)[0], want, rtol=rtol, atol=atol)
