"""Dropout: a mask that is known, is random, and is the same in every implementation."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_attn
from pallas_attn.api import attended
from pallas_attn.call import Call
from pallas_attn.dropout import dropped, kept_on, seed_of
from pallas_attn.testing.cases import Case, KINDS
from pallas_attn.testing.evaluate import (
    attention,
    called,
    EXACT,
    gradients,
    implementations,
    kernel_implementation,
    small,
    textbook,
    true_gradients,
    truth,
    with_gradients,
)
from pallas_attn.testing.jaxprs import largest_array
from pallas_attn.testing.numerics import (
    assert_formula,
    assert_rounding,
    assert_same_bits,
    GRADIENT_RATIO,
    OUTPUT_RATIO,
)


everywhere = pytest.mark.parametrize("implementation", implementations())
everywhere_and_dense = pytest.mark.parametrize(
    "implementation", [*implementations(), "reference"]
)
KERNELS = kernel_implementation()
RATE = 0.3
# how far a statistic may be from its mean, in its standard deviations: of the some
# thousands that are looked at here none is, unless by one chance in a million
FAR = 6.5


def key_words(seed, impl="threefry2x32"):
    return jax.random.key_data(jax.random.key(seed, impl=impl))


def call_of(rate=RATE, shared=False, B=2, N=3, T=37, S=53):
    return Call(
        B, N, N, T, S, 16, 16, 1.0, "float32", dropout=rate, dropout_shared=shared
    )


@functools.partial(jax.jit, static_argnums=0)
def mask_of(call, words, first=(0, 0, 0)):
    return kept_on(call, seed_of(words), first)


def in_numpy(call, words, first=(0, 0, 0)):
    """The docstring of `pallas_attn.dropout`, with unsigned numbers."""
    word = lambda x: np.asarray(x, np.uint32)
    m1, m2, g = word(0x7FEB352D), word(0x846CA68B), word(0x9E3779B9)

    def f(x):
        x = x * m1
        return (x ^ (x >> word(15))) * m2

    with np.errstate(over="ignore"):
        s = [word(0), word(1)]
        for place, w in enumerate(np.asarray(words)):
            s[place % 2] = f(f(s[place % 2] ^ w) + word(1))
        s[0] = s[0] ^ f(f(s[1]))
        s[1] = s[1] ^ f(f(s[0]))
        sizes = (call.B, call.N, call.T, call.S)
        starts = (first[0], 0, *first[1:])
        b, n, i, j = np.ogrid[
            tuple(slice(x, x + n) for x, n in zip(starts, sizes, strict=True))
        ]
        b, n, i, j = (x.astype(np.uint32) for x in (b, n, i, j))
        if call.dropout_shared:
            b, n = word(0), word(0)
        u, v = f(f(s[0] + b) + n), f(f(s[1] ^ b) ^ n)
        q, r = f(u ^ g * i), v + g * i
        return f(q ^ f(j)) + r >= word(round(call.dropout * 2**32))


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("shared", [False, True], ids=["each", "shared"])
@pytest.mark.parametrize("first", [(0, 0, 0), (5, 2**20, 70_000)], ids=str)
def test_the_mask_is_what_its_docstring_says(first, shared, impl):
    call, words = call_of(shared=shared), key_words(7, impl)
    want = in_numpy(call, words, first)
    want = np.broadcast_to(want, (*want.shape[:2], call.T, call.S))
    np.testing.assert_array_equal(mask_of(call, words, first), want)


def test_the_mask_stays_what_it_is():
    """A trained model's run can be repeated with another version of this library."""
    found = np.packbits(mask_of(call_of(0.5), key_words(0))[0, 0, 0, :32]).tobytes()
    assert found.hex() == "c93da22f"


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5, 0.9])
def test_weights_are_kept_independently(rate):
    """Rates of rows, columns and heads; pairs of neighbours, of heads and of seeds.

    And products of four, which a hash of two words that are mixed too little has.
    """
    call = call_of(rate, B=2, N=3, T=512, S=512)
    seeds = [key_words(seed) for seed in (0, 1, 2)] + [key_words(0, "rbg")]
    masks = np.concatenate(
        [mask_of(call, words).reshape(6, 512, 512) for words in seeds]
    )
    # each of mean 0 and variance 1
    x = (masks - (1 - rate)) / np.sqrt(rate * (1 - rate))
    found = {
        "rate": _total(x, (1, 2)),
        "rows": _spread(_total(x, 2)),
        "columns": _spread(_total(x, 1)),
    }
    for a, b in itertools.combinations(range(len(x)), 2):
        found[f"masks {a} and {b}"] = _total(x[a] * x[b], (0, 1))
    for d, e in itertools.product((1, 2, 3, 8, 64, 256), repeat=2):
        pairs = x[:, d:, e:] * x[:, :-d, :-e]
        others = x[:, :-d, e:] * x[:, d:, :-e]
        found[f"across {e}"] = _total(x[:, :, e:] * x[:, :, :-e], (1, 2))
        found[f"down {d}"] = _total(x[:, d:] * x[:, :-d], (1, 2))
        found[f"diagonal {d} {e}"] = _total(pairs, (1, 2))
        if 0.05 < rate < 0.95:  # else there are too few fours of the rare value
            found[f"four of {d} {e}"] = _total(pairs * others, (1, 2))
    worst = {name: np.abs(z).max() for name, z in found.items()}
    assert max(worst.values()) < FAR, max(worst.items(), key=lambda item: item[1])


def test_kept_masks_have_full_rank():
    """The largest singular value of random signs is that of random-matrix theory."""
    masks = mask_of(call_of(0.5, B=1, N=2, T=512, S=512), key_words(3))
    largest = np.linalg.norm(2.0 * np.asarray(masks[0]) - 1, 2, axis=(1, 2))
    assert (np.abs(largest / (2 * np.sqrt(512)) - 1) < 0.05).all()


def test_the_hash_is_uniform():
    """Chi-square of its 32 ranges, whose counts are differences of masks' sums."""
    words = key_words(11)
    rates = np.arange(1, 32) / 32
    sums = [
        int(mask_of(call_of(rate, T=300, S=300), words).sum())
        for rate in rates.tolist()
    ]
    size = 2 * 3 * 300 * 300
    counts = -np.diff([size, *sums, 0])
    chi = ((counts - size / 32) ** 2 / (size / 32)).sum()
    assert abs(chi - 31) < FAR * np.sqrt(2 * 31)


def _total(x, axes):
    return x.sum(axes) / np.sqrt(np.prod([x.shape[a] for a in np.atleast_1d(axes)]))


def _spread(z):
    """The sum of squares of many such totals, as one."""
    return ((z**2).sum(1) - z.shape[1]) / np.sqrt((z**4).mean() * z.shape[1])


def weights(case, implementation, **dropout):
    """P [B, N, T, S] after dropout: the values are eye."""
    sample = case.sample()
    eye = jnp.eye(case.sizes.S, dtype=jnp.float32)[None, :, None, :]
    value = jnp.broadcast_to(
        eye, (case.sizes.B, case.sizes.S, case.sizes.K, case.sizes.S)
    )
    attend = attention(
        sample.settings,
        implementation=implementation,
        config=small(case.bias, case.normalizer),
        **EXACT,
        **dropout,
    )
    output, residual = jax.jit(attend)(
        {**sample.operands, "value": value}, sample.conditions
    )
    return np.swapaxes(output, 1, 2), residual


@pytest.mark.at_most(3)
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    ("bias", "normalizer"),
    [
        ("alibi", "softmax"),
        ("co_alibi", "softmax"),
        ("alibi", "sink"),
        ("none", "entmax 1.5"),
        ("none", "entmax learned top 8"),
    ],
)
@everywhere_and_dense
def test_the_same_weights_are_kept_everywhere(implementation, bias, normalizer):
    case = Case(bias, "causal lengths GQA", (), normalizer)
    words, sizes = key_words(5), case.sizes
    keep = mask_of(call_of(B=sizes.B, N=sizes.N), words)
    keep = np.broadcast_to(keep, (sizes.B, sizes.N, sizes.T, sizes.S))
    every, residual = weights(case, implementation)
    got, same = weights(case, implementation, dropout_rate=RATE, dropout_rng=words)
    np.testing.assert_array_equal(got != 0, (every != 0) & keep)
    assert_formula(got, np.where(keep, every / (1 - RATE), 0))
    assert_formula(same, residual)


# "dropout" and "dropout GQA soft cap" are situations of the table: every law there
# holds for some bias with them. Here for all of the kernels.
@pytest.mark.at_most(2)
@pytest.mark.parametrize("bias", KINDS)
def test_every_gradient_of_every_bias(bias):
    case = Case(bias, "dropout GQA soft cap")
    options = {"implementation": KERNELS, "config": small(bias), **EXACT}
    got = gradients(case.sample(), **options)
    assert_formula(got, true_gradients(case))


@pytest.mark.at_most(2)
@pytest.mark.parametrize(
    "normalizer",
    ["entmax 1.5", "entmax learned", "entmax 2.0 top 3", "entmax learned top 8"],
)
@everywhere
def test_every_gradient_of_entmax(implementation, normalizer):
    case = Case("sum", "dropout GQA soft cap", (), normalizer)
    config = small("sum", normalizer)
    options = {"implementation": implementation, "config": config, **EXACT}
    assert_formula(gradients(case.sample(), **options), true_gradients(case))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@everywhere
def test_16_bits_round_like_xla(implementation, dtype):
    sample = Case("alibi", "causal").at(dtype=dtype).sample()
    words = key_words(2)
    dropout = {"dropout_rate": RATE, "dropout_rng": words}
    sample = dataclasses.replace(sample, settings={**sample.settings, **dropout})
    options = {"implementation": implementation, "config": small("alibi")}
    (got, _), grads = _with_words(gradients, sample, residual=False, **options)
    call = call_of(N=2)
    drop = functools.partial(dropped, call, mask_of(call, words))
    pull = lambda x, do: (
        (y := jax.vjp(lambda x: textbook(x, drop=drop), x))[:1] + y[1](do)
    )
    peer, theirs = jax.jit(pull)(sample.operands, sample.cotangents[0])
    (want, _), true = _with_words(truth, sample, residual=False)
    assert_rounding(got, peer, want, OUTPUT_RATIO)
    assert_rounding(grads, theirs, true, GRADIENT_RATIO)


def _with_words(evaluate, sample, **options):
    """The sample with its key among the conditions, where arrays are."""
    settings = dict(sample.settings)
    conditions = {**sample.conditions, "dropout_rng": settings.pop("dropout_rng")}
    changed = dataclasses.replace(sample, settings=settings, conditions=conditions)
    return evaluate(changed, **options)


@everywhere
def test_a_shared_mask_is_one_for_all_heads(implementation):
    """What flax calls broadcast dropout: the query's and the key's index alone."""
    sample = Case("none", "full").at(h=53).sample()
    operands = {
        **sample.operands,
        "value": jnp.broadcast_to(
            jnp.eye(53, dtype=jnp.float32)[None, :, None, :], (2, 53, 2, 53)
        ),
    }
    words = key_words(8)
    given = called(
        **operands,
        **EXACT,
        implementation=implementation,
        dropout_rate=RATE,
        dropout_rng=words,
        broadcast_dropout=True,
    )
    output = np.swapaxes(attended(given, False), 1, 2)
    keep = np.asarray(mask_of(call_of(shared=True), words))
    assert keep.shape == (1, 1, 37, 53)
    np.testing.assert_array_equal(output != 0, np.broadcast_to(keep, output.shape))


@pytest.mark.at_most(2)
@everywhere_and_dense
def test_vmap_over_keys(implementation):
    sample = Case("none", "causal").sample()
    keys = jax.random.split(jax.random.key(4), 3)
    attend = lambda query, key: pallas_attn.dot_product_attention(
        **{**sample.operands, "query": query},
        is_causal=True,
        dropout_rate=RATE,
        dropout_rng=key,
        implementation=implementation,
        config=small("none"),
        **EXACT,
    )

    def f(key):
        output, pullback = jax.vjp(
            lambda query: attend(query, key), sample.operands["query"]
        )
        return output, pullback(sample.cotangents[0])

    mapped = jax.jit(jax.vmap(f))(keys)
    alone = jax.jit(f)
    assert_formula(mapped, jax.tree.map(lambda *x: jnp.stack(x), *map(alone, keys)))
    assert not np.array_equal(mapped[0][0], mapped[0][1])


@everywhere
def test_another_key_is_not_traced_again(implementation):
    sample, traces = Case("none", "causal").sample(), []

    @jax.jit
    def attend(key):
        traces.append(key)
        return pallas_attn.dot_product_attention(
            **sample.operands,
            dropout_rate=RATE,
            dropout_rng=key,
            implementation=implementation,
            config=small("none"),
        )

    first, again, other = map(attend, (jax.random.key(n) for n in (0, 0, 1)))
    assert_same_bits(first, again)
    assert not np.array_equal(first, other)
    assert len(traces) == 1


def test_a_key_means_the_same_typed_or_not():
    sample = Case("none", "causal").sample()
    attend = functools.partial(
        pallas_attn.dot_product_attention,
        **sample.operands,
        dropout_rate=RATE,
        implementation="reference",
    )
    for impl in ("threefry2x32", "rbg"):
        key = jax.random.key(3, impl=impl)
        words = jax.random.key_data(key)
        assert_same_bits(attend(dropout_rng=key), attend(dropout_rng=words))
        assert_same_bits(attend(dropout_rng=key), attend(dropout_rng=np.asarray(words)))


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys_have_seeds_of_their_own(impl):
    """Of "rbg" too, the halves of whose keys are equal."""
    keys = jax.random.split(jax.random.key(0, impl=impl), 200)
    more = jax.vmap(functools.partial(jax.random.key, impl=impl))(jnp.arange(200))
    words = jnp.concatenate([jax.random.key_data(x) for x in (keys, more)])
    seeds = np.asarray(jax.vmap(seed_of)(words))
    for place in (0, 1):
        assert len(set(seeds[:, place].tolist())) == 400


@pytest.mark.parametrize("implementation", [*implementations(), "reference"])
def test_a_rate_of_0_leaves_the_program_as_it_is(implementation):
    sample = Case("alibi", "causal").sample()

    def program(**options):
        evaluate = with_gradients(
            sample.settings, implementation=implementation, **options
        )
        arguments = sample.operands, sample.conditions, sample.cotangents
        return jax.jit(evaluate).lower(*arguments).as_text()

    without = program()
    assert program(dropout_rate=0.0, dropout_rng=jax.random.key(0)) == without
    assert program(dropout_rate=0.5, dropout_rng=jax.random.key(0)) != without


@everywhere
def test_the_same_weights_are_kept_in_a_process_with_x64(implementation):
    sample = Case("none", "dropout").sample()
    run = lambda: gradients(
        sample, implementation=implementation, config=small("none"), **EXACT
    )
    before = run()
    with jax.enable_x64(True):
        after = run()
    assert_formula(after, before)


@everywhere
def test_the_mean_over_keys_is_what_nothing_was_dropped_from(implementation):
    sample = Case("none", "causal").at(B=1, N=1, K=1, T=8, S=8).sample()
    attend = functools.partial(
        pallas_attn.dot_product_attention,
        **sample.operands,
        is_causal=True,
        implementation=implementation,
        **EXACT,
    )
    keys = jax.random.split(jax.random.key(9), 256)
    drawn = jax.jit(jax.vmap(lambda key: attend(dropout_rate=0.5, dropout_rng=key)))(
        keys
    )
    error = np.asarray(drawn.mean(0) - attend())
    deviation = np.asarray(drawn.std(0)) / np.sqrt(256)
    assert (np.abs(error) <= FAR * deviation + 1e-6).all()


@everywhere
def test_no_array_of_all_pairs(implementation):
    sizes = {"B": 4, "N": 4, "K": 4, "T": 700, "S": 900}
    sample = Case("none", "dropout").at(**sizes).specs()
    shape = largest_array(
        with_gradients(sample.settings, implementation=implementation),
        sample.operands,
        sample.conditions,
        sample.cotangents,
    )
    assert np.prod(shape) < 4 * 4 * 700 * 900


def test_visited_and_sparsity_know_of_dropout():
    """And count what they count without: weights that the normalizer made 0."""
    case = Case("alibi", "causal", (), "entmax 1.5")
    operands = case.sample().operands
    for f in (pallas_attn.visited, pallas_attn.sparsity):
        count = functools.partial(
            f, **operands, is_causal=True, implementation="xla", config=None
        )
        with_it = count(dropout_rate=RATE, dropout_rng=jax.random.key(0))
        assert_same_bits(with_it, count())
