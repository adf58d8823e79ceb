"""Thin backward passes: one product with a stored dS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax

from pallas_attn.call import Call
from pallas_attn.tiled.plan import Plan
from pallas_attn.tiled.summaries import Sight
from pallas_attn.triton import schedule
from pallas_attn.triton.launch import Program
from pallas_attn.triton.programs import key_tile, keys_of, queries_of, query_tile
from pallas_attn.triton.tile import at_keys, at_queries, Tile, zeros
from pallas_attn.triton.visitor import Step
from pallas_attn.types import Index, Ref, Scalar


i32 = jnp.int32


def thin_rows_kernel(
    ds_ref: Ref,
    y_ref: Ref,
    sight: Sight,
    out: Ref,
    *,
    call: Call,
    program: Program,
    plan: Plan,
) -> None:
    """Scale dS Y of one query block, from a stored dS and an array per key."""
    t0 = query_tile(sight, call, plan, "thin_rows", program)
    w = keys_of(t0, two=False)

    def step(t: Tile, acc: jax.Array) -> jax.Array:
        y, ds = t.keys(y_ref), t.pair(ds_ref)
        y = t.seen_keys(_veil(t, ds), y)
        return acc + t.dot(ds.astype(y.dtype), y)

    acc = _thin_loop(w, t0, at_keys, step, zeros(t0.bq, y_ref))
    t0.put_rows(out, acc * call.scale)
    t0.note(acc)


def thin_cols_kernel(
    ds_ref: Ref,
    y_ref: Ref,
    sight: Sight,
    out: Ref,
    *,
    call: Call,
    program: Program,
    plan: Plan,
) -> None:
    """Scale dS^T Y of one key block, summed over the query heads of its key head."""
    x0 = key_tile(sight, call, plan, "thin_cols", program)
    first = x0.h

    def of_head(h: Index, acc: jax.Array) -> jax.Array:
        t0 = replace(x0, h=h)

        def step(t: Tile, acc: jax.Array) -> jax.Array:
            y, ds = t.rows(y_ref), t.pair(ds_ref)
            y = t.seen_queries(_veil(t, ds), y)
            return acc + t.dot(ds.astype(y.dtype).T, y)

        return _thin_loop(queries_of(t0, two=False), t0, at_queries, step, acc)

    acc = zeros(x0.bk, y_ref)
    if call.G == 1:
        acc = of_head(first, acc)
    else:
        acc = lax.fori_loop(first, first + call.G, of_head, acc)
    x0.put_keys(out, acc * call.scale)
    x0.note(acc)


def _thin_loop(
    w: schedule.Walk,
    t0: Tile,
    place: Callable[[Tile, Index, Scalar, bool], Tile],
    step: Step[jax.Array],
    acc: jax.Array,
) -> jax.Array:
    acc = w.near_loop(lambda n, side, acc: step(place(t0, n, side, True), acc), acc)
    return schedule.all_far(w.sides).loop(
        lambda n, side, acc: step(place(t0, n, side, t0.sight.veiled), acc), acc
    )


def _veil(t: Tile, ds: jax.Array) -> jax.Array | None:
    """Which pairs are visible, where 0 may meet what is not finite.

    With care: those with a gradient, for what a bias takes away has none.
    """
    if t.sight.careful:
        return ds != 0
    return t.visible if t.sight.veiled else None
