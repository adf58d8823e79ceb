"""The layer that makes the gates of forgetting attention from its input."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from pallas_attn.bias import forget_gate
from pallas_attn.layers.context import BiasContext
from pallas_attn.layers.gates import decaying, forgetting
from pallas_attn.linen.bias import BiasModule


class ForgetGate(BiasModule):
    """Forgetting attention: gates f_jn = sigmoid(w_n . x_j + c_n) from the keys' input.

    b_ij is the sum of log f over the positions after j up to i: the product of the
    gates between them multiplies the weight. While decoding the log gates are cached,
    by each layer its own. The layer is causal: keys after a query would never fade.

    Args:
        kernel_init: Of w, the parameter "gate" [features, N].
        decay_times: None: c starts at 0, as the paper's data-dependent gates. (first,
            last): c_n starts where a head forgets in that many tokens, f = exp(-1/time)
            with times evenly spaced in their logarithm, the paper's initialisation of
            its data-independent gates.
        data_dependent: Whether gates depend on the input; False: on the head alone.
        dtype: Of the product; None: of the input and the parameters. Gates are float32.
        param_dtype: Of the parameters.

    Returns:
        Of a call with a `BiasContext`: `pallas_attn.ForgetGate`, log gates [*B, S, N].

    Raises:
        ValueError: if a decay time is not positive.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from pallas_attn.linen import ForgetGate, MultiHeadAttention
        >>> layer = MultiHeadAttention(num_heads=2, bias=ForgetGate(), is_causal=True)
        >>> params = layer.init(jax.random.key(0), jnp.ones((1, 5, 8)))["params"]
        >>> params["bias"]["gate"]["kernel"].shape
        (8, 2)

    Source: Lin et al., Forgetting Transformer (arXiv 2503.02130).
    """

    kernel_init: Any = nn.initializers.normal(0.02)
    decay_times: tuple[float, float] | None = None
    data_dependent: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, context: BiasContext) -> forget_gate.ForgetGate:
        """The gates of the call's keys."""
        N, inputs = context.num_heads, context.inputs_kv
        bias_init = nn.initializers.zeros_init()
        if self.decay_times is not None:
            bias_init = decaying(self.decay_times)
        if self.data_dependent:
            logits = nn.Dense(
                N,
                kernel_init=self.kernel_init,
                bias_init=bias_init,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name="gate",
            )(inputs)
        else:
            logits = self.param("gate_bias", bias_init, (N,), self.param_dtype)
            logits = jnp.broadcast_to(logits, (*inputs.shape[:-1], N))
        return forgetting(self, logits, context)
