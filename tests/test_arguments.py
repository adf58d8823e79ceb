"""What an argument may look like, and what it then means."""

import functools
import itertools
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_attn import (
    ALiBi,
    CoALiBi,
    dot_product_attention,
    Entmax,
    FactoredBias,
    sparsity,
    visited,
)
from pallas_attn.testing.evaluate import EXACT, kernel_implementation
from pallas_attn.testing.numerics import assert_formula, assert_same_bits, assert_zero


T, S, N, K, H, h = 5, 7, 4, 2, 8, 6
LEADING = (2, 3)

# What comes before the implementations is the same for all: the quickest to compile.
DENSE = {"is_causal": True, "implementation": "reference"}


@pytest.fixture
def normal(getkey):
    return lambda *shape: jax.random.normal(getkey(), shape)


@pytest.fixture
def qkv(normal):
    """Operands without a leading axis, or with those given."""
    return lambda *leading: (
        normal(*leading, T, N, H),
        normal(*leading, S, K, H),
        normal(*leading, S, K, h),
    )


def attend(qkv, bias=None, **options):
    query, key, value = qkv
    options = {"return_residual": True, **EXACT, **options}
    return dot_product_attention(query, key, value, bias, **options)


def leading_forms():
    """Each of two leading axes 1 or full."""
    return [
        pytest.param(form, id="x".join(map(str, form)))
        for form in itertools.product(*((1, n) for n in LEADING))
    ]


FIELDS = {
    "dense": lambda lead, x: x(*lead, 1, T, S),
    "factored": lambda lead, x: FactoredBias(x(*lead, T, 1, 3), x(*lead, S, N, 3)),
    "alibi": lambda lead, x: ALiBi(abs(x(*lead, N))),
    "co_alibi": lambda lead, x: CoALiBi(abs(x(*lead, N))),
    "mixed": lambda lead, x: ALiBi(abs(x(N))) + x(*lead, 1, 1, S) + x(T, S),
}


@pytest.mark.parametrize("form", leading_forms())
@pytest.mark.parametrize("field", FIELDS)
def test_each_leading_axis_of_a_bias_is_one_or_full(field, form, qkv, normal):
    operands, bias = qkv(*LEADING), FIELDS[field](form, normal)

    def shared(x, place):
        if x.shape[:2] != form:  # a field without leading axes
            return x
        return x[tuple(min(i, n - 1) for i, n in zip(place, form, strict=True))]

    def all_at_once(bias):
        return attend(operands, bias, **DENSE)

    def one_by_one(bias):
        found = []
        for place in itertools.product(*(range(n) for n in LEADING)):
            one = jax.tree.map(functools.partial(shared, place=place), bias)
            found.append(attend([x[place] for x in operands], one, **DENSE))
        return jax.tree.map(
            lambda *x: jnp.stack(x).reshape(*LEADING, *x[0].shape), *found
        )

    @functools.partial(jax.jit, static_argnums=0)
    def with_gradient(f, bias):
        found, pullback = jax.vjp(f, bias)
        return found, pullback(jax.tree.map(jnp.ones_like, found))

    assert_formula(with_gradient(all_at_once, bias), with_gradient(one_by_one, bias))


@pytest.mark.parametrize("form", leading_forms())
def test_each_leading_axis_of_positions_is_one_or_full(form, qkv):
    operands, alibi = qkv(*LEADING), ALiBi(jnp.ones(N))
    mask = jnp.ones((*form, 1, T, S), bool).at[..., 2].set(False)
    rows = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32) + 3, (*form, T))
    placed, by_head, offset, static = (
        attend(operands, alibi, **places, **DENSE)
        for places in (
            {"query_positions": rows, "mask": mask},
            {
                "query_positions": jnp.repeat(rows[..., None, :], N, axis=-2),
                "key_positions": jnp.arange(S, dtype=jnp.int32),
                "mask": mask,
            },
            {
                "query_offset": jnp.full(form, 3, jnp.int32),
                "mask": jnp.broadcast_to(mask, (*LEADING, N, T, S)),
            },
            {"query_offset": 3, "mask": mask},
        )
    )
    for other in (placed, by_head, offset):
        assert_formula(other, static)


def test_fewer_axes_align_to_the_right(qkv, normal):
    operands, bias = qkv(2), normal(T, S)
    full = jnp.broadcast_to(bias, (2, N, T, S))
    want = attend(operands, full, mask=full > -1)
    for rank in (2, 3, 4):
        fewer = bias.reshape((1,) * (rank - 2) + (T, S))
        assert_formula(attend(operands, fewer, mask=fewer > -1), want)
    assert_formula(attend(operands, jnp.float32(0.5)), attend(operands, full * 0 + 0.5))


def test_a_call_of_jax_nn_is_a_call_of_ours(qkv, normal):
    for leading in ((), (2,)):
        query, key, value = qkv(*leading)
        value = jnp.concatenate([value, value], -1)[..., :H]
        arguments = {
            "bias": normal(1, N, T, S),
            "mask": (normal(1, 1, T, S) > -1) | jnp.eye(T, S, dtype=bool)[None, None],
            "scale": 0.3,
            "is_causal": True,
            "query_seq_lengths": jnp.full(leading or (1,), 4, jnp.int32),
            "key_value_seq_lengths": jnp.full(leading or (1,), 6, jnp.int32),
            "local_window_size": (3, 1),
            "return_residual": True,
        }
        with jax.numpy_rank_promotion("allow"):
            output, lse = jax.nn.dot_product_attention(query, key, value, **arguments)
        got = dot_product_attention(query, key, value, **arguments)
        chex.assert_trees_all_equal_shapes_and_dtypes(got, (output, lse))
        real = (..., slice(4), slice(None))  # jax.nn has its own lse of padded rows
        assert_formula(got[0], output)
        assert_formula(got[1][real], lse[real])


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_numpy_arrays_and_integers_are_converted(dtype, qkv, normal):
    operands = [x.astype(dtype if dtype == "bfloat16" else "float32") for x in qkv(2)]
    arrays = [np.asarray(x) for x in operands]
    if dtype == "float64":  # JAX takes it as float32 without x64
        arrays = [x.astype(dtype) for x in arrays]
    bias, slopes = normal(T, S), abs(normal(N))
    ids = np.arange(2 * T).reshape(2, T) // 3, np.arange(2 * S).reshape(2, S) // 3
    options = {
        "is_causal": np.bool_(True),
        "scale": np.float64(0.25),
        "local_window_size": np.int64(4),
    }
    got = attend(
        arrays,
        np.asarray(bias) + ALiBi(np.asarray(slopes)),  # pyright: ignore
        mask=np.asarray(bias) > -1,
        query_offset=np.int64(2),
        query_seq_lengths=np.asarray([4, 2**40]),
        key_value_seq_lengths=np.asarray([-(2**40), 6], np.int64),
        query_segment_ids=ids[0],
        key_segment_ids=ids[1].astype(np.uint8),
        **options,
    )
    want = attend(
        operands,
        bias + ALiBi(slopes),
        mask=bias > -1,
        query_offset=2,
        query_seq_lengths=jnp.asarray([4, 5], jnp.int32),
        key_value_seq_lengths=jnp.asarray([0, 6], jnp.int32),
        query_segment_ids=jnp.asarray(ids[0], jnp.int32),
        key_segment_ids=jnp.asarray(ids[1], jnp.int32),
        is_causal=True,
        scale=0.25,
        local_window_size=4,
    )
    assert_same_bits(got, want)


def test_a_scale_may_be_any_number(qkv, normal):
    operands, bias = qkv(2), normal(T, S)
    query, *rest = operands
    assert_same_bits(
        attend(operands, bias), attend(operands, bias, scale=1 / math.sqrt(H))
    )
    for scale in (0.3, 2, 1e-30, 0.0, -0.7):
        got = attend(operands, bias, scale=scale)
        assert_formula(got, attend([query * scale, *rest], bias, scale=1.0))
        for array in (jnp.float32(scale), np.float64(scale), np.asarray(scale)):
            assert_formula(attend(operands, bias, scale=array), got)


def test_a_scale_of_0_averages(qkv):
    query, key, value = qkv(2)
    got, lse = attend((query, key, value), scale=0.0)
    mean = jnp.repeat(value.mean(1, keepdims=True), N // K, axis=2)
    assert_formula(got, jnp.broadcast_to(mean, got.shape))
    assert_formula(lse, jnp.full_like(lse, math.log(S)))


def test_a_learned_scale_has_a_gradient(qkv):
    operands = qkv(2)
    query, *rest = operands

    def loss(scale, query):
        return jnp.sum(attend([query, *rest], scale=scale)[0] ** 2)

    dscale, dquery = jax.jit(jax.grad(loss, argnums=(0, 1)))(jnp.float32(0.4), query)
    assert_formula(dscale, jnp.sum(dquery * query) / 0.4)


def test_a_window_without_end_hides_nothing(qkv):
    operands = qkv(2)
    endless = attend(operands, local_window_size=2**62)
    assert_formula(endless, attend(operands))


SIZES = {"T": (2, 0, S), "S": (2, T, 0), "B": (0, T, S), "all": (0, 0, 0)}
IMPLEMENTATIONS = ("xla", "reference", kernel_implementation())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("size", SIZES.values(), ids=list(SIZES))
def test_empty_sizes_have_right_shapes_and_no_gradient(size, implementation, normal):
    B, T, S = size
    given = {
        "query": normal(B, 3, T, N, H),
        "key": normal(B, 3, S, K, H),
        "value": normal(B, 3, S, K, h),
        "bias": ALiBi(jnp.ones(N)) + normal(T, S),
    }

    def outputs(given):
        return dot_product_attention(
            **given, is_causal=True, implementation=implementation, return_residual=True
        )

    (output, lse), pullback = jax.vjp(outputs, given)
    chex.assert_shape([output, lse], [(B, 3, T, N, h), (B, 3, T, N)])
    assert_zero(output)
    assert np.all(np.isneginf(lse))
    gradients = pullback((output + 1, jnp.ones_like(lse)))
    chex.assert_trees_all_equal_shapes_and_dtypes(gradients, (given,))
    assert_zero(gradients)
    shares = visited(**given, implementation=implementation)
    chex.assert_tree_shape_prefix(tuple(shares), (B, 3, N))


@pytest.mark.parametrize(
    ("alpha", "residual"),
    [(1.0, -np.inf), (1.5, np.inf), ([1.0, 1.5, 2.0, 1.0], None)],
    ids=["1", "1.5", "learned"],
)
def test_empty_sizes_of_entmax(alpha, residual, normal):
    if residual is None:
        alpha = jnp.array(alpha)
        residual = jnp.where(alpha == 1, -jnp.inf, jnp.inf)
    query, nothing = normal(2, 3, T, N, H), normal(2, 3, 0, K, H)

    def outputs(alpha):
        return attend((query, nothing, nothing), normalizer=Entmax(alpha, 3))

    output, tau = outputs(alpha)
    assert_zero(output)
    np.testing.assert_array_equal(tau, np.broadcast_to(residual, tau.shape))
    shares = sparsity(query, nothing, nothing, normalizer=Entmax(alpha))
    assert_same_bits(tuple(shares), (jnp.zeros((2, 3, N)),) * 2)


ENTMAX = ("xla", "reference")


@pytest.mark.parametrize("implementation", ENTMAX)
def test_numbers_that_alpha_and_top_k_may_be(implementation, qkv):
    operands = qkv(2)
    found = functools.partial(attend, operands, implementation=implementation)
    want = found(normalizer=Entmax(1.5, 3))
    for alpha in (np.float32(1.5), np.float64(1.5)):
        normalizer: Any = Entmax(alpha, np.int64(3))  # pyright: ignore
        assert_same_bits(found(normalizer=normalizer), want)
    assert_same_bits(found(normalizer=Entmax(2)), found(normalizer=Entmax(2.0)))
    per_head = np.full(N, 1.5)
    for dtype in ("float16", "float32", "float64"):
        normalizer = Entmax(per_head.astype(dtype), 3)  # pyright: ignore
        assert_formula(found(normalizer=normalizer), want)


def test_alpha_has_a_gradient_of_its_dtype(qkv):
    operands = qkv(2)
    loss = lambda alpha: attend(operands, normalizer=Entmax(alpha))[0].sum()
    for dtype in (jnp.bfloat16, jnp.float32):
        assert jax.grad(loss)(jnp.full(N, 1.5, dtype)).dtype == dtype


@pytest.mark.parametrize("implementation", ENTMAX)
def test_entmax_in_float64_stays_float64(implementation, qkv):
    with jax.enable_x64(True):
        operands = [x.astype("float64") for x in qkv(2)]
        for alpha in (1.5, jnp.full(N, 1.5, "float32"), jnp.full(N, 1.5)):
            got = attend(
                operands, normalizer=Entmax(alpha), implementation=implementation
            )
            chex.assert_trees_all_equal_dtypes(got, (np.zeros(1), np.zeros(1)))


@pytest.mark.parametrize("leading", [(), (2,), (2, 3)], ids=str)
def test_sparsity_has_the_leading_axes(leading, qkv):
    shares = sparsity(
        *qkv(*leading), is_causal=True, implementation="xla", normalizer=Entmax(2.0)
    )
    for share in shares:
        assert share.dtype == jnp.float32
        assert share.shape == (*leading, N)
    nothing = sparsity(*qkv(*leading), implementation="xla")
    assert_same_bits(tuple(nothing), (jnp.zeros((*leading, N)),) * 2)


@pytest.mark.parametrize("leading", [(), (2,), (2, 3)], ids=str)
def test_visited_has_the_leading_axes(leading, qkv):
    shares = visited(*qkv(*leading), is_causal=True, implementation="xla")
    for share in shares:
        assert share.dtype == jnp.float32
        assert_same_bits(share, jnp.ones((*leading, N)))


def test_with_x64_on_indices_may_be_wide(qkv):
    operands = qkv(2)
    alibi = ALiBi(jnp.ones(N))

    def step(i, total):
        return total + attend(operands, alibi, is_causal=True, query_offset=i)[0]

    want = sum(
        attend(operands, alibi, is_causal=True, query_offset=i)[0] for i in range(3)
    )
    with jax.enable_x64(True):
        got = jax.lax.fori_loop(0, 3, step, jnp.zeros_like(want))
        wide = attend(operands, ALiBi(jnp.ones(N, "float64")), is_causal=True)
    assert got.dtype == jnp.float32
    assert_formula(got, want)
    assert_same_bits(wide, attend(operands, alibi, is_causal=True))


@pytest.mark.parametrize("implementation", [None, "xla", "reference"])
def test_float64_stays_float64(implementation, qkv):
    with jax.enable_x64(True):
        operands = [x.astype("float64") for x in qkv(2)]
        alibi = ALiBi(jnp.ones(N, "float32"))
        got = attend(operands, alibi, implementation=implementation)
    chex.assert_trees_all_equal_dtypes(got, (np.zeros(1), np.zeros(1)))
