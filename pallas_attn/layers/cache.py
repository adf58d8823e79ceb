"""Where new tokens go in a cache of keys, values and whatever else is kept."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

from pallas_attn.bias.base import Bias, homes, Sum
from pallas_attn.checks import arrays as check
from pallas_attn.rules import kind, known
from pallas_attn.shapes import Sizes


@dataclass(frozen=True)
class Slot:
    """The places that T new tokens take in a cache of S.

    Args:
        index: int32 [*B], how many tokens each entry has cached.
        lengths: int32 [*B], how many of the T are not padding; None: all.
        new: T.
        max_length: S.
    """

    index: Int[Array, "*B"]
    lengths: Int[Array, "*B"] | None
    new: int
    max_length: int

    @property
    def batch(self) -> tuple[int, ...]:
        """The sizes of the leading axes."""
        return self.index.shape

    @property
    def positions(self) -> Int[Array, "*B T"]:
        """Where the new tokens stand."""
        return self.index[..., None] + self._places

    @property
    def following(self) -> Int[Array, "*B"]:
        """The index of the next call."""
        new = jnp.int32(self.new) if self.lengths is None else self.lengths
        return self.index + new

    @property
    def homeless(self) -> Bool[Array, "*B T"]:
        """New tokens that are not padding and have no place."""
        beyond = self.positions >= self.max_length
        if self.lengths is None:
            return beyond
        return beyond & (self._places < self.lengths[..., None])

    @property
    def _places(self) -> Int[Array, "*#B T"]:
        places = jnp.arange(self.new, dtype=jnp.int32)
        return places.reshape(*(1 for _ in self.batch), self.new)

    def check(self) -> None:
        """Refuses tokens without a place, where the index is known.

        Raises:
            ValueError: if the cache is full.
        """
        ends = known(self.following)
        if ends is not None and ends.size and int(ends.max()) > self.max_length:
            raise ValueError(
                f"`decode`: the cache has {self.max_length} places; got token "
                f"{int(ends.max())}. Initialise the layer with inputs as long as the "
                "longest sequence."
            )

    def written(
        self, cached: Shaped[Array, "*B S *rest"], x: Shaped[Array, "*B T *rest"]
    ) -> Shaped[Array, "*B S *rest"]:
        """What is cached, with the new tokens in their places."""
        entries, rest = math.prod(self.batch), cached.shape[len(self.batch) + 1 :]
        flat = cached.reshape(entries, self.max_length, *rest)
        new = x.astype(cached.dtype).reshape(entries, self.new, *rest)
        places = self.positions.reshape(entries, self.new)
        entry = jnp.arange(entries, dtype=jnp.int32)[:, None]
        # padding may have no place: it is dropped, and never clamped onto a token
        return flat.at[entry, places].set(new, mode="drop").reshape(cached.shape)

    def rows(self, bias: Bias) -> Bias:
        """A bias of S queries for the new tokens alone.

        Fields with a query axis of S entries are read at the new tokens' positions;
        other fields, and the axes of keys, stay.
        """
        if isinstance(bias, Sum):
            return Sum(tuple(self.rows(term) for term in bias.terms))
        rows = {}
        for name, home in homes(bias).items():
            x = jnp.asarray(getattr(bias, name))
            if home == "query" and x.ndim > len(self.batch):
                rows[name] = self._taken(x, len(self.batch))
            elif home == "pair" and 2 <= x.ndim <= len(self.batch) + 3:
                x = x.reshape((1,) * (len(self.batch) + 3 - x.ndim) + x.shape)
                rows[name] = self._taken(x, x.ndim - 2)
        return dataclasses.replace(bias, **rows) if rows else bias

    def _taken(self, x: Array, axis: int) -> Array:
        """The entries of an axis at the new tokens' positions; others have none."""
        if x.shape[axis] != self.max_length or self.max_length == 1:
            return x
        before, after = axis - len(self.batch), x.ndim - axis - 1
        places = self.positions.reshape(
            *self.batch, *(1,) * before, self.new, *(1,) * after
        )
        return jnp.take_along_axis(x, places, axis=axis, mode="clip")


class Cache(Protocol):
    """What a layer keeps between calls while it decodes."""

    def slot(self, sizes: Sizes, lengths: Any) -> Slot | None:
        """Where the new tokens of a call go; the index moves on.

        Args:
            sizes: Of the call.
            lengths: int32 [*B], how many of the T tokens are not padding, or None.

        Returns:
            None while the cache is made.

        Raises:
            ValueError: if there is no cache, it does not fit the call, or it is full.
        """
        ...

    def kept(
        self, name: str, x: Shaped[Array, "*B T *rest"], slot: Slot | None
    ) -> Shaped[Array, "*B S *rest"]:
        """All that there is under a name: what is new, with what came before.

        Args:
            name: Of what is kept.
            x: What is new.
            slot: Where it goes; None: a cache of its shape is made, and it is returned.
        """
        ...

    def name_of(self, module: Any, name: str) -> str:
        """A name for what a module of the layer keeps, that no other module takes."""
        ...


def taken(
    index: Int[Array, "*#B"], places: tuple[int, ...], sizes: Sizes, lengths: Any
) -> tuple[Slot, Int[Array, "*#B"]]:
    """Where the new tokens of a call go, and the index of the next call.

    Args:
        index: How many tokens each entry has cached, or all have.
        places: The shape of cached keys.
        sizes: Of the call.
        lengths: int32 [*B], how many of the T tokens are not padding, or None.

    Raises:
        ValueError: if the cache does not fit the call, or it is full.
    """
    longest = _places_of(places, sizes)
    new = check.lengths("query_seq_lengths", lengths, sizes, sizes.T)
    shared = index.shape != sizes.leading
    if new is not None and shared:
        raise ValueError(
            "`query_seq_lengths` needs a `cache_index` for each entry, of shape "
            f"{sizes.leading}; got {index.shape}. Let this layer make the cache."
        )
    new = None if new is None else new.reshape(sizes.leading)
    slot = Slot(jnp.broadcast_to(index, sizes.leading), new, sizes.T, longest)
    slot.check()
    return slot, index + jnp.int32(sizes.T) if shared else slot.following


def check_new(sizes: Sizes) -> None:
    """New keys are those of the new queries' tokens.

    Raises:
        ValueError: if they are not as many.
    """
    if sizes.T != sizes.S:
        raise ValueError(
            "`inputs_k` must have the length of `inputs_q` where `decode` is True; "
            f"got {sizes.S} and {sizes.T}. The cache has the keys before."
        )


def refuse_places(query_offset: Any, **others: Any) -> None:
    """Refuses what the index of the cache says of tokens while decoding.

    Args:
        query_offset: 0 where none was given.
        **others: None where they were not given.

    Raises:
        ValueError: if any was.
    """
    natural = isinstance(query_offset, int) and query_offset == 0
    given = {"query_offset": None if natural else query_offset, **others}
    for name, x in given.items():
        if x is not None:
            raise ValueError(
                f"`{name}` must be left out where `decode` is True: `cache_index` has "
                f"it; got {kind(x)}. `query_seq_lengths` tells padding from tokens."
            )


def _places_of(shape: tuple[int, ...], sizes: Sizes) -> int:
    """S of a cache that fits the call."""
    *batch, longest = shape[:-2]
    if tuple(batch) != sizes.leading or shape[-2:] != (sizes.K, sizes.H):
        letters = (*sizes.leading, "S", sizes.K, sizes.H)
        wanted = ", ".join(map(str, letters))
        raise ValueError(
            "`decode`: the cache must have the batch, key heads and head dim of the "
            f"call, [{wanted}]; got {shape}. Make one with inputs of this batch."
        )
    return longest
