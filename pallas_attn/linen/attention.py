"""The attention layer: flax's parameters and call, with biases and a cache."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn
from flax.linen.linear import default_kernel_init
from jaxtyping import Array, Float, Int

from pallas_attn.config import Config
from pallas_attn.implementations import Implementation
from pallas_attn.layers.attention import (
    attend,
    Conditions,
    context_of,
    OutputHook,
    QueryKeyHook,
)
from pallas_attn.layers.fields import (
    check_heads,
    check_sink,
    head_dim,
    with_bias,
)
from pallas_attn.layers.inputs import key_value_inputs
from pallas_attn.linen.bias import bias_value, read_by
from pallas_attn.linen.cache import Variables
from pallas_attn.linen.projections import normalized, Projections
from pallas_attn.normalizers.entmax import Entmax
from pallas_attn.normalizers.softmax import Softmax
from pallas_attn.rules import kind


class MultiHeadAttention(nn.Module):
    """Multi-head attention with biases, in the parameters of flax's layer.

    With x, y, z the inputs of query, key and value, and heads n:

        q_n = W_n x    k_n = W'_n y    v_n = W''_n z    [H], [H], [h]
        output = sum_n W'''_n softmax(q_n.k_n / sqrt(H) + bias_n) v_n

    Parameters, their names and the call are those of
    `flax.linen.MultiHeadDotProductAttention`: a checkpoint of one loads into the other,
    and without a bias both give the same outputs. There is no `attention_fn`, for this
    layer is one. A query that may attend to nothing has no weights here; in flax it has
    equal ones. While decoding (`decode`) the cache's index drives the causal mask and
    every bias, entry by entry: a call may bring one token or many, and
    `query_seq_lengths` says how many of them are not padding.

    Args:
        num_heads: N.
        dtype: Of the computation; None: of inputs and parameters.
        param_dtype: Of the parameters.
        qkv_features: N * H; None: the features of `inputs_q`.
        out_features: Of the output; None: the features of `inputs_q`.
        broadcast_dropout: Drop the same pairs in all batch entries and heads.
        dropout_rate: Of the weights, 0 <= rate < 1.
        deterministic: No dropout; here or in the call.
        precision: Of all products, as `jax.lax.Precision`.
        kernel_init: Of the kernels.
        out_kernel_init: Of the kernel of "out"; None: `kernel_init`.
        bias_init: Of the biases of the projections.
        out_bias_init: Of the bias of "out"; None: `bias_init`.
        use_bias: Whether projections have biases, or the names of those that have one:
            some of "query", "key", "value", "out".
        decode: Whether there is a cache. `init` with inputs of the largest length makes
            it: "cached_key" and "cached_value" [*B, S, K, H], "cache_index" [*B].
        normalize_qk: Norms of each head's queries and keys, before `query_key_hook`:
            True: layer norms (arXiv 2302.05442); "rms"; or a module, of which each has
            a copy. Parameters "query_ln", "key_ln".
        force_fp32_for_softmax: Weights are float32 whatever is given.
        qkv_dot_general: As flax's, of the projections; deprecated there.
        out_dot_general: As flax's; deprecated there.
        qkv_dot_general_cls: As flax's, of the projections.
        out_dot_general_cls: As flax's.
        qk_attn_weights_einsum_cls: None: weights are never formed.
        attn_weights_value_einsum_cls: None.
        num_kv_heads: K, a divisor of N; None: N.
        bias: A bias value, an array [#B, #N, #T, #S], a module (`ALiBi`, ...), or a sum
            of them. While decoding, fields of a value that have as many queries as the
            cache has places are read at the new tokens'.
        normalizer: `Softmax()` or `Entmax(alpha, top_k)`.
        sink: Whether each head has a learned sink, a score whose value is 0: parameter
            "sink", [N], 0 at first. Of softmax.
        is_causal: Attend to positions up to the query's; always while decoding.
        local_window_size: An int or (left, right), in positions.
        logits_soft_cap: c > 0: c tanh(q.k / (c sqrt(H))) stands for the product.
        query_key_hook: A function or module, for rotary embeddings: (query
            [*B, T, N, H], key [*B, S, K, H], query_positions [*#B, #N, T],
            key_positions [*#B, #N, S]) -> (query, key), before keys are cached.
        output_hook: A function or module, for gates: (output [*B, T, N, h], lse
            [*B, T, N], inputs_q) -> output, before the product of "out". Of `Entmax`
            tau stands for lse.
        scale: Of the product q.k; None: 1/sqrt(H).
        value_dim: h; None: H.
        implementation: As of `dot_product_attention`.
        config: As of `dot_product_attention`.

    Returns:
        Of a call: [*B, T, out_features].

    Raises:
        ValueError: if heads do not divide, an argument is wrong or not read, there is
            no cache to decode with, or it is full.
        TypeError: if a bias is none, or a dtype is wrong.
        NotImplementedError: if an einsum is asked for.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from pallas_attn.linen import ALiBi, MultiHeadAttention
        >>> layer = MultiHeadAttention(num_heads=4, bias=ALiBi(), decode=True)
        >>> x = jax.random.normal(jax.random.key(0), (2, 7, 16))
        >>> variables = layer.init(jax.random.key(1), x)  # a cache of 7 tokens
        >>> prompt, cache = layer.apply(variables, x[:, :5], mutable="cache")
        >>> token, cache = layer.apply(variables | cache, x[:, 5:6], mutable="cache")
        >>> token.shape, cache["cache"]["cache_index"].tolist()
        ((2, 1, 16), [6, 6])

    Source: Vaswani et al., Attention Is All You Need (arXiv 1706.03762).
    """

    num_heads: int
    dtype: Any = None
    param_dtype: Any = jnp.float32
    qkv_features: int | None = None
    out_features: int | None = None
    broadcast_dropout: bool = True
    dropout_rate: float = 0.0
    deterministic: bool | None = None
    precision: Any = None
    kernel_init: Any = default_kernel_init
    out_kernel_init: Any = None
    bias_init: Any = nn.initializers.zeros_init()
    out_bias_init: Any = None
    use_bias: bool | Sequence[str] = True
    decode: bool = False
    normalize_qk: bool | Literal["rms"] | nn.Module = False
    force_fp32_for_softmax: bool = False
    qkv_dot_general: Any = None
    out_dot_general: Any = None
    qkv_dot_general_cls: Any = None
    out_dot_general_cls: Any = None
    qk_attn_weights_einsum_cls: Any = None
    attn_weights_value_einsum_cls: Any = None
    num_kv_heads: int | None = None
    bias: Any = None
    normalizer: Softmax | Entmax = Softmax()
    sink: bool = False
    is_causal: bool = False
    local_window_size: int | tuple[int, int] | None = None
    logits_soft_cap: float | None = None
    query_key_hook: QueryKeyHook | None = None
    output_hook: OutputHook | None = None
    scale: float | None = None
    value_dim: int | None = None
    implementation: Implementation | Sequence[Implementation] | None = None
    config: Config | None = None

    @nn.compact
    def __call__(
        self,
        inputs_q: Float[Array, "*B T features"],
        inputs_k: Float[Array, "*B S features"] | None = None,
        inputs_v: Float[Array, "*B S features"] | None = None,
        *,
        inputs_kv: Float[Array, "*B S features"] | None = None,
        mask: Any = None,
        deterministic: bool | None = None,
        dropout_rng: Array | None = None,
        sow_weights: bool = False,
        query_seq_lengths: Int[Array, "*B"] | None = None,
        key_value_seq_lengths: Int[Array, "*B"] | None = None,
        query_segment_ids: Int[Array, "*B T"] | None = None,
        key_segment_ids: Int[Array, "*B S"] | None = None,
        query_positions: Any = None,
        key_positions: Any = None,
        query_offset: Any = 0,
        pair: Float[Array, "*#A T S channels"] | None = None,
        query_coordinates: Float[Array, "*#B T d"] | None = None,
        key_coordinates: Float[Array, "*#B S d"] | None = None,
    ) -> Float[Array, "*B T out_features"]:
        """The layer's output.

        Args:
            inputs_q: [*B, T, features].
            inputs_k: [*B, S, features]; None: `inputs_q`.
            inputs_v: [*B, S, features]; None: `inputs_k`.
            inputs_kv: Both, in one argument.
            mask: bool [#B, #N, #T, #S], True where a query may attend, or a number that
                is 0 where it may not (what `flax.linen.make_causal_mask` makes). One
                below 0 is an error, or makes the output NaN where it is traced: what
                is added to scores is a bias.
            deterministic: No dropout.
            dropout_rng: A key; None: the module's stream "dropout".
            sow_weights: Keep the dense weights, before dropout, as "attention_weights"
                of the collection "intermediates": [*B, N, T, S], computed beside the
                output.
            query_seq_lengths: int32 [*B]; outputs of queries beyond are those of zeros.
                While decoding: how many of the tokens are not padding.
            key_value_seq_lengths: int32 [*B]; keys beyond are not attended to.
            query_segment_ids: int32 [*B, T].
            key_segment_ids: int32 [*B, S].
            query_positions: int32 [T], [*#B, T] or [*#B, #N, T].
            key_positions: int32 [S], [*#B, S] or [*#B, #N, S].
            query_offset: The position of query 0, instead; an int or int32 [*#B].
            pair: [*#A, T, S, channels], for `PairBias`.
            query_coordinates: [*#B, T, d], for biases of points.
            key_coordinates: [*#B, S, d]; None, in self-attention: those of the queries,
                cached while decoding.

        Returns:
            [*B, T, out_features].
        """
        inputs_k, inputs_v = key_value_inputs(inputs_q, inputs_k, inputs_v, inputs_kv)
        self._check()
        given = Conditions(
            mask,
            query_seq_lengths=query_seq_lengths,
            key_value_seq_lengths=key_value_seq_lengths,
            query_segment_ids=query_segment_ids,
            key_segment_ids=key_segment_ids,
            query_positions=query_positions,
            key_positions=key_positions,
            query_offset=query_offset,
            pair=pair,
            query_coordinates=query_coordinates,
            key_coordinates=key_coordinates,
        )
        made = self._projections(inputs_q.shape[-1])
        context = context_of(
            self,
            (inputs_q, inputs_k),
            self._projected(made, inputs_q, inputs_k, inputs_v),
            given,
            cache=Variables(self) if self.decode else None,
            read=read_by(self.bias),
        )
        x = attend(
            self,
            context,
            None if self.bias is None else bias_value("bias", self.bias, context),
            given,
            normalizer=self._normalizer(),
            dropout=self._dropout(deterministic, dropout_rng),
            sow=self._sown if sow_weights else None,
        )
        return made.out(
            x,
            self.out_features or inputs_q.shape[-1],
            kernel_init=self.out_kernel_init or self.kernel_init,
            bias_init=self.out_bias_init or self.bias_init,
            dot_general=self.out_dot_general,
            dot_general_cls=self.out_dot_general_cls,
        )

    def _normalizer(self) -> Softmax | Entmax:
        if not self.sink:
            return self.normalizer
        check_sink(self.normalizer)
        zeros = nn.initializers.zeros_init()
        return Softmax(self.param("sink", zeros, (self.num_heads,), self.param_dtype))

    def _projections(self, features: int) -> Projections:
        H = head_dim(self.num_heads, self.qkv_features or features)
        return Projections(
            heads=self.num_heads,
            key_heads=self.num_kv_heads or self.num_heads,
            head_dim=H,
            value_dim=self.value_dim or H,
            biased=with_bias(self.use_bias),
            dense=functools.partial(
                nn.DenseGeneral,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                precision=self.precision,
            ),
        )

    def _projected(
        self, made: Projections, q: Array, k: Array, v: Array
    ) -> tuple[Array, Array, Array]:
        """Query [*B, T, N, H], key [*B, S, K, H] and value [*B, S, K, h]."""
        query, key, value = made.of(
            q,
            k,
            v,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            dot_general=self.qkv_dot_general,
            dot_general_cls=self.qkv_dot_general_cls,
        )
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return *normalized(self.normalize_qk, query, key, **dtypes), value

    def _dropout(
        self, deterministic: bool | None, rng: Array | None
    ) -> tuple[float, Array | None]:
        """The rate and key of this call; as flax, only a rate asks for the flag."""
        if self.dropout_rate == 0:
            return 0.0, None
        if nn.merge_param("deterministic", self.deterministic, deterministic):
            return 0.0, None
        return self.dropout_rate, self.make_rng("dropout") if rng is None else rng

    def _sown(self, weights: Float[Array, "*B N T S"]) -> None:
        self.sow("intermediates", "attention_weights", weights)

    def _check(self) -> None:
        """Refuses what flax has and no kernel can do, and heads that do not divide."""
        for name in ("qk_attn_weights_einsum_cls", "attn_weights_value_einsum_cls"):
            if getattr(self, name) is not None:
                raise NotImplementedError(
                    f"`{name}` cannot be honoured: the kernels make both products; got "
                    f"{kind(getattr(self, name))}. Leave it None."
                )
        check_heads(self.num_heads, self.num_kv_heads, self.value_dim)
