"""The fields of a bias' terms: where each lives, what it varies along."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_attn.bias.base import Added, Bias, homes


# A field of a sum: the index of its term, and its name.
Field = tuple[int, str]


def fields(added: Added) -> dict[Field, Any]:
    """All fields of all terms."""
    return {
        (n, name): getattr(term, name)
        for n, term in enumerate(added.terms)
        for name in homes(term)
    }


def home(added: Added, field: Field) -> str:
    """Where a field lives."""
    return homes(added.terms[field[0]])[field[1]]


def span(added: Added, field: Field) -> str:
    """What a field varies along, "", "q", "k" or "qk": who owns its gradient."""
    where = home(added, field)
    if where == "pair":
        shape = getattr(added.terms[field[0]], field[1]).shape
        return "q" * (shape[2] > 1) + "k" * (shape[3] > 1)
    return {"head": "", "query": "q", "key": "k"}[where]


def is_identity(added: Added, field: Field) -> bool:
    """Whether the field's gradient is that of the score."""
    return field[1] in added.terms[field[0]].identity


def with_fields(added: Added, values: dict[Field, Any]) -> tuple[Bias, ...]:
    """The terms with other values in their fields."""
    return tuple(
        replace(term, **{name: values[n, name] for name in homes(term)})
        for n, term in enumerate(added.terms)
    )


def turned(added: Added) -> Added:
    """Full pair fields transposed, for kernels that keep scores as [keys, queries]."""
    values = {
        f: x.swapaxes(2, 3) if span(added, f) == "qk" else x
        for f, x in fields(added).items()
    }
    return Added(with_fields(added, values), added.products)


def along(added: Added, field: Field) -> Float[Array, "#B #N length"] | None:
    """A field that varies along queries or keys alone, or along neither; else None.

    None for a head's number too.
    """
    x, place = getattr(added.terms[field[0]], field[1]), home(added, field)
    if place == "head" or span(added, field) == "qk":
        return None
    return jnp.swapaxes(x, 1, 2) if place != "pair" else x.reshape(*x.shape[:2], -1)
