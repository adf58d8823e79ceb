"""What passes after the forward one read beside the operands, and of a tile's rows."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_attn.normalizers.softmax import difference, exponent, LOG2E
from pallas_attn.triton.ptx import exp2, product
from pallas_attn.triton.tile import Tile
from pallas_attn.types import Scalar


@dataclass(frozen=True)
class SoftmaxRows:
    """The `RowWeights` of softmax, [bq]: what `Cotangents` has of all queries."""

    lse: jax.Array
    delta: jax.Array
    peak: jax.Array | None
    total: jax.Array | None
    large_rows: bool  # as a plan has it

    @property
    def attends(self) -> jax.Array:
        """Whether a query attends to anything."""
        return self.lse != jnp.inf

    @property
    def large(self) -> bool:
        """Whether the forward pass kept lse in two."""
        return self.peak is not None

    def weights(
        self,
        t: Tile,
        s: jax.Array,
        row: Scalar,
        rest: list[jax.Array],
        visible: jax.Array | None,
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
                s = s - product(t.call, r, -inverse)  # as the forward pass rounds it
            row = product(t.call, row, inverse, always=True)
            base, more = t.along_q(self.peak), t.along_q(self.total)
            if self.large_rows and isinstance(row, jax.Array):
                base, lacks = difference(base, row)
                more = more + lacks * mul
            else:
                base = base - row
            e = exponent(s, base, mul, large=True) - more
        if visible is not None:
            e = jnp.where(visible, e, -jnp.inf)
        p = exp2(t.call, e)
        return p, p

    def in_units_of_u(self, x: jax.Array) -> jax.Array:
        """What x per query is as a multiple of U: a row of P adds up to 1."""
        return x


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cotangents:
    """What the backward passes read beside the operands."""

    do: Float[Array, "B T N h"]
    lse: Float[Array, "B N T"]  # log2, +inf for empty rows
    delta: Float[Array, "B N T"]
    # where scores may be large, lse in two: peak (units of q.k) + total (log2)
    peak: Float[Array, "B N T"] | None = None
    total: Float[Array, "B N T"] | None = None
    dlse: Float[Array, "B N T"] | None = None  # what a row of dS adds up to; None: 0
    large_rows: bool = field(default=False, metadata={"static": True})

    def of_rows(self, t: Tile) -> SoftmaxRows:
        """The statistics of a tile's queries."""
        peak, total = self.peak, self.total
        return SoftmaxRows(
            t.stat(self.lse, jnp.inf),
            t.stat(self.delta),
            None if peak is None else t.stat(peak, jnp.inf),
            None if total is None else t.stat(total),
            self.large_rows,
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Known:
    """What the tangent pass reads of rows; as `Cotangents` has it, but for o."""

    o: Float[Array, "B T N h"]
    lse: Float[Array, "B N T"]
    peak: Float[Array, "B N T"] | None = None
    total: Float[Array, "B N T"] | None = None
    large_rows: bool = field(default=False, metadata={"static": True})

    def of_rows(self, t: Tile) -> SoftmaxRows:
        """The statistics of a tile's queries, which have no delta."""
        peak, total = self.peak, self.total
        return SoftmaxRows(
            t.stat(self.lse, jnp.inf),
            jnp.zeros((t.bq,), jnp.float32),
            None if peak is None else t.stat(peak, jnp.inf),
            None if total is None else t.stat(total),
            self.large_rows,
        )
