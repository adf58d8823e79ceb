"""A low-rank bias."""

from jaxtyping import Array, Float

from pallas_attn.bias.base import Bias, key_home, query_home


class FactoredBias(Bias):
    """b_ij = sum_r q_factor_ir k_factor_jr.

    Args:
        q_factor: [#B, T, #N, R], any floating dtype, any R >= 1.
        k_factor: [#B, S, #N, R].

    The product has float32 accuracy for float32 factors whatever `precision` says; it
    is never scaled.

    Example:
        >>> import jax.numpy as jnp
        >>> from pallas_attn import FactoredBias
        >>> j = jnp.arange(4.0)
        >>> q_factor = jnp.stack([-j, jnp.ones(4)], -1)[None, :, None]
        >>> k_factor = jnp.stack([jnp.ones(4), j], -1)[None, :, None]
        >>> bias = FactoredBias(q_factor, k_factor)  # j - i
        >>> print(bias.materialise(jnp.arange(4), jnp.arange(4))[0, 0, 1])
        [-1.  0.  1.  2.]

    Source: FlashBias (arXiv 2505.12044).
    """

    q_factor: Float[Array, "#B T #N R"] = query_home()
    k_factor: Float[Array, "#B S #N R"] = key_home()

    ranked = True

    def contract(self) -> tuple[Array, Array]:
        """The factors."""
        return self.q_factor, self.k_factor
