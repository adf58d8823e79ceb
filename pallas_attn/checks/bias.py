"""What can be wrong about a bias: its class, its fields, what its methods return."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array

from pallas_attn.bias.base import Bias, by_distance, has_tile, homes, Sum
from pallas_attn.bias.dense import DenseBias
from pallas_attn.bias.region import Place
from pallas_attn.checks.tile import elementwise
from pallas_attn.rules import (
    array,
    floating,
    kind,
    library_of,
    shape,
    shape_from_the_right,
    wrong_shape,
)
from pallas_attn.shapes import axes, fits, fits_from_the_right, Sizes, spelled


# By home: the axes of a field, and what to do about a wrong one. Behind those of a
# query or key field may stand axes of its own, which `contract` or `expand` uses up.
LEADING = "Its leading axes are those of query, of size 1 where it is shared."
HOME_RULES = {
    "head": ("#B #N", "Give one number per head."),
    "query": ("#B T #N", LEADING),
    "key": ("#B S #N", LEADING),
    "pair": ("#B #N #T #S", "Give a shared axis the size 1."),
    "distance": ("#B #N D", "Give one number per head and distance."),
}
ALIGNED = ("head", "pair", "distance")


def given(x: Any, sizes: Sizes) -> Bias:
    """A bias value with checked arrays for fields; an array is a DenseBias."""
    if x is None:
        return Sum(())
    if isinstance(x, Bias):
        return _with_arrays("bias", x, sizes)
    if isinstance(x, type):
        raise TypeError(
            f"`bias` must be a value, not a class; got {kind(x)}. Write "
            f"`{x.__name__}(...)`."
        )
    found = array("bias", x, "an array or a bias value", _instead(x))
    _shaped("bias", found, "pair", sizes)
    addable("bias", found, hides=True)
    return DenseBias(found)


def _instead(x: Any) -> str:
    """What to give for a thing that is no bias."""
    if isinstance(x, list | tuple):
        return "Add biases up, `a + b`; of numbers jnp.asarray makes an array."
    library = library_of(x)
    if library is not None:
        return (
            "That is a module: modules are the bias of "
            f"pallas_attn.{library}.MultiHeadAttention. Give a value, such as "
            "`pallas_attn.ALiBi(slopes)`."
        )
    if hasattr(x, "get_value"):  # of flax.nnx
        return "Pass the value it holds: `x.get_value()`."
    if callable(x):
        return (
            "A formula of positions is the `tile` of a class of your own: see "
            "pallas_attn.Bias."
        )
    return "Use jnp.asarray, or see pallas_attn.Bias."


def _with_arrays(name: str, term: Bias, sizes: Sizes) -> Bias:
    if isinstance(term, Sum):
        named = enumerate(term.terms)
        return Sum(
            tuple(_with_arrays(f"{name}.terms[{i}]", t, sizes) for i, t in named)
        )
    fields = {
        field: _field(f"{name}.{field}", getattr(term, field), home, sizes, term.ranked)
        for field, home in homes(term).items()
    }
    term.check(name)  # as it was given: under a trace an array made of it is traced
    return dataclasses.replace(term, **fields) if fields else term


def _field(name: str, x: Any, home: str, sizes: Sizes, ranked: bool = False) -> Array:
    """ranked: behind the axes of a query or key field stands that of a product."""
    found = array(name, x)
    if home in ALIGNED:
        if home in ("head", "distance") and not found.ndim:
            letters, advice = HOME_RULES[home]
            shape(name, found, axes(letters, sizes), advice)
        _shaped(name, found, home, sizes)
        return found
    letters, advice = HOME_RULES[home]
    rule = axes(letters, sizes)
    if not fits(found.shape[: len(rule)], rule):
        own = found.shape[len(rule) :]
        if own or ranked:
            rule += axes("R" if len(own) <= 1 else "...", sizes)
        advice += _if_heads_came_first(sizes, lambda s: fits(
            found.shape[: len(rule)], axes(letters, s)
        ))  # fmt: skip
        wrong_shape(name, found, spelled(rule), advice)
    return found


def _shaped(name: str, x: Array, home: str, sizes: Sizes) -> None:
    """A field whose axes are aligned to the right."""
    letters, advice = HOME_RULES[home]
    fit = lambda sizes: fits_from_the_right(x.shape, axes(letters, sizes))
    if not fit(sizes):
        advice += _if_heads_came_first(sizes, fit)
        shape_from_the_right(name, x, axes(letters, sizes), advice)


def _if_heads_came_first(sizes: Sizes, fit: Callable[[Sizes], bool]) -> str:
    """What to say of a bias that would fit queries and keys [*B, heads, length, H]."""
    turned = dataclasses.replace(sizes, T=sizes.N, N=sizes.T, S=sizes.K, K=sizes.S)
    if not fit(turned):
        return ""
    return (
        f" It would fit N = {sizes.T} heads of T = {sizes.N} queries: does query come "
        "as [*B, heads, length, H]? Swap its axes, and those of key and value."
    )


class Part(NamedTuple):
    """One of the simplest terms of a bias, checked.

    Args:
        term: What neither `at` nor `expand` takes further.
        product: (A [#B, T, #N, R], B [#B, S, #N, R]) of its `contract`, or None.
        fields: What its `tile` reads, by name; None: it has no tile.
    """

    term: Bias
    product: tuple[Array, Array] | None
    fields: dict[str, Array] | None


def parts(bias: Bias, place: Place, sizes: Sizes) -> list[Part]:
    """A given bias as its simplest terms, where a call puts it: its way down, once."""
    return [
        Part(
            term,
            _product(name, term, sizes),
            tiled(name, term, sizes, place) if has_tile(term) else None,
        )
        for name, term in _terms("bias", bias, place, sizes)
    ]


def _terms(
    name: str, bias: Bias, place: Place, sizes: Sizes
) -> Iterator[tuple[str, Bias]]:
    """The simplest terms of a bias, each by name: those that `expand` leaves alone.

    A CoALiBi among them is refused: it is no sum's term.
    """
    if isinstance(bias, Sum):
        for i, part in enumerate(bias.terms):
            yield from _terms(f"{name}.terms[{i}]", part, place, sizes)
        return
    if bias.placed:
        bias = dataclasses.replace(bias, **tiled(name, bias, sizes))
        bias = bias.at(place)
    expanded = bias.expand()
    if not isinstance(expanded, tuple):
        raise TypeError(
            f"`{name}.expand` must return a tuple of bias values; got "
            f"{kind(expanded)}. Write `return (term,)`."
        )
    for i, part in enumerate(expanded):
        if type(part) is type(bias):
            yield name, _adding(name, part)
        elif isinstance(part, Bias):
            yield from _terms(f"{name}.expand()[{i}]", part, place, sizes)
        else:
            raise TypeError(
                f"`{name}.expand` must return bias values; got {kind(part)}. An array "
                "is a DenseBias(array)."
            )


def _adding(name: str, term: Bias) -> Bias:
    if term.family:
        raise NotImplementedError(
            "`bias`: Co-ALiBi with another bias is not implemented in this version; "
            f"got {kind(term)} at `{name}`. Pass CoALiBi(slopes) alone."
        )
    if not has_tile(term) and type(term).contract is Bias.contract:
        raise TypeError(
            f"`{name}` must override tile, contract or expand; got "
            f"{kind(term)} that overrides none. See pallas_attn.Bias."
        )
    return term


def tiled(
    name: str, x: Bias, sizes: Sizes, place: Place | None = None
) -> dict[str, Array]:
    """The fields that kernels read: one number per head, query, key, pair or diagonal.

    place: where a call reads tables of distances; None: they stay what they are.
    """
    home_of = homes(x)
    for field in dataclasses.fields(x):
        if field.name not in home_of and not field.metadata.get("static"):
            raise TypeError(
                f"`{name}.{field.name}` must have a home, for `tile` reads it; got "
                "none. Declare it with head_home(), query_home(), key_home(), "
                "pair_home() or distance_home(first), or as static: "
                'field(metadata={"static": True}).'
            )
    fields = {f: _field(f"{name}.{f}", getattr(x, f), home, sizes)
              for f, home in home_of.items()}  # fmt: skip
    for field, home in home_of.items():
        addable(f"{name}.{field}", fields[field], hides=home == "pair")
        rule = axes(HOME_RULES[home][0], sizes)
        if home not in ALIGNED:
            advice = "`tile` takes one number each."
            shape(f"{name}.{field}", fields[field], rule, advice)
    if has_tile(x):
        wide = any(field.dtype == np.float64 for field in fields.values())
        elementwise(name, x, np.float64 if wide else np.float32)
    if place is None:
        return fields
    read = by_distance(dataclasses.replace(x, **fields), place)
    return {name: getattr(read, name) for name in fields}


def _product(name: str, x: Bias, sizes: Sizes) -> tuple[Array, Array] | None:
    """What `contract` returns: A [#B, T, #N, R] and B [#B, S, #N, R], or None."""
    pair = x.contract()
    if pair is None:
        return None
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise TypeError(
            f"`{name}.contract` must return two arrays or None; got {kind(pair)}. "
            "Return (A [#B, T, #N, R], B [#B, S, #N, R])."
        )
    names = tuple(_name(name, x, i, side) for i, side in enumerate(pair))
    a, b = (array(n, side) for n, side in zip(names, pair, strict=True))
    shape(names[0], a, axes("#B T #N R", sizes), LEADING)
    shape(names[1], b, axes("#B S #N R", sizes, R=a.shape[-1]), LEADING)
    for n, side in zip(names, (a, b), strict=True):
        addable(n, side)
    return a, b


def addable(name: str, x: Array, hides: bool = False) -> None:
    """An array of a dtype that can be added to scores.

    hides: a mask may have been meant.
    """
    advice = "Cast it: `.astype(jnp.float32)`."
    if hides:
        advice = (
            "If it is 0 where a query may not attend, write `mask=bias != 0`; if it is "
            "to be added, cast it: `.astype(jnp.float32)`."
        )
    floating(name, x, advice)


def _name(name: str, x: Bias, i: int, side: Any) -> str:
    """The field that a side of a product is, or its place in `contract`."""
    found = (field for field in homes(x) if getattr(x, field) is side)
    return f"{name}.{next(found, f'contract()[{i}]')}"
