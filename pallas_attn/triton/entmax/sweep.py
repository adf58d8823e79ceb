"""A sweep over the key blocks of a query block that may hold weight."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_attn.normalizers.entmax import Learned, Power
from pallas_attn.normalizers.softmax import LOG2E
from pallas_attn.tiled.fields import Values
from pallas_attn.tiled.operands import Operands
from pallas_attn.tiled.plan import Plan
from pallas_attn.triton import schedule
from pallas_attn.triton.programs import keys_of, Visits
from pallas_attn.triton.pruning import Grains, largest_scores, visits
from pallas_attn.triton.scores import reach_of, row_scores
from pallas_attn.triton.terms import hold
from pallas_attn.triton.tile import at_keys, Tile
from pallas_attn.triton.visitor import Step
from pallas_attn.types import State


i32 = jnp.int32


@dataclass(frozen=True)
class Sweep:
    """The key blocks of a query block: near ones, and the far ones that remain."""

    t0: Tile
    ops: Operands
    held: Values
    q: jax.Array
    qs: list[jax.Array]
    near: schedule.Walk
    far: schedule.Remaining

    def scores(self, t: Tile) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """(x, row, visible): scores x + row in units of q.k, x = -inf where hidden."""
        return row_scores(t, self.q, self.qs, self.ops.k, self.ops.added, self.held)

    def whole(self, t: Tile) -> jax.Array:
        """The scores of a tile in units of q.k, -inf where hidden: they bound and rank.

        Without a row's own part where that is NaN or inf: added to -inf it would make
        candidates of hidden keys. The passes that make weights have it.
        """
        x, row, _ = self.scores(t)
        if not self.ops.added.terms:
            return x
        return x + jnp.where(row < jnp.inf, row, 0.0)[:, None]

    def above(
        self,
        m: jax.Array,
        level: jax.Array,
        grains: Grains | None,
        power: Power | Learned,
    ) -> Sweep:
        """Without the far blocks whose bound is below every row's threshold.

        m, level: [bq], of the threshold, which may be any lower bound.
        """
        assert grains is not None
        t0 = self.t0
        least = m * (t0.call.scale * LOG2E) - power.reach(level) * LOG2E
        floor = -schedule.above(-jnp.min(jnp.where(t0.inside_rows(), least, jnp.inf)))
        reach = reach_of(t0.call, self.q, self.qs)

        def weight(j: jax.Array, ok: jax.Array) -> tuple[jax.Array, jax.Array]:
            most = largest_scores(t0, self.ops, self.held, grains, reach, j, ok)
            worth = jnp.where(most < floor, jnp.full_like(most, -jnp.inf), jnp.inf)
            return worth, jnp.zeros_like(most)

        blocks = pl.cdiv(t0.call.S, t0.bk)
        far = schedule.holes(t0.call, self.near.sides, blocks, t0.bk, weight)
        return replace(self, far=far)

    def near_loop(self, body: Step[State], state: State) -> State:
        """Run body(tile, state) over the near blocks."""
        return self.near.near_loop(
            lambda j, side, s: body(at_keys(self.t0, j, side, edge=True), s), state
        )

    def far_loop(self, body: Step[State], state: State) -> State:
        """Run body(tile, state) over the far blocks."""
        edge = self.t0.sight.veiled
        return self.far.loop(
            lambda j, side, s: body(at_keys(self.t0, j, side, edge=edge), s), state
        )

    @property
    def visits(self) -> Visits:
        """How many blocks it visits, and how many there are."""
        return visits(self.near, None, [self.far])


def sweep_of(t0: Tile, ops: Operands, plan: Plan) -> Sweep:
    """The sweep over all key blocks that the queries of a block may see."""
    near = keys_of(t0, plan.two_sided)
    q = t0.rows(ops.q)
    qs = [t0.rows(a) for a, _ in ops.added.products]
    held = hold(ops.added, t0, ("", "q"))
    return Sweep(t0, ops, held, q, qs, near, schedule.all_far(near.sides))
