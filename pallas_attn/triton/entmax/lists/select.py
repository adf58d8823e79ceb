"""From candidates to lists: scores, the largest k of them, their weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_attn.config import Block
from pallas_attn.normalizers.entmax import newton
from pallas_attn.tiled.operands import Operands
from pallas_attn.tiled.summaries import Sight
from pallas_attn.triton.entmax.call import SparseCall
from pallas_attn.triton.entmax.lists.candidates import Ends, middle_of, ordered
from pallas_attn.triton.entmax.lists.operands import Scores, Selected, Words
from pallas_attn.triton.entmax.lists.pairs import (
    listed,
    Pairs,
    row_tile,
    scatter_listed,
)
from pallas_attn.triton.entmax.power import power_of
from pallas_attn.triton.entmax.support import WORD
from pallas_attn.triton.launch import Program
from pallas_attn.triton.scores import capped
from pallas_attn.triton.terms import hold, on_tile, parts
from pallas_attn.types import Index, Ref


f32 = jnp.float32
i32 = jnp.int32

# What |sum p - 1| may be before the weights are divided by their sum, and the most
# steps to it.
CLOSE = 3e-7
MOST_STEPS = 24

# A search's level of each row, what the last step found amiss, how many there were.
Steps = tuple[jax.Array, jax.Array, jax.Array]


def list_scores_kernel(
    ops: Operands,
    words: Words,
    out: Scores,
    *,
    call: SparseCall,
    program: Program,
    cut: Block,
    word: int,
) -> None:
    """The keys of each row's words, and their scores: one float32 sum for each.

    Some words at a time, one key of each: that many loads are in flight.
    """
    t0 = row_tile(ops.sight, call, cut, program)
    count, ahead, inverse = t0.stat(words.count, 0), cut.block_k, 1.0 / call.scale
    products = ops.added.products
    q = t0.rows(ops.q).astype(f32)[:, None, :]
    qs = [t0.rows(a).astype(f32)[:, None, :] for a, _ in products]
    held = hold(ops.added, t0, ("", "q"))
    length = out.x.shape[-1]

    def score(t: Pairs) -> tuple[jax.Array, jax.Array]:
        """(x, row): without and of what a whole row has, in units of q.k."""
        x, _ = capped(call, jnp.sum(q * t.keys(ops.k), 2))
        for a, (_, b) in zip(qs, products, strict=True):
            x = x + jnp.sum(a * t.keys(b), 2)
        t, terms = on_tile(ops.added, t, held)
        row, rest = parts(terms, t)
        for r in rest:
            x = x - r * -inverse
        row = jnp.broadcast_to(row * inverse, (t.bq, 1))
        # What is not finite in a row's own part is so in all its scores.
        return x + (row - row), row.reshape(t.bq)

    def some_words(n: Index, at: jax.Array) -> jax.Array:
        place = n * ahead + jnp.arange(ahead, dtype=i32)
        ok = place[None, :] < count[:, None]
        left = listed(t0, words.words, n * ahead, ahead, ok)
        first = listed(t0, words.numbers, n * ahead, ahead, ok) * word
        size = lax.population_count(left)
        to = at[:, None] + jnp.cumsum(size, 1, dtype=i32) - size

        def one_of_each(n: Index, left: jax.Array) -> jax.Array:
            ok = (left != 0) & (to + n < length)
            key = jnp.where(ok, first + (WORD - 1) - lax.clz(left & -left), 0)
            x, row = score(Pairs.of(t0, key, ok))
            scatter_listed(t0, out.x, to + n, x, ok)
            scatter_listed(t0, out.keys, to + n, key, ok)
            return left & (left - 1)

        lax.fori_loop(i32(0), jnp.max(size), one_of_each, left)
        return at + jnp.sum(size, 1, dtype=i32)

    steps = (jnp.max(count) + (ahead - 1)) // ahead
    nothing = jnp.zeros((t0.bq,), i32)
    found = lax.fori_loop(i32(0), steps, some_words, nothing)
    t0.put_stat(out.count, jnp.minimum(found, length))
    none = jnp.zeros((t0.bq, ahead), bool)
    t0.put_stat(out.row, score(Pairs.of(t0, none.astype(i32), none))[1])


def list_select_kernel(
    scores: Scores,
    start: Ref,
    alpha: Ref | None,
    sight: Sight,
    out: Selected,
    *,
    call: SparseCall,
    program: Program,
    cut: Block,
    fused: bool,
) -> None:
    """The largest top_k of a list (of equal ones the first), and their weights.

    Entries with weight are stored at the front, in key order. start: a level of each
    row that is nearly right.
    """
    t0 = row_tile(sight, call, cut, program)
    power = power_of(call, alpha, t0.b, t0.h, fused=fused)
    n, length, width = t0.bq, cut.block_k, out.keys.shape[-1]
    count = t0.stat(scores.count, 0)
    has = jnp.arange(length, dtype=i32)[None, :] < count[:, None]
    x = listed(t0, scores.x, i32(0), length, has)
    m = jnp.max(jnp.where(has, x, -jnp.inf), 1)
    m = jnp.where(m == -jnp.inf, 0.0, m)

    # The candidates' largest score may have been rounded elsewhere, or hidden.
    first = jnp.minimum(t0.stat(start), power.level_of(1.0))
    first = jnp.where(count > 0, first, power.level_of(1.0))

    def weights(keep: jax.Array, level: jax.Array) -> tuple[jax.Array, jax.Array]:
        p, u = power.weights(x, m[:, None], level[:, None], call.scale)
        return jnp.where(keep, p, 0.0), jnp.where(keep, u, 0.0)

    def solved(keep: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(p, u, level) with sum p = 1."""

        def step(state: Steps) -> Steps:
            level, _, steps = state
            p, u = weights(keep, level)
            total = jnp.where(count > 0, jnp.sum(p, 1), 1.0)
            by = newton(power.a, total, jnp.sum(u, 1))
            level = jnp.where(count > 0, power.lowered(level, by), level)
            return level, jnp.max(jnp.abs(total - 1)), steps + 1

        def more(state: Steps) -> jax.Array:
            return (state[1] > CLOSE) & (state[2] < MOST_STEPS)

        level, _, _ = lax.while_loop(more, step, (first, f32(1), i32(0)))
        p, u = weights(keep, level)
        total = jnp.sum(p, 1)[:, None]
        # A sum that is NaN would make weights of places that hold no key: 0 / NaN.
        p = jnp.where(keep, p / jnp.where(total == 0, 1.0, total), 0.0)
        return p, u, level

    def size(y: jax.Array) -> jax.Array:
        return jnp.sum(y.astype(i32), 1, dtype=i32)

    def largest(k: int) -> jax.Array:
        rank = jnp.where(has, ordered(x), jnp.iinfo(i32).min)

        def half(_: Index, ends: Ends) -> Ends:
            low, high = ends
            middle = middle_of(low, high)
            enough = size(rank >= middle[:, None]) >= k
            return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

        low = jnp.full((n,), jnp.iinfo(i32).min + 1, i32)
        high = jnp.full((n,), jnp.iinfo(i32).max, i32)
        kth, _ = lax.fori_loop(0, 32, half, (low, high))
        above = has & (rank > kth[:, None])
        tied = has & (rank == kth[:, None])
        room = (k - size(above))[:, None]
        keep = above | (tied & (jnp.cumsum(tied.astype(i32), 1, dtype=i32) <= room))
        return jnp.where((count > k)[:, None], keep, has)

    p, u, level = solved(has)
    if call.top_k is not None:
        k = call.top_k
        # Where no row has more weights than that, a selection changes nothing.
        p, u, level = lax.cond(
            jnp.max(size(p != 0)) > k,
            lambda: solved(largest(k)),
            lambda: (p, u, level),
        )
    on = p != 0
    place = jnp.cumsum(on.astype(i32), 1, dtype=i32) - 1
    on = on & (place < width)
    key = listed(t0, scores.keys, i32(0), length, on)
    for ref, y in ((out.keys, key), (out.p, p), (out.u, u)):
        scatter_listed(t0, ref, place, y, on)
    t0.put_stat(out.count, size(on))
    # `lists.by_key_block` sorts whole lists: what it reads has been written.
    every = jnp.arange(length, dtype=i32)[None, :]
    rest = every >= size(on)[:, None]
    scatter_listed(t0, out.keys, every, jnp.zeros_like(key), rest)
    row = t0.stat(scores.row)
    t0.put_stat(out.m, jnp.where(count > 0, m + row, jnp.inf))
    t0.put_stat(out.level, level)
