"""The tangent pass: how output and log-sum-exp of one query block move with operands.

With S' = scale (q'k + qk') + b' and the weights P of the forward pass

    lse' = rowsum(P S') + w s'       of a sink s of weight w
    o' = (D P S') v + (D P) v' - lse' o       D what dropout makes of weights

in one walk over the key blocks that hold weight: what subtracts lse' o waits for its
end.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_attn.bias.base import Bias
from pallas_attn.call import Call
from pallas_attn.tiled.fields import Values
from pallas_attn.tiled.operands import Moved, Moves, Operands
from pallas_attn.tiled.plan import Plan
from pallas_attn.triton.dropout import drop_on, rescale
from pallas_attn.triton.launch import Program
from pallas_attn.triton.operands import Known
from pallas_attn.triton.programs import query_tile
from pallas_attn.triton.scores import dots, weightless
from pallas_attn.triton.terms import hold, hold_fields, on_tile, parts, pushforward
from pallas_attn.triton.tile import Tile, zeros
from pallas_attn.triton.visitor import Own, Visitor


f32 = jnp.float32


class State(NamedTuple):
    """What a query block adds up over its key blocks: (P S') v + P v', rows of P S'."""

    acc: jax.Array
    total: jax.Array


def tangent_kernel(
    ops: Operands,
    moves: Moves,
    known: Known,
    blocks: Visitor,
    out: Moved,
    *,
    call: Call,
    program: Program,
    plan: Plan,
) -> None:
    """Tangents of output and log-sum-exp of one query block."""
    t0 = query_tile(ops.sight, call, plan, "tangent", program, blocks.order)
    stats, q, products = known.of_rows(t0), t0.rows(ops.q), ops.added.products
    qs, held = [t0.rows(a) for a, _ in products], hold(ops.added, t0, ("", "q"))
    rows = _Rows.of(moves, t0, q)

    def step(t: Tile, state: State) -> State:
        k, ks = t.keys(ops.k), [t.keys(b) for _, b in products]
        t, terms = on_tile(ops.added, t, held)
        s, slope = dots(t, q, k, qs, ks)
        row, rest = parts(terms, t, large=stats.large)
        rest = weightless(rest, len(terms) + len(products) > 1)
        visible, drop = t.visible, drop_on(t)
        p, _ = stats.weights(t, s, row, rest, visible)
        acc, total = state

        def weighted(acc: jax.Array, p: jax.Array, v: jax.Array) -> jax.Array:
            p, v = p if drop is None else drop(p), t.seen_keys(visible, v)
            return acc + t.dot(p.astype(v.dtype), v)

        moved = rows.scores(t, k, slope, terms)
        if moved is not None:
            ps = p * moved
            if visible is not None:  # 0 * NaN of what nobody sees
                ps = jnp.where(visible, ps, 0.0)
            acc, total = weighted(acc, ps, t.keys(ops.v)), total + jnp.sum(ps, 1)
        if moves.v is not None:
            acc = weighted(acc, p, t.keys(moves.v))
        return State(acc, total)

    state = State(zeros(t0.bq, ops.v), jnp.zeros((t0.bq,), f32))
    own = Own(q, qs, stats)
    (acc, total), _ = blocks.over_keys(t0, ops, held, own, plan, step, state)
    if moves.sunk is not None:
        total = total + t0.stat(moves.sunk)
    # in an empty row 0 may have met a query that is not finite
    total = jnp.where(stats.attends, total, 0.0)
    acc = acc * rescale(call) if call.dropout else acc
    o = acc - total[:, None] * t0.rows(known.o).astype(f32)
    o = jnp.where(stats.attends[:, None], o, 0.0)
    t0.put_rows(out.o, o)
    t0.put_stat(out.lse, total)
    t0.note(o, total)


class _Rows(NamedTuple):
    """What moves the scores of a query block, loaded as far as no key is needed."""

    moves: Moves
    q: jax.Array
    dq: jax.Array | None
    sides: list[jax.Array]
    held: Values

    @staticmethod
    def of(moves: Moves, t0: Tile, q: jax.Array) -> _Rows:
        """Of the block's queries q."""
        dq = None if moves.q is None else t0.rows(moves.q)
        sides = [t0.rows(a) for a, _ in moves.products]
        return _Rows(moves, q, dq, sides, hold_fields(moves.fields, t0, ("", "q")))

    def scores(
        self, t: Tile, k: jax.Array, slope: jax.Array | None, terms: tuple[Bias, ...]
    ) -> jax.Array | None:
        """S' on a tile; None: 0. Slope: of a soft cap."""
        moves, found = self.moves, []
        if self.dq is not None:
            found.append(t.dot(self.dq, k.T))
        if moves.k is not None:
            found.append(t.dot(self.q, t.keys(moves.k).T))
        if slope is not None:
            found = [x * slope for x in found]
        for a, (_, b) in zip(self.sides, moves.products, strict=True):
            found.append(t.dot(a, t.keys(b).T))
        found = [sum(found[1:], found[0]) * t.call.scale] if found else []
        if moves.fields:
            rest = {f: x for f, x in moves.fields.items() if f not in self.held}
            loaded = self.held | hold_fields(rest, t, ("k", "qk", "d"))
            found.append(pushforward(terms, loaded, t))
        return sum(found[1:], found[0]) if found else None
