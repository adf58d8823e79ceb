"""A score that every row has beside those of its keys, and whose value is 0."""

import functools
import itertools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_attn import DenseBias, dot_product_attention, Entmax, Softmax
from pallas_attn.linen import ALiBi, MultiHeadAttention
from pallas_attn.testing.cases import Case, KINDS, SITUATIONS
from pallas_attn.testing.evaluate import (
    EXACT,
    gradients,
    implementations,
    small,
    textbook,
    true_gradients,
    truth,
    values,
    written,
)
from pallas_attn.testing.numerics import (
    assert_formula,
    assert_rounding,
    assert_zero,
    GRADIENT_RATIO,
    OUTPUT_RATIO,
)


everywhere = pytest.mark.parametrize("implementation", implementations())
everywhere_and_dense = pytest.mark.parametrize(
    "implementation", [*implementations(), "reference"]
)
# What is pruned and what is not take turns: a sink knows no form of a bias.
added = itertools.cycle(["alibi", "sum"])
TABLE = [
    *(Case(bias, "causal GQA", (), "sink") for bias in KINDS),
    *(Case(next(added), situation, (), "sink") for situation in SITUATIONS),
    *(Case("co_alibi", situation, (), "sink") for situation in SITUATIONS),
]


def options(case, implementation):
    """Of a call of a case in float32."""
    config = small(case.bias, case.normalizer)
    return {"implementation": implementation, "config": config, **EXACT}


@pytest.mark.at_most(12)
@everywhere
@pytest.mark.parametrize("case", TABLE, ids=str)
def test_float32_is_exact(case, implementation):
    """The output, the log-sum-exp and every gradient, the sink's among them."""
    sample = case.sample()
    assert "normalizer" in sample.operands
    got = gradients(sample, **options(case, implementation))
    assert_formula(got, true_gradients(case, True))


@pytest.mark.at_most(5)
@everywhere
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("bias", KINDS)
def test_16_bits_round_like_xla(bias, dtype, implementation):
    case = Case(bias, "causal", (), "sink").at(dtype=dtype, N=8, K=2)
    sample = case.sample()
    config = small(bias, "sink")
    (output, _), got = gradients(
        sample, residual=False, implementation=implementation, config=config
    )
    pullback = jax.jit(lambda x, do: jax.vjp(textbook, x)[1](do)[0])
    (want, _), wanted = true_gradients(case, False)
    assert_rounding(output, jax.jit(textbook)(sample.operands), want, OUTPUT_RATIO)
    peer = pullback(sample.operands, sample.cotangents[0])
    assert_rounding(got, peer, wanted, GRADIENT_RATIO)


@pytest.mark.at_most(4)
@pytest.mark.parametrize("bias", KINDS)
def test_the_written_backward_is_that_of_autodiff(bias):
    case = Case(bias, "causal lengths GQA", (), "sink")
    assert_formula(written(case.sample()), true_gradients(case))


@pytest.mark.at_most(4)
@everywhere_and_dense
@pytest.mark.parametrize("bias", ["none", "alibi", "dense", "co_alibi"])
def test_no_sink_is_one_of_no_weight(bias, implementation):
    case = Case(bias, "causal")
    sample = case.sample()
    plain = values(sample, **options(case, implementation))
    for none in (
        Softmax(None),
        Softmax(jnp.full(sample.operands["query"].shape[2], -jnp.inf)),
    ):
        settings = {**sample.settings, "normalizer": none}
        assert_formula(
            values(replace(sample, settings=settings), **options(case, implementation)),
            plain,
        )


@everywhere_and_dense
@pytest.mark.parametrize("masked", [False, True])
def test_it_is_one_more_key(masked, implementation):
    """Whose score a bias sets, and whose value is 0."""
    rng = np.random.default_rng(7)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    B, T, S, N, H = 2, 19, 37, 4, 16
    q, k, v, do = draw(B, T, N, H), draw(B, S, N, H), draw(B, S, N, 8), draw(B, T, N, 8)
    sink, bias = 2 * draw(N), draw(1, N, T, S)
    mask = jnp.asarray(rng.random((B, 1, T, S)) < (0.1 if masked else 2.0))
    call = {"return_residual": True, **EXACT}

    def beside(q, k, v, bias, sink):
        return dot_product_attention(
            q, k, v, bias, mask, normalizer=Softmax(sink),
            implementation=implementation, config=small("dense"), **call,
        )  # fmt: skip

    def among(q, k, v, bias, sink):
        more = lambda x: jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0)))
        of_sink = jnp.broadcast_to(sink[None, :, None, None], (1, N, T, 1))
        return dot_product_attention(
            q, more(k), more(v), jnp.concatenate([bias, of_sink], -1),
            jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=True),
            implementation="xla", **call,
        )  # fmt: skip

    def both(f):
        out, back = jax.vjp(f, q, k, v, bias, sink)
        return out, back((do, out[1]))

    assert_formula(
        jax.jit(functools.partial(both, beside))(),
        jax.jit(functools.partial(both, among))(),
    )


@everywhere_and_dense
@pytest.mark.parametrize("bias", ["none", "alibi", "co_alibi"])
def test_a_row_that_sees_no_key_has_its_sink(bias, implementation):
    """As its residual, and the residual's cotangent is its gradient."""
    case = Case(bias, "full", (), "sink")
    sample = case.sample()
    B, T, N, _ = sample.operands["query"].shape
    mask = jnp.broadcast_to(jnp.arange(T)[:, None] < 5, (1, 1, T, 1))
    sample = replace(sample, conditions={"mask": mask})
    do, dlse = sample.cotangents
    sample = replace(sample, cotangents=(do, dlse.at[:, :5].set(0)))
    (output, lse), got = gradients(sample, **options(case, implementation))
    sink = sample.operands["normalizer"].sink
    assert_zero(output[:, 5:])
    np.testing.assert_array_equal(lse[:, 5:], jnp.broadcast_to(sink, (B, T - 5, N)))
    (_, _), others = gradients(
        replace(sample, cotangents=(do, 0 * dlse)), **options(case, implementation)
    )
    assert_formula(
        got["normalizer"].sink - others["normalizer"].sink, dlse[:, 5:].sum((0, 1))
    )


@everywhere_and_dense
@pytest.mark.parametrize("bias", ["none", "alibi", "co_alibi"])
def test_padding_is_no_row_and_has_no_sink(bias, implementation):
    """Nor does what its residual's cotangent has, NaN, come to the sink."""
    case = Case(bias, "full", (), "sink")
    sample = case.sample()
    B, T, _, _ = sample.operands["query"].shape
    do, dlse = sample.cotangents
    call = {"return_residual": True, **options(case, implementation)}

    def both(query, do, dlse, **more):
        def attend(operands):
            operands = {**operands, "query": query}
            return dot_product_attention(**operands, **sample.settings, **more, **call)

        out, back = jax.vjp(attend, sample.operands)
        return out, back((do, dlse))[0]

    query = sample.operands["query"]
    want = jax.jit(both)(query[:, :5], do[:, :5], dlse[:, :5])
    lengths = jnp.full((B,), 5, jnp.int32)
    bad = lambda x: x.at[:, 5:].set(jnp.nan)
    (output, lse), got = jax.jit(both)(
        bad(query), bad(do), bad(dlse), query_seq_lengths=lengths
    )
    assert_zero(output[:, 5:])
    assert np.isneginf(lse[:, 5:]).all()
    assert_formula(((output[:, :5], lse[:, :5]), got), want)


@everywhere
@pytest.mark.parametrize("level", [-1e9, -1e4, 1e9])
def test_what_a_whole_row_has_is_seen_by_its_sink(level, implementation):
    """Beside -1e9 it has all weight, and the residual all its digits."""
    case = Case("none", "full", (), "sink")
    sample = case.sample()
    _, T, N, _ = sample.operands["query"].shape
    bias = DenseBias(jnp.full((1, N, T, 1), level, jnp.float32))
    sample = replace(sample, operands={**sample.operands, "bias": bias})
    (output, lse), _ = gradients(sample, **options(case, implementation))
    if level < 0:
        assert_zero(output)
        sink = sample.operands["normalizer"].sink
        np.testing.assert_array_equal(lse, jnp.broadcast_to(sink, lse.shape))
    else:
        plain = replace(
            sample, operands={**sample.operands, "bias": None, "normalizer": Softmax()}
        )
        assert_formula(output, values(plain, **options(case, implementation))[0])


@everywhere
@pytest.mark.parametrize("offset", [0, 61, 2**20])
def test_queries_beyond_all_keys(offset, implementation):
    """What their keys share is no longer nothing: a sink sees it."""
    case = Case("alibi", "full", (), "sink")
    sample = case.sample()
    sample = replace(sample, settings={**sample.settings, "query_offset": offset})
    assert_formula(gradients(sample, **options(case, implementation)), truth(sample))


@everywhere_and_dense
def test_leading_axes_and_16_bits(implementation):
    """[N], [#B, N] of any leading axes; a gradient in its own shape and dtype."""
    rng = np.random.default_rng(3)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    T, S, N, H = 9, 21, 2, 16
    q, k, v = draw(2, 3, T, N, H), draw(2, 3, S, N, H), draw(2, 3, S, N, H)

    def total(sink, place=()):
        o = dot_product_attention(
            q[place], k[place], v[place], normalizer=Softmax(sink),
            implementation=implementation, config=small("none"), **EXACT,
        )  # fmt: skip
        return jnp.sum(jnp.sin(o))

    for shape in ((N,), (1, 1, N), (2, 1, N), (2, 3, N)):
        sink = draw(*shape)
        got = jax.grad(total)(sink)
        full = jnp.broadcast_to(sink, (2, 3, N))
        by_place = jnp.stack([
            jnp.stack([jax.grad(total)(full[a, b], (a, b)) for b in range(3)])
            for a in range(2)
        ])  # fmt: skip
        over = tuple(range(3 - len(shape))) + tuple(
            axis + 3 - len(shape) for axis, n in enumerate(shape[:-1]) if n == 1
        )
        assert_formula(got, by_place.sum(over).reshape(shape))
        narrow = sink.astype(jnp.bfloat16)
        assert jax.grad(total)(narrow).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("sink", "words"),
    [
        (jnp.zeros(3), r"`normalizer.sink`.*\[1 or B, N\] = \[1\|2, 4\]"),
        (jnp.zeros(4, jnp.int32), r"`normalizer.sink` must be float16.*got int32"),
        (jnp.full(4, jnp.inf), r"`normalizer.sink` must be below inf"),
        (0.5, r"`normalizer.sink`"),
    ],
    ids=["shape", "int", "inf", "number"],
)
def test_errors_say_what_to_do(sink, words):
    x = jnp.ones((2, 5, 4, 16))
    with pytest.raises((TypeError, ValueError), match=words):
        dot_product_attention(x, x, x, normalizer=Softmax(sink))


def test_it_is_a_pytree():
    """Of one leaf, or of none."""
    assert jax.tree.leaves(Softmax()) == []
    assert repr(Softmax()) == "Softmax()"
    assert repr(Softmax(jnp.zeros(4))) == "Softmax(sink=f32[4])"
    doubled = jax.tree.map(lambda x: 2 * x, Softmax(jnp.ones(4)))
    np.testing.assert_array_equal(doubled.sink, 2 * np.ones(4))


def test_it_is_mapped_along_any_axis():
    """As an operand of its own, and its axes as a pytree like it."""
    x = jnp.asarray(np.random.default_rng(2).standard_normal((2, 9, 4, 16)), "float32")
    attend = lambda n: dot_product_attention(x, x, x, normalizer=n)
    sinks = jnp.linspace(-1.0, 2.0, 12).reshape(3, 4)
    want = jnp.stack([attend(Softmax(sink)) for sink in sinks])
    for axis in (0, 1):
        given = Softmax(jnp.moveaxis(sinks, 0, axis))
        axes: Any = Softmax(axis)  # pyright: ignore[reportArgumentType]
        assert_formula(jax.vmap(attend, in_axes=(axes,))(given), want)


def test_a_layer_learns_one_score_per_head():
    """A parameter of its own, beside those of the layer without."""
    x = jnp.asarray(np.random.default_rng(2).standard_normal((2, 9, 16)), jnp.float32)
    plain = MultiHeadAttention(num_heads=4, bias=ALiBi(), is_causal=True)
    layer = MultiHeadAttention(num_heads=4, bias=ALiBi(), is_causal=True, sink=True)
    params: Any = layer.init(jax.random.key(0), x)["params"]
    assert params["sink"].shape == (4,)
    without = {k: v for k, v in params.items() if k != "sink"}
    of = lambda level: {**without, "sink": jnp.full(4, level)}
    apply = lambda params: jnp.asarray(layer.apply({"params": params}, x))
    assert_formula(apply(of(-jnp.inf)), plain.apply({"params": without}, x))
    loss = lambda params: jnp.sum(jnp.sin(apply(params)))
    assert np.abs(jax.grad(loss)(of(0.5))["sink"]).min() > 0
    with pytest.raises(ValueError, match="`sink=True` is a learned sink of `Softmax"):
        layer.clone(normalizer=Entmax(1.5)).init(jax.random.key(0), x)
