"""Lists of (query, key) pairs: gathers, scatters, and what a bias' term sees of them.

Index arrays stand on every axis of a reference: the interpreter takes no others then.
Here numbers that were read from memory become addresses: `gather`, `gather_vectors` and
`scatter_listed` see to it that none of them leaves its array, whatever it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_attn.bias.region import nearest
from pallas_attn.call import Call
from pallas_attn.config import Block
from pallas_attn.positions import difference
from pallas_attn.tiled.summaries import Frame, Sight
from pallas_attn.triton.launch import Program
from pallas_attn.triton.memory import load_number, load_where, store_where
from pallas_attn.triton.programs import frame_of, Grid
from pallas_attn.triton.tile import Tile
from pallas_attn.types import Index, Ref


f32 = jnp.float32
i32 = jnp.int32


def width_of(ref: Ref) -> int:
    """The last axis of an array, padded as a program holds it."""
    return max(16, pl.next_power_of_2(ref.shape[-1]))


def gather(ref: Ref, index: tuple[Index, ...], ok: jax.Array) -> jax.Array:
    """Entries of an array, 0 where not ok; an index for every axis, into its range."""
    index = tuple(
        jnp.broadcast_to(clamped(x, n), ok.shape)
        for x, n in zip(index, ref.shape, strict=True)
    )
    return load_where(ref.at[index], ok)


def clamped(i: Index, size: int) -> jax.Array:
    """An index that lies in an axis of this size."""
    return jnp.clip(jnp.asarray(i), i32(0), i32(size - 1))


def gather_vectors(
    ref: Ref, b: Index, i: jax.Array, head: Index, ok: jax.Array
) -> jax.Array:
    """Vectors i of a head of an array [#B, length, heads, width], padded."""
    width = width_of(ref)
    lane = jnp.arange(width, dtype=i32).reshape((1,) * i.ndim + (width,))
    ok = jnp.broadcast_to(ok[..., None], (*i.shape, width))
    if width != ref.shape[-1]:
        ok = ok & (lane < ref.shape[-1])
    # Lanes stay a plain range, by which Triton loads several at once.
    index = (b, clamped(i, ref.shape[1])[..., None], head, lane)
    return load_where(ref.at[tuple(jnp.broadcast_to(x, ok.shape) for x in index)], ok)


def scatter(
    call: Call, ref: Ref, index: tuple[Index, ...], x: jax.Array, ok: jax.Array
) -> None:
    """Store entries where ok, at an index for every axis."""
    *lead, last = (jnp.broadcast_to(y, ok.shape) for y in index)
    if call.interpret:  # it writes the old value back where a mask is False
        last = jnp.where(ok, last, ref.shape[-1])
    store_where(ref.at[(*lead, last)], x, ok)


def row_tile(sight: Sight, call: Call, block: Block, program: Program) -> Tile:
    """The queries that a program owns; long rows are launched first."""
    grid = row_grid(call, block)
    b, h, i = grid.place(program)
    if call.causal:
        i = grid.blocks - 1 - i
    bq, bk = block.block_q, block.block_k
    where, flag = frame_of(call, sight, b), program.flag
    return Tile(call, sight, where, b, h, i * bq, i * 0, bq, bk, flag=flag)


def row_grid(call: Call, block: Block) -> Grid:
    """The programs of a pass by queries."""
    blocks = pl.cdiv(call.T, block.block_q)
    return Grid(call.B, call.N, blocks, long_first=call.causal)


def listed(t: Tile, ref: Ref, first: Index, n: int, ok: jax.Array) -> jax.Array:
    """Numbers first .. first + n of the lists [B, N, T, length] of a tile's queries."""
    at = ref.at[t.b, t.h, pl.ds(t.q0, t.bq), pl.ds(first, n)]
    return load_where(at, ok)


def put_listed(t: Tile, ref: Ref, first: Index, x: jax.Array, ok: jax.Array) -> None:
    """Store numbers into the lists of a tile's queries, from `first` on."""
    at = ref.at[t.b, t.h, pl.ds(t.q0, t.bq), pl.ds(first, x.shape[1])]
    store_where(at, x, ok)


def scatter_listed(
    t: Tile, ref: Ref, place: jax.Array, x: jax.Array, ok: jax.Array
) -> None:
    """Store numbers at places of the lists of a tile's queries, where ok.

    What is past a list's end, or of queries past the last, is not stored.
    """
    query = (t.q0 + jnp.arange(t.bq, dtype=i32))[:, None]
    inside = (query < t.call.T) & (place >= 0) & (place < ref.shape[-1])
    ok = jnp.broadcast_to(ok & inside, x.shape)
    scatter(t.call, ref, (t.b, t.h, query, place), x, ok)


@dataclass(frozen=True)
class Pairs:
    """Pairs of query head h, batch entry b, to a term a tile with scattered keys.

    query: int32 [rows, 1], key: int32 [rows, entries], ok: which of them exist.
    """

    call: Call
    sight: Sight  # of refs
    frame: Frame
    b: Index
    h: Index
    query: jax.Array
    key: jax.Array
    ok: jax.Array
    loaded: tuple[jax.Array, jax.Array] | None = None  # explicit positions, if read
    flip: bool = False  # queries along the first axis, always

    @classmethod
    def of(cls, t: Tile, key: jax.Array, ok: jax.Array) -> Pairs:
        """Keys [queries, entries] beside the queries of a tile."""
        query = t.q0 + jnp.arange(t.bq, dtype=i32)[:, None]
        return cls(t.call, t.sight, t.frame, t.b, t.h, query, key, ok)

    # What a term may use.

    @property
    def query_position(self) -> jax.Array:
        """int32 [rows, 1]."""
        if self.loaded is not None:
            return self.loaded[0]
        ref = self.sight.arrays.query_positions
        if ref is None:
            return self.query + self.frame.offset
        return self._numbers(ref, (0, 1), 2, self.query, self._rows)

    @property
    def key_position(self) -> jax.Array:
        """int32 [rows, entries]."""
        if self.loaded is not None:
            return self.loaded[1]
        ref = self.sight.arrays.key_positions
        if ref is None:
            return self.key
        return self._numbers(ref, (0, 1), 2, self.key, self.ok)

    @property
    def distance(self) -> jax.Array:
        """Query position minus key position, float32."""
        return difference(self.query_position, self.key_position, f32)

    @property
    def away(self) -> tuple[jax.Array, ...]:
        """|distance|."""
        return (jnp.abs(self.distance),)

    def from_nearest(self, last: jax.Array) -> tuple[jax.Array, ...]:
        """|nearest - key position|."""
        there = nearest(self.query_position, last) - self.key_position
        return (jnp.abs(there.astype(f32)),)

    # What triton/terms.py uses.

    def settled(self) -> Pairs:
        """With explicit positions read: a load cannot be differentiated through."""
        if not self.sight.arrays.placed:
            return self
        return replace(self, loaded=(self.query_position, self.key_position))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what has a number per pair."""
        return self.key.shape

    @property
    def bq(self) -> int:
        """How many rows there are."""
        return self.key.shape[0]

    def along_q(self, x: jax.Array) -> jax.Array:
        """One number per row, shaped to broadcast."""
        return x[:, None]

    @property
    def visible(self) -> jax.Array:
        """A list holds visible pairs only."""
        return self.ok

    def seen_part(self, visible: jax.Array | None, x: jax.Array) -> jax.Array:
        """Numbers of pairs or rows, 0 where there is no pair."""
        if visible is None or jnp.ndim(x) == 0:
            return x
        return jnp.where(visible if x.shape == self.shape else self._rows, x, 0.0)

    def field(self, home: str, ref: Ref) -> jax.Array:
        """A field on these pairs, float32: a number, one per row, or one per pair."""
        if home == "query":
            x = self._numbers(ref, (0, 2), 1, self.query, self._rows)
        elif home == "key":
            x = self._numbers(ref, (0, 2), 1, self.key, self.ok)
        elif home == "head":
            x = load_number(ref, self._lead(*ref.shape))
        else:
            x = self._pair(ref)
        return x.astype(f32)

    # What a pass uses.

    def keys(self, ref: Ref) -> jax.Array:
        """[rows, entries, width] of an array [#B, S, heads, width], float32."""
        b, head = self._lead(ref.shape[0], ref.shape[2])
        return gather_vectors(ref, b, self.key, head, self.ok).astype(f32)

    @property
    def _rows(self) -> jax.Array:
        """[rows, 1]: which rows have a pair."""
        return jnp.max(self.ok.astype(i32), 1, keepdims=True) > 0

    def _lead(self, batch: int, heads: int) -> tuple[jax.Array, jax.Array]:
        """Indices into axes that may be 1, or K heads."""
        return (
            jnp.asarray(self.b) * i32(batch > 1),
            jnp.asarray(self.h) // i32(self.call.N // heads),
        )

    def _numbers(
        self, ref: Ref, lead: tuple[int, int], axis: int, i: jax.Array, ok: jax.Array
    ) -> jax.Array:
        """Entries i along an axis; lead: which axes are the batch and the heads."""
        index = [i] * 3
        index[lead[0]], index[lead[1]] = self._lead(*(ref.shape[n] for n in lead))
        assert index[axis] is i
        return gather(ref, tuple(index), ok)

    def _pair(self, ref: Ref) -> jax.Array:
        """Of an array [#B, #N, #T, #S], as small as it is."""
        queries, keys = ref.shape[2:]
        lead = self._lead(*ref.shape[:2])
        if queries == keys == 1:
            zero = lead[0] * 0
            return load_number(ref, (*lead, zero, zero))
        i = self.query if queries > 1 else i32(0)
        j = self.key if keys > 1 else i32(0)
        return gather(ref, (*lead, i, j), self.ok if keys > 1 else self._rows)
