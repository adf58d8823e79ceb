"""A bias given as an array."""

from typing import Any

from jaxtyping import Array, Float

from pallas_attn.bias.base import Bias, pair_home
from pallas_attn.bias.region import Positions


class DenseBias(Bias):
    """b_ij = bias_ij.

    Args:
        bias: [#B, #N, #T, #S], any floating dtype. Its gradient is summed over every
            size-1 axis inside the kernels.

    Example:
        >>> import jax, pallas_attn
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 97, 8, 64))
        >>> shared = jax.random.normal(jax.random.key(1), (1, 8, 97, 97))
        >>> bias = pallas_attn.DenseBias(shared)  # by both entries of the batch
        >>> pallas_attn.dot_product_attention(q, k, v, bias).shape
        (2, 97, 8, 64)

    Source: Flash Attention with a matrix bias; the pair bias of AlphaFold.
    """

    bias: Float[Array, "#B #N #T #S"] = pair_home()

    identity = ("bias",)

    def tile(self, t: Positions) -> Any:
        """The loaded tile itself."""
        return self.bias

    def bound(self, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        """The largest entry, of one per query or one per key."""
        known: Any = self.bias  # its extremes
        return known.most

    @property
    def bounded(self) -> bool:
        """Not where there is an entry per pair: nobody looks for its largest."""
        return 1 in self.bias.shape[-2:]
