"""The fields of a bias' terms: where each lives, what it varies along."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_attn.bias.base import Added, Bias, homes


@dataclass(frozen=True, order=True)
class Field:
    """A field of a bias' term, with the facts that its home and its shape decide.

    Args:
        term: The index of its term.
        name: Its name there.
        home: Where it lives: "head", "query", "key", "pair" or "distance".
        span: What it varies along, "", "q", "k", "qk" or "d": who owns its gradient.
        additive: Whether its gradient is that of the score.
        steep: Whether it may give all keys of a row a value such as -1e9.
        running: Whether it holds running sums along keys.
    """

    term: int
    name: str
    home: str
    span: str
    additive: bool
    steep: bool
    running: bool

    @property
    def is_row_constant(self) -> bool:
        """Whether it adds one number to a whole row of scores."""
        return self.additive and self.span in ("", "q")

    def of(self, terms: tuple[Bias, ...]) -> Array:
        """Its value in terms."""
        return getattr(terms[self.term], self.name)


# Of each field an array, or a ref of it, or what is loaded on a tile.
Values = dict[Field, Array]


def fields(added: Added) -> Values:
    """All fields of all terms, arrays or refs, in the order of terms."""
    return {
        Field(
            n,
            name,
            home,
            _span(home, getattr(term, name).shape),
            name in term.identity,
            term.steep,
            term.running,
        ): getattr(term, name)
        for n, term in enumerate(added.terms)
        for name, home in homes(term).items()
    }


def _span(home: str, shape: tuple[int, ...]) -> str:
    if home == "distance" and len(shape) == 3:
        return "d"
    if home in ("pair", "distance"):
        return "q" * (shape[2] > 1) + "k" * (shape[3] > 1)
    return {"head": "", "query": "q", "key": "k"}[home]


def with_fields(added: Added, values: Mapping[Field, Array | None]) -> tuple[Bias, ...]:
    """The terms with other values in all their fields."""
    return tuple(
        replace(term, **{f.name: x for f, x in values.items() if f.term == n})
        for n, term in enumerate(added.terms)
    )


def turned(added: Added) -> Added:
    """Full pair fields transposed, for kernels that keep scores as [keys, queries]."""
    values = {
        f: x.swapaxes(2, 3) if f.span == "qk" else x for f, x in fields(added).items()
    }
    return Added(with_fields(added, values), added.products)


def along(field: Field, x: Array) -> Float[Array, "#B #N length"] | None:
    """A field that varies along queries, keys or diagonals alone, or along none.

    None of one that varies along queries and keys, and of a head's number.
    """
    if field.home == "head" or field.span == "qk":
        return None
    if field.span == "d":
        return x
    if field.home in ("pair", "distance"):
        return x.reshape(*x.shape[:2], -1)
    return jnp.swapaxes(x, 1, 2)
