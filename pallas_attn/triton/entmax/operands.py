"""What entmax's passes hand on, and what its backward passes read of a row."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_attn.normalizers.entmax import Learned, Power
from pallas_attn.tiled.operands import Operands, Wanted
from pallas_attn.triton.entmax.call import SparseCall
from pallas_attn.triton.entmax.lists.operands import Lists
from pallas_attn.triton.entmax.power import power_of
from pallas_attn.triton.ptx import product
from pallas_attn.triton.tile import Tile
from pallas_attn.types import Scalar


@dataclass(frozen=True)
class EntmaxRows:
    """The `RowWeights` of entmax, [bq]: what `Cotangents` has of all queries."""

    power: Power | Learned
    m: jax.Array
    level: jax.Array
    u: jax.Array
    delta: jax.Array

    @property
    def attends(self) -> jax.Array:
        """Whether a query attends to anything."""
        return self.m != jnp.inf

    @property
    def large(self) -> bool:
        """Of 16 bits the forward pass kept no more digits than a dot has."""
        return False

    def weights(
        self,
        t: Tile,
        s: jax.Array,
        row: Scalar,
        rest: list[jax.Array],
        visible: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        """(P, U) of products s and of what is added to them."""
        x, m = self.scores(t, s, row, rest, visible)
        return self.power.weights(x, m, t.along_q(self.level), t.call.scale)

    def scores(
        self,
        t: Tile,
        s: jax.Array,
        row: Scalar,
        rest: list[jax.Array],
        visible: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        """Scores without what a whole row has, and the largest less that."""
        inverse = 1.0 / t.call.scale
        for r in rest:
            s = s - product(t.call, r, -inverse)  # as the forward pass rounds it
        if visible is not None:
            s = jnp.where(visible, s, -jnp.inf)
        m = t.along_q(self.m)
        if isinstance(row, float):
            return s, m - row * inverse
        # what an empty row has for itself may be NaN
        return s, jnp.where(m == jnp.inf, m, m - product(t.call, row, inverse))

    def in_units_of_u(self, x: jax.Array) -> jax.Array:
        """What x per query is as a multiple of U."""
        return x / jnp.where(self.u == 0, 1.0, self.u)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cotangents:
    """What the backward passes read beside the operands."""

    do: Float[Array, "B T N h"]
    m: Float[Array, "B N T"]  # the largest score, units of q.k; +inf for empty rows
    level: Float[Array, "B N T"]
    u: Float[Array, "B N T"]  # sum u
    delta: Float[Array, "B N T"]
    alpha: Float[Array, "#B #N"] | None  # None: static
    dlse: Float[Array, "B N T"] | None = None  # what a row of dS adds up to; None: 0
    fused: bool = field(default=False, metadata={"static": True})

    def of_rows(self, t: Tile) -> EntmaxRows:
        """The statistics of a tile's queries."""
        assert isinstance(t.call, SparseCall)
        return EntmaxRows(
            power_of(t.call, self.alpha, t.b, t.h, fused=self.fused),
            t.stat(self.m, jnp.inf),
            t.stat(self.level),
            t.stat(self.u),
            t.stat(self.delta),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dense:
    """What the passes over tiles leave for the backward.

    m, level, u: as `Cotangents` has them.
    o2: float32: the mean of the values by u.
    bits: of every query block a bit for each key block with weight.
    """

    m: Float[Array, "B N T"]
    level: Float[Array, "B N T"]
    u: Float[Array, "B N T"]
    o2: Float[Array, "B T N h"]
    bits: Int[Array, "B N query_blocks words"]
    visits: Int[Array, "B N query_blocks 2"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Residuals:
    """What the backward pass keeps of the forward pass.

    ops: the operands, products as columns.
    factors: the products as they came.
    alpha: float32; None: static.
    m, level: as `Cotangents` has them.
    dense, lists: of the way that was taken; of both where the device chose.
    """

    ops: Operands
    factors: tuple[tuple[Array, Array], ...]
    alpha: Float[Array, "#B #N"] | None
    m: Float[Array, "B N T"]
    level: Float[Array, "B N T"]
    dense: Dense | None
    lists: Lists | None
    wanted: Wanted = field(metadata={"static": True})
    wants_alpha: bool = field(metadata={"static": True})
