"""The backward pass over block diagonals: what varies with the distance alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_attn.call import Call
from pallas_attn.tiled.fields import Field
from pallas_attn.tiled.operands import Operands
from pallas_attn.tiled.plan import Plan
from pallas_attn.tiled.summaries import Sight
from pallas_attn.triton.blocks import block_of
from pallas_attn.triton.launch import Program
from pallas_attn.triton.memory import load_number, store
from pallas_attn.triton.programs import frame_of
from pallas_attn.triton.row_weights import RowCotangents
from pallas_attn.triton.scores import weights_and_ds
from pallas_attn.triton.terms import on_tile, pullback
from pallas_attn.triton.tile import Tile
from pallas_attn.triton.visitor import Visitor
from pallas_attn.types import Index, Ref


f32 = jnp.float32
i32 = jnp.int32


def block_diagonals(call: Call, sight: Sight, n: int) -> tuple[int, int]:
    """The first block diagonal of blocks of n that any pair may see, and how many.

    Counted from the one of the first query and the last key.
    """
    keys = pl.cdiv(call.S, n)
    count, offset = pl.cdiv(call.T, n) + keys - 1, call.offset
    if not call.causal or sight.arrays.placed or sight.arrays.offset is not None:
        return 0, count
    assert offset is not None
    first = min(max(keys - 1 - (offset + n - 1) // n, 0), count - 1)
    return first, count - first


def diagonals_kernel(
    ops: Operands,
    cot: RowCotangents,
    blocks: Visitor,
    start: Ref | None,
    out: Ref,
    *,
    call: Call,
    program: Program,
    plan: Plan,
    field: Field,
    first: int,
) -> None:
    """One block diagonal of the gradient of a field, [n, n].

    Entry (r, s) of all square tiles along a block diagonal is as far apart: they are
    summed as they are, over the batch entries and heads that share the field. What a
    tile's own diagonals add up to is left to whoever has them all.

    start: the first head of those whose field `out` is of; None: it is of all.
    """
    n = block_of(call, plan, "diagonals").block_q
    array = field.of(ops.added.terms)
    own_b, own_h = array.shape[:2]
    g, c = program.place
    some = out.shape[1]
    b0, out_h = g // some, g % some
    h0 = out_h if start is None else out_h + load_number(start, (i32(0) * g,))
    last = i32(pl.cdiv(call.S, n) - 1)
    ahead = c + i32(first) - last  # query block less key block
    lo = jnp.maximum(ahead, 0)
    hi = jnp.minimum(i32(pl.cdiv(call.T, n)), last + 1 + ahead)

    def at(b: Index, h: Index, i: Index) -> Tile:
        where = frame_of(call, ops.sight, b)
        j = i - ahead
        return Tile(call, ops.sight, where, b, h, i * n, j * n, n, n, flag=program.flag)

    def add(t: Tile, acc: jax.Array) -> jax.Array:
        t, terms = on_tile(ops.added, t, {})
        products = ops.added.products
        _, _, ds, _, visible = weights_and_ds(
            t,
            (t.rows(ops.q), t.keys(ops.k), t.keys(ops.v), t.rows(cot.do)),
            ([t.rows(a) for a, _ in products], [t.keys(x) for _, x in products]),
            terms,
            cot.of_rows(t),
        )
        grad = pullback(terms, (field,), t)(ds)[field]
        return acc + (grad if visible is None else jnp.where(visible, grad, 0.0))

    def of_head(y: Index, acc: jax.Array) -> jax.Array:
        b = b0 if own_b > 1 else (y if own_h > 1 else y // call.N)
        h = h0 if own_h > 1 else y % call.N
        step = lambda i, acc: blocks.on_tile(at(b, h, i), add, acc)
        return lax.fori_loop(lo, hi, step, acc)

    share = (call.B if own_b == 1 else 1) * (call.N if own_h == 1 else 1)
    acc = lax.fori_loop(i32(0), i32(share), of_head, jnp.zeros((n, n), f32))
    whole = pl.ds(c * 0, n)
    store(out.at[b0, out_h, c, whole, whole], None, acc, out)
    at(b0, h0, lo).note(acc)
