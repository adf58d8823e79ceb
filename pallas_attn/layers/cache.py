"""Where new tokens go in a cache of keys, values and whatever else is kept."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

from pallas_attn.bias.base import Bias, homes, Sum
from pallas_attn.rules import known


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
