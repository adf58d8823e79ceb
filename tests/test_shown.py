"""Blocks that a mask hides are not visited; those shown whole are as without it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_attn import Block, Config, visited
from pallas_attn.testing.cases import Case, Sample
from pallas_attn.testing.evaluate import (
    called,
    EXACT,
    gradients,
    in_float64,
    kernel_implementation,
    SMALL,
    tangents,
    truth,
    values,
)
from pallas_attn.testing.indices import watched
from pallas_attn.testing.numerics import assert_formula, assert_same_bits
from pallas_attn.tiled import summaries
from pallas_attn.tiled.summaries import GRAIN, grains_of, Sight
from pallas_attn.triton.shown import ALL, ANY, shown, SOME
from pallas_attn.visibility import Visibility


B, N, T, S = 1, 2, 150, 200
SIZES = {"B": B, "N": N, "K": 1, "T": T, "S": S, "H": 16, "h": 8}
# bias, situation, normalizer: each looks at blocks in another way
CALLS = [
    ("none", "full", "softmax"),
    ("none", "causal", "sink"),
    ("none", "causal window lengths", "softmax"),
    ("none", "causal segments", "softmax"),
    ("none", "soft cap", "softmax"),
    ("none", "positions shuffled", "softmax"),
    ("alibi", "full", "softmax"),
    ("alibi", "causal", "softmax"),
    ("relative", "causal", "softmax"),
    ("factored", "full", "softmax"),
    ("saturating", "causal", "softmax"),
    ("dense", "full", "softmax"),  # whose dS is stored: every block has one
    ("dense-1NTS", "causal", "softmax"),
]


def blocks(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """A mask that hides, shows, or shows some of blocks that are no pass' own."""
    rng = np.random.default_rng(seed)
    mask = rng.random(shape) < 0.8
    for i in range(0, shape[-2], 40):
        for j in range(0, shape[-1], 70):
            for lead in np.ndindex(shape[:-2]):
                kind = rng.integers(3)
                if kind < 2:
                    mask[(*lead, slice(i, i + 40), slice(j, j + 70))] = kind == 1
    mask[..., 64:128, :64] = True  # a grain of all
    mask[..., 5, :] = False
    return mask


MASKS = {
    "shared": blocks((1, 1, T, S)),
    "heads": blocks((1, N, T, S), 1),
    "hidden": np.zeros((1, 1, T, S), bool),
    "shown": np.ones((B, 1, T, S), bool),
    "late": np.arange(S) >= S - 3 - np.arange(T)[None, None, :, None] // 70,
}


@pytest.fixture(autouse=True)
def looked(monkeypatch, retraced):
    """Masks are looked at, however small."""
    monkeypatch.setattr(summaries, "LOOKED_AT", 1)
    jax.clear_caches()
    yield
    jax.clear_caches()


def masked(call: tuple[str, str, str], mask: np.ndarray) -> Sample:
    bias, situation, normalizer = call
    sample = Case(bias, situation, (), normalizer).at(**SIZES).sample()
    conditions = sample.conditions | {"mask": jnp.asarray(mask)}
    return dataclasses.replace(sample, conditions=conditions)


def kernels(**more: Any) -> dict[str, Any]:
    return {"implementation": kernel_implementation(), "config": SMALL, **more}


@pytest.mark.at_most(8)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("call", CALLS, ids="-".join)
def test_values_and_gradients_are_those_of_all_blocks(call, mask):
    sample = masked(call, MASKS[mask])
    assert_formula(gradients(sample, **kernels(), **EXACT), truth(sample))


@pytest.mark.at_most(2)
@pytest.mark.parametrize("call", CALLS[:9:2], ids="-".join)
def test_so_are_tangents(call):
    sample = masked(call, MASKS["heads"])
    got = jax.jit(tangents(sample.settings, **kernels(), **EXACT))
    want = tangents(sample.settings, implementation="reference")
    arguments = sample.operands, sample.conditions
    assert_formula(got(*arguments), in_float64(want, *arguments))


@pytest.mark.at_most(2)
@pytest.mark.parametrize("call", [CALLS[0], CALLS[2], CALLS[7]], ids="-".join)
def test_no_list_is_read_past_its_end(call):
    """Of whatever number of blocks, none among them."""
    if kernel_implementation() != "triton_interpret":
        pytest.skip("this machine has a GPU: no kernel is interpreted here")
    for mask in ("hidden", "late", "heads"):
        with watched() as strays:
            gradients(masked(call, MASKS[mask]), **kernels())
        assert not strays


def test_what_no_query_sees_is_not_read():
    """NaN there reaches nothing, in blocks that are hidden or that show others."""
    mask = MASKS["shared"].copy()
    hidden = np.r_[0:64, 70:90, 199:200]
    mask[..., hidden] = False
    sample = masked(CALLS[0], mask)
    poisoned = dict(sample.operands)
    for name in ("key", "value"):
        poisoned[name] = poisoned[name].at[:, hidden].set(jnp.nan)
    poison = dataclasses.replace(sample, operands=poisoned)
    clean = gradients(sample, **kernels())
    found = gradients(poison, **kernels())
    assert_same_bits(found, clean)


@pytest.mark.parametrize("mask", ["shared", "late", "hidden"])
def test_just_the_blocks_that_show_any_are_visited(mask):
    """Of blocks as large as what is looked at; of smaller ones no others."""
    sample = masked(CALLS[0], MASKS[mask])
    block = Block(GRAIN, GRAIN, 4, 1)
    config = Config(block, block, block)
    found = visited(**sample.operands, **sample.conditions, **kernels(config=config))
    pad = [(0, -n % GRAIN) for n in (T, S)]
    grains = np.pad(MASKS[mask][0, 0], pad).reshape(-(-T // GRAIN), GRAIN, -1, GRAIN)
    share = grains.any((1, 3)).mean()
    for x in found:
        np.testing.assert_allclose(x, share, rtol=1e-6)


def test_nobody_looks_where_nothing_may_be_left_out():
    """`prune=False` visits all blocks, and gives the same to rounding."""
    sample = masked(CALLS[0], MASKS["shared"])
    config = dataclasses.replace(SMALL, prune=False)
    found = visited(**sample.operands, **sample.conditions, **kernels(config=config))
    assert all(bool((x == 1).all()) for x in found)
    got = values(sample, **kernels(config=config), **EXACT)
    assert_formula(got, values(sample, **kernels(), **EXACT))


@pytest.mark.parametrize("mask", MASKS)
def test_grains_are_counted(mask):
    x = np.broadcast_to(MASKS[mask], (1, MASKS[mask].shape[1], T, S))
    found = np.asarray(grains_of(jnp.asarray(x)))
    for i, j in np.ndindex(*found.shape[2:]):
        part = x[..., i * GRAIN : (i + 1) * GRAIN, j * GRAIN : (j + 1) * GRAIN]
        want = part.any((2, 3)).astype(int) + part.all((2, 3))
        np.testing.assert_array_equal(found[..., i, j], want)


@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize("size", [(16, 32), (64, 64), (128, 64), (32, 128)])
def test_lists_hold_the_blocks_of_their_kind(size, by_key):
    """In order, beside how many come before; long ones begin first."""
    mask = MASKS["heads"]
    sight = Sight(Visibility(), grains=grains_of(jnp.asarray(mask)))
    sample = masked(CALLS[0], mask)
    arguments = {**sample.settings, **sample.conditions, **sample.operands}
    call = called(**arguments).problem.call
    block = Block(*size)
    found = shown(sight, call, block, by_key=by_key)
    assert found is not None
    grains = np.asarray(sight.grains)
    rows = np.arange(-(-T // size[0])) * size[0]
    columns = np.arange(-(-S // size[1])) * size[1]

    def grain(start: int, n: int, end: int) -> slice:
        last = min(start + n, end) - 1
        return slice(start // GRAIN, last // GRAIN + 1)

    work = np.zeros(len(columns if by_key else rows))
    for h, i, j in np.ndindex(N, len(rows), len(columns)):
        part = grains[0, h, grain(rows[i], size[0], T), grain(columns[j], size[1], S)]
        kinds = {ANY: (part > 0).any(), ALL: (part == 2).all()}
        kinds[SOME] = kinds[ANY] and not kinds[ALL]
        own, other = (j, i) if by_key else (i, j)
        work[own] += kinds[ANY]
        for kind, here in kinds.items():
            before = np.asarray(found.before[0, h, own, kind])
            count = int(before[-1])
            assert (before[other + 1] - before[other]) == here
            listed = np.asarray(found.at[0, h, own, kind, :count])
            assert (other in listed) == here
            assert (np.diff(listed) > 0).all()
    assert (np.diff(work[np.asarray(found.order)]) <= 0).all()
