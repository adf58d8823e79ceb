"""No kernel reads or writes outside its arrays, whatever numbers it is given."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_attn.call import Call
from pallas_attn.config import Block
from pallas_attn.testing.cases import Case
from pallas_attn.testing.evaluate import (
    EXACT,
    kernel_implementation,
    small,
    truth,
    with_gradients,
)
from pallas_attn.testing.guards import guarded
from pallas_attn.testing.indices import watched
from pallas_attn.testing.numerics import assert_formula, assert_same_bits
from pallas_attn.triton.entmax import route
from pallas_attn.triton.launch import launch, like
from pallas_attn.triton.memory import load_where, store_where


# Calls that between them run every kernel, every plan of a backward and every kind of
# mask; the last block of either axis is ragged.
SIZES = {"T": 19, "S": 37, "H": 8, "h": 8}
CASES = [
    Case(bias, situation, (), normalizer).at(**SIZES)
    for bias, situation, normalizer in [
        ("dense", "mask BNTS", "softmax"),
        ("sum", "causal GQA", "sink"),
        ("saturating", "causal segments", "softmax"),
        ("factored-float32 R20", "causal window lengths", "softmax"),
        ("co_alibi", "all at once", "sink"),
        ("alibi", "lengths", "entmax 1.5"),
        ("sum-three dense", "causal", "entmax learned top 8"),
        ("none", "full", "entmax 2.0"),  # through lists too
    ]
]
ROWS = [pytest.param(x, marks=[pytest.mark.light] * (x in CASES[:1])) for x in CASES]


def look():
    """Where kernels are interpreted, a context that looks at every index."""
    interpreted = kernel_implementation() == "triton_interpret"
    return watched() if interpreted else contextlib.nullcontext([])


@pytest.mark.whole
@pytest.mark.parametrize("case", ROWS, ids=str)
def test_nothing_leaves_its_arrays(case, monkeypatch):
    """Every array between bands of NaN; interpreted, every index is looked at too."""
    monkeypatch.setattr(route, "LONG", SIZES["S"])
    sample = case.sample()
    arguments = (sample.operands, sample.conditions, sample.cotangents)
    with guarded() as damage, look() as strays:
        evaluate = with_gradients(
            sample.settings,
            implementation=kernel_implementation(),
            config=small(case.bias, case.normalizer),
            **EXACT,
        )
        run = jax.jit(evaluate).lower(*arguments).compile()

    found = {}

    def checked(name, operands, cotangents):
        result = jax.block_until_ready(run(operands, sample.conditions, cotangents))
        jax.effects_barrier()
        if damage or strays:
            found[name] = [*set(damage), *sorted(set(strays))]
            damage.clear()
            strays.clear()
        return result

    plain = checked("as drawn", sample.operands, sample.cotangents)
    assert_formula(plain, truth(sample))
    for name, place, untouched in neighbours(case.sizes):
        result = checked(name, *spoilt(sample, place))
        assert_same_bits(seen(result, untouched), seen(plain, untouched))
    for name, operands, cotangents in extremes(sample):
        checked(name, operands, cotangents)
    assert not found, "\n".join(f"{name}: {x}" for name, x in found.items())


def shifting_kernel(x, out, *, call, program, by):
    place = program.place[0] * 0 + jnp.arange(16, dtype=jnp.int32)
    ok = place < x.shape[0]
    store_where(out.at[place + by], load_where(x.at[place + by], ok), ok)


@pytest.mark.parametrize("by", [0, -1, 1])
def test_a_kernel_that_leaves_its_arrays_is_seen(by):
    interpreted = kernel_implementation() == "triton_interpret"
    call = Call(1, 1, 1, 1, 1, 1, 1, 1.0, "float32", interpret=interpreted)
    x = jnp.arange(10, dtype=jnp.float32)
    block = Block(16, 16, 1, 1)
    run = lambda x: launch(shifting_kernel, (1,), (x,), like(x), call, block, by=by)
    with guarded() as damage, look() as strays:
        found = np.asarray(jax.jit(run)(x))
    jax.effects_barrier()
    assert bool(damage) == (by != 0)
    if interpreted:
        assert {(stray.what, *stray[2:]) for stray in strays} == {
            -1: {("load", 0, -1, -1), ("store", 0, -1, -1)},
            0: set(),
            1: {("load", 0, 10, 10), ("store", 0, 10, 10)},
        }[by]
    assert np.isnan(found).sum() == (by != 0)  # the place that nothing was stored to


def neighbours(s):
    """(name, index of what becomes NaN, of what must not see it); axes B, T|S, N|K."""
    yield (
        "NaN in the last batch entry",
        np.s_[-1:],
        np.s_[:-1] if s.B > 1 else np.s_[:0],
    )
    if s.K > 1:
        yield "NaN in the last heads", np.s_[:, :, -1:], np.s_[:, :, :1]


def spoilt(sample, place):
    """The operands and cotangents, NaN in some batch entries or heads."""
    operands = dict(sample.operands)
    for name in ("query", "key", "value"):
        operands[name] = operands[name].at[place].set(jnp.nan)
    return operands, tuple(x.at[place].set(jnp.nan) for x in sample.cotangents)


def seen(result, place):
    """What of the values and of the gradients lies in some batch entries or heads."""
    values, gradients = result
    made = (*values, *(gradients[name] for name in ("query", "key", "value")))
    return [np.asarray(x)[place] for x in made]


def extremes(sample):
    """(name, operands, cotangents): each array with what no score should be."""
    given = (sample.operands, sample.cotangents)
    leaves, tree = jax.tree.flatten_with_path(given)
    for place, (path, x) in enumerate(leaves):
        chosen = jax.random.bernoulli(jax.random.key(place), 0.1, x.shape)
        for value in (jnp.nan, jnp.inf, -jnp.inf):
            changed = [leaf for _, leaf in leaves]
            changed[place] = jnp.where(chosen, jnp.asarray(value, x.dtype), x)
            yield f"{value} in {jax.tree_util.keystr(path)}", *tree.unflatten(changed)
    zero = {**sample.operands}
    for name in ("query", "bias"):
        zero[name] = jax.tree.map(jnp.zeros_like, zero[name])
    yield "equal scores", zero, sample.cotangents
    for value in (jnp.nan, jnp.inf, -jnp.inf):
        fill = lambda x, value=value: jnp.full_like(x, value)
        yield f"all {value}", *jax.tree.map(fill, given)
        if jax.tree.leaves(sample.operands["bias"]):
            bias = jax.tree.map(fill, sample.operands["bias"])
            yield f"a bias of {value}", {**sample.operands, "bias": bias}, given[1]
