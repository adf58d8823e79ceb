"""The forget gate is its formula, to an error that does not grow with the length."""

import functools
import itertools
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_attn
from pallas_attn import ALiBi, Block, Config, DenseBias, ForgetGate
from pallas_attn.bias.base import homes, tile_on
from pallas_attn.bias.region import Place, Region
from pallas_attn.bias.running_sums import MOST
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
    "mask B11S",
    "packed",
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


@pytest.mark.at_most(2)
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


@pytest.mark.at_most(2)
@everywhere
@pytest.mark.parametrize("situation", PLACED)
def test_every_gradient(situation, implementation):
    case = Case("forget gate", situation)
    options = {"implementation": implementation, "config": SMALL, **EXACT}
    _, got = gradients(case.sample(), **options)
    assert_formula(got, true_gradients(case, True)[1])


def test_those_situations_are_known():
    assert set(PLACED) <= set(SITUATIONS)


LOWEST = float(np.finfo(np.float32).min)
RESETS = {
    "none": {},
    "ordinary": {40: -40.0},
    "-65504": {40: -65504.0},
    "-1e4": {40: -1e4, 41: -1e4, 200: -1e4},
    "-1e9": {1: -1e9, 40: -1e9, 200: -1e9, 299: -1e9},
    "-1e15": {0: -1e15, 200: -1e15},
    "-1e20": {40: -1e20, 200: -1e20},
    "lowest": {40: LOWEST, 41: LOWEST, 200: LOWEST},
    "-inf": {40: -np.inf, 200: -np.inf},
    "two sizes": {40: -1e9, 200: -2e4},
    "everywhere": dict.fromkeys(range(300), -1e9),
}


def gates_with(resets, length=300):
    """Gates [length, 2] of small and of large steps, and what resets them."""
    rng = np.random.default_rng(3)
    gates = -np.abs(rng.standard_normal((length, 2))) * [0.003, 30.0]
    for place, reset in resets.items():
        gates[place] = reset
    return gates.astype(np.float32)


def between(gates):
    """Sums of the gates after j up to i, each added up for itself, in float64."""
    length = len(gates)
    sums = np.zeros((2, length, length))
    for j in range(length):
        sums[:, j + 1 :, j] = np.cumsum(gates[j + 1 :].astype(np.float64), 0).T
    return sums


def placed(gates, place):
    """What is added to the scores where a call puts its queries and keys."""
    term = ForgetGate(jnp.asarray(gates)).at(place)
    region = Region(
        place.query_positions[..., :, None], place.key_positions[..., None, :]
    )
    return np.asarray(tile_on(term, region)[0])


def counted(length, first=0):
    return first + jnp.arange(length, dtype=jnp.int32)[None, None]


@pytest.mark.at_most(4)
@pytest.mark.parametrize("size", RESETS)
def test_a_reset_costs_nothing_of_what_comes_after(size):
    """Value by value; at -1e30 and below it has no weight, whatever it is."""
    gates = gates_with(RESETS[size])
    want, positions = between(gates), counted(300)
    found = placed(gates[None], Place(positions, positions))
    weighty = want > -1e30
    assert_long_sum(found[weighty], want[weighty])
    assert (found[~weighty] <= -1e30).all()
    assert (found <= 1e-3).all()


@pytest.mark.parametrize("size", RESETS)
def test_nor_in_a_long_row(size):
    """Of the last query, from which the truth adds up backwards: no reset is in it."""
    gates = gates_with(RESETS[size], 32768)
    after = 1 + max(RESETS[size], default=0)
    gates[after:, 1] = -0.0051  # of equal gates all are rounded to the same side
    last = jnp.array([len(gates) - 1], jnp.int32)
    keys = jnp.arange(len(gates), dtype=jnp.int32)
    found = ForgetGate(jnp.asarray(gates[None])).materialise(last, keys)[0, :, 0]
    later = np.cumsum(gates[:0:-1].astype(np.float64), 0)[::-1].T
    assert_long_sum(found[:, after:-1], later[:, after:])


@pytest.mark.at_most(4)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("size", RESETS)
def test_alone_a_reset_is_far_below_all_else(size, causal):
    """No mask and no other term: a row sees something that no reset has touched."""
    gates = gates_with(RESETS[size])
    want, positions = between(gates), counted(300)
    place = Place(positions, positions, offset=0, causal=causal, alone=True)
    found = placed(gates[None], place)
    before = np.tril(np.ones((300, 300), bool))
    near = before & (want > -MOST)
    assert_long_sum(found[near], want[near])
    assert (found[before & ~near] < -0.99 * MOST).all()


@pytest.mark.at_most(4)
@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("size", RESETS)
def test_the_bound_is_one(size, causal, alone):
    """Of blocks of 64 queries and keys: no value of theirs is above it."""
    gates, positions = gates_with(RESETS[size], 320)[None], counted(320)
    place = Place(positions, positions, offset=0, causal=causal, alone=alone)
    term = ForgetGate(jnp.asarray(gates)).at(place)
    extremes = {}
    for name in homes(term):
        blocks = getattr(term, name)[0].reshape(5, 64, 2)
        axis = 1 if name.startswith("query") else 0
        least, most = (jnp.expand_dims(x(1), axis) for x in (blocks.min, blocks.max))
        extremes[name] = SimpleNamespace(least=least, most=most)
    first = 64 * jnp.arange(5)[:, None]
    q, k = first[:, None], first[None]
    bound = replace(term, **extremes).bound(q, q + 63, k, k + 63)
    values = placed(gates, place)
    if causal:
        hidden = np.arange(320)[:, None] < np.arange(320)
        values = np.where(hidden, -np.inf, values)
    most = values.reshape(2, 5, 64, 5, 64).max((2, 4))
    assert (np.moveaxis(np.asarray(bound), -1, 0) >= most).all()


def of_segments(rng, count, ordered):
    ids = rng.choice([7, -(2**31), 2**31 - 1], (2, count))
    return np.sort(ids, -1) if ordered else ids


@pytest.mark.at_most(3)
@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(
    "where", ["counted", "offset", "offsets", "restart", "any", "heads"]
)
@pytest.mark.parametrize("ordered", [True, False])
def test_sums_are_those_of_the_segment(ordered, where, alone):
    """Ids in any order, of queries other than of keys; NaN stays in its segment."""
    rng = np.random.default_rng(5)
    T, S, N = 31, 41, 3
    gates = -np.abs(rng.standard_normal((2, S, N))).astype(np.float32)
    ids = of_segments(rng, T, ordered), of_segments(rng, S, ordered)
    gates[ids[1] == 7] = np.nan
    first = {"offset": 6, "offsets": np.array([-4, 9])[:, None, None]}.get(where, 0)
    queries, keys = (np.arange(n)[None, None] for n in (T, S))
    queries = queries + first
    if where == "restart":
        queries, keys = (np.stack([np.cumsum(x[b] == x[b, 0]) for b in (0, 1)])[:, None]
                         for x in ids)  # fmt: skip
    if where in ("any", "heads"):
        shape = (2, N) if where == "heads" else (1, 1)
        queries, keys = (rng.integers(-9, 9, (*shape, n)) for n in (T, S))
    i32 = lambda x: jnp.asarray(x, jnp.int32)
    offset = {"counted": 0, "offset": 6, "offsets": i32(np.array([-4, 9]))}.get(where)
    place = Place(
        i32(queries),
        i32(keys),
        offset=offset,
        query_segments=i32(ids[0]),
        key_segments=i32(ids[1]),
        alone=alone,
    )
    term = ForgetGate(jnp.asarray(gates)).at(place)
    region = Region(place.query_positions[..., None], place.key_positions[..., None, :])
    found = np.broadcast_to(tile_on(term, region), (2, N, T, S))
    queries, keys = (np.broadcast_to(x, (2, N, x.shape[-1])) for x in (queries, keys))
    for b, n in itertools.product(range(2), range(N)):
        want = np.zeros((T, S))
        for i, j in itertools.product(range(T), range(S)):
            own = ids[1][b] == ids[0][b, i]
            after = (keys[b, n] > keys[b, n, j]) & (keys[b, n] <= queries[b, n, i])
            want[i, j] = gates[b, own & after, n].astype(np.float64).sum()
        same = (ids[0][b][:, None] == ids[1][b]) & (ids[1][b] != 7)
        assert same.any()
        assert_long_sum(found[b, n][same], want[same])


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


@pytest.mark.parametrize("traced", [False, True], ids=["static", "traced"])
@pytest.mark.parametrize("offset", [-3, 1, 5, 30, 99])
def test_an_offset_is_the_positions_that_it_stands_for(offset, traced, getkey):
    """Sums are read from where the queries start, or sorted with their positions.

    What is wrong with a query's own shows in its lse alone.
    """
    query = jax.random.normal(getkey(), (1, 7, 2, 16))
    key, value = jax.random.normal(getkey(), (2, 1, 23, 2, 16))
    bias = ForgetGate(jax.nn.log_sigmoid(jax.random.normal(getkey(), (1, 23, 2))))
    attend = functools.partial(
        pallas_attn.dot_product_attention, query, key, value, bias,
        is_causal=True, implementation="xla", return_residual=True,
    )  # fmt: skip
    start = jnp.array([offset], jnp.int32) if traced else offset
    positions = jnp.arange(7, dtype=jnp.int32) + offset
    keys = jnp.arange(23, dtype=jnp.int32)
    want = attend(query_positions=positions, key_positions=keys)
    assert_formula(attend(query_offset=start), want)
