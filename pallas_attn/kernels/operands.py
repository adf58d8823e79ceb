"""What the passes read, as one value each: arrays outside, refs inside the kernels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from pallas_attn.bias.base import Added
from pallas_attn.kernels.terms import Field
from pallas_attn.kernels.tile import Tile
from pallas_attn.kernels.visible import Sight


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
    norms: Any = None
    reach: Any = None
    peak: Any = None
    total: Any = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pruning:
    """What rules blocks out; None where nothing is pruned.

    norms: the largest |[k, B]| of a grain of keys, [B, heads, grains].
    reach: the largest |scale [q, A]| (log2) of a forward block of queries.
    floors: the least log2-sum of a grain of queries.
    """

    norms: Any = None
    reach: Any = None
    floors: Any = None
