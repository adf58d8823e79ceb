"""How many pairs and blocks have weight: what `sparsity` and `visited` report."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float

from pallas_attn.tiled.plan import plan
from pallas_attn.triton.blocks import block_of
from pallas_attn.triton.entmax.call import SparseCall
from pallas_attn.triton.entmax.census import census_kernel, Counts
from pallas_attn.triton.entmax.lists.passes import Lists
from pallas_attn.triton.entmax.operands import Residuals
from pallas_attn.triton.launch import launch
from pallas_attn.triton.programs import grid_of
from pallas_attn.types import outline


f32 = jnp.float32
i32 = jnp.int32


class Census(NamedTuple):
    """Of the visible pairs the share with weight, and of the visible blocks.

    1 where nothing is visible.
    """

    weighty: Float[Array, "B N"]
    active: Float[Array, "B N"]


def census(res: Residuals, call: SparseCall) -> Census:
    """Counts, by one more sweep over all keys and from what the forward pass left."""
    p = replace(plan(call, res.ops.sight, res.ops.added, res.wanted), pruned=False)
    grid = grid_of(call, p, "forward")
    rows = outline((call.B, call.N, call.T), f32)
    visits = outline((call.B, call.N, grid.blocks, 2), i32)
    out: Counts = launch(
        census_kernel,
        grid.shape,
        (res.ops, res.alpha, res.level, res.m),
        Counts(rows, visits, rows),
        call,
        block_of(call, p, "forward"),
        plan=p,
    )
    weighty, active = out.weighty, None
    if res.dense is not None:
        bits = lax.population_count(res.dense.bits)
        active = bits.sum((2, 3), dtype=i32).astype(f32)
    if res.lists is not None:
        listed = _listed(res.lists, call).sum((2, 3), dtype=i32).astype(f32)
        count, fits = res.lists.count.astype(f32), res.lists.fits
        if active is None:
            weighty, active = count, listed
        else:
            assert fits is not None
            weighty = jnp.where(fits, count, weighty)
            active = jnp.where(fits, listed, active)
    assert active is not None
    blocks = out.visits[..., 1].sum(2, dtype=i32).astype(f32)
    return Census(_share(weighty.sum(2), out.visible.sum(2)), _share(active, blocks))


def _share(part: Array, whole: Array) -> Array:
    return jnp.where(whole > 0, part / jnp.maximum(whole, 1), 1.0)


def _listed(lists: Lists, call: SparseCall) -> Bool[Array, "B N I J"]:
    """The blocks in which some row has a key with weight."""
    block = call.config.forward
    assert block is not None
    shape = (pl.cdiv(call.T, block.block_q), pl.cdiv(call.S, block.block_k))
    exists = lax.broadcasted_iota(i32, lists.keys.shape, 3) < lists.count[..., None]
    place = [
        lax.broadcasted_iota(i32, lists.keys.shape, axis) // size
        for axis, size in enumerate((1, 1, block.block_q))
    ]
    keys = jnp.where(exists, lists.keys // block.block_k, shape[1])
    blank = jnp.zeros((call.B, call.N, *shape), bool)
    return blank.at[(*place, keys)].set(True, mode="drop")
