"""What the passes read, as one value each: arrays outside, refs inside the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jaxtyping import Array, Float, Int

from pallas_attn.tiled.summaries import Sight


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Operands:
    """What every pass reads."""

    q: Float[Array, "B T N H"]
    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K h"]
    slopes: Float[Array, "#B #N"]
    sight: Sight
    sink: Float[Array, "#B #N"] | None = None


# What passes make. The order of fields, which is the alphabet's, is that of a kernel's
# outputs.


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Counted:
    """The key that the weights of each row count from, where sums are exact.

    inside, right: see `scan.Reference`; right_low: what `right` was rounded by.
    log_sum: log2 of the sum of the weights that count from it.
    """

    inside: Float[Array, "B N T"]
    log_sum: Float[Array, "B N T"]
    right: Float[Array, "B N T"]
    right_low: Float[Array, "B N T"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Forward:
    """What the forward pass makes; see `Residuals`."""

    base: Float[Array, "B N T"]
    counted: Counted | None
    first: Int[Array, "B N query_blocks"]
    gates: Float[Array, "B N T"]
    gates_low: Float[Array, "B N T"]
    lse: Float[Array, "B N T"]
    o: Float[Array, "B T N h"]
    visits: Int[Array, "B N query_blocks 2"] | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Rows:
    """What the pass over rows makes.

    beyond: what rounding left in delta, where there is a sink.
    dm: of each row the slope's gradient.
    """

    beyond: Float[Array, "B N T"] | None = None
    dm: Float[Array, "B N T"]
    dq: Float[Array, "B T N H"]
    visits: Int[Array, "B N query_blocks 2"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Cols:
    """What the pass over columns makes."""

    dk: Float[Array, "B S K H"]
    dv: Float[Array, "B S K h"]
    visits: Int[Array, "B N key_blocks 2"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Gradients:
    """What both make."""

    cols: Cols
    rows: Rows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Residuals:
    """What the backward pass keeps of the forward pass; see `Saved`."""

    ops: Operands
    o: Float[Array, "B T N h"]
    lse: Float[Array, "B N T"]  # log2, +inf for empty rows
    base: Float[Array, "B N T"]
    gates: Float[Array, "B N T"]
    gates_low: Float[Array, "B N T"]
    first: Int[Array, "B N query_blocks"]
    visits: Int[Array, "B N query_blocks 2"] | None
    counted: Counted | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Saved:
    """What the backward passes read beside the operands, per row.

    base: the exponent that weights count from, log2, +inf for empty rows.
    gates, gates_low: the sum of a row's gates, and its rounding error.
        Where sums are exact: q.k of the key that weights count from.
    counted: of that key; None: sums are not exact, and base has the sum of weights too.
    dlse: what a row of dT adds up to; None: 0.
    first: the first key block that a query block of the forward pass visited.
    start: the first batch entry and key head of a group; None: there is one group.
    """

    do: Float[Array, "B T N h"]
    base: Float[Array, "B N T"]
    gates: Float[Array, "B N T"]
    gates_low: Float[Array, "B N T"]
    delta: Float[Array, "B N T"]
    dlse: Float[Array, "B N T"] | None
    first: Int[Array, "B N query_blocks"]
    counted: Counted | None
    start: Int[Array, " 2"] | None = None
