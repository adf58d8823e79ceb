"""A bias with one number per distance."""

import dataclasses
from typing import Any

from jaxtyping import Array, Float

from pallas_attn.bias.base import Bias, distance_home
from pallas_attn.bias.region import Positions
from pallas_attn.positions import UNBOUNDED


class RelativeBias(Bias):
    """b_ij = table[clip(query position i - key position j - first, 0, D - 1)].

    Learned functions of the distance stand on it: T5's buckets, KERPLE, FIRE, an MLP's
    numbers of all distances. Where positions are implicit no array of all pairs is
    made, nor of its gradient; where they are arrays, and under `Entmax`, the bias is
    written out, [#B, #N, T, S]. Blocks of distances whose numbers are too low to weigh
    are left out, unless it is. What an entry adds up, it adds in a fixed order.

    Args:
        table: [#B, #N, D], or [N, D], any floating dtype.
        first: The distance of entry 0: 0 for keys before the query alone, 1 - D where
            they all come after it. Distances that the table lacks have its nearer end.

    Example:
        >>> import jax.numpy as jnp
        >>> from pallas_attn import RelativeBias
        >>> positions = jnp.arange(3)
        >>> table = jnp.array([[-5.0, 0.0, 5.0]])  # of the distances -1, 0 and 1
        >>> print(RelativeBias(table, -1).materialise(positions, positions)[0, 0])
        [[ 0. -5. -5.]
         [ 5.  0. -5.]
         [ 5.  5.  0.]]

    Sources: Raffel et al., T5 (arXiv 1910.10683); Chi et al., KERPLE (arXiv
    2205.09921); Li et al., FIRE (arXiv 2310.04418).
    """

    table: Float[Array, "*#B #N D"] = distance_home("first")
    first: int = dataclasses.field(default=0, metadata={"static": True})

    identity = ("table",)

    def check(self, name: str) -> None:
        """Refuses a first distance that is no integer, or none of positions.

        Raises:
            TypeError: if it is no integer.
            ValueError: if no two positions are so far apart.
        """
        if not isinstance(self.first, int) or isinstance(self.first, bool):
            raise TypeError(
                f"`{name}.first` must be an int, the distance of the table's entry 0; "
                f"got {self.first!r}. It is static."
            )
        if abs(self.first) >= UNBOUNDED:
            raise ValueError(
                f"`{name}.first` must be a distance of two positions; got {self.first}."
                " Those of keys before their query are positive."
            )

    def tile(self, t: Positions) -> Any:
        """The number of each pair's distance."""
        return self.table

    def bound(self, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        """The largest number of the distances of a range."""
        known: Any = self.table  # its extremes
        return known.most
