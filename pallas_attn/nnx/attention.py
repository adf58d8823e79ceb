"""The attention layer of nnx: flax's constructor and parameters, biases and a cache."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.linear import default_kernel_init
from jaxtyping import Array, Float

from pallas_attn.config import Config
from pallas_attn.implementations import Implementation
from pallas_attn.layers.attention import (
    attend,
    Conditions,
    context_of,
    Named,
    OutputHook,
    QueryKeyHook,
)
from pallas_attn.layers.cache import Cache
from pallas_attn.layers.context import BiasContext
from pallas_attn.layers.fields import (
    check_heads,
    check_sink,
    head_dim,
    with_bias,
)
from pallas_attn.layers.inputs import key_value_inputs
from pallas_attn.nnx.arguments import check_features, hashable, hook, norm, stream
from pallas_attn.nnx.bias import bias_value, held, read, read_by
from pallas_attn.nnx.cache import Shapes, Variables
from pallas_attn.normalizers.entmax import Entmax
from pallas_attn.normalizers.softmax import Softmax


NONE: Mapping[str, Any] = MappingProxyType({})


class MultiHeadAttention(nnx.Module):
    """Multi-head attention with biases, in the parameters of flax's layer.

    With x, y, z the inputs of query, key and value, and heads n:

        q_n = W_n x    k_n = W'_n y    v_n = W''_n z    [H], [H], [h]
        output = sum_n W'''_n softmax(q_n.k_n / sqrt(H) + bias_n) v_n

    The constructor, the parameters and the call are those of
    `flax.nnx.MultiHeadAttention`, without `attention_fn`, for this layer is one, and
    without functions of promotion; `is_causal` is the layer's. The tree of `nnx.Param`
    is that of `pallas_attn.linen.MultiHeadAttention`: one checkpoint serves both.

    What a bias learns is a parameter of the layer, under "bias": that of a bias module,
    or the variables in a value. Arrays in a value are constants, which are in the state
    and no `nnx.Param`: `ALiBi(slopes)` is fixed, `ALiBi(nnx.Param(slopes))` learned.

    While decoding (`decode`) the cache's index drives the causal mask and every bias,
    entry by entry: a call may bring one token or many, and `query_seq_lengths` says how
    many of them are not padding. `init_cache` makes the cache.

    Args:
        num_heads: N.
        in_features: Of `inputs_q`.
        qkv_features: N * H; None: `in_features`.
        out_features: Of the output; None: `in_features`.
        num_kv_heads: K, a divisor of N; None: N.
        in_kv_features: Of the inputs of key and value; None: `in_features`.
        dtype: Of the computation; None: of inputs and parameters.
        param_dtype: Of the parameters.
        broadcast_dropout: Drop the same pairs in all batch entries and heads.
        dropout_rate: Of the weights, 0 <= rate < 1.
        deterministic: No dropout; here, in the call, or by `eval()`.
        precision: Of all products, as `jax.lax.Precision`.
        kernel_init: Of the kernels.
        out_kernel_init: Of the kernel of "out"; None: `kernel_init`.
        bias_init: Of the biases of the projections.
        out_bias_init: Of the bias of "out"; None: `bias_init`.
        use_bias: Whether projections have biases, or the names of those that have one.
        decode: Whether there is a cache; here, in the call, or by `nnx.view`.
        normalize_qk: Norms of each head's queries and keys, before `query_key_hook`:
            True: layer norms (arXiv 2302.05442); "rms"; or a module, of which each has
            a copy. Parameters "query_ln", "key_ln".
        qkv_dot_general_cls: As flax's, of the projections.
        out_dot_general_cls: As flax's.
        rngs: Of the parameters, and of dropout.
        keep_rngs: Whether the layer keeps a stream for dropout, if it has a rate.
        kernel_metadata: Of the kernels, for sharding.
        out_kernel_metadata: Of that of "out"; empty: `kernel_metadata`.
        bias_metadata: Of the biases of the projections.
        out_bias_metadata: Of that of "out"; empty: `bias_metadata`.
        query_ln_scale_metadata: Of the scale of "query_ln".
        key_ln_scale_metadata: Of the scale of "key_ln".
        bias: A bias value, an array [#B, #N, #T, #S], a module (`ALiBi`, ...), a
            variable of a value or an array, or a sum of them. While decoding, fields of
            a value that have as many queries as the cache has places are read at the
            new tokens'.
        normalizer: `Softmax()` or `Entmax(alpha, top_k)`; variables in it are learned.
        sink: Whether each head has a learned sink, a score whose value is 0: parameter
            "sink", [N], 0 at first. Of softmax.
        is_causal: Attend to positions up to the query's; always while decoding.
        local_window_size: An int or (left, right), in positions.
        logits_soft_cap: c > 0: c tanh(q.k / (c sqrt(H))) stands for the product.
        query_key_hook: A module or function, for rotary embeddings: (query
            [*B, T, N, H], key [*B, S, K, H], query_positions [*#B, #N, T],
            key_positions [*#B, #N, S]) -> (query, key), before keys are cached.
        output_hook: A module or function, for gates: (output [*B, T, N, h], lse
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
        TypeError: if a bias is none, a dtype is wrong, or a hook is a function that
            holds modules or variables.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from pallas_attn.nnx import ALiBi, MultiHeadAttention
        >>> bias = ALiBi(4, learned=True)
        >>> layer = MultiHeadAttention(4, 16, bias=bias, decode=True, rngs=nnx.Rngs(0))
        >>> x = jax.random.normal(jax.random.key(0), (2, 7, 16))
        >>> layer.init_cache(x.shape)  # of 7 tokens
        >>> prompt, token = layer(x[:, :5]), layer(x[:, 5:6])
        >>> token.shape, layer.cache_index.get_value().tolist()
        ((2, 1, 16), [6, 6])

    Source: Vaswani et al., Attention Is All You Need (arXiv 1706.03762).
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        num_kv_heads: int | None = None,
        in_kv_features: int | None = None,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        broadcast_dropout: bool = True,
        dropout_rate: float = 0.0,
        deterministic: bool | None = None,
        precision: Any = None,
        kernel_init: Any = default_kernel_init,
        out_kernel_init: Any = None,
        bias_init: Any = nnx.initializers.zeros_init(),
        out_bias_init: Any = None,
        use_bias: bool | Sequence[str] = True,
        decode: bool = False,
        normalize_qk: bool | Literal["rms"] | nnx.Module = False,
        qkv_dot_general_cls: Any = None,
        out_dot_general_cls: Any = None,
        rngs: nnx.Rngs,
        keep_rngs: bool = True,
        kernel_metadata: Mapping[str, Any] = NONE,
        out_kernel_metadata: Mapping[str, Any] = NONE,
        bias_metadata: Mapping[str, Any] = NONE,
        out_bias_metadata: Mapping[str, Any] = NONE,
        query_ln_scale_metadata: Mapping[str, Any] = NONE,
        key_ln_scale_metadata: Mapping[str, Any] = NONE,
        bias: Any = None,
        normalizer: Softmax | Entmax = Softmax(),
        sink: bool = False,
        is_causal: bool = False,
        local_window_size: int | tuple[int, int] | None = None,
        logits_soft_cap: float | None = None,
        query_key_hook: QueryKeyHook | None = None,
        output_hook: OutputHook | None = None,
        scale: float | None = None,
        value_dim: int | None = None,
        implementation: Implementation | Sequence[Implementation] | None = None,
        config: Config | None = None,
    ):
        check_heads(num_heads, num_kv_heads, value_dim)
        self.num_heads = num_heads
        self.num_kv_heads = K = num_kv_heads or num_heads
        self.in_features = in_features
        self.in_kv_features = in_kv_features or in_features
        self.head_dim = H = head_dim(num_heads, qkv_features or in_features)
        self.value_dim = h = value_dim or H
        self.out_features = out_features or in_features
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.broadcast_dropout = broadcast_dropout
        self.dropout_rate = dropout_rate
        self.deterministic = deterministic
        self.precision = precision
        self.decode = decode
        self.is_causal = is_causal
        self.local_window_size = hashable(local_window_size)
        self.logits_soft_cap = logits_soft_cap
        self.scale = scale
        self.implementation = hashable(implementation)
        self.config = config

        biased = with_bias(use_bias)
        kinds: Any = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        make = functools.partial(nnx.LinearGeneral, precision=precision, **kinds)
        project = functools.partial(
            make,
            kernel_init=kernel_init,
            bias_init=bias_init,
            dot_general_cls=qkv_dot_general_cls,
            kernel_metadata=kernel_metadata,
            bias_metadata=bias_metadata,
        )
        of_key = self.in_kv_features
        self.query = project(in_features, (num_heads, H), use_bias="query" in biased)
        self.key = project(of_key, (K, H), use_bias="key" in biased)
        self.value = project(of_key, (K, h), use_bias="value" in biased)
        self.out = make(
            (num_heads, h),
            self.out_features,
            axis=(-2, -1),
            use_bias="out" in biased,
            kernel_init=out_kernel_init or kernel_init,
            bias_init=out_bias_init or bias_init,
            dot_general_cls=out_dot_general_cls,
            kernel_metadata=out_kernel_metadata or kernel_metadata,
            bias_metadata=out_bias_metadata or bias_metadata,
        )
        normed = functools.partial(norm, normalize_qk, H)
        self.query_ln = nnx.data(normed(query_ln_scale_metadata, **kinds))
        self.key_ln = nnx.data(normed(key_ln_scale_metadata, **kinds))
        if sink:
            check_sink(normalizer)
        first = jnp.zeros((num_heads,), param_dtype)
        self.sink = nnx.data(nnx.Param(first) if sink else None)
        self.normalizer = nnx.data(normalizer)
        self.bias = held("bias", bias)
        self.query_key_hook = hook("query_key_hook", query_key_hook)
        self.output_hook = hook("output_hook", output_hook)
        kept = keep_rngs and dropout_rate > 0
        self.rngs = nnx.data(rngs.dropout.fork() if kept else None)
        self.cached_key = nnx.data(None)
        self.cached_value = nnx.data(None)
        self.cache_index = nnx.data(None)

    def __call__(
        self,
        inputs_q: Float[Array, "*B T features"],
        inputs_k: Float[Array, "*B S features"] | None = None,
        inputs_v: Float[Array, "*B S features"] | None = None,
        *,
        inputs_kv: Float[Array, "*B S features"] | None = None,
        mask: Any = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        sow_weights: bool = False,
        decode: bool | None = None,
        **conditions: Unpack[Named],
    ) -> Float[Array, "*B T out_features"]:
        """The layer's output.

        Args:
            inputs_q: [*B, T, in_features].
            inputs_k: [*B, S, in_kv_features]; None: `inputs_q`.
            inputs_v: [*B, S, in_kv_features]; None: `inputs_k`.
            inputs_kv: Both, in one argument.
            mask: bool [#B, #N, #T, #S], True where a query may attend, or a number that
                is 0 where it may not. What is added to scores is a bias.
            deterministic: No dropout; None: as the layer.
            rngs: Of dropout; None: the layer's own.
            sow_weights: Keep the dense weights, before dropout, as the
                `nnx.Intermediate` "attention_weights": [*B, N, T, S].
            decode: Whether the cache is read and written; None: as the layer.
            **conditions: `query_seq_lengths`, `key_value_seq_lengths` int32 [*B] (of
                queries while decoding: how many tokens are not padding);
                `query_segment_ids`, `key_segment_ids` int32 [*B, L];
                `query_positions`, `key_positions` int32 [L], [*#B, L], [*#B, #N, L], or
                `query_offset`, an int or int32 [*#B]; `pair` [*#A, T, S, channels];
                `query_coordinates`, `key_coordinates` [*#B, L, d].

        Returns:
            [*B, T, out_features].
        """
        inputs_k, inputs_v = key_value_inputs(inputs_q, inputs_k, inputs_v, inputs_kv)
        given = Conditions(mask, **conditions)
        cached = self.decode if decode is None else decode
        inputs = (inputs_q, inputs_k, inputs_v)
        context, bias = self._seen(inputs, given, Variables(self) if cached else None)
        x = attend(
            self,
            context,
            bias,
            given,
            normalizer=self._normalizer(),
            dropout=self._dropout(deterministic, rngs),
            sow=self._sown if sow_weights else None,
        )
        return self.out(x)

    def init_cache(
        self,
        input_shape: Sequence[int],
        dtype: Any = None,
        **conditions: Unpack[Named],
    ) -> None:
        """Makes an empty cache, of the longest inputs.

        It is made of `nnx.Cache` variables: "cached_key" [*B, S, K, H], "cached_value"
        [*B, S, K, h], "cache_index" [*B], and what the bias keeps, with the names that
        the collection "cache" of `pallas_attn.linen.MultiHeadAttention` has.

        Args:
            input_shape: Of `inputs_q`, (*B, S, in_features), S the most tokens.
            dtype: Of cached keys and values; None: that which the layer gives them, of
                inputs of its `dtype`, or its `param_dtype`.
            **conditions: What the bias reads of a call, as of the longest: `pair`,
                `query_coordinates`; arrays, or `jax.ShapeDtypeStruct`.

        Raises:
            ValueError: if the bias does not take inputs of this length.
        """
        leading = tuple(input_shape)[:-1]
        kind = self.dtype or self.param_dtype
        x = jax.ShapeDtypeStruct(tuple(input_shape), kind)
        y = jax.ShapeDtypeStruct((*leading, self.in_kv_features), kind)
        graph, state = nnx.split(self)

        def kept(state: Any, x: Array, y: Array, named: Any) -> dict[str, Array]:
            layer: Any = nnx.merge(graph, state)
            shapes = Shapes(layer)
            of_keys = x if x.shape == y.shape else y
            layer._seen((x, of_keys, of_keys), Conditions(**named), shapes)
            return shapes.found

        for name, found in jax.eval_shape(kept, state, x, y, dict(conditions)).items():
            own = name in ("cached_key", "cached_value") and dtype is not None
            empty = jnp.zeros(found.shape, dtype if own else found.dtype)
            setattr(self, name, nnx.Cache(empty))
        self.cache_index = nnx.Cache(jnp.zeros(leading[:-1], jnp.int32))

    def set_view(
        self, deterministic: bool | None = None, decode: bool | None = None
    ) -> None:
        """What `nnx.view` changes.

        Args:
            deterministic: No dropout.
            decode: Whether the cache is read and written.
        """
        if deterministic is not None:
            self.deterministic = deterministic
        if decode is not None:
            self.decode = decode

    def _seen(
        self, inputs: tuple[Array, Array, Array], given: Conditions, cache: Cache | None
    ) -> tuple[BiasContext, Any]:
        """What the bias sees of a call, and its value."""
        q, k, v = inputs
        check_features("inputs_q", q, self.in_features)
        check_features("inputs_k", k, self.in_kv_features)
        check_features("inputs_v", v, self.in_kv_features)
        query, key, value = self.query(q), self.key(k), self.value(v)
        if self.query_ln is not None:
            query, key = self.query_ln(query), self.key_ln(key)
        projected = (query, key, value)
        reads = read_by(self.bias)
        context = context_of(self, (q, k), projected, given, cache=cache, read=reads)
        if self.bias is None:
            return context, None
        return context, bias_value("bias", self.bias, context)

    def _normalizer(self) -> Softmax | Entmax:
        sink = self.sink
        return read(self.normalizer) if sink is None else Softmax(sink.get_value())

    def _dropout(
        self, deterministic: bool | None, rngs: nnx.Rngs | nnx.RngStream | None
    ) -> tuple[float, Array | None]:
        """The rate and key of this call; as flax, only a rate asks for the flag."""
        if self.dropout_rate == 0:
            return 0.0, None
        flag = self.deterministic if deterministic is None else deterministic
        if flag is None:
            raise ValueError(
                "`deterministic` must be given where there is a `dropout_rate`; got "
                "None. Give it to the layer or its call: `eval()` sets it."
            )
        if flag:
            return 0.0, None
        return self.dropout_rate, stream(rngs, self.rngs)()

    def _sown(self, weights: Float[Array, "*B N T S"]) -> None:
        self.sow(nnx.Intermediate, "attention_weights", weights)
