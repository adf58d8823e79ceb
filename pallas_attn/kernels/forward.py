"""The forward pass: one query block of one head, over the key blocks it sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_attn.bias.base import Added
from pallas_attn.call import NO_WEIGHT, Call
from pallas_attn.kernels import walk
from pallas_attn.kernels.plan import Plan, block_of, grid_of
from pallas_attn.kernels.terms import bound, hold, on_tile, parts
from pallas_attn.kernels.tile import (
    Tile,
    at_keys,
    exp2,
    load_number,
    store_number,
    uniform,
)
from pallas_attn.kernels.visible import GRAIN, Sight, frame
from pallas_attn.normalizers.softmax import (
    LOG2E,
    SPREAD,
    log_sum,
    lowest,
    peak,
    referred,
    rescaled,
)


f32 = jnp.float32
i32 = jnp.int32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Operands:
    """What every pass reads: arrays outside, refs inside the kernels."""

    q: Any
    k: Any
    v: Any
    added: Added
    sight: Sight


def frame_of(call: Call, sight: Sight, b: Any) -> Any:
    """The frame of batch entry b, in uniform registers."""
    return frame(call, sight, b, lambda ref, at: uniform(call, load_number(ref, at)))


def query_tile(sight: Sight, call: Call, plan: Plan, kernel: str) -> Tile:
    """The query block that this program owns; its first key block."""
    grid, block = grid_of(call, plan, kernel), block_of(call, plan, kernel)
    b, h, i = grid.place()
    if call.causal:  # long programs first
        i = grid.blocks - 1 - i
    bq, bk = block.block_q, block.block_k
    where = frame_of(call, sight, b)
    return Tile(call, sight, where, b, h, i * bq, i * 0, bq, bk)


def keys_of(t: Tile, two: bool) -> walk.Walk:
    """The key blocks that a query block visits."""
    span = walk.hull(t.call, t.sight, t.b, t.h, t.q0, t.bq, t.bk, by_key=False)
    return walk.over_keys(t.call, t.frame, t.q0, t.bq, t.bk, two, span)


def far_keys(
    t: Tile, w: walk.Walk, ops: Operands, held: Any, norms: Any, reach: Any, floor: Any
) -> walk.Remaining:
    """The far blocks that remain, where every row's log2-sum is at least `floor`."""
    call = t.call
    p0 = t.q0 + t.frame.offset

    def weight(j: jax.Array, ok: jax.Array) -> tuple[jax.Array, Any]:
        lead = (t.b, t.h // i32(call.N // norms.shape[1]))
        norm = walk.of_blocks(norms, lead, j, ok, t.bk, GRAIN, jnp.maximum)
        k0 = j * t.bk
        most = bound(ops.added, held, p0, p0 + t.bq - 1, k0, k0 + t.bk - 1)
        return norm * reach + most, floor

    return walk.holes(call, w.sides, pl.cdiv(call.S, t.bk), t.bk, weight)


def reach_of(call: Call, q: jax.Array, qs: list[jax.Array]) -> jax.Array:
    """The largest |scale [q, A]| in log2, above the rounding of any dot, TF32's too."""
    squares = sum([squared_norm(a) for a in qs], squared_norm(q))
    return jnp.sqrt(jnp.max(squares)) * (call.scale * LOG2E * (1 + 2.0**-8))


def squared_norm(x: jax.Array) -> jax.Array:
    """|x|^2 of every row, float32."""
    return jnp.sum(x.astype(f32) ** 2, 1)


def dots(t: Tile, q: Any, k: Any, qs: list[Any], ks: list[Any]) -> jax.Array:
    """q.k plus the products, in one accumulator, oriented as the tile."""
    s = t.dot(k, q.T) if t.flip else t.dot(q, k.T)
    for a, b in zip(qs, ks, strict=True):
        # Factors keep float32 accuracy whatever the precision of q.k.
        dot = t.exact_dot if a.dtype == f32 else t.dot
        s = (dot(b, a.T) if t.flip else dot(a, b.T)) + s
    return s


def weightless(rest: list[jax.Array], several: bool) -> list[jax.Array]:
    """Parts of a score; of several terms, each alone can take a key's weight away."""
    if not several:  # one term's -1e30 is the score's own
        return rest
    return [jnp.where(r <= NO_WEIGHT, -jnp.inf, r) for r in rest]


def forward_kernel(
    ops: Operands, norms: Any, out: dict[str, Any], *, call: Call, plan: Plan
) -> None:
    """Output and log2-sum of one query block."""
    t0 = query_tile(ops.sight, call, plan, "forward")
    w = keys_of(t0, plan.two)
    mul, inverse = call.scale * LOG2E, 1.0 / call.scale
    products = ops.added.products
    several = len(ops.added.terms) + len(products) > 1
    q, qs = t0.rows(ops.q), [t0.rows(a) for a, _ in products]
    held = hold(ops.added, t0, ("", "q"))

    def power(x: jax.Array) -> jax.Array:
        return exp2(call, x)

    def scores(t: Tile) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """(x, row, visible): the scores x + row in units of q.k."""
        x = dots(t, q, t.keys(ops.k), qs, [t.keys(b) for _, b in products])
        row, rest = parts(on_tile(ops.added, t, held), t)
        for r in weightless(rest, several):
            # Not `+ r`: that would become the dot's accumulator, whose load Triton does
            # not pipeline.
            x = x - r * -inverse
        visible = t.visible
        if visible is not None:
            x = jnp.where(visible, x, -jnp.inf)
        row = jnp.broadcast_to(row * inverse, (t.bq, 1)).reshape(t.bq)
        return x, row, visible

    def weighted(t: Tile, weights: jax.Array, visible: Any) -> jax.Array:
        v = t.seen_keys(visible, t.keys(ops.v))
        return t.dot(weights.astype(v.dtype), v)

    def online(t: Tile, state: Any) -> Any:
        acc, m, l = state
        x, row, visible = scores(t)
        weights, old, m = rescaled(m, x, row, mul, power)
        acc = acc * old[:, None] + weighted(t, weights, visible)
        return acc, m, l * old + jnp.sum(weights, 1)

    def near(j: Any, side: Any, state: Any) -> Any:
        return online(at_keys(t0, j, side, edge=True), state)

    veiled = ops.sight.veiled
    zero = jnp.zeros((t0.bq,), f32)
    width = max(16, pl.next_power_of_2(call.h))
    state = (jnp.zeros((t0.bq, width), f32), zero + lowest(call.scale), zero)
    acc, m, l = w.near_loop(near, state)
    if not plan.pruned:
        far = walk.all_far(w.sides)

        def rest(t: Any, state: Any) -> Any:
            return online(at_keys(t0, *far.at(t), edge=veiled), state)

        if w.sides:
            acc, m, l = lax.fori_loop(i32(0), far.count, rest, (acc, m, l))
        reference = m * mul
    else:
        # A bound on the scores replaces the running maximum.
        reach = reach_of(call, q, qs)
        sums = jnp.where(t0.inside_rows(), m * mul + jnp.log2(l), jnp.inf)
        far = far_keys(t0, w, ops, held, norms, reach, jnp.min(sums))
        # Rare: scores that may spread over 2^200 first get their true maximum, by a
        # plain loop that costs nothing where it does not run.
        wide = far.top - jnp.min(m) * mul > 2 * SPREAD

        def find(state: Any) -> Any:
            t, m = state
            x, row, _ = scores(at_keys(t0, *far.at(t), edge=veiled))
            return t + 1, peak(m, x, row)

        top = lax.while_loop(lambda s: wide & (s[0] < far.count), find, (i32(0), m))[1]
        lift = jnp.where(wide, -jnp.inf, far.top - SPREAD)
        reference = jnp.maximum(top * mul, lift)
        # (A fused multiply-add may leave a rounding error of 1e22 of -1e30.)
        old = power(jnp.minimum(m * mul - reference, 0.0))

        def rest(t: Any, state: Any) -> Any:
            acc, l = state
            t = at_keys(t0, *far.at(t), edge=veiled)
            x, row, visible = scores(t)
            weights = referred(x, row, reference, mul, power)
            return acc + weighted(t, weights, visible), l + jnp.sum(weights, 1)

        acc, l = lax.fori_loop(i32(0), far.count, rest, (acc * old[:, None], l * old))
        store_number(out["reach"], (t0.b, t0.h, t0.q0 // i32(t0.bq)), reach)
    if not walk.covers(t0.frame.queries, call.T):
        inside = t0.inside_rows()
        acc, l = jnp.where(inside[:, None], acc, 0.0), jnp.where(inside, l, 0.0)
    t0.put_rows(out["o"], acc / jnp.where(l > 0, l, 1.0)[:, None])
    t0.put_stat(out["lse"], log_sum(reference, l))
    report(out["visits"], t0, t0.h, t0.q0 // i32(t0.bq), w, far)


def report(
    ref: Any, t: Tile, h: Any, n: Any, w: walk.Walk, far: walk.Remaining
) -> None:
    """How many blocks this program visited, and how many there were."""
    near = i32(w.near[1]) - i32(w.near[0])
    store_number(ref, (t.b, h, n, i32(0) * n), near + far.count)
    store_number(ref, (t.b, h, n, i32(0) * n + 1), w.visible)
