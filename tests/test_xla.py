"""Chunked attention is the dense reference, chunk by chunk and in linear memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_attn.bias.base import Added
from pallas_attn.bias.dense import DenseBias
from pallas_attn.call import Call
from pallas_attn.testing.cases import Case, KINDS, SITUATIONS
from pallas_attn.testing.evaluate import (
    attention,
    EXACT,
    gradients,
    true_gradients,
    with_gradients,
)
from pallas_attn.testing.jaxprs import largest_array
from pallas_attn.testing.numerics import assert_formula
from pallas_attn.visibility import Visibility
from pallas_attn.xla import chunks


XLA = {"implementation": "xla", **EXACT}
MIB = 2**20


@pytest.mark.at_most(8)
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("bias", ["dense-1NTS", "co_alibi"])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_chunks_are_the_whole_in_every_situation(situation, bias):
    case = Case(bias, situation)
    assert_formula(gradients(case.sample(), **XLA), true_gradients(case))


@pytest.mark.at_most(5)
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    "bias",
    [
        *KINDS,
        "dense-1N1S",
        "dense-B1T1",
        "alibi-BN",
        "sum-three dense",
        "co_alibi-BN",
        "co_alibi-negative",
    ],
)
def test_chunks_are_the_whole_with_every_bias(bias):
    case = Case(bias, "causal")
    assert_formula(gradients(case.sample(), **XLA), true_gradients(case))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("length", [1, 7, 8, 9, 17])
@pytest.mark.parametrize("bias", ["alibi", "co_alibi"])
def test_chunks_of_any_length(bias, length):
    case = Case(bias, "causal").at(T=length, S=length)
    assert_formula(gradients(case.sample(), **XLA), true_gradients(case))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("bias", ["sum", "co_alibi"])
def test_float64_is_float64(bias):
    case = Case(bias, "all at once")
    sample, want = case.sample(), true_gradients(case)
    with jax.enable_x64(True):
        wide = lambda x: x.astype(np.float64)
        operands, cotangents = jax.tree.map(wide, (sample.operands, sample.cotangents))
        evaluate = with_gradients(sample.settings, **XLA)
        got = jax.jit(evaluate)(operands, sample.conditions, cotangents)
        assert all(x.dtype == jnp.float64 for x in jax.tree.leaves(got))
        assert_formula(got, want)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("bias", ["sum", "co_alibi"])
@pytest.mark.parametrize("situation", ["causal", "lengths"])
def test_forward_mode_and_second_order(situation, bias):
    """The jvp, and the product of the Hessian of a loss with a vector."""
    sample = Case(bias, situation).sample()
    tangents = Case(bias, situation).sample(1).operands
    do, _ = sample.cotangents

    def derivatives(implementation):
        attend = attention(sample.settings, implementation=implementation, **EXACT)
        f = lambda x: attend(x, sample.conditions)[0]
        loss = lambda x: (f(x) ** 2 * do).sum()
        along = jax.jvp(f, (sample.operands,), (tangents,))
        curvature = jax.jvp(jax.grad(loss), (sample.operands,), (tangents,))[1]
        return along, curvature

    got = jax.jit(lambda: derivatives("xla"))()
    assert_formula(got, jax.jit(lambda: derivatives("reference"))())


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("form", ["1NTS", "B1TS", "11TS", "BN1S", "BNT1"])
def test_a_shared_bias_makes_no_array_of_all_pairs(form):
    """Forward and backward, its gradient too."""
    case = Case(f"dense-{form}", "causal lengths GQA").at(B=3)
    sample, s = case.sample(), case.sizes
    shape = largest_array(
        with_gradients(sample.settings, **XLA),
        sample.operands,
        sample.conditions,
        sample.cotangents,
    )
    assert np.prod(shape) < s.B * s.N * s.T * s.S


@pytest.mark.parametrize("bias", ["alibi", "co_alibi"])
def test_memory_grows_with_the_length_and_not_its_square(bias):
    def temporaries(length):
        sizes = {"B": 1, "N": 2, "K": 2, "T": length, "S": length}
        return temporary_bytes(Case(bias, "causal").at(**sizes).specs(), **XLA)

    assert temporaries(8192) < 2.2 * temporaries(4096)


@pytest.mark.parametrize("situation", ["full", "causal"])
@pytest.mark.parametrize("bias", ["alibi", "dense-1NTS"])
def test_an_eighth_of_the_temporaries_of_jax_nn(bias, situation):
    """Forward and backward at B1 N8 T2048 H64, every gradient included."""
    sizes = {"B": 1, "N": 8, "K": 8, "T": 2048, "S": 2048, "H": 64, "h": 64}
    sample = Case(bias, situation).at(**sizes).specs()

    def peer(query, key, value, bias):
        rows = jnp.arange(2048, dtype=jnp.int32)
        return jax.nn.dot_product_attention(
            query, key, value, bias.materialise(rows, rows), **sample.settings
        )

    loss = lambda x: peer(**x).sum()
    theirs = compiled_bytes(jax.jit(jax.grad(loss)).lower(sample.operands))
    assert temporary_bytes(sample, residual=False, **XLA) <= theirs / 8


@pytest.mark.parametrize("bias", ["alibi", "co_alibi"])
def test_32768_keys_need_no_array_of_scores(bias):
    """Two copies of each operand and a chunk, where scores alone would be 34 GB."""
    sizes = {"B": 1, "N": 8, "K": 8, "T": 32768, "S": 32768, "H": 64, "h": 64}
    sample = Case(bias, "causal").at(**sizes).specs()
    attend = jax.jit(attention(sample.settings, **XLA))
    lowered = attend.lower(sample.operands, sample.conditions)
    assert compiled_bytes(lowered) <= 512 * MIB


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("offset", [-20, 0, 16, 60])
@pytest.mark.parametrize("window", [None, (7, 0), (3, 9), (0, 0), (90, 90)])
@pytest.mark.parametrize("causal", [False, True])
def test_chunks_hold_every_visible_pair(causal, window, offset):
    """Each row is in a chunk with every key it may see."""
    call = Call(1, 1, 1, 37, 53, 8, 8, 1.0, "float32", causal, window, offset)
    plan = chunks.chunks(call, Visibility(), Added())
    held = np.zeros((37, 53), bool)
    for group in plan.groups:
        for t, s in zip(group.rows_from, group.keys_from, strict=True):
            assert 0 <= s <= 53 - group.keys
            held[t : t + plan.rows, s : s + group.keys] = True
    distance = np.arange(37)[:, None] + offset - np.arange(53)
    left, right = window or (99, 99)
    visible = (distance <= left) & (distance >= -right)
    if causal:
        visible &= distance >= 0
    assert held[visible].all()
    starts = [t for group in plan.groups for t in group.rows_from]
    assert starts == sorted(starts)


def test_far_keys_are_left_out():
    """Causal: at most 5/8 of all pairs are read; in a window, little but it."""

    def read(**options):
        call = Call(1, 8, 8, 4096, 4096, 64, 64, 1.0, "float32", **options)
        plan = chunks.chunks(call, Visibility(), Added())
        pairs = sum(g.keys * g.rows_from.size * plan.rows for g in plan.groups)
        return pairs / 4096**2

    assert read() == 1
    assert read(causal=True) <= 5 / 8
    assert read(window=(64, 0)) <= 1 / 4


def test_a_bias_of_all_pairs_has_one_loop():
    """Several would each make a whole gradient."""
    call = Call(1, 2, 2, 512, 512, 64, 64, 1.0, "float32", causal=True)
    groups = lambda *shape: len(
        chunks.chunks(
            call,
            Visibility(),
            Added((DenseBias(jnp.broadcast_to(jnp.float32(0), shape)),)),
        ).groups
    )
    assert groups(1, 2, 512, 512) == 1
    assert 1 < groups(1, 2, 1, 512) == groups(1, 2, 512, 1)


@pytest.mark.usefixtures("small_chunks")
def test_sums_over_chunks_are_float32():
    """A key's gradient in bfloat16 is rounded once, not once a chunk."""
    sample = Case("dense-1N1S", "causal").at(dtype=jnp.bfloat16).sample()
    _, got = gradients(sample, **XLA)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), sample.operands)
    f = lambda operands: with_gradients(sample.settings, **XLA)(
        operands, {}, tuple(x.astype(jnp.float32) for x in sample.cotangents)
    )
    _, want = jax.jit(f)(wide)
    # the output's own rounding is the one difference: none in these gradients
    unit = float(jnp.finfo(jnp.bfloat16).eps)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (np.abs(x.astype(np.float32) - y) <= unit * np.abs(y) + 1e-6).all()


def temporary_bytes(sample, **options):
    """Of a compiled forward and backward."""
    evaluate = jax.jit(with_gradients(sample.settings, **options))
    return compiled_bytes(
        evaluate.lower(sample.operands, sample.conditions, sample.cotangents)
    )


def compiled_bytes(lowered):
    """Temporaries that the compiler allocates."""
    analysis = lowered.compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes
