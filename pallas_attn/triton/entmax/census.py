"""How many pairs are visible, and how many of them have weight: for `sparsity`."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_attn.normalizers.softmax import lowest
from pallas_attn.tiled.operands import Operands
from pallas_attn.tiled.plan import Plan
from pallas_attn.triton.entmax.call import SparseCall
from pallas_attn.triton.entmax.power import fuses, power_of
from pallas_attn.triton.entmax.sweep import sweep_of
from pallas_attn.triton.launch import Program
from pallas_attn.triton.programs import query_tile, report
from pallas_attn.triton.tile import Tile
from pallas_attn.types import Ref


f32 = jnp.float32
i32 = jnp.int32

# Of every query, a number of one kind and one of another.
Pair = tuple[jax.Array, jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Counts:
    """Visible keys of every query, those of them with weight; blocks as `report`."""

    visible: Float[Array, "B N T"]
    visits: Int[Array, "B N blocks 2"]
    weighty: Float[Array, "B N T"]


def census_kernel(
    ops: Operands,
    alpha: Ref | None,
    level_ref: Ref,
    m_ref: Ref,
    out: Counts,
    *,
    call: SparseCall,
    program: Program,
    plan: Plan,
) -> None:
    """Of each row the keys that are visible, and those above its threshold; blocks."""
    t0 = query_tile(ops.sight, call, plan, "forward", program)
    power = power_of(call, alpha, t0.b, t0.h, fused=fuses(call, ops))
    sweep, floor = sweep_of(t0, ops, plan), lowest(call.scale)
    m, level = t0.stat(m_ref, jnp.inf), t0.stat(level_ref)
    exists = t0.inside_rows()

    def count(t: Tile, state: Pair) -> Pair:
        visible, weighty = state
        x, row, _ = sweep.scores(t)
        p, _ = power.weights(x, (m - row)[:, None], level[:, None], call.scale)
        seen = exists[:, None] & ~(x + row[:, None] <= floor)

        def number(of: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(seen & of, 1.0, 0.0), 1)

        return visible + number(p == p), weighty + number(p > 0)

    nothing = jnp.zeros((t0.bq,), f32)
    state = sweep.near_loop(count, (nothing, nothing))
    visible, weighty = sweep.far_loop(count, state)
    t0.put_stat(out.visible, visible)
    t0.put_stat(out.weighty, weighty)
    report(out.visits, t0, t0.q0 // i32(t0.bq), sweep.visits)
