"""Laws of the builders of factors: exact ones, and those of a truncated SVD."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_attn import (
    ALiBi,
    alibi_factors,
    alibi_slopes,
    DenseBias,
    dot_product_attention,
    squared_distance_factors,
    svd_factors,
)
from pallas_attn.testing.numerics import assert_formula


B, T, S, N, H, L = 2, 37, 53, 2, 16, 3


def product(bias, dtype=np.float64):
    """[..., #N, T, S] of factors with any leading axes."""
    q, k = (np.asarray(x, dtype) for x in (bias.q_factor, bias.k_factor))
    return np.einsum("...inr,...jnr->...nij", *shared_heads(q, k))


def shared_heads(q, k):
    heads = max(q.shape[-2], k.shape[-2])
    return (np.broadcast_to(x, (*x.shape[:-2], heads, x.shape[-1])) for x in (q, k))


def distances(x, y):
    """|x_i - y_j|^2 [..., T, S] in float64."""
    x, y = (np.asarray(z, np.float64) for z in (x, y))
    return ((x[..., :, None, :] - y[..., None, :, :]) ** 2).sum(axis=-1)


def rows(key, batch=B, length=T):
    return jax.random.normal(key, (batch, length, N, H))


@pytest.mark.parametrize("offset", [0, 16, -5])
def test_alibi_factors_are_alibi_of_a_causal_call(getkey, offset):
    query, key, value = (rows(getkey(), length=n) for n in (T, S, S))
    slopes = jax.random.uniform(getkey(), (B, N), minval=0.1)

    def attended(bias):
        return dot_product_attention(
            query,
            key,
            value,
            bias,
            is_causal=True,
            query_offset=offset,
            implementation="reference",
        )

    with jax.default_matmul_precision("highest"):
        built = attended(alibi_factors(slopes, T, S, query_offset=offset))
        assert_formula(built, attended(ALiBi(slopes)))


@pytest.mark.parametrize("slope", [0.5, 2**-8, 0.3])
def test_alibi_factors_are_right_to_rounding_at_32k(slope):
    """In float32: two products that each round once, and their sum."""
    length = 32768
    bias = alibi_factors(jnp.array([slope]), length, length)
    sample = np.r_[0:3, 1000:1003, 16380:16390, length - 3 : length]
    q = np.asarray(bias.q_factor)[0, sample, 0]
    k = np.asarray(bias.k_factor)[0, sample, 0]
    assert q.dtype == k.dtype == np.float32
    got = (q[:, None, 0] * k[None, :, 0]) + (q[:, None, 1] * k[None, :, 1])
    want = np.float64(np.float32(slope)) * (sample[None, :] - sample[:, None])
    assert np.abs(got - want).max() <= slope * 2 * length * 2**-24


def test_positions_of_alibi_factors_are_centred():
    bias = alibi_factors(jnp.ones(1), 4, 100, query_offset=96)
    assert np.abs(bias.k_factor[..., 1]).max() == 50
    assert np.abs(bias.q_factor[..., 0]).max() <= 50


def test_16_bit_slopes_of_factors_are_refused():
    with pytest.raises(TypeError, match="`slopes` must be float32.*whole logits"):
        alibi_factors(alibi_slopes(4).astype(jnp.float16), T, S)


def test_alibi_factors_of_layers(getkey):
    slopes = jax.random.uniform(getkey(), (L, B, N))
    bias = alibi_factors(slopes, T, S)
    assert bias.q_factor.shape == (L, B, T, N, 2)
    assert bias.k_factor.shape == (L, 1, S, 1, 2)
    one = alibi_factors(slopes[1], T, S)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda x: x[1], bias), one)


def test_alibi_factors_under_jit_and_at_a_traced_offset():
    made = jax.jit(lambda slopes, at: alibi_factors(slopes, T, S, query_offset=at))
    got, want = (
        f(alibi_slopes(N), 7)
        for f in (made, lambda s, at: alibi_factors(s, T, S, query_offset=at))
    )
    assert_formula(got, want)


def test_squared_distances_are_exact(getkey):
    x, y = (jax.random.normal(getkey(), (B, n, 3)) for n in (T, S))
    weight = jax.random.uniform(getkey(), (N,))
    bias = squared_distance_factors(x, y, weight)
    assert bias.q_factor.shape == (B, T, N, 5)
    assert bias.k_factor.shape == (B, S, 1, 5)
    want = -np.asarray(weight, np.float64)[:, None, None] * distances(x, y)[:, None]
    assert_formula(product(bias), want)


def test_squared_distances_survive_a_far_origin(getkey):
    """Points of the size 1 at a distance of 1000, which is exact in float32."""
    x, y = (jax.random.normal(getkey(), (B, n, 2)).round(2) for n in (T, S))
    far = jnp.array([1000.0, -1000.0]).reshape(1, 1, 2)
    x, y = x + far, y + far
    bias = squared_distance_factors(x, y)
    got = np.einsum(
        "binr,bjnr->bij", np.asarray(bias.q_factor), np.asarray(bias.k_factor)
    )
    assert_formula(got, -distances(x, y))


def test_entries_of_a_batch_are_centred_each(getkey):
    x = jax.random.normal(getkey(), (B, T, 2)).round(2)
    x = x + jnp.array([0.0, 4096.0]).reshape(B, 1, 1)
    bias = squared_distance_factors(x, x)
    assert np.abs(bias.k_factor[..., :2]).max() < 10


@pytest.mark.parametrize(
    ("x", "y", "weight", "heads"),
    [
        ((T, 1), (S, 1), (), 1),
        ((T, 3), (B, S, 3), (N,), N),
        ((B, T, 3), (S, 3), (T, N), N),
        ((1, T, 3), (B, S, 3), (B, T, N), N),
        ((B, T, 3), (B, S, 3), (B, 1, N), N),
        ((L, B, T, 2), (B, S, 2), (L, 1, 1, N), N),
    ],
    ids=str,
)
def test_squared_distances_of_every_form(getkey, x, y, weight, heads):
    x, y, weight = (jax.random.uniform(getkey(), shape) for shape in (x, y, weight))
    bias = squared_distance_factors(x, y, weight)
    w = np.atleast_1d(np.asarray(weight, np.float64))
    w = w if w.ndim > 1 else w[None]
    want = -np.moveaxis(w, -1, -2)[..., None] * distances(x, y)[..., None, :, :]
    want = want.reshape((1,) * (4 - want.ndim) + want.shape)
    assert_formula(product(bias), want)
    assert bias.q_factor.shape[-2] == heads
    assert bias.q_factor.shape[:-4] == bias.k_factor.shape[:-4], "layers"


def test_gradients_reach_points_and_weights(getkey):
    x, y = (jax.random.normal(getkey(), (B, n, 3)) for n in (T, S))
    weight = jax.random.uniform(getkey(), (B, T, N))
    query, key, value = (rows(getkey(), length=n) for n in (T, S, S))

    def loss(made):
        def of(x, y, weight):
            output = dot_product_attention(
                query, key, value, made(x, y, weight), implementation="reference"
            )
            return jnp.sum(output**2)

        return jax.jit(jax.grad(of, argnums=(0, 1, 2)))(x, y, weight)

    def dense(x, y, weight):
        apart = ((x[:, :, None] - y[:, None]) ** 2).sum(axis=-1)
        return -jnp.swapaxes(weight, 1, 2)[..., None] * apart[:, None]

    with jax.default_matmul_precision("highest"):
        assert_formula(loss(squared_distance_factors), loss(dense))


def test_points_that_are_not_finite_stay_where_they_are(getkey):
    x, y = (jax.random.normal(getkey(), (B, n, 2)) for n in (T, S))
    clean = squared_distance_factors(x, y)
    broken = squared_distance_factors(
        x, jnp.concatenate([y, jnp.full((B, 1, 2), jnp.nan)], axis=1)
    )
    np.testing.assert_array_equal(broken.q_factor, clean.q_factor)
    np.testing.assert_array_equal(broken.k_factor[:, :S], clean.k_factor)


def low_rank(getkey, rank, leading=(B, N)):
    a = jax.random.normal(getkey(), (*leading, T, rank))
    b = jax.random.normal(getkey(), (*leading, S, rank))
    return jnp.matmul(a, jnp.swapaxes(b, -1, -2), precision="highest")


def test_an_svd_of_full_rank_is_exact(getkey):
    bias = low_rank(getkey, 5)
    assert_formula(product(svd_factors(bias, rank=5)), bias)


@pytest.mark.parametrize("rank", [1, 4, 20])
def test_what_a_truncation_says_is_what_it_lost(getkey, rank):
    bias = jax.random.normal(getkey(), (B, N, T, S))
    factors, error = svd_factors(bias, rank, return_error=True)
    lost = np.asarray(bias, np.float64) - product(factors)
    energy = 1 - (lost**2).sum((-2, -1)) / (np.asarray(bias) ** 2).sum((-2, -1))
    assert_formula(error.energy, energy)
    assert_formula(error.worst_error, np.abs(lost).max((-2, -1)))
    s = np.linalg.svd(np.asarray(bias, np.float64), compute_uv=False)
    assert (error.worst_error <= s[..., rank]).all(), "the bound of the docstring"


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.995])
def test_the_rank_is_the_least_that_keeps_the_energy_in_every_head(getkey, energy):
    one, other = low_rank(getkey, 2), jax.random.normal(getkey(), (B, N, T, S))
    bias = jnp.concatenate([one, other], axis=1)
    factors, kept = svd_factors(bias, energy=energy, return_error=True)
    assert kept.energy.shape == (B, 2 * N)
    assert (kept.energy >= energy).all()
    rank = factors.q_factor.shape[-1]
    less = svd_factors(bias, rank - 1, return_error=True)[1]
    assert (less.energy < energy).any()


def test_a_head_of_zeros_has_factors():
    factors, error = svd_factors(jnp.zeros((N, T, S)), return_error=True)
    assert factors.q_factor.shape == (1, T, N, 1)
    assert (error.energy == 1).all()
    assert (product(factors) == 0).all()


@pytest.mark.parametrize(
    ("shape", "q_shape"),
    [
        ((T, S), (1, T, 1, 4)),
        ((N, T, S), (1, T, N, 4)),
        ((B, 1, T, S), (B, T, 1, 4)),
        ((L, B, N, T, S), (L, B, T, N, 4)),
    ],
    ids=str,
)
def test_axes_of_an_svd_are_those_of_its_bias(getkey, shape, q_shape):
    bias = jax.random.normal(getkey(), shape)
    factors = svd_factors(bias, 4)
    assert factors.q_factor.shape == q_shape
    assert factors.k_factor.shape == (*q_shape[:-3], S, *q_shape[-2:])
    if len(shape) == 5:
        one = jax.tree.map(lambda x: x[1], factors)
        assert_formula(product(one), product(svd_factors(bias[1], 4)))


def test_an_svd_under_jit_needs_a_rank(getkey):
    bias = low_rank(getkey, 6)
    got = jax.jit(lambda x: svd_factors(x, 3, return_error=True))(bias)
    want = svd_factors(DenseBias(bias), 3, return_error=True)
    assert_formula(product(got[0]), product(want[0]))
    assert_formula(got[1], want[1])
    with pytest.raises(ValueError, match="`rank` must be given.*traced"):
        jax.jit(svd_factors)(bias)


def test_a_16_bit_bias_is_factored_in_float32(getkey):
    bias = low_rank(getkey, 3).astype(jnp.bfloat16)
    whole = svd_factors(bias, rank=T)
    assert whole.q_factor.dtype == jnp.float32
    assert_formula(product(whole), bias)


X, Y = jnp.ones((T, 2)), jnp.ones((S, 2))
THREE: Any = 3.0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: alibi_factors(0.5, T, S), ValueError, "`slopes` must be [N] or"),
        (
            lambda: alibi_factors(X, THREE, S),
            TypeError,
            "`query_length` must be an int",
        ),
        (lambda: alibi_factors(X, T, -1), ValueError, "`key_length` must be at least"),
        (
            lambda: alibi_factors(X, T, S, query_offset=0.5),
            TypeError,
            "`query_offset` must be int32",
        ),
        (
            lambda: alibi_factors(X, T, S, query_offset=np.arange(2)),
            ValueError,
            "`query_offset` must be an int or an int32 scalar",
        ),
        (
            lambda: squared_distance_factors(X[0], Y),
            ValueError,
            "`x_q` must be [..., T",
        ),
        (lambda: squared_distance_factors(X, Y[:, :1]), ValueError, "`x_k` must be"),
        (
            lambda: squared_distance_factors(X, Y.astype(jnp.int32)),
            TypeError,
            "`x_k` must be float16",
        ),
        (
            lambda: squared_distance_factors(X, Y, jnp.ones((T + 1, N))),
            ValueError,
            "and one T",
        ),
        (
            lambda: squared_distance_factors(
                jnp.ones((2, T, 2)), jnp.ones((3, S, 2)), jnp.ones(N)
            ),
            ValueError,
            "leading axes that are equal or 1",
        ),
        (lambda: svd_factors(X[0]), ValueError, "`bias` must be [..., #N, T, S]"),
        (lambda: svd_factors(X > 0), TypeError, "`bias` must be float16"),
        (
            lambda: svd_factors(X, 3),
            ValueError,
            "`rank` must be in 1..min(T, S) = 1..2",
        ),
        (lambda: svd_factors(X, THREE), TypeError, "`rank` must be an int"),
        (lambda: svd_factors(X, energy=0), ValueError, "`energy` must be in (0, 1]"),
        (lambda: svd_factors(X / 0, 1), ValueError, "`bias` must be finite"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
