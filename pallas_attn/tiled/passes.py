"""What a tiled lowering brings: the passes of softmax, as functions of whole arrays.

`pallas_attn.triton.passes` is one. What a pass makes is float32 and not yet summed over
the axes that its operand shares: `autodiff.collected` does that for all of them.
"""

from __future__ import annotations

from typing import Protocol, TypeAlias

from jaxtyping import Array

from pallas_attn.call import Call
from pallas_attn.tiled.fields import Field
from pallas_attn.tiled.operands import (
    Cols,
    Forward,
    Moved,
    Moves,
    Operands,
    Residuals,
    Rows,
)
from pallas_attn.tiled.plan import Plan
from pallas_attn.types import Tree


# The lowering's own: made by one of its passes and handed to others as they are.
Grains: TypeAlias = Tree  # what bounds the scores of whole blocks
Cotangents: TypeAlias = Tree  # what backward passes read of rows, among it `delta`
Blocks: TypeAlias = Tree  # how they rule blocks out


class Passes(Protocol):
    """The passes of a lowering, each named for what it owns; a module may be one."""

    def grains(self, ops: Operands, call: Call, p: Plan) -> Grains:
        """What bounds the scores of whole blocks; None where nothing is pruned."""
        ...

    def forward(self, ops: Operands, grains: Grains, call: Call, p: Plan) -> Forward:
        """Output, log-sum-exp and what else the plan needs of them."""
        ...

    def tangent(self, res: Residuals, moves: Moves, call: Call, p: Plan) -> Moved:
        """The tangents of output and log-sum-exp."""
        ...

    def cotangents(
        self, res: Residuals, do: Array, dlse: Array | None, call: Call, p: Plan
    ) -> tuple[Cotangents, Blocks]:
        """(cot, blocks): what `rows`, `cols` and `tiles` read of rows and of blocks."""
        ...

    def rows(
        self, ops: Operands, cot: Cotangents, blocks: Blocks, call: Call, p: Plan
    ) -> Rows:
        """What varies along queries: dq, products' sides, fields."""
        ...

    def cols(
        self, ops: Operands, cot: Cotangents, blocks: Blocks, call: Call, p: Plan
    ) -> Cols:
        """What varies along keys: dv, dk, products' sides, fields; or dS itself."""
        ...

    def tiles(
        self,
        ops: Operands,
        cot: Cotangents,
        blocks: Blocks,
        field: Field,
        rows: Rows,
        call: Call,
        p: Plan,
    ) -> Array:
        """The gradient of a field along queries and keys, in the field's shape."""
        ...

    def diagonals(
        self,
        ops: Operands,
        cot: Cotangents,
        blocks: Blocks,
        field: Field,
        rows: Rows,
        call: Call,
        p: Plan,
    ) -> Array:
        """The gradient of a field along diagonals, in the field's shape."""
        ...

    def thin_rows(
        self,
        ds: Array,
        y: Array,
        out: Array,
        ops: Operands,
        call: Call,
        p: Plan,
    ) -> Array:
        """Scale dS Y, shaped as `out`, for an array y per key."""
        ...

    def thin_cols(
        self,
        ds: Array,
        y: Array,
        out: Array,
        ops: Operands,
        call: Call,
        p: Plan,
    ) -> Array:
        """Scale dS^T Y, shaped as `out`, for an array y per query."""
        ...
