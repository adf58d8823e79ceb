"""Dropout on a tile: the mask of `pallas_attn.dropout` from indices that it knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from pallas_attn.call import Call
from pallas_attn.dropout import head_words, kept, key_word, query_words, Seed, Words
from pallas_attn.tiled.summaries import Frame
from pallas_attn.triton.tile import Tile
from pallas_attn.types import Index


i32 = jnp.int32

# x where a weight is kept, else 0
Drop = Callable[[jax.Array], jax.Array]


class OfHead(Protocol):
    """What tells which head's mask it is: a tile, or a program over lists of pairs."""

    @property
    def call(self) -> Call:
        """The static facts."""
        ...

    @property
    def frame(self) -> Frame:
        """The batch entry's, with the seed."""
        ...

    @property
    def b(self) -> Index:
        """The batch entry."""
        ...

    @property
    def h(self) -> Index:
        """The query head."""
        ...


def drop_on(t: Tile) -> Drop | None:
    """What drops weights of a tile, without the factor `rescale`; None: nobody does."""
    if t.frame.seed is None:
        return None
    queries = query_words(_head(t, t.frame.seed), t.q0 + jnp.arange(t.bq, dtype=i32))
    key = key_word(t.k0 + jnp.arange(t.bk, dtype=i32))
    a, c = (t.along_q(x) for x in queries)
    keep = kept(t.call, (a, c), t.along_k(key))
    return lambda x: jnp.where(keep, x, 0.0)


def drop_pairs(t: OfHead, query: jax.Array, key: jax.Array) -> Drop | None:
    """The same of pairs of one head, [rows, 1] and [rows, entries], or [entries]."""
    if t.frame.seed is None:
        return None
    keep = kept(t.call, query_words(_head(t, t.frame.seed), query), key_word(key))
    return lambda x: jnp.where(keep, x, 0.0)


def rescale(call: Call) -> float:
    """What kept weights are multiplied by."""
    return 1 / (1 - call.dropout)


def _head(t: OfHead, seed: Seed) -> Words:
    return head_words(t.call, seed, jnp.asarray(t.b), jnp.asarray(t.h))
