"""Positions anywhere within +-2^30: differences, comparisons and ranges as integers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_attn
from pallas_attn import ALiBi, CoALiBi, DenseBias, Entmax, Softmax
from pallas_attn.call import Call
from pallas_attn.positions import difference, moved, within
from pallas_attn.testing.evaluate import implementations, SMALL, small
from pallas_attn.testing.numerics import assert_formula
from pallas_attn.tiled.block_ranges import blocks, keys_in_sight, queries_in_sight
from pallas_attn.tiled.summaries import frame, Sight
from pallas_attn.visibility import Visibility


FAR = 2**30
PLACES = np.array([-FAR, 1 - FAR, -(2**24) - 1, -3, 0, 2, 2**24 + 1, FAR - 1, FAR])
REACHES = (0, 1, 5, 2**24, FAR - 1, FAR, FAR + 1, 2**31 - 2, 2**31 - 1, 2**31)
WINDOWS = list(itertools.product(REACHES, REACHES))

q, k = (jnp.asarray(x, jnp.int32) for x in (PLACES[:, None], PLACES[None, :]))
DISTANCE = PLACES[:, None] - PLACES[None, :]  # int64


def test_a_difference_is_that_of_integers():
    np.testing.assert_array_equal(
        difference(q, k, jnp.float32), DISTANCE.astype(np.float32)
    )


@pytest.mark.parametrize("window", [(a, b) for a, b in WINDOWS if a in (0, b)], ids=str)
def test_a_window_compares_integers(window):
    left, right = window
    found = np.ones(DISTANCE.shape, bool)
    for condition in within(q, k, window):
        found &= np.asarray(condition)
    np.testing.assert_array_equal(found, (left >= DISTANCE) & (right >= -DISTANCE))


@pytest.mark.parametrize("by", [*REACHES, *(-n for n in REACHES)])
def test_a_sum_ends_where_int32_does(by):
    want = np.clip(PLACES + by, -(2**31), 2**31 - 1)
    if abs(by) < 2**31:
        np.testing.assert_array_equal(moved(jnp.asarray(PLACES, jnp.int32), by), want)
    assert [moved(int(x), by) for x in PLACES] == list(want)


@pytest.mark.light
@pytest.mark.parametrize("lengths", [(37, 53), (0, 53), (-2, 53), (9, 53), (9, 20)])
@pytest.mark.parametrize("traced", [False, True], ids=["static", "traced"])
@pytest.mark.parametrize("offset", [-FAR, -7, 3, 24, FAR - 37])
@pytest.mark.parametrize("window", [None, (3, 2**31), (2**31 - 1, 4), (FAR, FAR)])
@pytest.mark.parametrize("causal", [False, True])
def test_ranges_are_those_of_integers(causal, window, offset, traced, lengths):
    """Of a block, what any entry sees and what every entry sees lie as told.

    No entry of a frame is seen by nobody: it may be NaN.
    """
    T, S, block = 37, 53, 16
    call = Call(1, 1, 1, T, S, 16, 16, 1.0, "float32", causal=causal, window=window)
    given = jnp.asarray([offset], jnp.int32)
    call = Call(**{**vars(call), "offset": None if traced else offset})
    sizes = [
        None if n == size else jnp.asarray([n], jnp.int32)
        for n, size in zip(lengths, (T, S), strict=True)
    ]
    arrays = Visibility(
        offset=given if traced else None, query_lengths=sizes[0], key_lengths=sizes[1]
    )
    sight = Sight(arrays)

    def number(ref, at):
        return ref[at]

    where = frame(call, sight, jnp.int32(0), number)
    i, j = np.arange(T)[:, None] + offset, np.arange(S)[None, :]
    sees = (i - offset < lengths[0]) & (j < lengths[1])
    if causal:
        sees &= j <= i
    if window is not None:
        sees &= (i - j <= window[0]) & (j - i <= window[1])
    if causal or window is not None:
        np.testing.assert_array_equal(_entries(where.keys, S), sees.any(0))
        np.testing.assert_array_equal(_entries(where.queries, T), sees.any(1))
    for seen, in_sight, own_length in (
        (sees, keys_in_sight, lengths[0]),
        (sees.T, queries_in_sight, lengths[1]),
    ):
        for start in range(0, seen.shape[0], block):
            own = seen[start : start + block]
            # a ragged block may be told less of
            whole = start + block <= own_length or start >= own_length
            any_, every = in_sight(call, where, jnp.int32(start), block)
            got = _entries(any_, seen.shape[1])
            assert (got | ~own.any(0)).all()
            assert not whole or (got == own.any(0)).all()
            assert own.any() or not whole or _empty(blocks(block, any_, None))
            real = own[: max(own_length - start, 0)]  # weights of others are 0
            assert (real.all(0) | ~_entries(every, seen.shape[1])).all()


def _entries(limits, size):
    found = np.zeros(size, bool)
    found[max(int(limits[0]), 0) : max(int(limits[1]), 0)] = True
    return found


def _empty(limits):
    return int(limits[0]) >= int(limits[1])


@pytest.mark.parametrize("implementation", ["reference", *implementations()])
@pytest.mark.parametrize(
    "options",
    [{"is_causal": True}, {"local_window_size": (2**31 - 1, 5)}],
    ids=["causal", "window"],
)
def test_calls_with_positions_2_31_apart(options, implementation):
    n = PLACES.size
    zero, value = jnp.zeros((1, n, 1, 16)), jnp.eye(n, 16)[None, :, None]
    at = jnp.asarray(PLACES, jnp.int32)
    slope = jnp.array([2.0**-29])
    attend = jax.jit(
        lambda at: pallas_attn.dot_product_attention(
            zero,
            zero,
            value,
            pallas_attn.ALiBi(slope),
            query_positions=at,
            key_positions=at,
            implementation=implementation,
            config=SMALL,
            **options,
        )
    )
    seen = (0 if "is_causal" in options else -5) <= DISTANCE
    if "local_window_size" in options:
        seen &= DISTANCE <= 2**31 - 1
    e = np.where(seen, np.exp2(-np.abs(DISTANCE) / 2**29 / np.log(2)), 0)
    want = np.pad(e / e.sum(1, keepdims=True), ((0, 0), (0, 16 - n)))
    assert_formula(attend(at)[0, :, 0], want)


def _biases(rng):
    slopes = jnp.asarray([0.5, 0.02, 1.0, 0.1], jnp.float32)
    full = jnp.asarray(rng.standard_normal((2, 4, 256, 19)), jnp.float32)
    return {
        "none": None,
        "alibi": ALiBi(slopes),
        "co_alibi": CoALiBi(slopes),
        "dense": DenseBias(full),
    }


@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize(
    ("bias", "H", "normalizer"),
    [
        ("none", 24, Softmax()),
        ("alibi", 24, Softmax()),
        ("co_alibi", 24, Softmax()),
        ("co_alibi", 24, Softmax(jnp.zeros(4))),
        ("dense", 80, Softmax()),  # whose gradient is a dS that thin passes read
        ("none", 24, Entmax(1.5)),
        ("none", 24, Entmax(1.5, top_k=3)),
    ],
    ids=["none", "alibi", "co_alibi", "sink", "dense", "entmax", "top"],
)
def test_heads_that_share_keys_stand_where_each_stands(
    bias, H, normalizer, implementation
):
    """Each query head sees the keys from another block of queries alone."""
    config = small(bias, "softmax" if type(normalizer) is Softmax else "entmax 1.5")
    rng = np.random.default_rng(3)
    shapes = (2, 256, 4, H), (2, 19, 2, H), (2, 19, 2, H)
    operands = [jnp.asarray(rng.standard_normal(x), jnp.float32) for x in shapes]
    own = np.arange(256)[None, :] // 64 == np.arange(4)[:, None]
    at = np.where(own, np.arange(256) % 64, 10**6)[None]

    do = jnp.asarray(rng.standard_normal(shapes[0]), jnp.float32)

    def loss(operands, bias, name):
        query, key, value = operands
        output = pallas_attn.dot_product_attention(
            query, key, value, bias, query_positions=jnp.asarray(at, jnp.int32),
            key_positions=jnp.arange(19), local_window_size=(30, 30),
            normalizer=normalizer, implementation=name, config=config,
            precision=jax.lax.Precision.HIGHEST,
        )  # fmt: skip
        return jnp.sum(output * do)

    gradients = jax.grad(loss, argnums=(0, 1))
    given = _biases(rng)[bias]
    got, want = (
        jax.tree.leaves(gradients(operands, given, name))
        for name in (implementation, "reference")
    )
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5 * float(jnp.abs(y).max()))
