"""Online softmax: what a query block keeps of the key blocks that it has met."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_attn.normalizers.softmax import (
    LOG2E,
    lowest,
    Peak,
    peak,
    relative,
    rescaled,
    ROOM,
    SPREAD,
    WIDEST,
)
from pallas_attn.tiled.fields import Values
from pallas_attn.tiled.operands import Operands
from pallas_attn.tiled.plan import Plan
from pallas_attn.triton.dropout import drop_on
from pallas_attn.triton.memory import store_number
from pallas_attn.triton.ptx import exp2
from pallas_attn.triton.schedule import Remaining
from pallas_attn.triton.scores import row_scores
from pallas_attn.triton.tile import at_keys, Tile, zeros
from pallas_attn.triton.visitor import Step
from pallas_attn.types import Ref, Tree


f32 = jnp.float32
i32 = jnp.int32

# What counts from a fixed score: output and sum of weights.
Fixed = tuple[jax.Array, jax.Array]


class Sums(NamedTuple):
    """Of rows: the sum of weights times values, what weights count from, their sum."""

    acc: jax.Array
    base: Peak
    total: jax.Array


class Further(NamedTuple):
    """A loop's step, its first state, and what the last state makes."""

    add: Step[Tree]
    state: Tree
    finish: Callable[[Tree], Sums]


@dataclass(frozen=True)
class Online:
    """Adds up the key blocks of a query block.

    Args:
        t0: The query block, at any key block.
        ops: The operands, as refs.
        held: The fields that do not vary along keys, loaded.
        q: The queries.
        qs: The query sides of products.
        plan: Of the call.
        reach: Where the largest |scale [q, A]| is told, if anything is pruned.
    """

    t0: Tile
    ops: Operands
    held: Values
    q: jax.Array
    qs: list[jax.Array]
    plan: Plan
    reach: Ref | None

    def start(self) -> Sums:
        """Of no key."""
        zero, acc = jnp.zeros((self.t0.bq,), f32), zeros(self.t0.bq, self.ops.v)
        low = zero if self.plan.large_rows else None
        return Sums(acc, Peak(zero + lowest(self.t0.call.scale), low), zero)

    def add(self, t: Tile, sums: Sums) -> Sums:
        """With one more tile: weights count from the largest score so far."""
        x, row, visible = self._scores(t)
        weights, old, base = rescaled(
            sums.base, x, row, self._mul, self._power, self.plan.large_scores
        )
        acc = sums.acc * old[:, None] + self._weighted(t, weights, visible)
        return Sums(acc, base, sums.total * old + jnp.sum(weights, 1))

    def with_sink(self, sums: Sums) -> Sums:
        """With the sink's weight, in rows that see a key."""
        if self.ops.sink is None:
            return sums
        sink = self.t0.field("head", self.ops.sink) * (1 / self.t0.call.scale)
        acc, base, total = sums
        zero = jnp.zeros_like(total)
        score = Peak(zero + sink, None if base.low is None else zero)
        top = peak(base, score.high[:, None], zero)
        old, new = (self._power(x.above(top) * self._mul) for x in (base, score))
        new = jnp.where(total == 0, 0.0, new)
        return Sums(acc * old[:, None], top, total * old + new)

    def logs(self, sums: Sums) -> jax.Array:
        """The log2-sum of each row so far."""
        return sums.base.high * self._mul + jnp.log2(sums.total)

    def as_before(self, sums: Sums) -> Further:
        """How far blocks are added up where all remain."""
        return Further(self.add, sums, lambda sums: sums)

    def further(self, far: Remaining, reach: jax.Array, sums: Sums) -> Further:
        """How the far blocks that remain are added up.

        A bound on their scores replaces the running maximum. Not in float16: its
        weights end at 2^16, too near for a bound.
        """
        t0, mul = self.t0, self._mul
        assert self.reach is not None
        store_number(self.reach, (t0.b, t0.h, t0.q0 // i32(t0.bq)), reach)
        if t0.call.dtype == "float16":
            return self.as_before(sums)
        base = self._above_all(far, sums)
        old = self._power(sums.base.above(base) * mul)

        def add(t: Tile, fixed: Fixed) -> Fixed:
            acc, total = fixed
            x, row, visible = self._scores(t)
            weights = relative(x, row, base, mul, self._power, self.plan.large_scores)
            acc = acc + self._weighted(t, weights, visible)
            return acc, total + jnp.sum(weights, 1)

        return Further(
            add,
            (sums.acc * old[:, None], sums.total * old),
            lambda fixed: Sums(fixed[0], base, fixed[1]),
        )

    def _above_all(self, far: Remaining, sums: Sums) -> Peak:
        """What weights count from, given a bound on the scores of far blocks.

        Rare: scores that may spread further first get their true maximum, by a plain
        loop that costs nothing where it does not run.
        """
        t0, mul, veiled = self.t0, self._mul, self.ops.sight.veiled
        least = jnp.min(sums.base.high) * mul
        wide = ~(far.top - least <= ROOM + SPREAD)  # NaN too
        if self.plan.large_rows:  # a bound as rounded may be far below what it bounds
            wide |= jnp.abs(least) > WIDEST

        def find(state: tuple[jax.Array, Peak]) -> tuple[jax.Array, Peak]:
            t, m = state
            x, row, _ = self._scores(at_keys(t0, *far.at(t), edge=veiled))
            return t + 1, peak(m, x, row)

        more: Callable[..., jax.Array] = lambda state: wide & (state[0] < far.count)
        top = lax.while_loop(more, find, (i32(0), sums.base))[1]
        lift = jnp.where(wide, -jnp.inf, far.top - ROOM) * (1 / mul)
        high = jnp.maximum(top.high, lift)
        if top.low is None:
            return Peak(high, None)
        return Peak(high, jnp.where(lift > top.high, 0.0, top.low))

    @property
    def _mul(self) -> float:
        return self.t0.call.scale * LOG2E

    def _power(self, x: jax.Array) -> jax.Array:
        return exp2(self.t0.call, x)

    def _scores(self, t: Tile) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        added, large = self.ops.added, self.plan.large_scores
        return row_scores(t, self.q, self.qs, self.ops.k, added, self.held, large)

    def _weighted(
        self, t: Tile, weights: jax.Array, visible: jax.Array | None
    ) -> jax.Array:
        v, drop = t.seen_keys(visible, t.keys(self.ops.v)), drop_on(t)
        weights = weights if drop is None else drop(weights)
        return t.dot(weights.astype(v.dtype), v)
