"""What the formulas of entmax and top-k say beyond the table of cases.

Samples are generic: where a score equals the threshold exactly, sparsemax has two
derivatives, and float32 may be on the other side of it than float64.
"""

import dataclasses
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pallas_attn import (
    ALiBi,
    Bias,
    Block,
    Config,
    DenseBias,
    dot_product_attention,
    Entmax,
    head_home,
    query_home,
    Softmax,
    sparsity,
    visited,
)
from pallas_attn.normalizers.entmax import Learned, Power, takes_power
from pallas_attn.reference.entmax import entmax, largest
from pallas_attn.testing.cases import ALPHAS, Case, normal, NORMALIZERS, TOP_K
from pallas_attn.testing.evaluate import (
    attention,
    called,
    EXACT,
    gradients,
    implementations,
    kernel_implementation,
    SMALL_ENTMAX,
    textbook,
    true_gradients,
    truth,
    with_gradients,
    written,
)
from pallas_attn.testing.numerics import (
    assert_formula,
    assert_rounding,
    assert_same_bits,
    assert_zero,
    GRADIENT_RATIO,
    OUTPUT_RATIO,
)
from pallas_attn.tiled.operands import Wanted
from pallas_attn.triton.entmax import route
from pallas_attn.triton.entmax.lists import candidates, passes as over_lists


everywhere = pytest.mark.parametrize("implementation", implementations())
everywhere_and_dense = pytest.mark.parametrize(
    "implementation", [*implementations(), "reference"]
)
alphas = pytest.mark.parametrize("alpha", ALPHAS)

SPARSE = [name for name in NORMALIZERS if name.startswith("entmax")]
MET_BIASES = ("none", "alibi", "dense-1NTS", "factored", "sum", "saturating", "dense")
MET_SITUATIONS = (
    "causal",
    "full",
    "causal lengths GQA",
    "mask BNTS",
    "positions shuffled",
    "segments",
    "window",
    "all at once",
    "bottom-right",
    "lengths",
    "empty rows",
)
# every alpha with every top_k
WIDE = [
    Case(bias, situation, (), normalizer)
    for normalizer, bias, situation in zip(
        SPARSE, itertools.cycle(MET_BIASES), itertools.cycle(MET_SITUATIONS)
    )
]
# every alpha, every top_k, every bias and every situation
NARROW = [
    Case(bias, situation, (), normalizer)
    for normalizer, bias, situation in [
        ("entmax 1.5", "none", "causal"),
        ("entmax 1.5", "dense-1NTS", "full"),
        ("entmax 2.0", "alibi", "causal lengths GQA"),
        ("entmax 1.25", "factored", "mask BNTS"),
        ("entmax 1.1", "sum", "positions shuffled"),
        ("entmax 1.75", "saturating", "segments"),
        ("entmax 1.001", "dense", "bottom-right"),
        ("entmax learned", "alibi", "all at once"),
        ("entmax learned", "none", "empty rows"),
        ("entmax 1.0 top 8", "none", "lengths"),
        ("entmax 1.5 top 3", "alibi", "causal"),
        ("entmax 2.0 top 33", "dense", "window"),
        ("entmax 1.75 top 1", "factored", "bottom-right"),
        ("entmax 1.5 top 1", "alibi", "causal"),
        ("entmax 1.25 top 99", "none", "all at once"),
        ("entmax learned top 8", "sum", "causal lengths GQA"),
    ]
]
# the residual has a cotangent in every other case
PLACED = [
    *((case, place % 2 == 0, "xla") for place, case in enumerate(WIDE)),
    *((x, place % 2 == 1, kernel_implementation()) for place, x in enumerate(NARROW)),
]


def options(implementation) -> dict:
    return {"implementation": implementation, "config": SMALL_ENTMAX, **EXACT}


def with_operands(sample, **operands):
    return dataclasses.replace(sample, operands={**sample.operands, **operands})


def weights_of(scores, normalizer, implementation, **changed):
    """(P [T, S], residual [T]) of logits: those of a bias, and the values are eye."""
    rows, cols = scores.shape
    zero = lambda n: jnp.zeros((n, 1, 16), scores.dtype)
    output, residual = dot_product_attention(
        zero(rows),
        zero(cols),
        jnp.eye(cols, dtype=scores.dtype)[:, None, :],
        scores,
        normalizer=normalizer,
        return_residual=True,
        **options(implementation) | changed,
    )
    return output[:, 0], residual[:, 0]


def in_numpy(scores, alpha, top_k):
    """(P, tau) of rows in float64, by a stable sort and a bisected threshold."""
    scores = np.asarray(scores, np.float64)
    order = np.argsort(-scores, axis=1, kind="stable")
    rank = np.argsort(order, axis=1)
    kept = rank < (scores.shape[1] if top_k is None else top_k)
    a = alpha - 1
    if a == 0:
        e = np.where(kept, np.exp(scores), 0)
        return e / e.sum(1, keepdims=True), np.log(e.sum(1))
    x = np.where(kept, a * scores, -np.inf)
    high = x.max(1)
    low = high - 1
    for _ in range(80):
        middle = (low + high) / 2
        total = (np.maximum(x - middle[:, None], 0) ** (1 / a)).sum(1)
        low = np.where(total >= 1, middle, low)
        high = np.where(total < 1, middle, high)
    return np.maximum(x - low[:, None], 0) ** (1 / a), low


# Rows of which a bound finds many more than k keys: [S] from the index of a key.
CROWDED = {
    "all but the last are equal": lambda j: np.where(j == j[-1], 2.0, 1.0),
    "the largest come last": lambda j: np.where(j == j[-1], -1.0, -2e3 + j / 64),
    "the largest come first": lambda j: np.where(j == 0, -1.0, -2e3 - j / 64),
    "three largest of two sizes": lambda j: np.where(j % 73 == 44, 0.9, j % 2 * 0.6),
}


@pytest.mark.at_most(4)
@pytest.mark.parametrize("top_k", [2, 8])
@pytest.mark.parametrize("block_k", [16, 32, 64, 128])
@pytest.mark.parametrize("row", CROWDED)
def test_more_keys_than_a_list_has_room_for(row, block_k, top_k):
    """A list drops no key that is among the largest, in blocks of any size."""
    keys = np.arange(197)
    scores = jnp.array(np.stack([CROWDED[row](keys)] * 5), jnp.float32)
    block = Block(32, block_k)
    for alpha in (1.0, 2.0):
        got = weights_of(
            scores,
            Entmax(alpha, top_k),
            kernel_implementation(),
            config=Config(forward=block, rows=block, cols=block),
        )
        assert_formula(got, in_numpy(scores, alpha, top_k))


@pytest.mark.at_most(4)
@pytest.mark.parametrize(("case", "residual", "implementation"), PLACED, ids=str)
def test_values_and_every_gradient(case, residual, implementation):
    sample = case.sample()
    got = gradients(sample, residual=residual, **options(implementation))
    chex.assert_trees_all_equal_shapes_and_dtypes(got[1], sample.operands)
    assert_formula(got, true_gradients(case, residual))


@pytest.mark.parametrize("top_k", [None, *TOP_K])
@alphas
def test_the_reference_is_the_definition(alpha, top_k):
    """Of scores on a grid too: of equal ones the first are kept."""
    drawn = np.random.default_rng(0).normal(size=(40, 53)) * 2
    for scores in (drawn, 0.3 * np.round(drawn)):
        with jax.enable_x64(True):
            normalizer = Entmax(alpha, top_k)
            got = weights_of(jnp.asarray(scores), normalizer, "reference")
        assert_formula(got, in_numpy(scores, alpha, top_k))
        np.testing.assert_array_equal(
            np.asarray(got[0]) == 0, in_numpy(scores, alpha, top_k)[0] == 0
        )


@pytest.mark.parametrize("situation", ["full", "empty rows", "all at once"])
@pytest.mark.parametrize(
    "normalizer",
    ["entmax 1.1", "entmax 1.5 top 8", "entmax 2.0", "entmax 1.0 top 3"]
    + ["entmax learned", "entmax learned top 8"],
)
def test_the_written_backward_is_the_derivative(normalizer, situation):
    """In float64, with cotangents of the output and of the residual."""
    case = Case("sum", situation, (), normalizer)
    assert_formula(written(case.sample()), true_gradients(case))


@pytest.mark.at_most(3)
@everywhere
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("normalizer", "bias"),
    [
        ("entmax 1.5", "none"),
        ("entmax 2.0", "dense-1NTS"),
        ("entmax 1.5 top 8", "alibi"),
        ("entmax learned", "factored"),
    ],
)
def test_16_bits_round_like_xla(normalizer, bias, dtype, implementation):
    case = Case(bias, "causal", (), normalizer).at(dtype=dtype)
    sample = case.sample()
    how = {"implementation": implementation, "config": SMALL_ENTMAX}
    (output, _), got = gradients(sample, residual=False, **how)
    chex.assert_trees_all_equal_dtypes(got, sample.operands)

    @jax.jit
    def pull(operands, do):
        found, pullback = jax.vjp(textbook, operands)
        return found, pullback(do)[0]

    peer, theirs = pull(sample.operands, sample.cotangents[0])
    (true, _), want = true_gradients(case, False)
    assert_rounding(output, peer, true, OUTPUT_RATIO)
    assert_rounding(got, theirs, want, GRADIENT_RATIO)


@everywhere_and_dense
@pytest.mark.parametrize(
    "normalizer", [Entmax(1.0), Entmax(1.0, 53), Entmax(1.0, 99)], ids=repr
)
def test_alpha_of_1_is_softmax(normalizer, implementation):
    sample = Case("alibi", "causal").sample()
    got = gradients(
        with_operands(sample, normalizer=normalizer), **options(implementation)
    )
    del got[1]["normalizer"]
    softmax = with_gradients(
        {**sample.settings, "normalizer": Softmax()}, **options(implementation)
    )
    want = jax.jit(softmax)(sample.operands, sample.conditions, sample.cotangents)
    assert_same_bits(got, want)


@everywhere_and_dense
@pytest.mark.parametrize("spread", [0.3, 1.0, 5.0])
def test_alpha_of_2_is_the_projection_onto_the_simplex(spread, implementation):
    scores = spread * normal(jax.random.key(0), 20, 37)
    got, _ = weights_of(scores, Entmax(2.0), implementation)
    project = lambda row: optax.projections.projection_simplex(row)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        want = jnp.stack([project(row) for row in scores])
    assert_formula(got, want)


@everywhere_and_dense
@pytest.mark.parametrize(
    ("normalizer", "weights", "tau"),
    [
        (Entmax(1.5), [0.433888, 0.066927, 0.370518, 0, 0.128667], -0.158702),
        (Entmax(2.0), [0.55, 0, 0.45, 0, 0], 0.45),
        (Entmax(1.5, 3), [0.460911, 0, 0.395521, 0, 0.143568], None),
    ],
    ids=repr,
)
def test_rows_to_check_by_eye(normalizer, weights, tau, implementation):
    scores = jnp.array([[1, 0.2, 0.9, -1.5, 0.4]])
    got, residual = weights_of(scores, normalizer, implementation)
    # written with six digits
    assert np.abs(got[0] - np.float32(weights)).max() <= 1e-6
    assert tau is None or abs(residual[0] - tau) <= 1e-6


ROWS = {
    "flat": lambda x: 0 * x,
    "peaked": lambda x: x.at[:, 5].add(60.0),
    "tied": lambda x: 0.3 * jnp.round(x),
    "huge": lambda x: 1e4 * x,
    "tiny": lambda x: 1e-4 * x,
    "far from 0": lambda x: x - 300.0,
    "lowered": lambda x: x - 1e9,
}


@pytest.mark.at_most(3)
@everywhere_and_dense
@pytest.mark.parametrize(
    ("normalizer", "dtype"),
    [
        *((f"entmax {alpha}", "float32") for alpha in (1.1, 1.25, 1.5, 1.75, 2.0)),
        ("entmax learned", "float32"),
        ("entmax 1.5 top 8", "float32"),
        ("entmax 2.0 top 3", "float32"),
        ("entmax 1.75", "bfloat16"),
        ("entmax 2.0 top 3", "float16"),
    ],
)
def test_weights_of_any_row_add_up_to_1(normalizer, dtype, implementation):
    s = Case("none").at(N=4, K=1, T=16, dtype=jnp.dtype(dtype)).sizes
    close = 1e-5 if dtype == "float32" else float(jnp.finfo(s.dtype).eps)
    keys = jax.random.split(jax.random.key(3), len(ROWS))
    for make, key in zip(ROWS.values(), keys, strict=True):
        rows = make(normal(key, s.T, s.S))[None].at[:, 7].set(-jnp.inf)
        output, residual = dot_product_attention(
            jnp.zeros((s.T, s.N, s.H), s.dtype),
            jnp.zeros((s.S, s.K, s.H), s.dtype),
            jnp.ones((s.S, s.K, 1), s.dtype),
            rows,
            normalizer=NORMALIZERS[normalizer](key, s),
            return_residual=True,
            **options(implementation),
        )
        alive = np.arange(s.T) != 7
        assert np.abs(output[alive].astype(jnp.float32) - 1).max() <= close
        assert np.isfinite(residual[alive]).all()
        assert_zero(output[~alive])
        assert np.isinf(residual[~alive]).all()


@pytest.mark.at_most(3)
@everywhere
@pytest.mark.parametrize(
    "normalizer", ["entmax 1.5", "entmax 2.0", "entmax 1.5 top 8", "entmax learned"]
)
def test_tied_scores(normalizer, implementation):
    """Scores on a grid of 0.15, of which no threshold of sparsemax is a point."""
    sample = Case("none", "causal", (), normalizer).sample()
    query, key = (jnp.round(sample.operands[x]) for x in ("query", "key"))
    tied = dataclasses.replace(
        with_operands(sample, query=query, key=key),
        settings={**sample.settings, "scale": 0.15},
    )
    assert_formula(gradients(tied, **options(implementation)), truth(tied))


@pytest.mark.at_most(3)
@everywhere
@pytest.mark.parametrize("factor", [0.01, 9.0])
@pytest.mark.parametrize(
    "normalizer", ["entmax 1.25", "entmax 1.5", "entmax 2.0", "entmax 1.5 top 8"]
)
def test_scores_of_any_size(normalizer, factor, implementation):
    sample = Case("none", "causal lengths GQA", (), normalizer).sample()
    sample = with_operands(sample, query=sample.operands["query"] * factor)
    assert_formula(gradients(sample, **options(implementation)), truth(sample))


def test_every_alpha_has_its_digits():
    """Of weights and their derivatives, by the form that alpha takes in a kernel."""
    gaps = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.05, 0.0999, 0.1, 0.11, 0.25, 0.5, 1)
    x = -np.linspace(0, 12, 97)
    for a in (float(np.float32(1 + gap)) - 1 for gap in gaps):
        power = Power(a) if takes_power(1 + a) else Learned(a)
        for largest_weight in (1.0, 0.4, 0.01):
            level = jnp.float32(power.level_of(largest_weight))
            z = np.maximum(largest_weight**a + a * x, 0)
            want = (
                z ** (1 / a),
                np.where(z > 0, np.where(z > 0, z, 1) ** (1 / a - 1), 0),
            )
            assert_formula(
                power.weights(jnp.float32(x), jnp.float32(0), level, 1), want
            )


@pytest.mark.parametrize("largest_weight", [1.0, 0.7, 0.4, 0.1, 0.01])
@pytest.mark.parametrize("a", [0.001, 0.1, 0.3, 0.5, 0.75, 0.999, 1.0])
def test_the_derivative_by_alpha_has_its_digits(a, largest_weight):
    """And is a number where a score is at the threshold but for rounding."""
    a = float(np.float32(a))
    learned = Learned(jnp.float32(a))
    level = jnp.float32(learned.level_of(largest_weight))
    by_alpha = lambda x: learned.by_alpha(jnp.float32(x), jnp.float32(0), level, 1.0)
    gap = largest_weight**a
    x = -np.linspace(0, 12, 97)
    z = np.maximum(gap + a * x, 1e-30)
    h = -(1 - z) / (a * a * z) - np.log(z) / a**2
    assert_formula(by_alpha(x), np.where(z > 1e-30, z ** (1 / a) * h, 0))
    edge = -gap / a * (1 + 2.0**-24 * np.arange(-32, 33))
    assert np.isfinite(by_alpha(edge)).all()


@everywhere_and_dense
@pytest.mark.parametrize("alpha", [1 + 1e-9, 1.0001, 1.001, 1.01, 1.05, 1.1, 1.3])
def test_a_number_has_the_digits_of_alpha_minus_1(alpha, implementation):
    """Tau holds alpha - 1 times the largest score, here up to 5000."""
    drawn = np.random.default_rng(0).normal(size=(16, 37)) * 2
    scores = np.float32(drawn + np.linspace(-5000, 5000, 16)[:, None])
    got = weights_of(jnp.asarray(scores), Entmax(alpha), implementation)
    assert_formula(got, in_numpy(scores, alpha, None))


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("largest_weight", [0.5, 0.01, 0.001])
@pytest.mark.parametrize("a", [0.25, 0.5, 0.75, 1.0])
def test_alpha_moves_a_weight_of_nearly_0_by_nearly_nothing_more(
    a, largest_weight, listed
):
    """Scores one float after another across the threshold: p > 0 is p^a > 0.

    Args:
        a: Alpha less 1.
        largest_weight: Of the row.
        listed: Whether p is given, as a list has it.
    """
    power, level = Learned(a), jnp.float32(np.log(largest_weight))
    ulps = np.arange(-64, 256, dtype=np.float32) * np.float32(2.0**-24)
    x = jnp.asarray(np.float32(-(largest_weight**a) / a) * (1 - ulps))
    p, u = power.weights(x, jnp.float32(0), level, 1)
    nothing, some = jnp.zeros_like(x), p > 0
    assert some.any()
    if listed:
        got = power.by_alpha(nothing, nothing, jnp.log(jnp.where(some, p, 1)), 1)
    else:
        got = power.by_alpha(x, jnp.float32(0), level, 1)
    p, u, some = (np.float64(y) for y in (p, u, some))
    z = np.where(p > 0, p, 1) ** a
    want = (-u * (1 - z) - p * np.log(z)) / a**2
    assert_formula(jnp.where(some > 0, got, 0), want)


@everywhere
def test_a_learned_alpha_is_a_static_one(implementation):
    sample = Case("alibi", "causal", (), "entmax 1.5").sample()
    learned = with_operands(sample, normalizer=Entmax(jnp.full(2, 1.5)))
    names = ("query", "key", "value", "bias")
    values, got = gradients(learned, **options(implementation))
    true_values, want = true_gradients(Case("alibi", "causal", (), "entmax 1.5"))
    assert_formula(values, true_values)
    assert_formula([got[x] for x in names], [want[x] for x in names])


@pytest.mark.parametrize("top_k", [None, 8])
@pytest.mark.parametrize("alpha", [1.0, 1.0 + 1e-9, 1.01, 1.1, 1.5, 1.9])
def test_the_derivative_by_alpha_is_that_of_differences(alpha, top_k):
    """Of the weights and of tau; at 1 the residual is another function, without one."""
    with jax.enable_x64(True):
        t = 2 * jax.random.normal(jax.random.key(0), (30, 53), jnp.float64)
        t = jnp.where(largest(t, top_k), t, -jnp.inf)
        at = lambda alpha: entmax(t, jnp.full((1, 1), alpha) - 1)
        step, of_tau = 1e-5, None
        if alpha - 1 < step:  # one-sided, of the same order
            (x, _), (y, _), (z, _) = (at(alpha + i * step) for i in range(3))
            want = (4 * y - 3 * x - z) / (2 * step)
        else:
            ends = at(alpha + step), at(alpha - step)
            want, of_tau = ((x - y) / (2 * step) for x, y in zip(*ends, strict=True))
        one = jnp.ones((), jnp.float64)
        _, (got, dtau) = jax.jvp(at, (alpha * one,), (one,))
        assert jnp.abs(got - want).max() < 1e-6
        if of_tau is not None:
            assert jnp.abs(dtau - of_tau).max() < 1e-6
        elif alpha == 1:
            assert_zero(dtau)


@pytest.mark.at_most(3)
@pytest.mark.parametrize("normalizer", ["entmax 1.5", "entmax learned top 8"])
@pytest.mark.parametrize("situation", ["causal", "lengths"])
def test_forward_mode_and_second_order(situation, normalizer, small_chunks):
    """The jvp, and the product of the Hessian of a loss with a vector."""
    case = Case("alibi", situation, (), normalizer)
    sample, tangents = case.sample(), case.sample(1).operands
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


@pytest.mark.at_most(3)
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("normalizer", ["entmax 1.5", "entmax learned top 8"])
@pytest.mark.parametrize(
    "situation", ["causal lengths GQA", "all at once", "positions per head"]
)
def test_chunks_are_the_whole(situation, normalizer):
    case = Case("sum", situation, (), normalizer)
    assert_formula(gradients(case.sample(), **options("xla")), true_gradients(case))


@pytest.mark.parametrize("normalizer", ["entmax 1.5", "entmax learned top 8"])
def test_float64_is_float64(normalizer):
    """To its own rounding: far below that of float32."""
    case = Case("alibi", "all at once", (), normalizer)
    sample, want = case.sample(), true_gradients(case)
    with jax.enable_x64(True):
        wide = lambda x: x.astype(np.float64)
        operands, cotangents = jax.tree.map(wide, (sample.operands, sample.cotangents))
        evaluate = with_gradients(sample.settings, implementation="xla", **EXACT)
        got = jax.jit(evaluate)(operands, sample.conditions, cotangents)
        assert all(x.dtype == jnp.float64 for x in jax.tree.leaves(got))
        scale = lambda tree: jax.tree.map(lambda x: 1e5 * np.asarray(x), tree)
        apart = jax.tree.map(lambda x, y: x - y, *map(finite, (got, want)))
        assert_formula(jax.tree.map(np.add, finite(want), scale(apart)), finite(want))


def finite(tree):
    """A tree with what is infinite (tau of empty rows) as 0."""
    return jax.tree.map(lambda x: np.where(np.isfinite(x), x, 0), tree)


class Reach(Bias):
    """A number per head whose derivative is one of the query's."""

    weight: jax.Array = head_home()
    reach: jax.Array = query_home()

    def tile(self, t):
        return self.weight * jnp.tanh(self.reach * t.distance / 16)


class Level(Bias):
    level: jax.Array = query_home()

    def tile(self, t):
        return self.level, -0.1 * jnp.abs(t.distance)


SHIFTS = jnp.resize(jnp.array([0.0, -1e4, -65504.0, -1e9], jnp.float32), (37,))


@pytest.mark.at_most(3)
@everywhere
@pytest.mark.parametrize("normalizer", ["entmax 1.5", "entmax 2.0 top 3"])
@pytest.mark.parametrize(
    "shifted",
    [DenseBias(SHIFTS[None, None, :, None]), Level(SHIFTS[None, :, None])],
    ids=lambda x: type(x).__name__,
)
def test_what_all_keys_of_a_query_share_costs_no_digits(
    shifted, normalizer, implementation
):
    sample = Case("alibi", "causal", (), normalizer).sample()
    sample = with_operands(sample, bias=sample.operands["bias"] + shifted)
    assert_formula(gradients(sample, **options(implementation)), truth(sample))


@pytest.mark.at_most(3)
@everywhere_and_dense
@pytest.mark.parametrize("normalizer", ["entmax 1.5", "entmax 2.0 top 3"])
def test_nan_where_nobody_looks(normalizer, implementation):
    """In hidden keys and values; in queries, biases and cotangents of empty rows.

    Under a soft cap, whose slope is NaN there.
    """
    sample = Case("alibi", "full", (), normalizer).at(S=61).sample()
    settings = {**sample.settings, "logits_soft_cap": 2.0}
    slopes, of_rows = sample.operands["bias"], jnp.sin(jnp.arange(37.0))
    summed = lambda x: (
        slopes
        + DenseBias(x[None, None, :, None])
        + Reach(jnp.ones((1, 1)), x[None, :, None])
    )
    sample = dataclasses.replace(sample, settings=settings)
    sample = with_operands(sample, bias=summed(of_rows))
    hidden, empty = jnp.arange(61) % 3 == 1, jnp.arange(37) % 5 == 2
    mask = (~hidden[None, :] & ~empty[:, None])[None, None]
    poison = lambda where, x: jnp.where(where[:, None, None], jnp.nan, x)
    do, dtau = sample.cotangents
    clean = dataclasses.replace(sample, conditions={"mask": mask})
    poisoned = dataclasses.replace(
        with_operands(
            clean,
            query=poison(empty, sample.operands["query"]),
            key=poison(hidden, sample.operands["key"]),
            value=poison(hidden, sample.operands["value"]),
            bias=summed(jnp.where(empty, jnp.nan, of_rows)),
        ),
        cotangents=(poison(empty, do), poison(empty, dtau[..., None])[..., 0]),
    )
    got = gradients(poisoned, **options(implementation))
    chex.assert_tree_all_finite((got[0][0], got[1]))
    assert_formula(got, truth(clean))


@pytest.mark.at_most(3)
@everywhere_and_dense
@pytest.mark.parametrize("normalizer", ["entmax 1.5", "entmax 1.5 top 3"])
def test_nan_in_a_visible_place_shows(normalizer, implementation):
    sample = Case("none", "causal", (), normalizer).at(T=40, S=40).sample()
    bad = with_operands(sample, key=sample.operands["key"].at[:, 20].set(jnp.nan))
    f = jax.jit(attention(sample.settings, **options(implementation)))
    output, _ = f(bad.operands, bad.conditions)
    assert np.isnan(output[:, 20:]).all()
    assert np.isfinite(output[:, :20]).all()


@everywhere
@pytest.mark.parametrize("normalizer", ["entmax 1.5", "entmax learned top 8"])
def test_twice_the_same_bits(normalizer, implementation):
    sample = Case("sum", "causal lengths GQA", (), normalizer).sample()
    evaluate = jax.jit(with_gradients(sample.settings, **options(implementation)))
    arguments = (sample.operands, sample.conditions, sample.cotangents)
    assert_same_bits(evaluate(*arguments), evaluate(*arguments))


@everywhere_and_dense
@pytest.mark.parametrize(
    "normalizer", ["entmax 1.5", "entmax 2.0 top 8", "entmax learned", "softmax"]
)
def test_sparsity_counts_zeros_among_visible_pairs(normalizer, implementation):
    case = Case("none", "causal", (), normalizer).at(B=1, T=37, S=37, h=37)
    eye = jnp.broadcast_to(jnp.eye(37)[None, :, None, :], (1, 37, 2, 37))
    sample = with_operands(case.sample(), value=eye)
    given = {**sample.operands, **sample.settings}
    shares = sparsity(**given, **options(implementation))
    for share in shares:
        assert share.shape == (1, 2)
        assert share.dtype == jnp.float32
        assert ((share >= 0) & (share <= 1)).all()
    if normalizer == "softmax":
        return assert_zero(shares)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(np.float64), sample.operands)
        weights = np.asarray(
            dot_product_attention(**wide, **sample.settings, implementation="reference")
        )
    visible = np.tril(np.ones((37, 37), bool))[None, :, None]
    zero = ((weights == 0) & visible).sum((1, 3)) / visible.sum()
    assert_formula(shares.zero_weights, zero)
    if implementation in ("xla", "reference"):
        assert_zero(shares.skipped_blocks)


@pytest.mark.parametrize(
    ("normalizer", "lifted"),
    [
        ("entmax 1.5", 1e4),  # its largest keys; others near the bound have no weight
        ("entmax 1.5 top 8", 1.0),
        ("entmax learned top 8", 1e4),
    ],
)
def test_keys_that_a_bound_lost_are_collected_again(
    normalizer, lifted, monkeypatch, retraced
):
    """As where a score that is computed again is rounded to below its row's bound."""
    monkeypatch.setattr(route, "LONG", 1)
    bound_of = candidates.bound_of

    def too_high(*operands):
        bound, need = bound_of(*operands)
        return bound + lifted, need

    monkeypatch.setattr(candidates, "bound_of", too_high)
    case = Case("dense-1NTS", "causal lengths GQA", (), normalizer)
    got = gradients(case.sample(), **options(kernel_implementation()))
    assert_formula(got, true_gradients(case))


@pytest.mark.parametrize("fits", [pytest.param(True, marks=pytest.mark.whole), False])
def test_long_rows_go_by_lists_where_they_fit_and_by_tiles_else(
    fits, monkeypatch, retraced
):
    """The device chooses between two ways to the same numbers, forward and backward."""
    monkeypatch.setattr(route, "LONG", 1)
    monkeypatch.setattr(over_lists, "MEAN", 40 if fits else 1)
    case = Case("dense-1NTS", "causal lengths GQA", (), "entmax 1.5")
    sample = case.sample()
    got = gradients(sample, **options(kernel_implementation()))
    assert_formula(got, true_gradients(case))
    given = called(
        **sample.operands,
        **sample.conditions,
        **sample.settings,
        implementation=kernel_implementation(),
        config=SMALL_ENTMAX,
    )
    ops, alpha, call = route.prepared(given.problem)
    _, found = route.forward(ops, alpha, call, Wanted(), wants_alpha=False)
    assert found.lists is not None
    assert bool(found.lists.fits) == fits


@pytest.mark.at_most(1)
@pytest.mark.parametrize("bias", ["dense-1NTS"])
def test_both_ways_of_long_rows_make_what_is_asked_for(bias, monkeypatch):
    """One conditional has both: each makes the gradients wanted, and no others."""
    monkeypatch.setattr(route, "LONG", 1)
    sample = Case(bias, "causal", (), "entmax 1.5").at(T=5, S=5, N=1, K=1).sample()
    leaves, tree = jax.tree.flatten(sample.operands)
    attend = attention(sample.settings, **options(kernel_implementation()))

    def loss(places, *wanted):
        every = dict(enumerate(leaves)) | dict(zip(places, wanted, strict=True))
        return attend(tree.unflatten(every.values()), {})[0].sum()

    for n in (1, len(leaves) - 1):  # each operand alone, each frozen alone
        for places in itertools.combinations(range(len(leaves)), n):
            wanted = [leaves[n] for n in places]
            every = tuple(range(n))
            made = jax.eval_shape(
                jax.grad(functools.partial(loss, places), every), *wanted
            )
            chex.assert_trees_all_equal_shapes_and_dtypes(list(made), wanted)


@pytest.mark.parametrize("normalizer", ["entmax 1.5", "entmax 1.5 top 3"])
def test_visited_and_sparsity_count_the_same_blocks(normalizer):
    sample = Case("alibi", "causal", (), normalizer).at(B=1, T=150, S=150).sample()
    steep = ALiBi(jnp.array([2.0, 0.01]))
    given = {**sample.operands, "bias": steep, **sample.settings}
    given |= options(kernel_implementation())
    skipped = sparsity(**given).skipped_blocks
    found = visited(**given)
    assert_formula(found.rows, 1 - skipped)
    assert_formula(found.cols, 1 - skipped)
    # steep slopes leave the blocks on the diagonal and those beside it
    assert skipped[0, 0] > 0.3
    assert (found.forward >= found.rows - 1e-6).all()


@pytest.mark.at_most(2)
@everywhere
@pytest.mark.parametrize("normalizer", ["entmax 1.5", "entmax learned top 8"])
def test_transformations_mean_what_they_say(normalizer, implementation):
    """A map over batch entries, a checkpoint and a scan over layers: the same sums."""
    sample = Case("alibi", "causal", (), normalizer).at(T=20, S=33).sample()
    bias, sparse = sample.operands["bias"], sample.operands["normalizer"]
    operands = tuple(sample.operands[name] for name in ("query", "key", "value"))

    def attend(q, k, v, sparse):
        return dot_product_attention(
            q, k, v, bias, is_causal=True, normalizer=sparse, **options(implementation)
        )

    def layers(attend, q, k, v, sparse):
        body = lambda x, _: (x + attend(x, k, v, sparse), None)
        return jnp.sum(jax.lax.scan(body, q, None, length=2)[0] ** 2)

    def gradient(attend):
        by_operands = jax.grad(functools.partial(layers, attend), (0, 1, 2, 3))
        return jax.jit(by_operands)(*operands, sparse)

    plain = gradient(attend)
    # XLA may fuse, and so round, what it computes again in another way.
    same = assert_formula if implementation == "xla" else assert_same_bits
    same(gradient(jax.checkpoint(attend)), plain)
    assert_formula(gradient(jax.vmap(attend, (0, 0, 0, None))), plain)


@everywhere_and_dense
def test_tau_says_which_keys_have_weight(implementation):
    scores = normal(jax.random.key(4), 20, 37)
    weights, tau = weights_of(scores, Entmax(1.5), implementation)
    z = jnp.maximum(0.5 * scores - tau[:, None], 0)
    assert_formula(z**2, weights)
    np.testing.assert_array_equal(z > 0, weights > 0)
