"""Where a block of scores lies: positions, layout, loads, stores, masks."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_attn.bias.base import is_diagonal
from pallas_attn.bias.region import nearest
from pallas_attn.call import Call
from pallas_attn.positions import difference, within
from pallas_attn.tiled.block_ranges import cut_evenly
from pallas_attn.tiled.summaries import Frame, Sight
from pallas_attn.triton import shifted
from pallas_attn.triton.memory import both, column, inside, load, store
from pallas_attn.types import Index, Range, Ref, Scalar, View


f32 = jnp.float32
i32 = jnp.int32


@dataclass(frozen=True)
class Tile:
    """`bq` queries from q0 and `bk` keys from k0 of query head h, batch entry b.

    flip: scores are kept as [keys, queries] instead of [queries, keys].
    side: +1 if every query is at or after every visible key, -1 if before, 0 if mixed.
    edge: some pair may be invisible, so loads and scores are masked; otherwise the
        whole tile is visible, save for rows and keys past the end of a ragged array.
    """

    call: Call
    sight: Sight  # of refs
    frame: Frame
    b: Index
    h: Index
    q0: Index
    k0: Index
    bq: int
    bk: int
    side: Scalar = 0
    flip: bool = False
    edge: bool = True
    loaded: tuple[jax.Array, jax.Array] | None = None  # explicit positions, if read
    kept: jax.Array | None = None  # `visible` less what a bias takes, once looked at
    flag: tuple[Ref, Index] | None = None  # as `launch.Program` has it

    # What a term may use.

    @property
    def query_position(self) -> jax.Array:
        """int32, one per query, shaped to broadcast against the tile."""
        return self.along_q(self._position(self.sight.arrays.query_positions, "q"))

    @property
    def key_position(self) -> jax.Array:
        """int32, one per key, shaped to broadcast against the tile."""
        return self.along_k(self._position(self.sight.arrays.key_positions, "k"))

    @property
    def distance(self) -> jax.Array:
        """Query position minus key position, float32."""
        if self.sight.arrays.placed:
            return difference(self.query_position, self.key_position, f32)
        return (self._start + self.along_q(_iota(self.bq))) - self.along_k(
            _iota(self.bk)
        )

    @property
    def away(self) -> tuple[jax.Array, ...]:
        """|distance| of visible pairs; on a known side a number, one per query and key.

        Those are of one sign and none is larger than the distance: nothing cancels.
        """
        side = self.side
        if self.sight.arrays.placed and not self.call.causal:
            # -2^31 stands for 2^31 too
            return (jnp.abs((self.query_position - self.key_position).astype(f32)),)
        placed = self.sight.arrays.placed
        if self.call.exact and not placed and self.call.rows_apart:
            return self._past_nearest()
        # parts of large numbers would be rounded by each tile in its own way
        whole = placed or self.call.exact or self.call.passes_keys
        if whole or (isinstance(side, int) and not side):
            # not |x| where it changes nothing: it costs registers
            return (self.distance if self.call.causal else jnp.abs(self.distance),)
        # from the nearest pair: the first query and the last key, or the reverse
        queries = (1 - side) * 0.5 * (self.bq - 1)
        keys = (1 + side) * 0.5 * (self.bk - 1)
        return (
            self._start * side - (queries + keys),
            self.along_q(_iota(self.bq) * side + queries),
            self.along_k(_iota(self.bk) * -side + keys),
        )

    def from_nearest(self, last: jax.Array) -> tuple[jax.Array, ...]:
        """|nearest - key position| of visible pairs, as `away` has |distance|."""
        side = self.side
        place = nearest(self._position(None, "q"), last) - self.k0
        if self.call.exact or (isinstance(side, int) and not side):
            there = self.along_q(place.astype(f32)) - self.along_k(_iota(self.bk))
            return (there if self.call.causal else jnp.abs(there),)
        # from the nearest key of the tile: the last, or the first
        keys = (1 + side) * 0.5 * (self.bk - 1)
        return (
            self.along_q(place.astype(f32) * side - keys),
            self.along_k(_iota(self.bk) * -side + keys),
        )

    # What a pass may use.

    def settled(self) -> Tile:
        """With explicit positions read: a load cannot be differentiated through."""
        arrays = self.sight.arrays
        if not arrays.placed:
            return self
        q = self._position(arrays.query_positions, "q")
        return replace(self, loaded=(q, self._position(arrays.key_positions, "k")))

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of a tile of scores."""
        return (self.bk, self.bq) if self.flip else (self.bq, self.bk)

    def along_q(self, x: jax.Array) -> jax.Array:
        """One number per query, shaped to broadcast against the tile."""
        return x[None, :] if self.flip else x[:, None]

    def along_k(self, x: jax.Array) -> jax.Array:
        """One number per key, shaped to broadcast against the tile."""
        return x[:, None] if self.flip else x[None, :]

    @property
    def visible(self) -> jax.Array | None:
        """Which pairs may attend, [tile]; None if that hides nothing here."""
        call, arrays, checks = self.call, self.sight.arrays, []
        if self.kept is not None:
            return self.kept
        if not self.edge:
            return None
        if not cut_evenly(self.frame.keys, call.S, self.bk):
            k = self.k0 + jnp.arange(self.bk, dtype=i32)
            checks.append(self.along_k(k < self.frame.keys[1]))
        # Rows past the last query see nothing; it matters where keys are blanked.
        step = self.bq if self.sight.veiled else 1
        if not cut_evenly(self.frame.queries, call.T, step):
            checks.append(self.along_q(self.inside_rows()))
        if call.causal or call.window:
            q, k = self.query_position, self.key_position
            if call.causal:
                checks.append(k <= q)
            if call.window:
                checks += within(q, k, call.window)
        if arrays.query_segments is not None:
            assert arrays.key_segments is not None
            q = self._vector(arrays.query_segments, (), self.q0, self.bq)
            k = self._vector(arrays.key_segments, (), self.k0, self.bk)
            checks.append(self.along_q(q) == self.along_k(k))
        if arrays.mask is not None:
            checks.append(self._pair_any(arrays.mask, turned=False).astype(bool))
        if not checks:
            return None
        return jnp.broadcast_to(functools.reduce(jnp.logical_and, checks), self.shape)

    def seen_keys(self, visible: jax.Array | None, x: jax.Array) -> jax.Array:
        """Key rows, 0 where no query of the tile sees them (0 * NaN is NaN)."""
        return self._guard(visible, 1 if self.flip else 0, x)

    def seen_queries(self, visible: jax.Array | None, x: jax.Array) -> jax.Array:
        """Query rows, 0 where they see no key of the tile."""
        return self._guard(visible, 0 if self.flip else 1, x)

    def seen_part(self, visible: jax.Array | None, x: jax.Array) -> jax.Array:
        """A tile, or one number per query or key, 0 where no visible pair reads it."""
        if visible is None or jnp.ndim(x) == 0:
            return x
        shared = [axis for axis, n in enumerate(x.shape) if n < self.shape[axis]]
        seen = visible
        for axis in shared:
            seen = jnp.max(seen.astype(i32), axis) > 0
            seen = seen[:, None] if axis == 1 else seen[None, :]
        return jnp.where(seen, x, 0.0)

    def rows(self, ref: Ref) -> jax.Array:
        """[bq, H] of an array [#B, T, heads, H]."""
        return load(*self._matrix(ref, "q"))

    def keys(self, ref: Ref) -> jax.Array:
        """[bk, H] of an array [#B, S, heads, H]."""
        return load(*self._matrix(ref, "k"))

    def stat(self, ref: Ref, other: float = 0.0) -> jax.Array:
        """[bq] of a row statistic [B, N, T]; `other` past the end."""
        return self._vector(ref, (self.h,), self.q0, self.bq, other)

    def put_rows(self, ref: Ref, x: jax.Array) -> None:
        """Store [bq, H] into an array [B, T, heads, H]."""
        store(*self._matrix(ref, "q", stored=True), x, ref)

    def put_keys(self, ref: Ref, x: jax.Array) -> None:
        """Store [bk, H] into an array [B, S, heads, H]."""
        store(*self._matrix(ref, "k", stored=True), x, ref)

    def put_stat(self, ref: Ref, x: jax.Array) -> None:
        """Store [bq] into [B, N, T]."""
        self._put_vector(ref, self.q0, self.bq, x)

    def put_key_stat(self, ref: Ref, x: jax.Array) -> None:
        """Store [bk] into [B, N, S]."""
        self._put_vector(ref, self.k0, self.bk, x)

    def carry(self, ref: Ref, lead: tuple[Index, ...], which: int) -> jax.Array:
        """[bq]: number `which` of each row of [*lead, T, 2]."""
        at = ref.at[(*lead, pl.ds(self.q0, self.bq), self.q0 * 0 + which)]
        return load(at, inside(self.q0, self.bq, (0, self.call.T), self.call.T))

    def put_carry(
        self, ref: Ref, lead: tuple[Index, ...], x: jax.Array, y: jax.Array
    ) -> None:
        """Store two numbers of each row into [*lead, T, 2]."""
        at = ref.at[(*lead, pl.ds(self.q0, self.bq), pl.ds(self.q0 * 0, 2))]
        ok = inside(self.q0, self.bq, (0, self.call.T), self.call.T)
        ok = None if ok is None else jnp.broadcast_to(ok[:, None], (self.bq, 2))
        both = jnp.where(jnp.arange(2, dtype=i32)[None, :] == 0, x[:, None], y[:, None])
        store(at, ok, both, ref)

    def pair(self, ref: Ref) -> jax.Array:
        """A tile of an array [#B, #N, T, S] (of [#B, #N, S, T], if flip)."""
        return load(*self._pair(ref, self.flip))

    def put_pair(
        self, ref: Ref, x: jax.Array, b: Index | None = None, h: Index | None = None
    ) -> None:
        """Store a tile [bq, bk] into an array [#B, #N, T, S], at (b, h) if given."""
        store(*self._pair(ref, False, b, h), x, ref)

    def note(self, *results: jax.Array, slot: int = 0) -> None:
        """Tell, if anyone asks, which rows of what a program makes are not finite.

        A row is a query, or a key where a program owns keys.

        Args:
            results: [rows] or [rows, any].
            slot: Of the program's flags; each is written once.
        """
        if self.flag is None:
            return
        ref, number = self.flag
        bad = ~(functools.reduce(jnp.add, map(lasting, results)) == 0)
        n = bad.shape[0]
        store(ref.at[number, pl.ds(number * 0 + slot * n, n)], None, bad, ref)

    def field(self, home: str, ref: Ref) -> jax.Array:
        """A field on this tile, float32: a number, one per query or key, or a tile."""
        if is_diagonal(home, len(ref.shape)):
            return self._diagonals(ref).astype(f32)
        if home in ("pair", "distance"):
            return self._pair_any(ref, turned=self.flip).astype(f32)
        if home == "head":
            return load(ref.at[self._lead(*ref.shape)], None).astype(f32)
        b, h = self._lead(ref.shape[0], ref.shape[2])
        axis = "q" if home == "query" else "k"
        i0, n, size, limits = self._limits(axis, stored=False)
        ok = inside(i0, n, limits, size)
        x = load(ref.at[b, pl.ds(i0, n), h], ok).astype(f32)
        return self.along_q(x) if home == "query" else self.along_k(x)

    def inside_rows(self) -> jax.Array:
        """[bq]: the queries that exist and lie within the frame."""
        q = self.q0 + jnp.arange(self.bq, dtype=i32)
        lo, hi = self.frame.queries
        ok = q < hi
        return ok if isinstance(lo, int) and lo == 0 else ok & (q >= lo)

    def keep_keys(self, x: jax.Array) -> jax.Array:
        """[bk, ...] with the rows of keys outside the frame set to 0."""
        lo, hi = self.frame.keys
        if isinstance(lo, int) and isinstance(hi, int) and (lo, hi) == (0, self.call.S):
            return x  # what lies past the array's end is not stored
        k = self.k0 + jnp.arange(self.bk, dtype=i32)
        ok = (k >= lo) & (k < hi)
        return jnp.where(column(ok, x.ndim), x, 0.0)

    def dot(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """The matrix product, accumulated in float32."""
        if self.call.interpret and self.call.exact:
            return _in_order(a, b)
        if self.call.precision is None:
            return plgpu.dot(a, b)
        return plgpu.dot(a, b, precision=self.call.precision)

    # Private: layout.

    @property
    def _start(self) -> jax.Array:
        return jnp.asarray(self.q0 + self.frame.offset - self.k0).astype(f32)

    def _past_nearest(self) -> tuple[jax.Array, jax.Array]:
        """|distance| in two parts: to the nearest key of all, and on from there.

        The same numbers in whatever tile a pair lies. So every pass rounds a score in
        the same way, and a weight of 1 in the forward pass is 1 in the others.
        """
        lo, hi = self.frame.keys
        query = self._position(None, "q")
        nearest = jnp.clip(query, i32(lo), i32(hi) - 1)
        beyond = jnp.abs((query - nearest).astype(f32))
        there = self.along_q((nearest - self.k0).astype(f32)) - self.along_k(
            _iota(self.bk)
        )
        return self.along_q(beyond), there if self.call.causal else jnp.abs(there)

    def _position(self, ref: Ref | None, axis: str) -> jax.Array:
        i0, n, start = (
            (self.q0, self.bq, self.frame.offset)
            if axis == "q"
            else (self.k0, self.bk, 0)
        )
        if self.loaded is not None:
            return self.loaded[axis == "k"]
        if ref is None:
            return i0 + start + jnp.arange(n, dtype=i32)
        return self._vector(ref, (self.h,), i0, n)

    def _lead(self, batch: int, heads: int) -> tuple[jax.Array, jax.Array]:
        """Indices into axes that may be 1, or K heads."""
        return (
            jnp.asarray(self.b) * i32(batch > 1),
            jnp.asarray(self.h) // i32(self.call.N // heads),
        )

    def _limits(self, axis: str, stored: bool) -> tuple[Index, int, int, Range]:
        """First index, count, array size and the range that may be read or written."""
        i0, n, size, limits = (
            (self.q0, self.bq, self.call.T, self.frame.queries)
            if axis == "q"
            else (self.k0, self.bk, self.call.S, self.frame.keys)
        )
        return i0, n, size, limits if self.edge and not stored else (0, size)

    def _matrix(
        self, ref: Ref, axis: str, stored: bool = False
    ) -> tuple[View, jax.Array | None]:
        """[n, H] of [#B, length, heads, H], H padded to a power of two; its mask."""
        i0, n, size, limits = self._limits(axis, stored)
        width = ref.shape[-1]
        padded = max(16, pl.next_power_of_2(width))
        b, h = self._lead(ref.shape[0], ref.shape[2])
        checks = []
        rows = inside(i0, n, limits, size)
        if rows is not None:
            checks.append(rows[:, None])
        if padded != width:
            checks.append((jnp.arange(padded, dtype=i32) < width)[None, :])
        first = jnp.asarray(i0, i32) * 0  # a static 0 is checked against the width
        at = ref.at[b, pl.ds(i0, n), h, pl.ds(first, padded)]
        return at, both(checks, (n, padded))

    def _vector(
        self, ref: Ref, head: tuple[Index, ...], i0: Index, n: int, other: float = 0
    ) -> jax.Array:
        """[n] from i0 of [#B, length], or of [#B, #N, length] with a head."""
        size = ref.shape[-1]
        b, h = self._lead(ref.shape[0], ref.shape[1] if head else self.call.N)
        at = ref.at[(b, h, pl.ds(i0, n)) if head else (b, pl.ds(i0, n))]
        return load(at, inside(i0, n, (0, size), size), other)

    def _put_vector(self, ref: Ref, i0: Index, n: int, x: jax.Array) -> None:
        b, h = self._lead(*ref.shape[:2])
        size = ref.shape[-1]
        store(ref.at[b, h, pl.ds(i0, n)], inside(i0, n, (0, size), size), x, ref)

    def _pair(
        self, ref: Ref, turned: bool, b: Index | None = None, h: Index | None = None
    ) -> tuple[View, jax.Array | None]:
        starts, steps = (self.q0, self.k0), (self.bq, self.bk)
        if turned:
            starts, steps = starts[::-1], steps[::-1]
        if b is None:
            b, h = self._lead(*ref.shape[:2])
        checks = []
        for axis, (i0, n, size) in enumerate(
            zip(starts, steps, ref.shape[2:], strict=True)
        ):
            ok = inside(i0, n, (0, size), size)
            if ok is not None:
                checks.append(ok[None, :] if axis else ok[:, None])
        at = ref.at[b, h, pl.ds(starts[0], steps[0]), pl.ds(starts[1], steps[1])]
        return at, both(checks, steps)

    def _pair_any(self, ref: Ref, turned: bool) -> jax.Array:
        """An array [#B, #N, #T, #S] on this tile, as small as it is, oriented.

        turned: a full one was transposed beforehand to the tile's orientation.
        """
        b, h = self._lead(*ref.shape[:2])
        queries, keys = ref.shape[2:]
        zero = jnp.asarray(self.b) * i32(0)  # the interpreter wants a traced index
        if queries > 1 and keys > 1:
            x = load(*self._pair(ref, turned))
            return x.T if self.flip and not turned else x
        if keys > 1:
            ok = inside(self.k0, self.bk, (0, keys), keys)
            return self.along_k(load(ref.at[b, h, zero, pl.ds(self.k0, self.bk)], ok))
        if queries > 1:
            ok = inside(self.q0, self.bq, (0, queries), queries)
            return self.along_q(load(ref.at[b, h, pl.ds(self.q0, self.bq), zero], ok))
        return load(ref.at[b, h, zero, zero], None)

    def _diagonals(self, ref: Ref) -> jax.Array:
        """One number per pair of a field along diagonals, in its copies."""
        b, h = self._lead(*ref.shape[:2])
        q, k = (jnp.arange(n, dtype=i32) for n in (self.bq, self.bk))
        pair, call = (self.along_q(q), self.along_k(k)), self.call
        at = shifted.place(ref, call, (self.q0, self.k0), pair, flip=self.flip)
        queries = inside(self.q0, self.bq, (0, call.T), call.T)
        keys = inside(self.k0, self.bk, (0, call.S), call.S)
        checks = [] if queries is None else [self.along_q(queries)]
        checks += [] if keys is None else [self.along_k(keys)]
        return load(ref.at[b, h, at], both(checks, self.shape))

    def _guard(self, visible: jax.Array | None, axis: int, x: jax.Array) -> jax.Array:
        if visible is None or not self.sight.veiled:
            return x
        seen = jnp.max(visible.astype(i32), axis) > 0
        return jnp.where(column(seen, x.ndim), x, jnp.zeros_like(x))


def _in_order(a: jax.Array, b: jax.Array) -> jax.Array:
    """The product, summed from first to last as IEEE float32 dots on a GPU are.

    XLA for CPU does so for 64 columns; for fewer, in an order that each shape has its
    own: passes whose tiles lie otherwise would round a score otherwise.
    """
    columns = b.shape[1]
    b = jnp.pad(b, ((0, 0), (0, max(0, 64 - columns))))
    return plgpu.dot(a, b, precision=lax.Precision.HIGHEST)[:, :columns]


def at_keys(tile: Tile, j: Index, side: Scalar, edge: bool) -> Tile:
    """The tile of key block j beside the same queries."""
    return replace(tile, k0=j * tile.bk, side=side, edge=edge)


def at_queries(tile: Tile, i: Index, side: Scalar, edge: bool) -> Tile:
    """The tile of query block i beside the same keys."""
    return replace(tile, q0=i * tile.bq, side=side, edge=edge)


def zeros(n: int, ref: Ref) -> jax.Array:
    """An accumulator of n rows as wide as an array, padded to a power of two."""
    return jnp.zeros((n, max(16, pl.next_power_of_2(ref.shape[-1]))), f32)


def plain_dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """The matrix product, accumulated in float32, whatever precision a call has."""
    return plgpu.dot(a, b)


def lasting(x: jax.Array) -> jax.Array:
    """0 of a row whose entries are finite, else NaN; of a vector so each entry."""
    x = x.astype(f32) * 0.0
    return jnp.sum(x, 1) if x.ndim > 1 else x


def _iota(n: int) -> jax.Array:
    return jnp.arange(n, dtype=i32).astype(f32)
