"""The forward pass: one query block of one head, over the key blocks it sees."""

from __future__ import annotations

import jax.numpy as jnp

from pallas_attn.call import Call
from pallas_attn.normalizers.softmax import LOG2E, log_sum
from pallas_attn.tiled.block_ranges import covers
from pallas_attn.tiled.operands import Forward, Operands
from pallas_attn.tiled.plan import Plan
from pallas_attn.triton.dropout import rescale
from pallas_attn.triton.launch import Program
from pallas_attn.triton.online import Online
from pallas_attn.triton.programs import keys_of, query_tile, report
from pallas_attn.triton.pruning import Pruning
from pallas_attn.triton.terms import hold


i32 = jnp.int32


def forward_kernel(
    ops: Operands,
    pruning: Pruning,
    out: Forward,
    *,
    call: Call,
    program: Program,
    plan: Plan,
) -> None:
    """Output and log2-sum of one query block."""
    assert out.visits is not None
    t0 = query_tile(ops.sight, call, plan, "forward", program, pruning.order)
    walk, mul = keys_of(t0, plan.two_sided), call.scale * LOG2E
    q, qs = t0.rows(ops.q), [t0.rows(a) for a, _ in ops.added.products]
    held = hold(ops.added, t0, ("", "q"))
    online = Online(t0, ops, held, q, qs, plan, out.reach)
    sums, visits = pruning.added_up(walk, online)
    acc, base, total = online.with_sink(sums)
    if not covers(t0.frame.queries, call.T):
        inside = t0.inside_rows()
        acc, total = jnp.where(inside[:, None], acc, 0.0), jnp.where(inside, total, 0.0)
    if call.dropout:
        acc = acc * rescale(call)
    o = acc / jnp.where(total == 0, 1.0, total)[:, None]
    t0.put_rows(out.o, o)
    t0.put_stat(out.lse, log_sum(base.high * mul, total))
    if out.peak is not None and out.total is not None:
        t0.put_stat(out.peak, jnp.where(total == 0, jnp.inf, base.high))
        log = jnp.log2(jnp.where(total == 0, 1.0, total))
        t0.put_stat(out.total, log if base.low is None else log + base.low * mul)
    report(out.visits, t0, t0.q0 // i32(t0.bq), visits)
    t0.note(o)
