"""The letters of every array of a call: which axis is the batch, which are heads."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax

from pallas_attn.bias.base import Added, Bias, homes, is_diagonal
from pallas_attn.normalizers.entmax import Entmax
from pallas_attn.normalizers.softmax import Softmax
from pallas_attn.problem import Problem
from pallas_attn.visibility import Visibility


# The axes of a field with each home; an axis of size 1 is shared.
FIELDS = {"head": "BN", "query": "BTN", "key": "BSN", "pair": "BNTS"}
DIAGONALS = "BNd"  # of one with a number per diagonal

VISIBILITY = {
    "offset": "B",
    "query_positions": "BNT",
    "key_positions": "BNS",
    "query_lengths": "B",
    "key_lengths": "B",
    "query_segments": "BT",
    "key_segments": "BS",
    "mask": "BNTS",
    "seed": "BNw",  # once parts of a call count entries and heads of the whole
}

# What a user calls the arrays of a `Visibility`.
ARGUMENTS = {
    "offset": "query_offset",
    "query_lengths": "query_seq_lengths",
    "key_lengths": "key_value_seq_lengths",
    "query_segments": "query_segment_ids",
    "key_segments": "key_segment_ids",
    "seed": "dropout_rng",
}


class Axes(NamedTuple):
    """An array's argument and the letters of its axes."""

    name: str
    letters: str


def axes_of(problem: Problem) -> list[Axes]:
    """The axes of every array of a problem, in the order of its leaves."""
    found: Any = Problem(
        Axes("query", "BTNH"),  # pyright: ignore[reportArgumentType]
        Axes("key", "BSKH"),  # pyright: ignore[reportArgumentType]
        Axes("value", "BSKh"),  # pyright: ignore[reportArgumentType]
        _of_bias(problem.bias),
        _of_normalizer(problem.normalizer),
        _of_visibility(problem.visibility),
        problem.call,
    )
    return jax.tree.leaves(found, is_leaf=lambda x: isinstance(x, Axes))


def leaves(problem: Problem) -> list[tuple[Any, Axes]]:
    """Every array of a problem with its axes."""
    return list(zip(jax.tree.leaves(problem), axes_of(problem), strict=True))


def _of_normalizer(normalizer: Softmax | Entmax) -> Any:
    """Its one array, where it has any."""
    name = "sink" if isinstance(normalizer, Softmax) else "alpha"
    return jax.tree.map(lambda _: Axes(f"normalizer.{name}", "BN"), normalizer)


def _of_bias(bias: Added | Bias) -> Any:
    if isinstance(bias, Bias):
        return _of_term(bias)
    terms = tuple(_of_term(term) for term in bias.terms)
    sides: Any = (Axes("bias", "BTNR"), Axes("bias", "BSNR"))
    return Added(terms, (sides,) * len(bias.products))


def _of_term(term: Bias) -> Bias:
    fields = {
        n: Axes(f"bias.{n}", letters(h, getattr(term, n)))
        for n, h in homes(term).items()
    }
    return dataclasses.replace(term, **fields)


def letters(home: str, x: Any) -> str:
    """The axes of a field as implementations have it."""
    if home != "distance":
        return FIELDS[home]
    return DIAGONALS if is_diagonal(home, x.ndim) else FIELDS["pair"]


def _of_visibility(visibility: Visibility) -> Any:
    return Visibility(
        **{
            name: Axes(ARGUMENTS.get(name, name), VISIBILITY[name])
            for name, x in vars(visibility).items()
            if x is not None
        }  # pyright: ignore[reportArgumentType]
    )
