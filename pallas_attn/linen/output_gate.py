"""A gate on what attention puts out, made of its input."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.linen.linear import default_kernel_init
from jaxtyping import Array, Float

from pallas_attn.layers.gates import gated


class OutputGate(nn.Module):
    """o_n sigmoid(W_n x + c_n), of each head's output and the query's input x.

    An `output_hook` of `MultiHeadAttention`.

    Args:
        per_head: One gate for a head; False: one for each of its h entries.
        use_bias: Whether there is c.
        kernel_init: Of W, the parameter "gate" [features, N, h], or [features, N, 1].
        bias_init: Of c. AlphaFold's gates start open: kernel 0, bias 1.
        dtype: Of the product; None: of the input and the parameters.
        param_dtype: Of the parameters.
        precision: Of the product, as `jax.lax.Precision`.

    Returns:
        Of a call: [*B, T, N, h], of the output's dtype.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from pallas_attn.linen import MultiHeadAttention, OutputGate
        >>> layer = MultiHeadAttention(num_heads=2, output_hook=OutputGate())
        >>> params = layer.init(jax.random.key(0), jnp.ones((1, 5, 8)))["params"]
        >>> params["output_hook"]["gate"]["kernel"].shape
        (8, 2, 4)

    Sources: Jumper et al., AlphaFold (doi 10.1038/s41586-021-03819-2), algorithm 7; Qiu
    et al., Gated Attention (arXiv 2505.06708); Lin et al., Forgetting Transformer
    (arXiv 2503.02130).
    """

    per_head: bool = False
    use_bias: bool = True
    kernel_init: Any = default_kernel_init
    bias_init: Any = nn.initializers.zeros_init()
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None

    @nn.compact
    def __call__(
        self,
        output: Float[Array, "*B T N h"],
        residual: Float[Array, "*B T N"],
        inputs_q: Float[Array, "*B T features"],
    ) -> Float[Array, "*B T N h"]:
        """The gated output.

        Args:
            output: [*B, T, N, h].
            residual: [*B, T, N]; not read.
            inputs_q: [*B, T, features].
        """
        *_, N, h = output.shape
        logits = nn.DenseGeneral(
            features=(N, 1 if self.per_head else h),
            use_bias=self.use_bias,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            name="gate",
        )(inputs_q)
        return gated(output, logits)
