"""Candidates: for each query the keys that can be among its largest, as set bits.

The k-th largest of the slots is at most the k-th largest of all, and a score below the
slots' own threshold has no weight. Both are lower bounds, of one number for each row;
a second sweep over the keys collects what is above it, one bit per key.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_attn.config import Block
from pallas_attn.normalizers.entmax import Learned, Power
from pallas_attn.normalizers.softmax import LOG2E, lowest
from pallas_attn.tiled.block_ranges import Runs
from pallas_attn.tiled.operands import Operands
from pallas_attn.tiled.plan import Plan
from pallas_attn.triton.entmax.call import SparseCall
from pallas_attn.triton.entmax.lists.blocks import keys_of_word
from pallas_attn.triton.entmax.lists.operands import Bounds, Candidates, Words
from pallas_attn.triton.entmax.lists.pairs import row_tile, scatter_listed
from pallas_attn.triton.entmax.power import fuses, power_of
from pallas_attn.triton.entmax.sweep import Sweep, sweep_of
from pallas_attn.triton.entmax.threshold import fill, ROUNDING, slot_level, Slots
from pallas_attn.triton.launch import Program
from pallas_attn.triton.programs import key_runs, side_of
from pallas_attn.triton.pruning import Grains, largest_scores
from pallas_attn.triton.ptx import uniform
from pallas_attn.triton.scores import reach_of
from pallas_attn.triton.tile import at_keys, Tile
from pallas_attn.triton.visitor import Step
from pallas_attn.types import Index, Range, Ref, State


f32 = jnp.float32
i32 = jnp.int32

# How often the bound of a row that lost keys to rounding is lowered.
TRIES = 6

# Halvings of an int32 range, and some.
HALVINGS = 40

Scores = Callable[[Tile], jax.Array]

# (scores of a tile, the tile) -> which pairs are meant
Take = Callable[[jax.Array, Tile], jax.Array]

# Of each row, two numbers: the ends of a search, or counts.
Ends = tuple[jax.Array, jax.Array]
# How often it was tried, and of each row the bound and how many keys there are.
Try = tuple[jax.Array, jax.Array, jax.Array]
# The ends of a search of each row, how many keys it has at the first, and the step.
Search = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def list_candidates_kernel(
    ops: Operands,
    alpha: Ref | None,
    grains: Grains | None,
    out: Candidates,
    *,
    call: SparseCall,
    program: Program,
    plan: Plan,
    cut: Block,
) -> None:
    """The bound of each row, and the keys at or above it as words of bits."""
    t0 = row_tile(ops.sight, call, cut, program)
    power = power_of(call, alpha, t0.b, t0.h, fused=fuses(call, ops))
    slots = fill(t0, ops, grains, power, plan)
    level, _ = slot_level(slots, power, call.scale)
    bound, need = bound_of(slots, level, power, call)
    t0.put_stat(out.m, slots.m)
    t0.put_stat(out.level, level)
    t0.put_stat(out.bound, bound)
    t0.put_stat(out.need, need)
    within = blocks_above(slots.sweep, grains, bound) if plan.pruned else None
    words, keys = collect(t0, slots.sweep.whole, above_all(bound), out.lists, within)
    put_counts(t0, words, keys, out.lists)


def bound_of(
    slots: Slots, level: jax.Array, power: Power | Learned, call: SparseCall
) -> tuple[jax.Array, jax.Array]:
    """A lower bound of the scores that a list may need, and how many it has at least.

    In units of q.k. inf where a query sees nothing or a score is not finite: what is
    not less than that, NaN, is a candidate still.
    """
    below = [slots.m[:, None] - x for x in slots.tops]
    depth = power.reach(level) * ((1 + ROUNDING) / call.scale)
    need = jnp.ones_like(depth)
    if call.top_k is not None:
        depth, need = narrowed(depth, below, call.top_k)
    bound = slots.m - depth * (1 + ROUNDING) - jnp.abs(slots.m) * ROUNDING
    bound = jnp.maximum(bound, lowest(call.scale))
    known = (slots.m - slots.m == 0) & (bound == bound)
    return jnp.where(known, bound, jnp.inf), jnp.where(known, need, 0.0).astype(i32)


def above_all(bound: jax.Array) -> Take:
    """The pairs that are not below the bound of their row."""
    return lambda x, _: ~(x < bound[:, None])


def narrowed(
    depth: jax.Array, below: list[jax.Array], k: int
) -> tuple[jax.Array, jax.Array]:
    """The least depth, nearly, in which there are k slots; all of it if there are not.

    And how many of the k there are. Halved are not depths but their bits: scores may
    lie 1 apart, or 1e9 where a bias hides keys.

    below: how far slots lie below the largest.
    """

    def count(bits: jax.Array) -> jax.Array:
        depth = lax.bitcast_convert_type(bits, f32)[:, None]
        inside = [jnp.sum((x <= depth).astype(f32), 1) for x in below]
        return inside[0] + inside[1]

    start = lax.bitcast_convert_type(jnp.minimum(depth, 3e38), i32)
    there = count(start)

    def half(_: Index, ends: Ends) -> Ends:
        low, high = ends
        middle = middle_of(low, high)
        enough = count(middle) >= k
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    def search() -> jax.Array:
        found = lax.fori_loop(0, 15, half, (jnp.zeros_like(start), start))[1]
        found = lax.bitcast_convert_type(found, f32)
        return jnp.where(there >= k, found, depth)

    depth = lax.cond(jnp.max(there) > k, search, lambda: depth)
    return depth, jnp.minimum(there, k)


def blocks_above(
    sweep: Sweep, grains: Grains | None, bound: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The range of key blocks that may have a score above the least bound of a row."""
    assert grains is not None
    t0, call = sweep.t0, sweep.t0.call
    size = pl.cdiv(call.S, t0.bk)
    j = jnp.arange(max(2, pl.next_power_of_2(size)), dtype=i32)
    reach = reach_of(call, sweep.q, sweep.qs)
    most = largest_scores(t0, sweep.ops, sweep.held, grains, reach, j, j < size)
    floor = jnp.min(jnp.where(t0.inside_rows(), bound, jnp.inf))
    may = ~(most < floor * (call.scale * LOG2E)) & (j < size)
    first = uniform(call, jnp.min(jnp.where(may, j, size)))
    return first, uniform(call, jnp.max(jnp.where(may, j + 1, 0)))


def collect(
    t0: Tile,
    scores: Scores,
    take: Take,
    out: Words,
    within: Range | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Append to each row's list the words of the blocks that have some, in key order.

    A word is 32 keys, or a smaller block; a block's words stay together. Returns how
    many words and keys each row has, stored or not.

    within: the range of key blocks that can have any; None: all.
    """
    bq, bk = t0.bq, t0.bk
    size = keys_of_word(bk)
    per = bk // size
    bit = i32(1) << (jnp.arange(bk, dtype=i32) % size)
    place = jnp.arange(per, dtype=i32)[None, :]

    def append(t: Tile, state: Ends) -> Ends:
        count, keys = state
        bits = jnp.where(take(scores(t), t), bit[None, :], 0)
        words = jnp.sum(bits.reshape(bq, per, size), 2, dtype=i32)
        some = jnp.max((words != 0).astype(i32), 1)
        to = count[:, None] + place
        ok = some[:, None] > 0
        scatter_listed(t0, out.words, to, words, ok)
        number = jnp.broadcast_to(t.k0 // i32(size) + place, to.shape)
        scatter_listed(t0, out.numbers, to, number, ok)
        more = jnp.sum(lax.population_count(words), 1, dtype=i32)
        return count + some * per, keys + more

    nothing = jnp.zeros((bq,), i32)
    return in_order(t0, key_runs(t0), within, append, (nothing, nothing))


def put_counts(t0: Tile, words: jax.Array, keys: jax.Array, out: Words) -> None:
    """Store how many words of each row there was room for, and how many keys it has."""
    inside, words = t0.inside_rows(), jnp.minimum(words, out.words.shape[-1])
    t0.put_stat(out.count, jnp.where(inside, words, 0))
    t0.put_stat(out.keys, jnp.where(inside, keys, 0))


def in_order(
    t0: Tile, runs: Runs, within: Range | None, body: Step[State], state: State
) -> State:
    """Runs body(tile, state) over the key blocks of a range, in storage order."""

    def one(j: Index, masked: bool, state: State) -> State:
        return body(at_keys(t0, j, side_of(t0), masked), state)

    return runs.loop(one, state, veiled=t0.sight.veiled, within=within)


def list_again_kernel(
    ops: Operands,
    bounds: Bounds,
    lists: Words,
    out: Words,
    *,
    call: SparseCall,
    program: Program,
    plan: Plan,
    cut: Block,
    most: int,
) -> None:
    """Collects again for blocks of queries of which one lost keys, or has too many.

    most: the keys that a list has room for.
    """
    t0 = row_tile(ops.sight, call, cut, program)
    keys, need = t0.stat(lists.keys, 0), t0.stat(bounds.need, 0)
    k, nothing = call.top_k, lambda: i32(0)

    def again() -> jax.Array:
        scores = sweep_of(t0, ops, plan).whole
        bound, m = t0.stat(bounds.bound), t0.stat(bounds.m, jnp.inf)
        bound, found = lowered(t0, scores, bound, m, need, keys, out)
        if k is None:  # who reads the lists looks whether all keys have room
            return i32(0)
        ends = (bound, m)
        fewer = functools.partial(raised, t0, scores, ends, k, most, found, out)
        return lax.cond(jnp.max(found) > most, fewer, nothing)

    wrong = jnp.max(need - keys) > 0
    if k is not None:
        wrong = wrong | (jnp.max(keys) > most)
    lax.cond(wrong, again, nothing)


def lowered(
    t0: Tile,
    scores: Scores,
    first: jax.Array,
    m: jax.Array,
    need: jax.Array,
    keys: jax.Array,
    out: Words,
) -> tuple[jax.Array, jax.Array]:
    """Collects with lower bounds until no row lacks keys; the bounds, counts of keys.

    A score that is computed again may be rounded otherwise, by a share of its addends,
    which nobody knows: bounds are lowered by 16 times as much each time, and at last to
    all keys.
    """
    size = jnp.maximum(finite_size(first), finite_size(m)) * ROUNDING

    def short(state: Try) -> jax.Array:
        tries, _, keys = state
        return (jnp.max(need - keys) > 0) & (tries <= TRIES)

    def collected(state: Try) -> Try:
        tries, *_ = state
        wider = lax.shift_left(i32(1), 4 * tries).astype(f32)
        bound = jnp.where(tries < TRIES, first - size * wider, lowest(t0.call.scale))
        bound = jnp.where(need > 0, bound, first)
        words, keys = collect(t0, scores, above_all(bound), out)
        put_counts(t0, words, keys, out)
        return tries + 1, bound, keys

    return lax.while_loop(short, collected, (i32(0), first, keys))[1:]


def finite_size(x: jax.Array) -> jax.Array:
    """The absolute value of what is finite, else 0."""
    return jnp.where(x - x == 0, jnp.abs(x), 0.0)


def raised(
    t0: Tile,
    scores: Scores,
    ends: Ends,
    k: int,
    most: int,
    keys: jax.Array,
    out: Words,
) -> jax.Array:
    """Collects with higher bounds, so that the keys of each row have room.

    They rise, bit by bit, until there are at least k and at most as many as a list
    holds; where more than that are equal, the first of them by key index.

    ends: of each row the bound so far, and the largest score.
    """
    runs, (bound, m) = key_runs(t0), ends
    every = jnp.full(keys.shape, t0.call.S, i32)

    def inside(x: jax.Array, t: Tile, low: jax.Array, end: jax.Array) -> jax.Array:
        rank = ordered(x)
        early = t.along_k(t.k0 + jnp.arange(t.bk, dtype=i32)) <= end[:, None]
        found = (rank > low[:, None]) | ((rank == low[:, None]) & early)
        return found & (x != -jnp.inf)

    def count(low: jax.Array, end: jax.Array) -> jax.Array:
        def add(t: Tile, n: jax.Array) -> jax.Array:
            found = inside(scores(t), t, low, end)
            return n + jnp.sum(found.astype(f32), 1)

        return in_order(t0, runs, None, add, jnp.zeros(keys.shape, f32)).astype(i32)

    def higher(state: Search) -> Search:
        low, high, n, step = state
        middle = middle_of(low, high)
        found = count(middle, every)
        go = (n > most) & (middle > low)
        up = go & (found >= k)
        low, n = jnp.where(up, middle, low), jnp.where(up, found, n)
        return low, jnp.where(go & ~up, middle, high), n, step + 1

    def shorter(state: Search) -> Search:
        first, last, n, step = state
        middle = middle_of(first, last)
        found = count(low, middle)
        go = (n > most) & (last > first + 1)
        ok = go & (found >= k)
        last, n = jnp.where(ok, middle, last), jnp.where(ok, found, n)
        return jnp.where(go & ~ok, middle, first), last, n, step + 1

    def unfinished(state: Search) -> jax.Array:
        low, high, n, step = state
        more = (n > most) & (middle_of(low, high) > low)
        return (jnp.max(more.astype(i32)) > 0) & (step < HALVINGS)

    low, _, n, _ = lax.while_loop(
        unfinished, higher, (ordered(bound), ordered(m) + 1, keys, i32(0))
    )
    _, end, _, _ = lax.while_loop(
        unfinished, shorter, (jnp.full_like(every, -1), every, n, i32(0))
    )
    words, _ = collect(t0, scores, lambda x, t: inside(x, t, low, end), out)
    put_counts(t0, words, keys, out)
    return i32(0)


def ordered(x: jax.Array) -> jax.Array:
    """An int32 that compares as the float32 does; -0 is 0, NaN the largest."""
    i = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), i32)
    i = i ^ ((i >> 31) & 0x7FFFFFFF)
    return jnp.where(x == x, i, jnp.iinfo(jnp.int32).max)


def middle_of(a: jax.Array, b: jax.Array) -> jax.Array:
    """The floor of the mean of two integers, of any size."""
    return (a & b) + ((a ^ b) >> 1)
