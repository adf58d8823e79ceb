"""What the passes read, as one value each: arrays outside, refs inside the kernels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from pallas_attn.bias.base import Added
from pallas_attn.kernels.instructions import exp2
from pallas_attn.kernels.terms import Field
from pallas_attn.kernels.tile import Tile
from pallas_attn.kernels.visible import Sight
from pallas_attn.normalizers.softmax import exponent, LOG2E


@dataclass(frozen=True)
class Wanted:
    """Which gradients somebody asked for.

    a, b: places of columns whose query, key side wants one; places: of all products.
    """

    q: bool = False
    k: bool = False
    v: bool = False
    fields: tuple[Field, ...] = ()
    a: tuple[int, ...] = ()
    b: tuple[int, ...] = ()
    places: tuple[int, ...] = ()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Operands:
    """What every pass reads: arrays outside, refs inside the kernels."""

    q: Any
    k: Any
    v: Any
    added: Added
    sight: Sight


@dataclass(frozen=True)
class RowStats:
    """Of the queries of a tile, [bq]: what `Cotangents` has of all."""

    lse: jax.Array
    delta: jax.Array
    peak: jax.Array | None
    total: jax.Array | None

    @property
    def some(self) -> jax.Array:
        """Whether a query attends to anything."""
        return self.lse != jnp.inf

    def weights(
        self, t: Tile, s: jax.Array, row: Any, rest: list[jax.Array], visible: Any
    ) -> tuple[jax.Array, jax.Array]:
        """(P, U) of products s and of what is added to them; U is P."""
        mul, inverse = t.call.scale * LOG2E, 1.0 / t.call.scale
        if self.peak is None or self.total is None:
            e = s * mul
            for r in rest:
                e = e + r * LOG2E
            e = e - (t.along_q(self.lse) - row * LOG2E)
        else:
            for r in rest:
                s = s - r * -inverse  # as the forward pass rounds it
            base = t.along_q(self.peak) - row * inverse
            e = exponent(s, base, mul, large=True) - t.along_q(self.total)
        if visible is not None:
            e = jnp.where(visible, e, -jnp.inf)
        p = exp2(t.call, e)
        return p, p

    def of_one(self, x: jax.Array) -> jax.Array:
        """What x per query is as a multiple of U: a row of P adds up to 1."""
        return x


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cotangents:
    """What the backward passes read beside the operands."""

    do: Any  # [B, T, N, h]
    lse: Any  # [B, N, T], log2, +inf for empty rows
    delta: Any  # [B, N, T]
    peak: Any = None  # where scores may be large, lse in two: peak (units of q.k)
    total: Any = None  # + total (log2)
    dlse: Any = None  # [B, N, T], natural units; None: no cotangent

    def of_rows(self, t: Tile) -> RowStats:
        """The statistics of a tile's queries."""
        large = self.peak is not None
        return RowStats(
            t.stat(self.lse, jnp.inf),
            t.stat(self.delta),
            t.stat(self.peak, jnp.inf) if large else None,
            t.stat(self.total) if large else None,
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Residuals:
    """What the backward pass keeps of the forward pass.

    ops: the operands, products as columns.
    factors: the products as they came.
    o: [B, T, N, h].
    lse: [B, N, T], log2, +inf for empty rows; where scores may be large, in two:
        peak (units of q.k) and total (log2).
    """

    ops: Operands
    factors: tuple[tuple[Any, Any], ...]
    o: Any
    lse: Any
    visits: Any
    wanted: Wanted = field(metadata={"static": True})
    grains: Any = None
    reach: Any = None
    peak: Any = None
    total: Any = None
