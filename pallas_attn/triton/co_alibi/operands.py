"""What the passes read, as one value each: arrays outside, refs inside the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from pallas_attn.tiled.summaries import Sight


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Operands:
    """What every pass reads; slopes [#B, #N]."""

    q: Any
    k: Any
    v: Any
    slopes: Any
    sight: Sight


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Residuals:
    """What the backward pass keeps of the forward pass; see `Saved`."""

    ops: Operands
    o: Any
    lse: Any  # [B, N, T], log2, +inf for empty rows
    base: Any
    gates: Any
    gates_low: Any
    first: Any
    visits: Any
    inside: Any = None
    right: Any = None
    right_low: Any = None
    log_sum: Any = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Saved:
    """What the backward passes read beside the operands, per row [B, N, T].

    base: the exponent that weights count from, log2, +inf for empty rows.
    gates, gates_low: the sum of a row's gates, and its rounding error.
        Where sums are exact: q.k of the key that weights count from.
    inside, right, right_low: of that key, see `Reference`; None: sums are not exact.
    log_sum: log2 of the sum of the weights that count from it; None: base has it.
    first: the first key block that a query block of the forward pass visited.
    start: the first batch entry and key head of a group; None: there is one group.
    """

    do: Any
    base: Any
    gates: Any
    gates_low: Any
    delta: Any
    dlse: Any
    first: Any
    start: Any = None
    inside: Any = None
    right: Any = None
    right_low: Any = None
    log_sum: Any = None
