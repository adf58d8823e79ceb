"""The programs of a pass, and the order in which they start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jax.experimental import pallas as pl


@dataclass(frozen=True)
class Grid:
    """The programs of a pass, one per (batch entry, head, block), and their order.

    long_first: programs differ in length: heads go fastest, long ones start first.
    flock: batch entries that run side by side because they share a bias tile.
    """

    batch: int
    heads: int
    blocks: int
    long_first: bool
    flock: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """The launch grid, fastest axis first."""
        if self.flock > 1:
            return (self.flock, self.blocks, self.heads, self.batch // self.flock)
        if self.long_first:
            return (self.heads, self.batch, self.blocks)
        return (self.blocks, self.heads, self.batch)

    def place(self) -> tuple[Any, Any, Any]:
        """(batch entry, head, block) of this program."""
        if self.flock > 1:
            entry, block, head, group = (pl.program_id(i) for i in range(4))
            return group * self.flock + entry, head, block
        x, y, z = (pl.program_id(i) for i in range(3))
        return (y, x, z) if self.long_first else (z, y, x)
