"""What the weights of a row are: what backward kernels ask, whatever the normalizer."""

from __future__ import annotations

from typing import Protocol

import jax

from pallas_attn.triton.tile import Tile
from pallas_attn.types import Ref, Scalar


class RowWeights(Protocol):
    """The normalizer's statistics of a tile's queries: from scores to weights again.

    With P the weights and U what dS is a multiple of, dS = U (dP - delta): U is P for
    softmax and p^(2 - alpha) on the support for entmax.
    """

    @property
    def delta(self) -> jax.Array:
        """[bq], what dP is compared with."""
        ...

    @property
    def attends(self) -> jax.Array:
        """[bq], whether a query attends to anything."""
        ...

    @property
    def large(self) -> bool:
        """Whether all passes must round alike what a whole row has, in 16 bits too."""
        ...

    def weights(
        self,
        t: Tile,
        s: jax.Array,
        row: Scalar,
        rest: list[jax.Array],
        visible: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        """(P, U) of a tile, 0 where a key is not visible.

        Args:
            t: The tile.
            s: Its products q.k, in their units.
            row: What is added to whole rows of logits, one per query or 0.0.
            rest: What else is added to logits, part by part.
            visible: Where a query may attend; None: everywhere.
        """
        ...

    def in_units_of_u(self, x: jax.Array) -> jax.Array:
        """[bq], the multiple of U whose sum over a row is x."""
        ...


class RowCotangents(Protocol):
    """What backward kernels read of rows beside the operands; a pytree of refs."""

    @property
    def do(self) -> Ref:
        """[B, T, N, h], the cotangent of the output."""
        ...

    @property
    def dlse(self) -> Ref | None:
        """[B, N, T], what a row of dS adds up to; None: 0."""
        ...

    def of_rows(self, t: Tile) -> RowWeights:
        """The statistics of a tile's queries, loaded."""
        ...
