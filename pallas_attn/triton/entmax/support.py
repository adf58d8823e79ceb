"""Which blocks hold weight, one bit each, and the loops over them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Int

from pallas_attn.call import Call
from pallas_attn.tiled.block_ranges import Runs
from pallas_attn.tiled.fields import Values
from pallas_attn.tiled.operands import Operands
from pallas_attn.tiled.plan import Plan
from pallas_attn.triton.memory import load_number
from pallas_attn.triton.programs import key_runs, query_runs, side_of, Visits
from pallas_attn.triton.ptx import uniform
from pallas_attn.triton.tile import at_keys, at_queries, Tile
from pallas_attn.triton.visitor import Own, Step
from pallas_attn.types import Index, Ref, State


i32 = jnp.int32

# Blocks of a word.
WORD = 32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Support:
    """The blocks with weight: what the passes after the threshold visit.

    by_query: of every query block a bit for each key block.
    by_key: of every key block a bit for each query block; None if no pass asks.
    """

    by_query: Int[Array, "B N query_blocks words"]
    by_key: Int[Array, "B N key_blocks words"] | None = None

    @property
    def order(self) -> None:
        """Blocks begin where they lie."""

    def over_keys(
        self,
        t0: Tile,
        ops: Operands,
        held: Values,
        own: Own | None,
        plan: Plan,
        step: Step[State],
        state: State,
    ) -> tuple[State, Visits]:
        """The loop over the key blocks of a query block."""
        row = (t0.b, t0.h, t0.q0 // i32(t0.bq))

        def visit(j: Index, edge: bool, state: State) -> State:
            return step(at_keys(t0, j, side_of(t0), edge=edge), state)

        return _over(t0, self.by_query, row, key_runs(t0), visit, state)

    def over_queries(
        self,
        t0: Tile,
        ops: Operands,
        held: Values,
        plan: Plan,
        step: Step[State],
        state: State,
    ) -> tuple[State, Visits]:
        """The loop over the query blocks of a key block."""
        row = (t0.b, t0.h, t0.k0 // i32(t0.bk))

        def visit(i: Index, edge: bool, state: State) -> State:
            return step(at_queries(t0, i, side_of(t0), edge=edge), state)

        assert self.by_key is not None
        return _over(t0, self.by_key, row, query_runs(t0), visit, state)

    def on_tile(self, t: Tile, step: Step[State], state: State) -> State:
        """One tile, if it has weight."""
        j = t.k0 // i32(t.bk)
        row = (t.b, t.h, t.q0 // i32(t.bq), j // WORD)
        bit = (load_number(self.by_query, row) >> (j % WORD)) & 1
        return lax.cond(bit > 0, lambda: step(t, state), lambda: state)


def words_of(blocks: int) -> int:
    """The words for so many bits: a power of two, for registers hold a row of them."""
    return max(2, pl.next_power_of_2(pl.cdiv(blocks, WORD)))


def mark(bits: jax.Array, j: Index, sums: jax.Array) -> jax.Array:
    """The words with bit j set, unless all sums are 0; NaN is not."""
    some = (~(jnp.sum(sums) <= 0)).astype(i32)
    word = jnp.arange(bits.shape[0], dtype=i32) == j // WORD
    return bits | jnp.where(word, some << (j % WORD), 0)


def by_key(bits: Int[Array, "B N I words"], key_blocks: int) -> Int[Array, "B N J w"]:
    """The same bits by key block."""
    place = jnp.arange(WORD, dtype=i32).reshape(1, 1, 1, 1, WORD)
    every = (bits[..., None] >> place) & 1  # [B, N, I, words, WORD]
    every = every.reshape(*bits.shape[:3], -1)[..., :key_blocks]
    turned = jnp.swapaxes(every, 2, 3)  # [B, N, J, I]
    pad = words_of(bits.shape[2]) * WORD - bits.shape[2]
    turned = jnp.pad(turned, ((0, 0), (0, 0), (0, 0), (0, pad)))
    grouped = turned.reshape(*turned.shape[:3], -1, WORD) << place
    return grouped.sum(4, dtype=i32)


def _over(
    t: Tile,
    bits: Ref,
    row: tuple[Index, ...],
    runs: Runs,
    visit: Callable[[Index, bool, State], State],
    state: State,
) -> tuple[State, Visits]:
    """Visit the blocks with a bit, edges masked."""
    every = ((runs.lo, runs.hi, t.sight.veiled), (runs.hi, runs.last, True))
    if runs.lo is not runs.first:
        every = ((runs.first, runs.lo, True), *every)
    count = i32(0)
    for lo, hi, edge in every:
        if isinstance(lo, int) and isinstance(hi, int) and lo >= hi:
            continue

        def one(x: Index, s: State, edge: bool = edge) -> State:
            return visit(x, edge, s)

        state, n = _set_bits(t.call, bits, row, lo, hi, one, state)
        count = count + n
    return state, (count, i32(runs.last) - i32(runs.first))


def _set_bits(
    call: Call,
    ref: Ref,
    row: tuple[Index, ...],
    lo: Index,
    hi: Index,
    body: Callable[[Index, State], State],
    state: State,
) -> tuple[State, jax.Array]:
    """Run body(block, state) over the blocks lo..hi that have a bit; how many."""

    def word(w: jax.Array, found: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
        state, count = found
        bits = load_number(ref, (*row, w)) & _span(lo, hi, w)
        bits = uniform(call, bits) if not call.interpret else bits
        n = lax.population_count(bits)

        def one(_: Index, rest: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
            left, state = rest
            block = w * WORD + (WORD - 1) - lax.clz(left & -left)
            return left & (left - 1), body(block, state)

        _, state = lax.fori_loop(i32(0), n, one, (bits, state))
        return state, count + n

    first, last = i32(lo) // WORD, (i32(hi) + (WORD - 1)) // WORD
    return lax.fori_loop(first, last, word, (state, i32(0)))


def _span(lo: Index, hi: Index, w: jax.Array) -> jax.Array:
    """The bits of word w that stand for blocks lo..hi."""

    def below(n: jax.Array) -> jax.Array:
        return jnp.where(n >= WORD, -1, (i32(1) << jnp.clip(n, 0, WORD - 1)) - 1)

    return below(hi - WORD * w) & ~below(lo - WORD * w)
