"""The module that makes the gates of forgetting attention from its input."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx

from pallas_attn.bias import forget_gate
from pallas_attn.layers.context import BiasContext
from pallas_attn.layers.gates import decaying, forgetting
from pallas_attn.nnx.bias import BiasModule


class ForgetGate(BiasModule):
    """Forgetting attention: gates f_jn = sigmoid(w_n . x_j + c_n) from the keys' input.

    b_ij is the sum of log f over the positions after j up to i. While decoding the log
    gates are cached, by each layer its own. The layer is causal: keys after a query
    would never fade.

    Args:
        num_heads: N.
        in_features: Of the inputs of keys.
        kernel_init: Of w, the parameter "gate" [in_features, N].
        decay_times: None: c starts at 0. (first, last): c_n starts where a head forgets
            in that many tokens, f = exp(-1/time), with times evenly spaced in their
            logarithm: the paper's data-independent gates.
        data_dependent: Whether gates depend on the input; False: on the head alone, the
            parameter "gate_bias" [N].
        dtype: Of the product; None: of the input and the parameters. Gates are float32.
        param_dtype: Of the parameters.
        rngs: Of the parameters.

    Returns:
        Of a call with a `BiasContext`: `pallas_attn.ForgetGate`, log gates [*B, S, N].

    Raises:
        ValueError: if a decay time is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from pallas_attn.nnx import ForgetGate, MultiHeadAttention
        >>> rngs = nnx.Rngs(0)
        >>> layer = MultiHeadAttention(
        ...     2, 8, bias=ForgetGate(2, 8, rngs=rngs), is_causal=True, rngs=rngs
        ... )
        >>> layer(jnp.ones((1, 5, 8))).shape, layer.bias.gate.kernel.shape
        ((1, 5, 8), (8, 2))

    Source: Lin et al., Forgetting Transformer (arXiv 2503.02130).
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        kernel_init: Any = nnx.initializers.normal(0.02),
        decay_times: tuple[float, float] | None = None,
        data_dependent: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.num_heads = num_heads
        bias_init = nnx.initializers.zeros_init()
        if decay_times is not None:
            bias_init = decaying(decay_times)
        self.gate: Any = nnx.data(None)
        self.gate_bias: Any = nnx.data(None)
        if data_dependent:
            self.gate = nnx.Linear(
                in_features,
                num_heads,
                kernel_init=kernel_init,
                bias_init=bias_init,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )
        else:
            first = bias_init(rngs.params(), (num_heads,), param_dtype)
            self.gate_bias = nnx.Param(first)

    def __call__(self, context: BiasContext) -> forget_gate.ForgetGate:
        """The gates of the call's keys."""
        inputs = context.inputs_kv
        if self.gate is None:
            shape = (*inputs.shape[:-1], self.num_heads)
            logits = jnp.broadcast_to(self.gate_bias.get_value(), shape)
        else:
            logits = self.gate(inputs)
        return forgetting(self, logits, context)
