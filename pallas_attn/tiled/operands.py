"""What the passes of any lowering read and leave, as one value each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax

from pallas_attn.bias.base import Added
from pallas_attn.tiled.fields import Field
from pallas_attn.tiled.summaries import Sight


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
