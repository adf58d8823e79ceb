"""Which blocks a backward pass visits: what its kernels ask, whatever says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax

from pallas_attn.tiled.fields import Values
from pallas_attn.tiled.operands import Operands
from pallas_attn.tiled.plan import Plan
from pallas_attn.triton.programs import Visits
from pallas_attn.triton.row_weights import RowWeights
from pallas_attn.triton.tile import Tile
from pallas_attn.types import Ref, State


# One more tile of a loop: (tile, state) -> state.
Step = Callable[[Tile, State], State]


class Own(NamedTuple):
    """What a program holds of its query block."""

    q: jax.Array
    qs: list[jax.Array]  # query sides of products
    stats: RowWeights


class Visitor(Protocol):
    """Goes through the blocks that a program has work in; a pytree of refs.

    Softmax's is `pruning.Pruning`, which leaves out far blocks by a bound; entmax's is
    `entmax.support.Support`, which knows the blocks with weight. Each must visit every
    block that holds weight, exactly once, and may visit others.
    """

    @property
    def order(self) -> Ref | None:
        """In which own blocks begin, [blocks], long ones first; None: as they lie."""
        ...

    def over_keys(
        self,
        t0: Tile,
        ops: Operands,
        held: Values,
        own: Own,
        plan: Plan,
        step: Step[State],
        state: State,
    ) -> tuple[State, Visits]:
        """Runs step(tile, state) over the key blocks of t0's query block.

        Args:
            t0: The query block, at any key block.
            ops: The operands, as refs.
            held: The fields that do not vary along keys, loaded.
            own: What the program holds of its query block.
            plan: The plan of the call.
            step: What to do with one more tile.
            state: What the first step takes.

        Returns:
            What the last step left; how many blocks were visited, of how many.
        """
        ...

    def over_queries(
        self,
        t0: Tile,
        ops: Operands,
        held: Values,
        plan: Plan,
        step: Step[State],
        state: State,
    ) -> tuple[State, Visits]:
        """Runs step(tile, state) over the query blocks of t0's key block."""
        ...

    def on_tile(self, t: Tile, step: Step[State], state: State) -> State:
        """Runs step(t, state) where t may hold weight; else leaves the state."""
        ...
