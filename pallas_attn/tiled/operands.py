"""What the passes of any lowering read and leave, as one value each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import jax
from jaxtyping import Array, Float, Int

from pallas_attn.bias.base import Added
from pallas_attn.tiled.fields import Field, Values
from pallas_attn.tiled.summaries import Sight
from pallas_attn.types import Tree


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
    sink: bool = False


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Operands:
    """What every pass reads: arrays outside, refs inside the kernels."""

    q: Float[Array, "B T N H"]
    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K h"]
    added: Added
    sight: Sight
    sink: Float[Array, "#B #N"] | None = None


# What passes make, None where a call does not need it. The order of fields, which is
# the alphabet's, is that of a kernel's outputs.


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Forward:
    """What a forward pass makes.

    grains: the bounds that it had, of the lowering's own kind.
    lse: log2, +inf for empty rows; where scores may be large, in two: peak (units of
        q.k) and total (log2).
    reach: what bounds the scores of a block of queries, as the lowering has it.
    visits: how many blocks each program visited, of how many; None: nobody will ask.
    """

    grains: Tree = None
    lse: Float[Array, "B N T"]
    o: Float[Array, "B T N h"]
    peak: Float[Array, "B N T"] | None = None
    reach: Float[Array, "B N blocks"] | None = None
    total: Float[Array, "B N T"] | None = None
    visits: Int[Array, "B N blocks 2"] | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Rows:
    """What a pass over rows makes, float32 but for dq.

    beyond: what delta lacks for a row of dS to add up.
    da: [B, T, N, columns] of products, by their place.
    fields: [B, N, T], those per head too.
    strange: 0 where all that was made was finite at first; None: nobody looked.
    """

    beyond: Float[Array, "B N T"] | None = None
    da: dict[int, Array] = field(default_factory=dict)
    dq: Float[Array, "B T N H"] | None = None
    fields: Values = field(default_factory=dict)
    strange: Int[Array, " some"] | None = None
    visits: Int[Array, "B N blocks 2"] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Cols:
    """What a pass over columns makes, float32 but for dk, dv and dS.

    db: [B, S, N, columns] of products, by their place.
    ds: the gradient of the scores, where it is stored.
    fields: [B, N, S].
    """

    db: dict[int, Array] = field(default_factory=dict)
    dk: Float[Array, "B S K H"] | None = None
    ds: Float[Array, "B N T S"] | None = None
    dv: Float[Array, "B S K h"] | None = None
    fields: Values = field(default_factory=dict)
    visits: Int[Array, "B N blocks 2"] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Moves:
    """Tangents of operands, as a tangent pass reads them; None, or absent: 0.

    fields: of terms.
    products: columns that add up to the tangent of all products, in units of q.k.
    sunk: of a sink, times its weight in every row.
    """

    q: Float[Array, "B T N H"] | None
    k: Float[Array, "B S K H"] | None
    v: Float[Array, "B S K h"] | None
    fields: Values
    products: tuple[tuple[Array, Array], ...] = ()
    sunk: Float[Array, "B N T"] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Moved:
    """What a tangent pass makes; 0 of empty rows.

    lse: float32, of the natural log-sum-exp.
    """

    lse: Float[Array, "B N T"]
    o: Float[Array, "B T N h"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Residuals:
    """What the backward pass keeps of the forward pass.

    ops: the operands, products as columns.
    factors: the products as they came.
    The others: see `Forward`.
    """

    ops: Operands
    factors: tuple[tuple[Array, Array], ...]
    o: Float[Array, "B T N h"]
    lse: Float[Array, "B N T"]
    visits: Int[Array, "B N blocks 2"] | None
    wanted: Wanted = field(metadata={"static": True})
    grains: Tree = None
    reach: Float[Array, "B N blocks"] | None = None
    peak: Float[Array, "B N T"] | None = None
    total: Float[Array, "B N T"] | None = None


class Kept(Protocol):
    """What gradients are made of, of whatever a forward pass keeps."""

    @property
    def ops(self) -> Operands:
        """The operands, products as columns."""
        ...

    @property
    def factors(self) -> tuple[tuple[Array, Array], ...]:
        """The products as they came."""
        ...

    @property
    def wanted(self) -> Wanted:
        """Which gradients are requested."""
        ...
