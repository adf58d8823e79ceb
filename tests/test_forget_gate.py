"""The forget gate is its formula, to an error that does not grow with the length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_attn
from pallas_attn import ALiBi, Block, Config, DenseBias, ForgetGate
from pallas_attn.testing.cases import Case, SITUATIONS
from pallas_attn.testing.evaluate import (
    EXACT,
    gradients,
    implementations,
    kernel_implementation,
    SMALL,
    true_gradients,
)
from pallas_attn.testing.numerics import assert_formula, assert_long_sum, assert_sum


everywhere = pytest.mark.parametrize("implementation", implementations())

# Situations that say where keys and queries stand, or which of them are there.
PLACED = [
    "offset per batch",
    "empty rows",
    "lengths",
    "positions shuffled",
    "positions per head",
    "causal window lengths",
]


def textbook(log_gate, query_positions, key_positions):
    """Pair by pair: the gates of positions after j up to i, in float64."""
    gates = np.asarray(log_gate, np.float64)
    shape = (len(query_positions), len(key_positions), gates.shape[-1])
    added = np.zeros(shape)
    for i, own in enumerate(query_positions):
        for j, other in enumerate(key_positions):
            between = (key_positions > other) & (key_positions <= own)
            added[i, j] = gates[between].sum(0)
    return np.moveaxis(added, -1, 0)


@pytest.mark.parametrize("offset", [0, 16, -20, 60])
def test_it_is_the_formula(offset):
    gates = jax.nn.log_sigmoid(jax.random.normal(jax.random.key(0), (1, 23, 3)))
    queries, keys = np.arange(17) + offset, np.arange(23)
    found = ForgetGate(gates).materialise(
        jnp.asarray(queries, jnp.int32), jnp.asarray(keys, jnp.int32)
    )
    assert_sum(found[0], textbook(gates[0], queries, keys))


@everywhere
def test_positions_given_or_counted_are_the_same(implementation):
    """Of equal positions, too, which a shuffled order of keys must not change."""
    sample = Case("forget gate", "causal").sample()
    shuffle = jax.random.permutation(jax.random.key(1), 53)
    counted = jnp.arange(53, dtype=jnp.int32)
    attend = lambda operands, **positions: pallas_attn.dot_product_attention(
        **operands,
        is_causal=True,
        implementation=implementation,
        config=SMALL,
        **EXACT,
        **positions,
    )
    want = attend(sample.operands, query_offset=5)
    moved = {
        **sample.operands,
        "key": sample.operands["key"][:, shuffle],
        "value": sample.operands["value"][:, shuffle],
        "bias": ForgetGate(sample.operands["bias"].log_gate[:, shuffle]),
    }
    got = attend(
        moved,
        query_positions=jnp.arange(37, dtype=jnp.int32) + 5,
        key_positions=counted[shuffle],
    )
    assert_formula(got, np.asarray(want, np.float64))


@everywhere
@pytest.mark.parametrize("situation", PLACED)
def test_every_gradient(situation, implementation):
    case = Case("forget gate", situation)
    options = {"implementation": implementation, "config": SMALL, **EXACT}
    _, got = gradients(case.sample(), **options)
    assert_formula(got, true_gradients(case, True)[1])


def test_those_situations_are_known():
    assert set(PLACED) <= set(SITUATIONS)


def strong_gates(length):
    """Gates from 0.5 to 0.999, and one head that often forgets everything at once."""
    steady = np.log(np.array([0.5, 0.9, 0.99, 0.999]))
    rng = np.random.default_rng(0)
    gates = steady * (1 + 0.5 * rng.standard_normal((length, 4)))
    resets = np.where(rng.random(length) < 0.05, -40.0, -0.001)
    return np.minimum(np.concatenate([gates, resets[:, None]], 1), 0).astype(np.float32)


def test_the_error_does_not_grow_with_the_length():
    """At 32K a sum is -2e4, whose float32 neighbours are 2e-3 away."""
    length = 2**15
    gates = strong_gates(length)
    sums = np.cumsum(gates.astype(np.float64), 0)
    rows = np.array([1, 63, 64, 1000, 16_384, 32_767])
    found = ForgetGate(jnp.asarray(gates)[None]).materialise(
        jnp.asarray(rows, jnp.int32), jnp.arange(length, dtype=jnp.int32)
    )[0]
    for n, row in enumerate(rows):
        want = sums[row] - sums[: row + 1]
        assert_long_sum(np.asarray(found)[:, n, : row + 1].T, want)


@everywhere
def test_the_last_rows_of_a_long_sequence(implementation):
    """Through the whole call, where gates sum to 2e4 before the rows that are read."""
    compiled = kernel_implementation() == "triton"
    length, rows = 2**15 if compiled else 2**13, 40
    gates = jnp.asarray(strong_gates(length))[None]
    draw = lambda n, count: jax.random.normal(jax.random.key(n), (1, count, 5, 16))
    query, key, value = draw(0, rows), draw(1, length), draw(2, length)
    attend = lambda bias, **options: pallas_attn.dot_product_attention(
        query, key, value, bias, is_causal=True, query_offset=length - rows, **options
    )
    sums = np.cumsum(np.asarray(gates[0], np.float64), 0)
    bias = np.moveaxis(sums[-rows:, None] - sums[None], -1, 0)
    bias = np.where(
        np.arange(length) > np.arange(length - rows, length)[:, None], 0, bias
    )
    with jax.enable_x64(True):
        q, k, v = (np.asarray(x, np.float64) for x in (query, key, value))
        want = pallas_attn.dot_product_attention(
            q,
            k,
            v,
            bias,
            is_causal=True,
            query_offset=length - rows,
            implementation="reference",
        )
    got = attend(ForgetGate(gates), implementation=implementation, **EXACT)
    assert_formula(got, np.asarray(want))


BLOCK = Block(64, 64)  # of whole grains: extremes are known per grain
PRUNED = Config(BLOCK, BLOCK, BLOCK, BLOCK)


def shares(bias, **settings):
    draw = lambda n: jax.random.normal(jax.random.key(n), (1, 384, 2, 16))
    found = pallas_attn.visited(
        draw(0),
        draw(1),
        draw(2),
        bias,
        implementation=kernel_implementation(),
        config=PRUNED,
        **settings,
    )
    return found._asdict().items()


@pytest.mark.parametrize("settings", [{"is_causal": True}, {}], ids=str)
def test_what_is_forgotten_is_not_visited(settings):
    """Head 0 forgets within a few keys, head 1 never."""
    log_gate = jnp.broadcast_to(jnp.array([-2.0, 0.0]), (1, 384, 2))
    for name, share in shares(ForgetGate(log_gate), **settings):
        few = 0.6 if settings else 0.8  # what comes after a query never fades
        assert share[0, 0] < few, f"{name} visits {share[0, 0]:.2f}"
        assert share[0, 1] == 1, f"{name} visits {share[0, 1]:.2f}"


@pytest.mark.parametrize("with_alibi", [False, True])
def test_a_bias_of_keys_prunes(with_alibi):
    """A hand-made mask of padding is one: -1e9 of the last 180 keys."""
    bias = DenseBias(jnp.where(jnp.arange(384) < 204, 0.0, -1e9)[None, None, None])
    if with_alibi:
        bias = bias + ALiBi(jnp.zeros(2))
    for name, share in shares(bias):
        assert (share[0] < 0.8).all(), f"{name} visits {share}"


@everywhere
def test_a_row_whose_every_key_has_minus_1e9(implementation):
    """An ordinary number; beside it float32 has no room for scores, and all is even."""
    value = jax.random.normal(jax.random.key(0), (1, 192, 1, 16))
    ones = jnp.ones_like(value)
    bias = jnp.full((1, 1, 1, 192), -1e9)
    attend = lambda value: pallas_attn.dot_product_attention(
        ones,
        0 * ones,
        value,
        bias,
        implementation=implementation,
        config=PRUNED,
        **EXACT,
    )
    out, back = jax.vjp(attend, value)
    mean = np.asarray(value, np.float64).mean(1, keepdims=True)
    assert_formula(out, np.broadcast_to(mean, out.shape))
    assert_formula(back(ones)[0], np.ones(value.shape))
