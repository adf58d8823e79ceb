"""How a call is cut into chunks: rows of queries, and the keys they may reach."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

from pallas_attn.bias.base import Added, Bias, homes, is_diagonal
from pallas_attn.call import Call
from pallas_attn.letters import FIELDS, letters
from pallas_attn.tracing.varying import in_shard_map
from pallas_attn.visibility import positions, Visibility


# Scores of a chunk: small enough to stay in a CPU's cache, large enough to keep a
# matrix product busy.
BYTES = 4 * 2**20
MOST_ROWS, LEAST_ROWS = 256, 32

# Under causality early rows need few keys. Each group of rows with one number of keys
# is a loop of its own: more groups save more work and cost more compilation and, in a
# backward, one more set of key gradients.
GROUPS = 4

# homes of fields that may have one value for each query and key
PAIRS = ("pair", "distance")

# letter of an axis -> (start, size); the batch's counts within each of several runs
Place = Mapping[str, tuple[Any, int]]


class Group(NamedTuple):
    """Successive chunks that read equally many keys; one loop runs over them."""

    keys: int
    rows_from: Int[np.ndarray, " chunks"]
    keys_from: Int[np.ndarray, " chunks"]


@dataclass(frozen=True)
class Plan:
    """Every chunk of a call; each has `batch` sequences and `rows` queries.

    The last chunk of rows ends with the last query and may overlap the one before. The
    batch is cut alike in each of `runs` equal runs, which may lie on as many devices:
    a chunk takes part of every run, so that no loop goes over what is sharded.
    """

    batch: int
    rows: int
    groups: tuple[Group, ...]
    runs: int = 1

    @property
    def each(self) -> int:
        """Sequences of a chunk in each run."""
        return self.batch // self.runs

    def entries(self, start: Array, call: Call) -> Int[Array, " batch"]:
        """The batch entries of the chunk that starts there in each run."""
        count = jnp.arange(self.batch, dtype=jnp.int32)
        if self.runs == 1:
            return start + count
        run, within = count // self.each, count % self.each
        return start + run * (call.B // self.runs) + within

    def joined(self, x: Array) -> Array:
        """[starts, chunks, batch, rows, ...] as [B, chunks, rows, ...]."""
        split = (*x.shape[:2], self.runs, self.each, *x.shape[3:])
        x = jnp.moveaxis(x.reshape(split), (2, 0, 3), (0, 1, 2))
        return x.reshape(-1, *x.shape[3:])


def chunks(call: Call, visibility: Visibility, added: Added) -> Plan:
    """Chunks whose scores fit `BYTES`: whole sequences if they do, else single ones.

    All of what is known only to an exported program that runs: its sequences, or its
    queries and keys.
    """
    if not all(isinstance(n, int) for n in (call.T, call.S)):
        whole = np.zeros(1, np.int32)
        return Plan(call.B, call.T, (Group(call.S, whole, whole),))
    per_row = 4 * call.N * call.S
    count = -(-call.T // min(MOST_ROWS, max(LEAST_ROWS, BYTES // per_row)))
    rows = -(-call.T // count)
    batch, runs = call.B, 1
    if isinstance(batch, int):
        runs = math.gcd(batch, 1 if in_shard_map() else jax.device_count())
        batch = max(1, min(call.B // runs, BYTES // (per_row * rows)))
        while call.B // runs % batch:
            batch -= 1
    # the gradient of a bias with one value per pair is written in place by one loop;
    # several would each make a whole one
    limit = 1 if any(_per_pair(term, call) for term in added.terms) else GROUPS
    groups = tuple(_groups(call, visibility, rows, limit))
    return Plan(batch * runs, rows, groups, runs)


def reach(
    call: Call, visibility: Visibility
) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " T"]]:
    """Keys first..stop that each query may see by causality and window.

    All of them where positions are known only when the call runs.
    """
    queries = np.arange(call.T)
    first, stop = np.zeros_like(queries), np.full_like(queries, call.S)
    offset = _offset(call, visibility)
    if offset is not None:
        queries = queries + offset
        if call.causal:
            stop = queries + 1
        if call.window is not None:
            left, right = call.window
            first, stop = queries - left, np.minimum(stop, queries + right + 1)
    return np.clip(first, 0, call.S), np.clip(stop, 0, call.S)


def may_hide(call: Call, visibility: Visibility) -> bool:
    """Whether there may be a key that no query sees."""
    arrays = dataclasses.replace(
        visibility, offset=None, query_positions=None, key_positions=None, seed=None
    )
    if arrays != Visibility() or not isinstance(call.T, int):
        return True
    if not isinstance(call.S, int):
        return True
    if _offset(call, visibility) is None:
        return call.causal or call.window is not None
    first, stop = reach(call, visibility)
    change = np.zeros(call.S + 1, int)
    np.add.at(change, first, 1)
    np.add.at(change, np.maximum(first, stop), -1)
    return bool((np.cumsum(change)[:-1] == 0).any())


def _offset(call: Call, visibility: Visibility) -> int | None:
    """The position of query 0, if it and all other positions are known when traced."""
    implicit = visibility.offset is None and not visibility.placed
    return call.offset if implicit else None


def _per_pair(term: Bias, call: Call) -> bool:
    """Whether a field of a term has one value for each query and key."""
    pairs = (getattr(term, n) for n, home in homes(term).items() if home in PAIRS)
    pairs = (x for x in pairs if x.ndim == 4)
    return any(x.shape[2] == call.T > 1 and x.shape[3] == call.S > 1 for x in pairs)


def _groups(
    call: Call, visibility: Visibility, rows: int, limit: int
) -> Iterator[Group]:
    """Runs of chunks that reach equally many keys, rounded up to S / limit."""
    starts = np.minimum(np.arange(-(-call.T // rows)) * rows, call.T - rows)
    first, stop = reach(call, visibility)
    lo = np.array([first[t : t + rows].min() for t in starts])
    hi = np.array([stop[t : t + rows].max() for t in starts])
    step = -(-call.S // limit)
    sizes = np.clip(-(-(hi - lo) // step), 1, limit) * step
    for size, run in itertools.groupby(range(starts.size), key=lambda i: sizes[i]):
        keys = min(int(size), call.S)
        own = list(run)
        keys_from = np.minimum(lo[own], call.S - keys)
        yield Group(keys, starts[own].astype(np.int32), keys_from.astype(np.int32))


def cut(x: Any, axes: str, place: Place, runs: int = 1) -> Any:
    """The part of an array at a place; an axis of size 1 is shared by all places."""
    if x is None:
        return None
    for axis, letter in enumerate(axes):
        if letter not in place or x.shape[axis] == 1:
            continue
        start, size = place[letter]
        if letter != "B":
            x = lax.dynamic_slice_in_dim(x, start, size, axis)
        elif size != x.shape[0]:
            x = x.reshape(runs, -1, *x.shape[1:])
            x = lax.dynamic_slice_in_dim(x, start, size // runs, 1)
            x = x.reshape(size, *x.shape[2:])
    return x


def cut_added(added: Added, call: Call, place: Place, runs: int) -> Added:
    """What a bias adds at a place."""
    (row, rows), (key, keys) = place["T"], place["S"]
    # the diagonals of a place, from that of its first query and last key on
    along = {"d": (row - key + jnp.int32(call.S - keys), rows + keys - 1)}

    def field(x: Array, home: str) -> Array:
        here = {**place, **along} if is_diagonal(home, x.ndim) else place
        return cut(x, letters(home, x), here, runs)

    terms = tuple(
        dataclasses.replace(
            term, **{n: field(getattr(term, n), h) for n, h in homes(term).items()}
        )
        for term in added.terms
    )
    products = tuple(
        (cut(a, FIELDS["query"], place, runs), cut(b, FIELDS["key"], place, runs))
        for a, b in added.products
    )
    return Added(terms, products)


def cut_visibility(
    visibility: Visibility, call: Call, place: Place, runs: int
) -> Visibility:
    """Who may attend to whom at a place, positions written out."""
    queries, keys = positions(call, visibility)

    def lengths(x: Array | None, letter: str) -> Array | None:
        return None if x is None else cut(x, "B", place, runs) - place[letter][0]

    mask: Bool[Array, "#B #N #T #S"] | None = visibility.mask
    return Visibility(
        query_positions=cut(queries, "BNT", place, runs),
        key_positions=cut(keys, "BNS", place, runs),
        query_lengths=lengths(visibility.query_lengths, "T"),
        key_lengths=lengths(visibility.key_lengths, "S"),
        query_segments=cut(visibility.query_segments, "BT", place, runs),
        key_segments=cut(visibility.key_segments, "BS", place, runs),
        mask=cut(mask, "BNTS", place, runs),
        seed=visibility.seed,
    )
