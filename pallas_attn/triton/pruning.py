"""The blocks that softmax's passes visit: near ones, and far ones that hold weight."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_attn.tiled.fields import Field, Values
from pallas_attn.tiled.operands import Operands
from pallas_attn.tiled.plan import Plan
from pallas_attn.tiled.summaries import Extremes, GRAIN, Sight
from pallas_attn.triton import schedule
from pallas_attn.triton.blocks import block_of
from pallas_attn.triton.memory import load_number
from pallas_attn.triton.online import Online, Sums
from pallas_attn.triton.operands import SoftmaxRows
from pallas_attn.triton.programs import keys_of, queries_of, Visits
from pallas_attn.triton.scores import reach_of
from pallas_attn.triton.shown import ALL, ANY, Shown, SOME
from pallas_attn.triton.terms import bound
from pallas_attn.triton.tile import at_keys, at_queries, Tile
from pallas_attn.triton.visitor import Own, Step
from pallas_attn.types import Index, Ref, State


i32 = jnp.int32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Grains:
    """What bounds the scores of whole blocks, known before any of them is visited.

    norms: the largest |[k, B]| of a grain of keys.
    fields: the extremes of the fields that terms may bound themselves by.
    """

    norms: Float[Array, "B heads grains"]
    fields: dict[Field, Extremes]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pruning:
    """What rules blocks out; None where nothing is pruned.

    grains: of keys and of fields.
    reach: the largest |scale [q, A]| (log2) of a forward block of queries.
    floors: the least log2-sum of a grain of queries.
    shown: of a pass, the blocks of which a mask shows any.
    """

    grains: Grains | None = None
    reach: Float[Array, "B N blocks"] | None = None
    floors: Float[Array, "B N grains"] | None = None
    shown: Shown | None = None

    @property
    def order(self) -> Ref | None:
        """In which own blocks begin: as a mask has it."""
        return None if self.shown is None else self.shown.order

    def added_up(self, w: schedule.Walk, online: Online) -> tuple[Sums, Visits]:
        """What a query block's key blocks make, and how many were visited."""
        t0, sight = online.t0, online.ops.sight
        sums, near = self._near(
            t0,
            w,
            lambda j, side, s: online.add(at_keys(t0, j, side, edge=True), s),
            online.start(),
        )
        far = schedule.all_far(w.sides)
        add, state, finish = online.as_before(sums)
        if online.plan.pruned:
            reach = reach_of(t0.call, online.q, online.qs)
            logs = jnp.where(t0.inside_rows(), online.logs(sums), jnp.inf)
            far = far_keys(t0, w, online.ops, online.held, self, reach, jnp.min(logs))
            add, state, finish = online.further(far, reach, sums)
        state, rest = self._far(
            t0,
            far,
            sight,
            lambda edge: lambda j, side, s: add(at_keys(t0, j, side, edge=edge), s),
            state,
        )
        return finish(state), visits(w, near, rest)

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
        """The loop over the key blocks of a query block."""
        w = keys_of(t0, plan.two_sided)

        def body(edge: bool) -> schedule.Body[State]:
            return lambda j, side, s: step(at_keys(t0, j, side, edge=edge), s)

        state, near = self._near(t0, w, body(edge=True), state)
        far = schedule.all_far(w.sides)
        if plan.pruned:
            assert isinstance(own.stats, SoftmaxRows)  # entmax has a support
            floor = jnp.min(jnp.where(t0.inside_rows(), own.stats.lse, jnp.inf))
            reach = reach_of(t0.call, own.q, own.qs)
            far = far_keys(t0, w, ops, held, self, reach, floor)
        state, rest = self._far(t0, far, ops.sight, body, state)
        return state, visits(w, near, rest)

    def over_queries(
        self,
        t0: Tile,
        ops: Operands,
        held: Values,
        plan: Plan,
        step: Step[State],
        state: State,
    ) -> tuple[State, Visits]:
        """The loop over the query blocks of a key block."""
        w = queries_of(t0, plan.two_sided)

        def body(edge: bool) -> schedule.Body[State]:
            return lambda i, side, s: step(at_queries(t0, i, side, edge=edge), s)

        state, near = self._near(t0, w, body(edge=True), state)
        far = schedule.all_far(w.sides)
        if plan.pruned:
            far = far_queries(t0, w, ops, held, self, plan)
        state, rest = self._far(t0, far, ops.sight, body, state)
        return state, visits(w, near, rest)

    def _near(
        self, t0: Tile, w: schedule.Walk, body: schedule.Body[State], state: State
    ) -> tuple[State, schedule.Remaining | None]:
        """The loop over near blocks, and which they are if not all."""
        if self.shown is None:
            return w.near_loop(body, state), None
        near = self.shown.of(t0, ANY, w.stretches())
        return near.loop(body, state), near

    def _far(
        self,
        t0: Tile,
        far: schedule.Remaining,
        sight: Sight,
        body: Callable[[bool], schedule.Body[State]],
        state: State,
    ) -> tuple[State, list[schedule.Remaining]]:
        """The loops over the far blocks that remain, and which they are.

        body: of whether blocks may have pairs that nobody sees.
        """
        if self.shown is None or far.stretches is None:
            return far.loop(body(sight.veiled), state), [far]
        lie = far.stretches()
        some, every = (self.shown.of(t0, kind, lie) for kind in (SOME, ALL))
        state = some.loop(body(True), state)
        return every.loop(body(sight.veiled_beside_mask), state), [some, every]

    def on_tile(self, t: Tile, step: Step[State], state: State) -> State:
        """One tile: every one is visited."""
        return step(t, state)


def visits(
    w: schedule.Walk, near: schedule.Remaining | None, far: list[schedule.Remaining]
) -> Visits:
    """How many blocks are visited, and how many there are; near: None if all are."""
    begun = i32(w.near[1]) - i32(w.near[0]) if near is None else near.count
    return sum([i32(x.count) for x in far], begun), w.visible


def far_keys(
    t: Tile,
    w: schedule.Walk,
    ops: Operands,
    held: Values,
    pruning: Pruning,
    reach: jax.Array,
    floor: jax.Array,
) -> schedule.Remaining:
    """The far blocks that remain, where every row's log2-sum is at least `floor`."""
    grains = pruning.grains
    assert grains is not None

    def weight(j: jax.Array, ok: jax.Array) -> tuple[jax.Array, jax.Array]:
        return largest_scores(t, ops, held, grains, reach, j, ok), floor

    return schedule.holes(t.call, w.sides, pl.cdiv(t.call.S, t.bk), t.bk, weight)


def largest_scores(
    t: Tile,
    ops: Operands,
    held: Values,
    grains: Grains,
    reach: jax.Array,
    j: jax.Array,
    ok: jax.Array,
) -> jax.Array:
    """No score of these queries with the keys of blocks j is above this, in log2."""
    p0, k0 = t.q0 + t.frame.offset, j * t.bk
    lead = schedule.lead_of(grains.norms, t.call, t.b, t.h)
    norm = schedule.of_blocks(grains.norms, lead, j, ok, t.bk, GRAIN, jnp.maximum)
    known = {
        f: _of_blocks(x, t, j, ok, t.bk)
        if f.span == "k"
        else _of_diagonals(x, t, t.q0 - k0, ok)
        if f.span == "d"
        else _of_own(x, t, t.q0, t.bq)
        for f, x in grains.fields.items()
    }
    ranges = p0, p0 + t.bq - 1, k0, k0 + t.bk - 1
    return schedule.above(norm * reach + bound(ops.added, held, known, *ranges))


def far_queries(
    t: Tile,
    w: schedule.Walk,
    ops: Operands,
    held: Values,
    pruning: Pruning,
    plan: Plan,
) -> schedule.Remaining:
    """The far blocks that remain, where a block's row sums are at least its floor."""
    call, lead = t.call, (t.b, t.h)
    grains, reaches, floors = pruning.grains, pruning.reach, pruning.floors
    assert grains is not None
    assert reaches is not None
    assert floors is not None
    norm = _norm_of_keys(grains.norms, t)
    own = {
        f: _of_own(x, t, t.k0, t.bk)
        for f, x in grains.fields.items()
        if f.span not in ("q", "d")
    }
    reach_block = block_of(call, plan, "forward").block_q

    def weight(i: jax.Array, ok: jax.Array) -> tuple[jax.Array, jax.Array]:
        q0 = i * t.bq + t.frame.offset
        reach = schedule.of_blocks(reaches, lead, i, ok, t.bq, reach_block, jnp.maximum)
        floor = schedule.of_blocks(floors, lead, i, ok, t.bq, GRAIN, jnp.minimum)
        known = {
            f: _of_blocks(x, t, i, ok, t.bq)
            if f.span == "q"
            else _of_diagonals(x, t, i * t.bq - t.k0, ok)
            for f, x in grains.fields.items()
            if f not in own
        }
        ranges = q0, q0 + t.bq - 1, t.k0, t.k0 + t.bk - 1
        most = bound(ops.added, held, own | known, *ranges)
        return schedule.above(reach * norm + most), floor

    return schedule.holes(call, w.sides, pl.cdiv(call.T, t.bq), t.bq, weight)


def _of_own(x: Extremes, t: Tile, i0: Index, n: int) -> Extremes:
    """The extremes of a field on n of its entries, those of the own block."""
    if x.least.shape[-1] == 1:  # the same for every query and key
        i0, n = i0 * 0, 1
    return Extremes(*schedule.of_own(x, t.call, t.b, t.h, i0, n))


def _of_blocks(
    x: Extremes, t: Tile, i: jax.Array, ok: jax.Array, block: int
) -> Extremes:
    """The extremes of a field on each of a vector of blocks."""

    def worst(ref: Ref, of: schedule.Worst) -> jax.Array:
        lead = schedule.lead_of(ref, t.call, t.b, t.h)
        return schedule.of_blocks(ref, lead, i, ok, block, GRAIN, of)

    return Extremes(worst(x.least, jnp.minimum), worst(x.most, jnp.maximum))


def _of_diagonals(x: Extremes, t: Tile, apart: jax.Array, ok: jax.Array) -> Extremes:
    """The extremes of a field along diagonals, of tiles whose first pairs are apart."""
    first = apart + i32(t.call.S - t.bk)

    def worst(ref: Ref, of: schedule.Worst) -> jax.Array:
        lead = schedule.lead_of(ref, t.call, t.b, t.h)
        length = t.bq + t.bk - 1
        return schedule.of_runs(ref, lead, first, ok, length, GRAIN, of)

    return Extremes(worst(x.least, jnp.minimum), worst(x.most, jnp.maximum))


def _norm_of_keys(norms: Ref, t: Tile) -> jax.Array:
    """The largest norm of the keys of a block."""
    final = norms.shape[-1] - 1
    head = t.h // i32(t.call.N // norms.shape[1])
    grains = [
        jnp.minimum(t.k0 // i32(GRAIN) + r, final) for r in range(max(1, t.bk // GRAIN))
    ]
    return functools.reduce(
        jnp.maximum, [load_number(norms, (t.b, head, g)) for g in grains]
    )
