"""The gradient of a learned alpha: one more pass over the blocks with weight."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_attn.normalizers.entmax import Learned
from pallas_attn.tiled.operands import Operands
from pallas_attn.tiled.plan import Plan
from pallas_attn.triton.dropout import drop_on, rescale
from pallas_attn.triton.entmax.call import SparseCall
from pallas_attn.triton.entmax.operands import Cotangents
from pallas_attn.triton.entmax.support import Support
from pallas_attn.triton.launch import Program
from pallas_attn.triton.programs import query_tile
from pallas_attn.triton.scores import row_scores
from pallas_attn.triton.terms import hold
from pallas_attn.triton.tile import Tile
from pallas_attn.types import Ref


f32 = jnp.float32

# Of each row, the sums of the gradient, of u (dP - delta) and of p h.
Sums = tuple[jax.Array, jax.Array, jax.Array]


def alpha_kernel(
    ops: Operands,
    cot: Cotangents,
    expected: Ref | None,
    support: Support,
    out: Ref,
    *,
    call: SparseCall,
    program: Program,
    plan: Plan,
) -> None:
    """The sum of p h (dP - delta) over the keys of each row, h = dlog p / dalpha.

    h moves alpha and leaves m + L where it is; that sum p stays 1 adds a multiple of u
    to it, which meets dP - delta and is 0. As in rows, what rounding left of that sum
    u (dP - delta), beyond what is expected of it, is taken off delta.
    """
    t0 = query_tile(ops.sight, call, plan, "rows", program)
    q = t0.rows(ops.q)
    qs = [t0.rows(a) for a, _ in ops.added.products]
    held = hold(ops.added, t0, ("", "q"))
    do, stats = t0.rows(cot.do), cot.of_rows(t0)
    power = stats.power
    assert isinstance(power, Learned)

    def add(t: Tile, sums: Sums) -> Sums:
        total, by_u, by_h = sums
        x, row, _ = row_scores(t, q, qs, ops.k, ops.added, held)
        m, level = (stats.m - row)[:, None], stats.level[:, None]
        by_alpha = power.by_alpha(x, m, level, call.scale)
        _, u = power.weights(x, m, level, call.scale)
        # NaN of a key that nobody sees meets u and p h of 0, below
        dp, drop = t.dot(do, t.keys(ops.v).T), drop_on(t)
        dp = dp if drop is None else drop(dp * rescale(call))
        beyond = dp - stats.delta[:, None]
        return (
            total + jnp.sum(jnp.where(by_alpha == 0, 0.0, by_alpha * beyond), 1),
            by_u + jnp.sum(jnp.where(u == 0, 0.0, u * beyond), 1),
            by_h + jnp.sum(by_alpha, 1),
        )

    nothing = jnp.zeros((t0.bq,), f32)
    state = (nothing, nothing, nothing)
    sums, _ = support.over_keys(t0, ops, held, None, plan, add, state)
    total, by_u, by_h = sums
    if expected is not None:
        by_u = by_u - t0.stat(expected)
    total = total - stats.in_units_of_u(by_u) * by_h
    total = jnp.where(stats.attends, total, 0.0)
    t0.put_stat(out, total)
    t0.note(total)
