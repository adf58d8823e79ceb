"""Ranges of entries and of blocks that a block of queries, or of keys, may meet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from pallas_attn.call import Call
from pallas_attn.positions import moved
from pallas_attn.tiled.summaries import Frame, least, most
from pallas_attn.types import Index, Range, State


i32 = jnp.int32


def keys_in_sight(call: Call, frame: Frame, q0: Index, bq: int) -> tuple[Range, Range]:
    """The ranges of keys that any, and that every, query of a block sees.

    As far as offset, causality, window and lengths tell.
    """
    first, last = frame.keys
    last = unless(apart(q0, bq, frame.queries, call.T), last, 0)
    whole_first, whole_last = 0, last
    if frame.placed:
        return (first, last), (whole_first, whole_last)
    p0 = q0 + frame.offset
    p1 = p0 + (bq - 1)
    if call.causal:
        last, whole_last = least(last, p1 + 1), least(whole_last, p0 + 1)
    if call.window:
        left, right = call.window
        first = most(first, moved(p0, -left))
        whole_first = most(whole_first, moved(p1, -left))
        last = least(last, moved(p1, right + 1))
        whole_last = least(whole_last, moved(p0, right + 1))
    return (first, last), (whole_first, whole_last)


def queries_in_sight(
    call: Call, frame: Frame, k0: Index, bk: int
) -> tuple[Range, Range]:
    """The ranges of queries that see any, and that see every, key of a block."""
    first, last = frame.queries
    last = unless(apart(k0, bk, frame.keys, call.S), last, 0)
    whole_first, whole_last = 0, last
    if frame.placed:
        return (first, last), (whole_first, whole_last)
    p0 = k0 - frame.offset
    p1 = p0 + (bk - 1)
    if call.causal:
        first, whole_first = most(first, p0), most(whole_first, p1)
    if call.window:
        left, right = call.window
        last = least(last, moved(p1, left + 1))
        whole_last = least(whole_last, moved(p0, left + 1))
        first = most(first, moved(p0, -right))
        whole_first = most(whole_first, moved(p1, -right))
    return (first, last), (whole_first, whole_last)


@dataclass(frozen=True)
class Runs:
    """Blocks in storage order: masked first..lo, whole lo..hi, masked hi..last."""

    first: Index
    lo: Index
    hi: Index
    last: Index

    def loop(
        self,
        body: Callable[[Index, bool, State], State],
        state: State,
        *,
        veiled: bool,
        within: Range | None = None,
    ) -> State:
        """Runs body(block, masked, state) over every block, in storage order.

        veiled: arrays may hide any pair: the middle is masked too.
        within: only blocks of this range.
        """
        for lo, hi, masked in (
            (self.first, self.lo, True),
            (self.lo, self.hi, veiled),
            (self.hi, self.last, True),
        ):
            if lo is hi or (isinstance(lo, int) and isinstance(hi, int) and lo >= hi):
                continue
            if within is not None:
                lo = jnp.maximum(i32(lo), within[0])
                hi = jnp.maximum(jnp.minimum(i32(hi), within[1]), lo)

            def one(n: Index, state: State, masked: bool = masked) -> State:
                return body(n, masked, state)

            state = lax.fori_loop(i32(lo), i32(hi), one, state)
        return state


def runs(
    block: int,
    visited: Range,
    whole: Range,
    hull: Range | None,
    low_edge: bool,
    high_edge: bool,
) -> Runs:
    """The blocks of a range of entries; an edge that cannot be masked is whole."""
    first, last = blocks(block, visited, hull)
    lo = clip(-(-whole[0] // block), first, last) if low_edge else first
    hi = clip(whole[1] // block, lo, last) if high_edge else last
    return Runs(first, lo, hi, last)


def blocks(block: int, visited: Range, hull: Range | None) -> Range:
    """The range of blocks that holds a range of entries, within the hull."""
    first, last = visited[0] // block, -(-visited[1] // block)
    if hull is not None:
        first, last = most(first, hull[0]), least(last, hull[1])
    return first, most(last, first)


def apart(i0: Index, n: int, limits: Range, size: int) -> bool | jax.Array:
    """Whether a block lies wholly outside a range; False if that cannot be."""
    lo, hi = limits
    if covers(limits, size):
        return False
    return (i0 >= hi) | (i0 + n <= lo)


def unless(condition: bool | jax.Array, x: Index, other: Index) -> Index:
    """The integer x, or `other` where the condition holds."""
    return x if condition is False else jnp.where(condition, i32(other), i32(x))


def clip(x: Index, lo: Index, hi: Index) -> Index:
    """The integer x within lo..hi, static if all are."""
    return most(least(x, hi), lo)


def covers(limits: Range, size: int) -> bool:
    """Whether a range is all of an axis, known statically."""
    return all(isinstance(x, int) for x in limits) and tuple(limits) == (0, size)


def cut_evenly(limits: Range, size: int, block: int) -> bool:
    """Whether a range is, statically, all of an axis that blocks divide."""
    return covers(limits, size) and size % block == 0


def divides(block: int, limits: Range) -> bool:
    """Whether blocks divide a range, known statically."""
    return isinstance(limits[1], int) and limits[1] % block == 0
