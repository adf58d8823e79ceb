"""What passes over lists hand on: arrays outside, refs inside the kernels.

The order of fields, but for those of `Lists` the alphabet's, is that of a kernel's
operands.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jaxtyping import Array, Bool, Float, Int

from pallas_attn.tiled.fields import Values


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Lists:
    """The keys with weight of every query, in key order; the first `count` count.

    keys: the key indices; p, u: their weights, p^(2 - alpha).
    m: the largest score in units of q.k, inf for empty rows; level: as `Power` or
        `Learned` has it.
    fits: whether every row's keys found place; always, where there is a top_k.
    """

    keys: Int[Array, "B N T k"]
    p: Float[Array, "B N T k"]
    u: Float[Array, "B N T k"]
    count: Int[Array, "B N T"]
    m: Float[Array, "B N T"]
    level: Float[Array, "B N T"]
    fits: Bool[Array, ""] | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Words:
    """The candidates of every query as words of bits; the first `count` count.

    keys: how many there are, stored or not.
    numbers: of the words, counted along the keys.
    """

    count: Int[Array, "B N T"]
    keys: Int[Array, "B N T"]
    numbers: Int[Array, "B N T words"]
    words: Int[Array, "B N T words"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What bounded the candidates of every query.

    bound: the least score of one, in units of q.k.
    m: the largest score, inf for empty rows.
    need: how many keys have a score that large, at least; at most k.
    """

    bound: Float[Array, "B N T"]
    m: Float[Array, "B N T"]
    need: Int[Array, "B N T"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Candidates:
    """`Words`, `Bounds`, and the level of every query's slots."""

    bound: Float[Array, "B N T"]
    count: Int[Array, "B N T"]
    keys: Int[Array, "B N T"]
    level: Float[Array, "B N T"]
    m: Float[Array, "B N T"]
    need: Int[Array, "B N T"]
    numbers: Int[Array, "B N T words"]
    words: Int[Array, "B N T words"]

    @property
    def lists(self) -> Words:
        """The candidates themselves."""
        return Words(
            count=self.count, keys=self.keys, numbers=self.numbers, words=self.words
        )

    @property
    def bounds(self) -> Bounds:
        """What bounded them."""
        return Bounds(bound=self.bound, m=self.m, need=self.need)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Scores:
    """The candidates of every query and their scores; the first `count` count.

    row: what all scores of a query have, in units of q.k; x: the scores without it.
    """

    count: Int[Array, "B N T"]
    keys: Int[Array, "B N T length"]
    row: Float[Array, "B N T"]
    x: Float[Array, "B N T length"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Selected:
    """What `Lists` has of the keys with weight."""

    count: Int[Array, "B N T"]
    keys: Int[Array, "B N T k"]
    level: Float[Array, "B N T"]
    m: Float[Array, "B N T"]
    p: Float[Array, "B N T k"]
    u: Float[Array, "B N T k"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Deltas:
    """What the gradients of the scores are made of.

    alpha: dL/dalpha of every row, if that is wanted.
    delta: what dP is compared with.
    dp: dP of every entry.
    """

    alpha: Float[Array, "B N T"] | None = None
    delta: Float[Array, "B N T"]
    dp: Float[Array, "B N T k"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class ByQuery:
    """What the pass over the lists of queries makes.

    da: [B, T, N, columns] of products, by their place.
    dqk: of every entry the gradient of q.k, where it is another than ds, the score's.
    fields: [B, N, T], those per head too.
    pairs: of fields along queries and keys, [B, N, T, k].
    """

    da: dict[int, Array]
    dq: Float[Array, "B T N H"] | None = None
    dqk: Float[Array, "B N T k"] | None = None
    ds: Float[Array, "B N T k"]
    fields: Values
    pairs: Values


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Entries:
    """Of the lists of all queries, one after the other, what keys own.

    ds, dqk: as `ByQuery` has them; without ds nobody asks for more than dv.
    """

    dqk: Float[Array, " entries"] | None = None
    ds: Float[Array, " entries"] | None = None
    keys: Int[Array, " entries"]
    p: Float[Array, " entries"]
