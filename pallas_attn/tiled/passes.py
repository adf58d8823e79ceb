"""What a tiled lowering brings: the passes of softmax, as functions of whole arrays.

`pallas_attn.triton.passes` is one. What a pass makes is float32 and not yet summed over
the axes that its operand shares: `autodiff.collected` does that for all of them.
"""

from __future__ import annotations

from typing import Any, Protocol

from jaxtyping import Array

from pallas_attn.call import Call
from pallas_attn.tiled.fields import Field
from pallas_attn.tiled.operands import Operands, Residuals
from pallas_attn.tiled.plan import Plan


class Passes(Protocol):
    """The passes of a lowering, each named for what it owns; a module may be one.

    What bounds scores (`grains`), what the backward passes read beside the operands
    (cotangents, `cot`) and how they rule blocks out (`blocks`) is the lowering's own:
    it is made by one pass and handed to others as it is.
    """

    def grains(self, ops: Operands, call: Call, p: Plan) -> Any:
        """What bounds the scores of whole blocks; None where nothing is pruned."""
        ...

    def forward(
        self, ops: Operands, grains: Any, call: Call, p: Plan
    ) -> dict[str, Any]:
        """The fields of `Residuals` that a forward pass makes."""
        ...

    def cotangents(
        self, res: Residuals, do: Array, dlse: Array | None, call: Call, p: Plan
    ) -> tuple[Any, Any]:
        """(cot, blocks): what `rows`, `cols` and `tiles` read of rows and of blocks."""
        ...

    def rows(
        self, ops: Operands, cot: Any, blocks: Any, call: Call, p: Plan
    ) -> dict[str, Any]:
        """dq, `da` of products, `fields` along queries, `visits`; `beyond` of delta."""
        ...

    def cols(
        self, ops: Operands, cot: Any, blocks: Any, call: Call, p: Plan
    ) -> dict[str, Any]:
        """dv, dk or dS, `db` of products, `fields` along keys, `visits`."""
        ...

    def tiles(
        self, ops: Operands, cot: Any, blocks: Any, field: Field, call: Call, p: Plan
    ) -> Array:
        """The gradient of a field along queries and keys, in the field's shape."""
        ...

    def thin_rows(
        self, ds: Array, y: Array, out: Any, ops: Operands, call: Call, p: Plan
    ) -> Array:
        """Scale dS Y, shaped as `out`, for an array y per key."""
        ...

    def thin_cols(
        self, ds: Array, y: Array, out: Any, ops: Operands, call: Call, p: Plan
    ) -> Array:
        """Scale dS^T Y, shaped as `out`, for an array y per query."""
        ...
