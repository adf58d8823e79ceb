"""Which blocks a program visits, in what order, and which it leaves out.

Near blocks come first: those with masked pairs, and those around the diagonal. Then
come the far blocks, wholly visible, from one or two sides, each with at most one hole.

Why a hole is safe. Let y_x bound every score of far block x (Cauchy-Schwarz on q.k and
the products, plus the terms' own bounds) and let every row's log2-sum over the blocks
it has seen be at least `floor`. Block x then holds at most w_x = n 2^(y_x - floor) of a
row's weight (n entries a block), whatever it contains. A run of blocks whose w add up
to at most 2^-24 is left out. A sum can only grow, so this stays true of the whole row.
NaN never compares, so blocks with a value that is not finite are never left out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_attn.call import Call
from pallas_attn.positions import moved, UNBOUNDED
from pallas_attn.tiled.block_ranges import (
    blocks,
    clip,
    divides,
    keys_in_sight,
    queries_in_sight,
)
from pallas_attn.tiled.summaries import Extremes, Frame, GRAIN, least, most, Sight
from pallas_attn.triton.memory import load_blocks, load_number
from pallas_attn.triton.ptx import uniform
from pallas_attn.types import Index, Range, Ref, Scalar, State


i32 = jnp.int32
f32 = jnp.float32

# At most this share of a row's, or a column's, weight is left out.
BUDGET = 2.0**-24

# Of a sum of a few terms, and a number that has a float32 beyond it.
ROUNDING = 2.0**-21
HUGE = 1e38

# (block, its side, state) -> state
Body = Callable[[Index, Scalar, State], State]
# The least and the largest of some entries, or of each of several blocks of them.
Ends = tuple[jax.Array, jax.Array]
# Blocks lo <= x < hi, and the side on which they lie.
Stretch = tuple[Index, Index, Scalar]
# Indices into the axes [#B, heads] of an array.
Lead = tuple[Index, Index]
# Which of two arrays' entries bounds both: a minimum or a maximum.
Worst = Callable[[jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True)
class Side:
    """Far blocks from the far end inwards: block x is first + step x.

    side: +1 if queries are at or after keys in all of them, -1 if before, 0 if mixed.
    """

    count: Index
    first: Index
    step: int
    side: int


@dataclass(frozen=True)
class Walk:
    """Near blocks as the loop range lo..end, and the far ones.

    span: the first and the last + 1 block of all.
    at: the block of a loop index (None: the index is the block; counted from 0 instead,
        it would cost registers).
    edges: the blocks of the last indices, as ranges.
    """

    span: Range
    near: Range
    at: Callable[[Index], Index] | None
    sides: tuple[Side, ...]
    edges: Callable[[], Sequence[Range]] = tuple

    def stretches(self) -> list[Stretch]:
        """Where the near blocks lie."""
        (lo, hi), edges = self.near, self.edges()
        for first, last in edges:
            hi = hi - (last - first)
        return [(lo, hi, 0), *((first, last, 0) for first, last in edges)]

    @property
    def visible(self) -> Index:
        """How many blocks there are to visit when nothing is left out."""
        far = functools.reduce(lambda n, s: n + s.count, self.sides, i32(0))
        return far + self.near[1] - self.near[0]

    def near_loop(self, body: Body[State], state: State) -> State:
        """Run body(block, side, state) over the near blocks, of no known side."""
        lo, end = self.near
        if isinstance(lo, int) and isinstance(end, int) and lo == end:
            return state
        at = self.at or (lambda t: t)
        return lax.fori_loop(i32(lo), i32(end), lambda t, s: body(at(t), 0, s), state)


@dataclass(frozen=True)
class Remaining:
    """Blocks that are visited: how many, the t-th as (block, side), a bound.

    top: an upper bound of their scores in log2 units; inf if there is none.
    stretches: what says where they lie; None: they are none, or nobody knows.
    ahead: whether a block's number is read while the one before is visited: Triton
        loads fewer blocks ahead where it must wait for their numbers, and none where
        they are read two before.
    """

    count: Index
    at: Callable[[Index], tuple[Index, Scalar]]
    top: Scalar = math.inf
    stretches: Callable[[], Sequence[Stretch]] | None = None
    ahead: bool = False

    def loop(self, body: Body[State], state: State) -> State:
        """Run body(block, side, state) over them."""
        if isinstance(self.count, int):  # 0
            return state
        if self.ahead:
            return self._loop_ahead(body, state)
        return lax.fori_loop(
            i32(0), self.count, lambda t, s: body(*self.at(t), s), state
        )

    def _loop_ahead(self, body: Body[State], state: State) -> State:
        last = jnp.maximum(self.count - 1, 0)

        def step(t: Index, known: tuple[Index, State]) -> tuple[Index, State]:
            (block, state), side = known, self.at(t)[1]
            after, _ = self.at(jnp.minimum(t + 1, last))
            return after, body(block, side, state)

        first, _ = self.at(i32(0))
        return lax.fori_loop(i32(0), self.count, step, (first, state))[1]


def over_keys(
    call: Call,
    frame: Frame,
    q0: Index,
    bq: int,
    bk: int,
    two: bool,
    hull: Range | None,
) -> Walk:
    """The key blocks of a query block. two: far ones lie on two sides of it."""
    visited, whole = keys_in_sight(call, frame, q0, bq)
    if frame.placed:
        return _all_near(bk, visited, hull)
    p0 = q0 + frame.offset
    p1 = p0 + (bq - 1)
    middle = left_side = right_side = None
    if call.causal:
        middle, left_side = (p0 + 1, p1 + 1), +1
    elif two:
        middle, left_side, right_side = (p0, p1 + 1), +1, -1
    return _split(
        bk,
        visited,
        whole,
        hull,
        middle,
        (left_side, right_side),
        low_edge=call.window is not None,
        high_edge=call.window is not None or not divides(bk, frame.keys),
    )


def over_queries(
    call: Call,
    frame: Frame,
    k0: Index,
    bq: int,
    bk: int,
    two: bool,
    hull: Range | None,
) -> Walk:
    """The query blocks of a key block."""
    visited, whole = queries_in_sight(call, frame, k0, bk)
    if frame.placed:
        return _all_near(bq, visited, hull)
    p0 = k0 - frame.offset
    p1 = p0 + (bk - 1)
    middle = left_side = right_side = None
    if call.causal:
        middle, right_side = (p0, p1), +1
    elif two:
        middle, left_side, right_side = (p0, p1 + 1), -1, +1
    return _split(
        bq,
        visited,
        whole,
        hull,
        middle,
        (left_side, right_side),
        low_edge=call.window is not None,
        high_edge=call.window is not None or not divides(bq, frame.queries),
    )


def _split(
    block: int,
    visited: Range,
    whole: Range,
    hull: Range | None,
    middle: Range | None,
    side_of: tuple[int | None, int | None],
    low_edge: bool,
    high_edge: bool,
) -> Walk:
    """Near and far blocks along an axis cut into blocks.

    visited, whole: the ranges of entries that any, and that every, entry of the own
        block sees.
    middle: the range around the diagonal, whose blocks are near; None if far blocks
        need no side.
    side_of: the side of far blocks before and after the middle; None: all are near.
    low_edge, high_edge: whether there may be blocks with masked pairs below and above
        the far ones.
    """
    first, last = blocks(block, visited, hull)
    whole_first = clip(-(-whole[0] // block), first, last) if low_edge else first
    whole_last = clip(whole[1] // block, whole_first, last)
    if middle is None:
        far = Side(i32(whole_last - whole_first), i32(whole_first), 1, 0)
        if not low_edge:
            none = isinstance(whole_last, int) and not high_edge
            near = (0, 0) if none else (whole_last, last)
            return Walk((first, last), near, None, (far,))
        begin, end, sides, tail = whole_last, last, [far], last
    else:
        before, after = side_of
        sides = []
        end = last
        if after is not None:
            end = clip(-(-middle[1] // block), least(first + 1, last), last)
            if before is None:
                end = clip(-(-middle[1] // block), whole_first, last)
        begin = first
        if before is not None:
            begin = clip(middle[0] // block, whole_first, whole_last)
            # At least one near block where there is any: pruning compares with its sum.
            begin = least(begin, most(end - 1, whole_first))
            sides.append(Side(begin - whole_first, whole_first, 1, before))
        if after is not None:
            beyond = most(end, whole_first)
            count = most(whole_last - beyond, 0)
            sides.append(Side(count, whole_last - 1, -1, after))
        tail = most(whole_last, end) if after is not None else last
        low_edge = low_edge and before is not None
        high_edge = high_edge and after is not None
        if not low_edge and not high_edge:
            return Walk((first, last), (begin, end), None, tuple(sides))
    low = whole_first - first if low_edge else 0
    high = last - tail if high_edge else 0

    def at(t: Index) -> Index:
        beyond = t - end
        edge = jnp.where(beyond < low, first + beyond, tail + (beyond - low))
        return jnp.where(t < end, t, edge)

    near = (begin, end + low + high)
    edges = lambda: ((first, first + low), (tail, tail + high))
    return Walk((first, last), near, at, tuple(sides), edges)


def _all_near(block: int, visited: Range, hull: Range | None) -> Walk:
    """Every block is near: arrays alone tell which pairs are visible."""
    near = blocks(block, visited, hull)
    return Walk(near, near, None, ())


def hull(
    call: Call,
    sight: Sight,
    b: Index,
    h: Index,
    i0: Index,
    n: int,
    block: int,
    by_key: bool,
) -> Range | None:
    """The range of blocks that the n entries from i0 may meet; None if no array tells.

    Blocks of wholly other segments, or out of sight, at its ends are left out.
    by_key: the own block is of keys, the range is of query blocks.
    """
    tables = [(sight.segments, _share), (sight.positions, _ordered)]
    tables = [(pair, rule) for pair, rule in tables if pair is not None]
    if not tables:
        return None
    size = pl.cdiv(call.T if by_key else call.S, block)
    x = jnp.arange(max(2, pl.next_power_of_2(size)), dtype=i32)
    ok = x < size
    for (queries, keys), rule in tables:
        own, other = (keys, queries) if by_key else (queries, keys)
        mine = of_own(own, call, b, h, i0, n)
        low, high = (
            of_blocks(ref, lead_of(ref, call, b, h), x, ok, block, GRAIN, worst)
            for ref, worst in ((other.least, jnp.minimum), (other.most, jnp.maximum))
        )
        q, k = ((low, high), mine) if by_key else (mine, (low, high))
        ok = ok & rule(call, q, k)
    first = jnp.min(jnp.where(ok, x, size))
    last = jnp.max(jnp.where(ok, x + 1, 0))
    return uniform(call, first), uniform(call, last)


def _share(call: Call, q: Ends, k: Ends) -> jax.Array:
    return (k[0] <= q[1]) & (k[1] >= q[0])


def _ordered(call: Call, q: Ends, k: Ends) -> jax.Array:
    left, right = call.window or (UNBOUNDED, UNBOUNDED)
    if call.causal:
        right = 0
    ok = k[0] <= moved(q[1], right)
    return ok if left == UNBOUNDED else ok & (k[1] >= moved(q[0], -left))


def of_own(own: Extremes, call: Call, b: Index, h: Index, i0: Index, n: int) -> Ends:
    """(least, most) of the n entries from i0."""

    def entries(ref: Ref) -> list[jax.Array]:
        final = ref.shape[-1] - 1
        lead = lead_of(ref, call, b, h)
        grains = [
            jnp.minimum(i0 // GRAIN + r, final) for r in range(max(1, n // GRAIN))
        ]
        return [load_number(ref, (*lead, g)) for g in grains]

    return (
        functools.reduce(jnp.minimum, entries(own.least)),
        functools.reduce(jnp.maximum, entries(own.most)),
    )


def lead_of(ref: Ref, call: Call, b: Index, h: Index) -> Lead:
    """Indices into the axes [#B, heads] of an array."""
    return b * i32(ref.shape[0] > 1), h // i32(call.N // ref.shape[1])


def of_blocks(
    ref: Ref,
    lead: Lead,
    i: jax.Array,
    ok: jax.Array,
    block: int,
    grain: int,
    worst: Worst,
) -> jax.Array:
    """One number for each block of a vector of blocks, from numbers kept per grain."""
    if block < grain:
        return load_blocks(ref, lead, i // (grain // block), ok)
    per = block // grain
    return functools.reduce(
        worst, [load_blocks(ref, lead, i * per + r, ok) for r in range(per)]
    )


def of_runs(
    ref: Ref,
    lead: Lead,
    first: jax.Array,
    ok: jax.Array,
    length: int,
    grain: int,
    worst: Worst,
) -> jax.Array:
    """One number for each of a vector of runs of entries, which start anywhere."""
    start, last = first // i32(grain), (first + i32(length - 1)) // i32(grain)
    most = (length + grain - 2) // grain + 1  # grains that a run may touch
    return functools.reduce(
        worst,
        [
            load_blocks(ref, lead, jnp.minimum(start + i32(r), last), ok)
            for r in range(most)
        ],
    )


def holes(
    call: Call,
    sides: tuple[Side, ...],
    size: int,
    entries: int,
    weight: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
) -> Remaining:
    """The far blocks without those that provably hold next to nothing.

    size: blocks of the axis. entries: queries or keys of a block. weight(block, ok) is
    (bound, floor): of every score in log2, of every own row's (block's rows') log2-sum.
    """
    cuts, top = [], f32(-jnp.inf)
    for side in sides:
        x = jnp.arange(max(2, pl.next_power_of_2(size)), dtype=i32)
        ok = x < side.count
        y, floor = weight(side.first + side.step * x, ok)
        known = jnp.where(y == y, y, jnp.inf)
        top = jnp.maximum(top, jnp.max(jnp.where(ok, known, -jnp.inf)))
        share = jnp.exp2(y + above(-floor)) * entries
        cuts.append(hole(share, side.count, BUDGET / len(sides)))
    cuts = [(uniform(call, a), uniform(call, b)) for a, b in cuts]
    return _remaining(sides, cuts, top)


def above(x: jax.Array) -> jax.Array:
    """Above x by more than what float32 rounded off it; sums of -1e9 need it."""
    return x + jnp.minimum(jnp.abs(x), HUGE) * ROUNDING


def all_far(sides: tuple[Side, ...]) -> Remaining:
    """Every far block."""
    return _remaining(sides)


def hole(w: jax.Array, n: Index, budget: float) -> tuple[jax.Array, jax.Array]:
    """Blocks a <= x < b of n, left out: their w add up to no more than the budget."""
    x = jnp.arange(w.shape[0], dtype=i32)
    a = jnp.min(jnp.where((w <= budget) & (x < n), x, n))
    lost = jnp.cumsum(jnp.where(x < a, 0.0, w))
    out = (x >= a) & (x < n) & (lost <= budget)
    return a, a + jnp.sum(out.astype(i32), dtype=i32)


def _remaining(
    sides: tuple[Side, ...], cuts: list[Range] | None = None, top: Scalar = math.inf
) -> Remaining:
    """One loop over the far blocks of all sides, which the compiler pipelines."""
    if not sides:
        return Remaining(0, lambda t: (t, 0), top)

    def block(t: Index, n: int) -> Index:
        if cuts is not None:
            a, b = cuts[n]
            t = t + jnp.where(t >= a, b - a, 0)
        return sides[n].first + sides[n].step * t

    left = [
        s.count if cuts is None else s.count - (cuts[n][1] - cuts[n][0])
        for n, s in enumerate(sides)
    ]

    def stretches() -> list[Stretch]:
        cut = [None] * len(sides) if cuts is None else cuts
        return [x for y in map(_stretches, sides, cut) for x in y]

    if len(sides) == 1:
        at_one = lambda t: (block(t, 0), sides[0].side)
        return Remaining(left[0], at_one, top, stretches)

    def at(t: Index) -> tuple[Index, Scalar]:
        one = t < left[0]
        side = jnp.where(one, f32(sides[0].side), f32(sides[1].side))
        return jnp.where(one, block(t, 0), block(t - left[0], 1)), side

    return Remaining(left[0] + left[1], at, top, stretches)


def _stretches(side: Side, cut: Range | None) -> list[Stretch]:
    """What a hole leaves of the far blocks of a side."""
    runs = [(0, side.count)] if cut is None else [(0, cut[0]), (cut[1], side.count)]
    if side.step > 0:
        return [(side.first + lo, side.first + hi, side.side) for lo, hi in runs]
    return [(side.first - hi + 1, side.first - lo + 1, side.side) for lo, hi in runs]
