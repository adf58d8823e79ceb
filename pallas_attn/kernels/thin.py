"""Thin backward passes: one product with a stored dS."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_attn.call import Call
from pallas_attn.kernels import walk
from pallas_attn.kernels.again import again, over_keys, over_queries, spoiled
from pallas_attn.kernels.owner import key_tile, keys_of, queries_of, query_tile
from pallas_attn.kernels.plan import Plan
from pallas_attn.kernels.tile import at_keys, at_queries, Tile, zeros


i32 = jnp.int32


def thin_rows_kernel(
    ds_ref: Any, y_ref: Any, sight: Any, out: Any, *, call: Call, plan: Plan
) -> None:
    """Scale dS Y of one query block, from a stored dS and an array per key."""
    t0 = query_tile(sight, call, plan, "thin_rows")
    w = keys_of(t0, two=False)

    def step(t: Tile, acc: jax.Array) -> jax.Array:
        y = t.seen_keys(_veil(t), t.keys(y_ref))
        return acc + t.dot(t.pair(ds_ref).astype(y.dtype), y)

    def look(t: Tile, acc: jax.Array) -> jax.Array:
        ds = t.pair(ds_ref)
        t = replace(t, taken=ds == 0)
        y = t.seen_keys(t.visible, t.keys(y_ref))
        return acc + t.dot(ds.astype(y.dtype), y)

    zero = zeros(t0.bq, y_ref)
    acc = _thin_loop(w, t0, at_keys, step, zero)
    redo = lambda: over_keys(t0, w.span, look, zero)
    acc = again(spoiled(acc), redo, acc)
    t0.put_rows(out, acc * call.scale)


def thin_cols_kernel(
    ds_ref: Any, y_ref: Any, sight: Any, out: Any, *, call: Call, plan: Plan
) -> None:
    """Scale dS^T Y of one key block, summed over the query heads of its key head."""
    t0 = key_tile(sight, call, plan, "thin_cols")
    w, first = queries_of(t0, two=False), t0.h

    def of_head(h: Any, acc: jax.Array, *, look: bool) -> jax.Array:
        t1 = replace(t0, h=h)

        def step(t: Tile, acc: jax.Array) -> jax.Array:
            y = t.seen_queries(_veil(t), t.rows(y_ref))
            return acc + t.dot(t.pair(ds_ref).astype(y.dtype).T, y)

        def careful(t: Tile, acc: jax.Array) -> jax.Array:
            ds = t.pair(ds_ref)
            t = replace(t, taken=ds == 0)
            y = t.seen_queries(t.visible, t.rows(y_ref))
            return acc + t.dot(ds.astype(y.dtype).T, y)

        if look:
            return over_queries(t1, w.span, careful, acc)
        return _thin_loop(w, t1, at_queries, step, acc)

    def of_heads(look: bool = False) -> jax.Array:
        one, acc = functools.partial(of_head, look=look), zeros(t0.bk, y_ref)
        if call.G == 1:
            return one(first, acc)
        return lax.fori_loop(first, first + call.G, one, acc)

    acc = of_heads()
    acc = again(spoiled(acc), lambda: of_heads(look=True), acc)
    t0.put_keys(out, acc * call.scale)


def _thin_loop(w: walk.Walk, t0: Tile, place: Any, step: Any, acc: jax.Array) -> Any:
    acc = w.near_loop(lambda n, side, acc: step(place(t0, n, side, True), acc), acc)
    return walk.all_far(w.sides).loop(
        lambda n, side, acc: step(place(t0, n, side, t0.sight.veiled), acc), acc
    )


def _veil(t: Tile) -> jax.Array | None:
    """Which pairs are visible, where 0 may meet what is not finite."""
    return t.visible if t.sight.veiled else None
