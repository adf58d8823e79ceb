"""Where queries and keys are: what a bias is told of a call and of a tile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_attn.positions import difference


class Positions(Protocol):
    """What `Bias.tile` sees: a tile of a kernel, listed pairs, or whole axes.

    All broadcast against the pairs of one query and one key each.
    """

    @property
    def query_position(self) -> Array:
        """int32, one per query."""
        ...

    @property
    def key_position(self) -> Array:
        """int32, one per key."""
        ...

    @property
    def distance(self) -> Array:
        """Query position minus key position, float32 or float64."""
        ...

    @property
    def away(self) -> tuple[Array, ...]:
        """|distance|, as parts each as small as it can be."""
        ...

    def from_nearest(self, last: Array) -> tuple[Array, ...]:
        """|nearest - key position|, as parts: of the query's among 0..last."""
        ...


@dataclass(frozen=True)
class Place:
    """Where a call puts its queries and keys, its leading axes as they were given.

    offset: of the queries, where positions are implicit; None where they are explicit.
    key_lengths: keys beyond do not exist.
    query_segments, key_segments: queries attend to keys of their own segment only.
    causal: no query attends to a later key.
    alone: nothing else is added to the scores and there is no mask: a query that sees
        any key sees the nearest that its segment, window and lengths leave.
    diagonal: tables of distances are read along diagonals where positions are implicit.
    """

    query_positions: Int[Array, "*#B #N T"]
    key_positions: Int[Array, "*#B #N S"]
    offset: int | Int[Array, "*#B"] | None = None
    key_lengths: Int[Array, "*#B"] | None = None
    query_segments: Int[Array, "*#B T"] | None = None
    key_segments: Int[Array, "*#B S"] | None = None
    causal: bool = False
    alone: bool = False
    diagonal: bool = False
    dtype: Any = jnp.float32


@dataclass(frozen=True)
class Region:
    """What `tile` sees on whole axes [B, N, T, S], outside the kernels."""

    query_position: Int[Array, "#B #N T 1"]
    key_position: Int[Array, "#B #N 1 S"]
    dtype: Any = jnp.float32

    @property
    def distance(self) -> Float[Array, "#B #N T S"]:
        """Query position minus key position."""
        return difference(self.query_position, self.key_position, self.dtype)

    @property
    def away(self) -> tuple[Float[Array, "#B #N T S"], ...]:
        """|distance|, as parts."""
        return (jnp.abs(self.distance),)

    def from_nearest(
        self, last: Float[Array, "#B #N 1 1"]
    ) -> tuple[Float[Array, "#B #N T S"], ...]:
        """|nearest - key position|, as parts."""
        there = nearest(self.query_position, last) - self.key_position
        return (jnp.abs(there).astype(self.dtype),)


def nearest(position: Int[Array, "*#axes"], last: Array) -> Int[Array, "*axes"]:
    """Of the positions 0..last, a whole number, the one nearest to each position."""
    return jnp.clip(position, 0, last.astype(jnp.int32))


def spread(home: str, x: Array) -> Array:
    """A field of whole axes, shaped to broadcast against [B, N, T, S]."""
    match home:
        case "head":
            return (x[None] if x.ndim == 1 else x)[..., None, None]
        case "query":
            return jnp.swapaxes(x, 1, 2)[:, :, :, None]
        case "key":
            return jnp.swapaxes(x, 1, 2)[:, :, None, :]
        case _:
            return x


def product_on(
    a: Float[Array, "#B T #N R"], b: Float[Array, "#B S #N R"], dtype: Any
) -> Float[Array, "#B #N T S"]:
    """A product on whole axes; in `dtype`, whatever the default precision says."""
    batch, heads = max(a.shape[0], b.shape[0]), max(a.shape[2], b.shape[2])
    a, b = (
        jnp.broadcast_to(x.astype(dtype), (batch, x.shape[1], heads, x.shape[3]))
        for x in (a, b)
    )
    return jnp.einsum("BTNR,BSNR->BNTS", a, b, precision=jax.lax.Precision.HIGHEST)
