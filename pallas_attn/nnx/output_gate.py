"""A gate on what attention puts out, made of its input."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.linear import default_kernel_init
from jaxtyping import Array, Float

from pallas_attn.layers.gates import gated


class OutputGate(nnx.Module):
    """o_n sigmoid(W_n x + c_n), of each head's output and the query's input x.

    An `output_hook` of `MultiHeadAttention`.

    Args:
        num_heads: N.
        in_features: Of the queries' input.
        value_dim: h, of the layer: by default its qkv_features / N. Not read where
            `per_head`.
        per_head: One gate for a head; False: one for each of its h entries.
        use_bias: Whether there is c.
        kernel_init: Of W, the parameter "gate" [in_features, N, h], or 1 for h.
        bias_init: Of c. AlphaFold's gates start open: kernel 0, bias 1.
        dtype: Of the product; None: of the input and the parameters.
        param_dtype: Of the parameters.
        precision: Of the product, as `jax.lax.Precision`.
        rngs: Of the parameters.

    Returns:
        Of a call: [*B, T, N, h], of the output's dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from pallas_attn.nnx import MultiHeadAttention, OutputGate
        >>> rngs = nnx.Rngs(0)
        >>> gate = OutputGate(2, 8, value_dim=4, rngs=rngs)
        >>> layer = MultiHeadAttention(2, 8, output_hook=gate, rngs=rngs)
        >>> layer(jnp.ones((1, 5, 8))).shape, gate.gate.kernel.shape
        ((1, 5, 8), (8, 2, 4))

    Sources: Jumper et al., AlphaFold (doi 10.1038/s41586-021-03819-2), algorithm 7; Qiu
    et al., Gated Attention (arXiv 2505.06708); Lin et al., Forgetting Transformer
    (arXiv 2503.02130).
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        value_dim: int | None = None,
        *,
        per_head: bool = False,
        use_bias: bool = True,
        kernel_init: Any = default_kernel_init,
        bias_init: Any = nnx.initializers.zeros_init(),
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        rngs: nnx.Rngs,
    ):
        width = 1 if per_head else value_dim
        if width is None:
            raise ValueError(
                "`value_dim` must be given where `per_head` is False; got None. It is "
                "that of the layer, by default qkv_features / num_heads."
            )
        self.gate = nnx.LinearGeneral(
            in_features,
            (num_heads, width),
            use_bias=use_bias,
            kernel_init=kernel_init,
            bias_init=bias_init,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            rngs=rngs,
        )

    def __call__(
        self,
        output: Float[Array, "*B T N h"],
        residual: Float[Array, "*B T N"],
        inputs_q: Float[Array, "*B T features"],
    ) -> Float[Array, "*B T N h"]:
        """The gated output; `residual` is not read."""
        return gated(output, self.gate(inputs_q))
