"""What the passes want to know of whole blocks beforehand: norms, delta, floors."""

from __future__ import annotations

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_attn.call import Call
from pallas_attn.config import Block
from pallas_attn.tiled.summaries import GRAIN, Sight
from pallas_attn.triton.launch import launch, Program
from pallas_attn.triton.memory import store_number
from pallas_attn.triton.programs import frame_of
from pallas_attn.triton.scores import squared_norm
from pallas_attn.triton.tile import Tile
from pallas_attn.types import outline, Ref


f32 = jnp.float32

# They stream whole grains once.
BLOCK = Block(GRAIN, GRAIN, 4, 1)


def norms(
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K h"],
    sides: list[Array],
    sight: Sight,
    call: Call,
) -> Float[Array, "B heads grains"]:
    """The largest |[k, sides]| of each grain of keys; NaN where one is not finite.

    sides: key sides of products, [B, S, N, columns]; heads: N with them, else K.
    """
    heads, grains = call.N if sides else call.K, pl.cdiv(call.S, GRAIN)
    return launch(
        norms_kernel,
        (heads, grains, call.B),
        (k, v, sides, sight),
        outline((call.B, heads, grains), f32),
        call,
        BLOCK,
    )


def deltas(
    o: Float[Array, "B T N h"],
    do: Float[Array, "B T N h"],
    lse: Float[Array, "B N T"],
    dlse: Float[Array, "B N T"] | None,
    sight: Sight,
    call: Call,
) -> tuple[Float[Array, "B N T"], Float[Array, "B N grains"]]:
    """<do, o> - dlse of each row, and the least log2-sum of each grain of rows."""
    grains = pl.cdiv(call.T, GRAIN)
    return launch(
        delta_kernel,
        (call.N, grains, call.B),
        (o, do, lse, dlse, sight),
        (
            outline((call.B, call.N, call.T), f32),
            outline((call.B, call.N, grains), f32),
        ),
        call,
        BLOCK,
    )


def norms_kernel(
    k_ref: Ref,
    v_ref: Ref,
    bs: list[Ref],
    sight: Sight,
    norms_ref: Ref,
    *,
    call: Call,
    program: Program,
) -> None:
    """The largest |[k, B]| of a grain of keys; NaN where k, B or v is not finite."""
    h, j, b = program.place  # heads that share a line of memory run side by side
    head = h * (call.N // norms_ref.shape[1])
    where = frame_of(call, sight, b)
    t = Tile(call, sight, where, b, head, j * 0, j * GRAIN, GRAIN, GRAIN)
    n2 = sum([squared_norm(t.keys(x)) for x in bs], squared_norm(t.keys(k_ref)))
    n2 = n2 + 0.0 * jnp.sum(t.keys(v_ref).astype(f32), 1)
    bad = jnp.sum(jnp.where(n2 - n2 == 0.0, 0.0, 1.0)) > 0
    store_number(norms_ref, (b, h, j), jnp.where(bad, jnp.nan, jnp.sqrt(jnp.max(n2))))


def delta_kernel(
    o_ref: Ref,
    do_ref: Ref,
    lse_ref: Ref,
    dlse_ref: Ref | None,
    sight: Sight,
    delta_ref: Ref,
    floor_ref: Ref,
    *,
    call: Call,
    program: Program,
) -> None:
    """The delta <do, o> - dlse, 0 in empty rows; the least log2-sum of a grain of rows.

    That floor is NaN where a cotangent is not finite: such queries are never left out.
    """
    h, i, b = program.place
    where = frame_of(call, sight, b)
    t = Tile(call, sight, where, b, h, i * GRAIN, i * 0, GRAIN, GRAIN)
    lse = t.stat(lse_ref, jnp.inf)
    delta = jnp.sum(t.rows(o_ref).astype(f32) * t.rows(do_ref).astype(f32), 1)
    if dlse_ref is not None:
        delta = delta - t.stat(dlse_ref)
    delta = jnp.where(lse == jnp.inf, 0.0, delta)
    t.put_stat(delta_ref, delta)
    store_number(floor_ref, (b, h, i), jnp.min(lse) + 0.0 * jnp.sum(delta))
