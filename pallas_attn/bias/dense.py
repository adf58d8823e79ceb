"""A bias given as an array."""

from typing import Any

from jaxtyping import Array, Float

from pallas_attn.bias.base import Bias, pair_home


class DenseBias(Bias):
    """b_ij = bias_ij.

    Args:
        bias: [#B, #N, #T, #S], any floating dtype. Its gradient is summed over every
            size-1 axis inside the kernels.

    Source: Flash Attention with a matrix bias; the pair bias of AlphaFold.
    """

    bias: Float[Array, "#B #N #T #S"] = pair_home()

    identity = ("bias",)

    def tile(self, t: Any) -> Any:
        """The loaded tile itself."""
        return self.bias
