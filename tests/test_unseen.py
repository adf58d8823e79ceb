"""NaN that nobody may see: every way to hide, crossed with what a call may have.

A covering table: each way to hide queries and keys in a row at least, each cap, scale,
dropout and grouping of heads in several; ragged, so that tiles have rows past T.
"""

from dataclasses import dataclass, replace
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_attn
from pallas_attn.bias.base import as_bias, Sum
from pallas_attn.config import Block, Config
from pallas_attn.testing.cases import Case
from pallas_attn.testing.evaluate import EXACT, gradients, implementations, truth
from pallas_attn.testing.numerics import assert_formula
from pallas_attn.testing.poison import bad, poisoned, poisoned_bias


T, S = 20, 27
SMALLEST = Block(16, 16)
CONFIG = Config(SMALLEST, SMALLEST, SMALLEST, SMALLEST)
FAR = 2**30


@dataclass(frozen=True)
class Row:
    """One call: how it hides, its bias, and what else it has."""

    veil: str
    bias: str
    extra: str = ""
    sizes: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        return " ".join(filter(None, (self.veil, self.bias, self.extra)))


GROUPED = (("N", 4), ("K", 2))
ROWS = [
    Row("segments", "none", "cap scale"),
    Row("segments", "co_alibi", "cap"),
    Row("positions", "saturating", "cap scale", GROUPED),
    Row("lengths", "sum", "dropout", GROUPED),
    Row("window", "co_alibi", "scale dropout"),
    Row("empty", "co_alibi"),
    Row("empty", "sum", "", GROUPED),
    Row("mask", "sum-factored dense", "scale dropout", GROUPED),
    Row("segments", "dense-11T1", "learned scale"),
    Row("bias BNTS", "none", "scale"),
    Row("bias BNTS", "none", "dropout", (("H", 80), ("h", 80))),
    Row("bias 1NTS", "saturating", "cap scale"),
    Row("bias B11S", "alibi", "dropout", GROUPED),
    Row("bias BNTS", "factored"),
    Row("bias 1NTS", "factored", "learned scale", GROUPED),
    Row("bias B11S", "alibi", "learned"),
    Row("bias BNTS", "sum", "top scale"),
    Row("segments", "alibi", "sink cap", GROUPED),
    Row("empty", "co_alibi", "sink"),
    Row("bias BNTS", "none", "sink dropout"),
]
NORMALIZER = {
    "learned": "entmax learned",
    "top": "entmax learned top 8",
    "sink": "sink",
}


CALLS = [(row, name) for row in ROWS for name in implementations()]


@pytest.mark.at_most(4)
@pytest.mark.parametrize(("row", "implementation"), CALLS, ids=str)
def test_poison_reaches_nothing(row, implementation):
    """NaN and inf in all that no place reads, cotangents too, change no result."""
    extra = row.extra.split()
    chosen = [NORMALIZER[x] for x in extra if x in NORMALIZER]
    normalizer = chosen[0] if chosen else "softmax"
    case = Case(row.bias, normalizer=normalizer)
    case = case.at(**{"T": T, "S": S, "B": 2, **dict(row.sizes)})
    sizes, sample = case.sizes, case.sample()
    veil, _, form = row.veil.partition(" ")
    conditions, settings, places = VEILS[veil](sizes)
    if "cap" in extra:
        settings["logits_soft_cap"] = 0.9
    if "dropout" in extra:
        settings["dropout_rate"] = 0.3
        conditions["dropout_rng"] = jax.random.key_data(jax.random.key(5))
    operands = dict(sample.operands)
    if "scale" in extra:
        operands["scale"] = jnp.float32(0.7)
    given, hiding = dict(conditions), None
    if form:  # what a mask hides in the truth, a term of -inf hides in the call
        shared = tuple(axis for axis, letter in enumerate(form) if letter == "1")
        places = full(sizes, places.any(shared, keepdims=True)).copy()
        places[1] &= form != "B11S"  # all queries of an entry, where none is told apart
        conditions["mask"] = jnp.asarray(places)
        shown = places.any(shared, keepdims=True)
        hiding = jnp.where(shown, 0.5, jnp.where(shown.cumsum(-1) % 2, -3e38, -jnp.inf))
    spoiled = {name: poisoned(places, name, x) for name, x in operands.items()}
    spoiled["bias"] = poisoned_bias(places, operands["bias"])
    if hiding is not None:
        spoiled["bias"] = hidden_by(spoiled["bias"], hiding)
        operands["bias"] = hidden_by(operands["bias"], jnp.full_like(hiding, 0.5))
    settings = {**sample.settings, **settings}
    clean = replace(sample, operands=operands, conditions=conditions, settings=settings)
    rows = np.swapaxes(places.any(3), 1, 2)
    do, dlse = sample.cotangents
    # where a row sees no key a sink has what its residual's cotangent has
    read = rows if normalizer != "sink" else np.ones_like(rows)
    cotangents = (
        jnp.where(rows[..., None], do, bad(do)),
        jnp.where(read, dlse, bad(dlse)),
    )
    assert not rows.all()
    assert not places.any((1, 2)).all()
    call = replace(clean, operands=spoiled, conditions=given, cotangents=cotangents)
    got = gradients(call, implementation=implementation, config=CONFIG, **EXACT)
    chex.assert_tree_all_finite(got[1])
    assert_formula(got, truth(clean))


def hidden_by(bias: Any, array: jax.Array) -> Any:
    return Sum((*as_bias(bias).expand(), pallas_attn.DenseBias(array)))


def segments(sizes: Any) -> Any:
    """Padding is segment 0 at the end; segment 7 has no key, segment 0 no query."""
    queries = jnp.repeat(jnp.array([[1, 2, 7]], jnp.int32), 7, 1)[:, : sizes.T]
    keys = jnp.repeat(jnp.array([[2, 1, 0]], jnp.int32), 9, 1)[:, : sizes.S]
    ids = {
        "query_segment_ids": jnp.broadcast_to(queries, (sizes.B, sizes.T)),
        "key_segment_ids": jnp.broadcast_to(keys, (sizes.B, sizes.S)),
    }
    same = np.asarray(queries)[0, :, None] == np.asarray(keys)[0]
    return ids, {}, full(sizes, same)


def positions(sizes: Any) -> Any:
    """From end to end; the first queries come before all keys, the last keys after."""
    queries = np.arange(sizes.T) - 5
    queries[:3] = -FAR
    keys = np.arange(sizes.S) - 7
    keys[:4] = 1 - FAR
    keys[-6:] = FAR
    placed = {
        "query_positions": jnp.asarray(queries, jnp.int32),
        "key_positions": jnp.asarray(keys, jnp.int32),
    }
    settings: dict[str, Any] = {"is_causal": True}
    return placed, settings, full(sizes, keys <= queries[:, None])


def lengths(sizes: Any) -> Any:
    queries, keys = np.array([sizes.T - 3, 9]), np.array([sizes.S - 5, 0])
    given = {
        "query_seq_lengths": jnp.asarray(queries, jnp.int32),
        "key_value_seq_lengths": jnp.asarray(keys, jnp.int32),
    }
    rows = (np.arange(sizes.T) < queries[:, None])[:, None, :, None]
    cols = (np.arange(sizes.S) < keys[:, None])[:, None, None, :]
    return given, {}, full(sizes, rows & cols)


def window(sizes: Any) -> Any:
    """The last queries have no key within reach, nor have the first keys a query."""
    settings = {"local_window_size": (3, 1), "query_offset": 12}
    ahead = np.arange(sizes.S) - (np.arange(sizes.T)[:, None] + 12)
    return {}, settings, full(sizes, (ahead <= 1) & (ahead >= -3))


def empty(sizes: Any) -> Any:
    """An entry has no query: where its window would begin, no key is real."""
    given, settings, places = window(sizes)
    queries = np.array([sizes.T - 3, 0])
    given = given | {"query_seq_lengths": jnp.asarray(queries, jnp.int32)}
    rows = (np.arange(sizes.T) < queries[:, None])[:, None, :, None]
    return given, settings, full(sizes, places & rows)


def mask(sizes: Any) -> Any:
    """Some queries see nothing, some keys nobody, and of the rest some pairs."""
    rng = np.random.default_rng(0)
    given = rng.random((sizes.B, sizes.N, sizes.T, sizes.S)) < 0.7
    given[:, :, 4:7] = given[..., 5:8] = given[..., -2:] = False
    return {"mask": jnp.asarray(given)}, {}, given


def bias(sizes: Any) -> Any:
    """As a mask does."""
    return {}, {}, mask(sizes)[2]


VEILS = {
    "segments": segments,
    "positions": positions,
    "lengths": lengths,
    "window": window,
    "empty": empty,
    "mask": mask,
    "bias": bias,
}


def full(sizes: Any, places: Any) -> np.ndarray:
    return np.broadcast_to(places, (sizes.B, sizes.N, sizes.T, sizes.S))
