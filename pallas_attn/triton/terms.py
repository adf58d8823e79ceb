"""What a kernel sees of the terms of a bias: fields loaded on a tile, parts, bounds."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Protocol, TypeVar

import jax
import jax.numpy as jnp

from pallas_attn.bias.base import Added, Bias, parts_of
from pallas_attn.bias.region import Positions
from pallas_attn.call import Call, NO_WEIGHT
from pallas_attn.tiled.fields import (
    Field,
    fields,
    Values,
    with_fields,
)
from pallas_attn.tiled.summaries import Extremes, Sight
from pallas_attn.triton.ptx import product
from pallas_attn.triton.tile import Tile
from pallas_attn.types import Index, Ref, Scalar


f32 = jnp.float32


class Ground(Positions, Protocol):
    """What terms are looked at on: a tile, or listed pairs of queries and keys."""

    @property
    def call(self) -> Call:
        """What is known of the call when it is traced."""
        ...

    @property
    def sight(self) -> Sight:
        """Who may see whom, of refs."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what has a number per pair."""
        ...

    @property
    def bq(self) -> int:
        """How many queries there are."""
        ...

    @property
    def flip(self) -> bool:
        """Whether queries lie along the last axis."""
        ...

    @property
    def visible(self) -> jax.Array | None:
        """Which pairs may attend; None if that hides nothing here."""
        ...

    def field(self, home: str, ref: Ref) -> jax.Array:
        """A field, float32: a number, one per query or key, or one per pair."""
        ...

    def seen_part(self, visible: jax.Array | None, x: jax.Array) -> jax.Array:
        """What `field` gives, 0 where no visible pair reads it."""
        ...

    def along_q(self, x: jax.Array) -> jax.Array:
        """One number per query, shaped to broadcast."""
        ...

    def settled(self) -> Ground:
        """With explicit positions read: a load cannot be differentiated through."""
        ...


Where = TypeVar("Where", bound=Ground)


def hold(added: Added, t: Tile, spans: Iterable[str]) -> Values:
    """The fields that vary along no more than `spans`, loaded once before a loop."""
    return hold_fields(fields(added), t, spans)


def hold_fields(values: Values, t: Tile, spans: Iterable[str]) -> Values:
    """Those of some fields that vary along `spans`, loaded."""
    return {f: t.field(f.home, x) for f, x in values.items() if f.span in spans}


def on_tile(added: Added, t: Where, held: Values) -> tuple[Where, tuple[Bias, ...]]:
    """The terms with their fields loaded on this tile, those in `held` as they are.

    And the tile, without the pairs that they take away if `Sight.careful` asks for it.
    """
    rest = {f: t.field(f.home, x) for f, x in fields(added).items() if f not in held}
    if t.sight.careful and isinstance(t, Tile):
        t = replace(t, kept=_kept(with_fields(added, held | rest), t))
    if t.sight.careful or not all(f.additive for f in rest):
        # A derivative of what nobody sees may not be finite; 0 times it is not 0.
        visible = t.visible
        rest = {f: t.seen_part(visible, x) for f, x in rest.items()}
    return t, with_fields(added, held | rest)


def _kept(terms: tuple[Bias, ...], t: Tile) -> jax.Array:
    """The visible pairs that no term, nor the sum of all, takes away."""
    values = [functools.reduce(jnp.add, parts_of(term.tile(t))) for term in terms]
    whole = functools.reduce(jnp.add, values)
    checks = [jnp.broadcast_to(~(x <= NO_WEIGHT), t.shape) for x in (*values, whole)]
    visible = t.visible
    return functools.reduce(
        jnp.logical_and, checks if visible is None else [visible, *checks]
    )


def parts(
    terms: tuple[Bias, ...], t: Ground, *, large: bool = False
) -> tuple[Scalar, list[jax.Array]]:
    """(row, rest): the sum of what does not depend on the key, and all that does.

    large: the sum may be so large that all passes must round it alike, part by part.
    """
    axis = 0 if t.flip else 1
    every = [part for term in terms for part in parts_of(term.tile(t))]
    whole = [jnp.ndim(part) == 0 or part.shape[axis] == 1 for part in every]
    row, several = 0.0, sum(whole) > 1
    for part in itertools.compress(every, whole):
        if several and (large or t.call.exact):
            part = jnp.broadcast_to(jnp.asarray(part, f32), jnp.shape(part) or (1, 1))
            part = product(t.call, part, 1.0, always=True)
        row = row + part
    return row, [part for part, of_row in zip(every, whole, strict=True) if not of_row]


def pullback(
    terms: tuple[Bias, ...], mine: tuple[Field, ...], t: Ground
) -> Callable[[jax.Array], Values]:
    """What takes dS to gradients of the fields `mine`, by JAX's own vjp of `tile`.

    A head's number is spread over queries, so that its sum waits for the loop's end.
    """
    if not mine:
        return lambda ds: {}
    t = t.settled()

    def total(values: dict[Field, jax.Array]) -> jax.Array:
        out = jnp.zeros(t.shape, f32)
        for n in sorted({f.term for f in mine}):
            new = {f.name: values[f] for f in mine if f.term == n}
            for part in parts_of(replace(terms[n], **new).tile(t)):
                out = out + jnp.broadcast_to(part, t.shape)
        return out

    def primal(field: Field) -> jax.Array:
        x = field.of(terms)
        return t.along_q(jnp.full((t.bq,), x)) if jnp.ndim(x) == 0 else x

    _, back = jax.vjp(total, {field: primal(field) for field in mine})

    def gradients(ds: jax.Array) -> dict[Field, jax.Array]:
        return {
            field: g.reshape(max(g.shape)) if 1 in g.shape else g
            for field, g in back(ds)[0].items()
        }

    return gradients


def pushforward(terms: tuple[Bias, ...], moved: Values, t: Ground) -> jax.Array:
    """What the terms move by when some of their fields do, by JAX's own jvp of `tile`.

    It broadcasts against the tile, as small as its parts are.
    """
    t = t.settled()

    def total(values: Values) -> jax.Array:
        out = jnp.zeros((1, 1), f32)
        for n in sorted({f.term for f in moved}):
            new = {f.name: values[f] for f in moved if f.term == n}
            for part in parts_of(replace(terms[n], **new).tile(t)):
                out = out + part
        return out

    return jax.jvp(total, ({f: f.of(terms) for f in moved},), (moved,))[1]


def bound(
    added: Added,
    held: Values,
    extremes: Mapping[Field, Extremes],
    *ranges: Index,
) -> jax.Array:
    """The largest sum of the terms on ranges of positions, in log2 units.

    extremes: of the fields that have any, on these ranges.
    """
    total, every = f32(0), fields(added)
    for n, term in enumerate(added.terms):
        assert term.bounded
        known = {
            f.name: extremes.get(f, held.get(f) if f.home == "head" else None)
            for f in every
            if f.term == n
        }
        total = total + replace(term, **known).bound(*ranges)
    return total * math.log2(math.e)
