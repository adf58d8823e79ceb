"""The attention layer: flax's parameters and call, with biases and a cache."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.linen.linear import default_kernel_init
from jaxtyping import Array, Float, Int

from pallas_attn.api import attended, weights_of
from pallas_attn.bias.base import terms_of
from pallas_attn.canonical import canonical
from pallas_attn.checks import arrays as check
from pallas_attn.config import Config
from pallas_attn.implementations import Implementation
from pallas_attn.layers.cache import Slot
from pallas_attn.layers.mask import spoiled, truth
from pallas_attn.linen.bias import bias_value, BiasContext, read_by
from pallas_attn.linen.decode import cached, refuse_places, slot_of
from pallas_attn.normalizers.entmax import Entmax
from pallas_attn.normalizers.softmax import Softmax
from pallas_attn.poison import poisoned
from pallas_attn.rules import kind
from pallas_attn.shapes import Sizes


# query [*B, T, N, H], key [*B, S, K, H] and the positions of each -> query, key
QueryKeyHook = Callable[[Array, Array, Array, Array], tuple[Array, Array]]


class MultiHeadAttention(nn.Module):
    """Multi-head attention with biases, in the parameters of flax's layer.

    With x, y, z the inputs of query, key and value, and heads n:

        q_n = W_n x    k_n = W'_n y    v_n = W''_n z
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
        use_bias: Whether projections have biases.
        decode: Whether there is a cache. `init` with inputs of the largest length makes
            it: "cached_key" and "cached_value" [*B, S, K, H], "cache_index" [*B].
        normalize_qk: Layer norms of queries and keys (arXiv 2302.05442).
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
    use_bias: bool = True
    decode: bool = False
    normalize_qk: bool = False
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
        inputs_k, inputs_v = _inputs(inputs_q, inputs_k, inputs_v, inputs_kv)
        self._check()
        query, key, value = self._projected(inputs_q, inputs_k, inputs_v)
        *batch, T, N, H = query.shape
        S, K = key.shape[-3:-1]
        sizes = Sizes(tuple(batch), T, S, N, K, H, H)
        slot = slot_of(self, sizes, query_seq_lengths) if self.decode else None
        if slot is not None:
            refuse_places(
                query_offset,
                query_positions=query_positions,
                key_positions=key_positions,
                key_value_seq_lengths=key_value_seq_lengths,
            )
            query_offset = slot.index
        offset = check.offset(query_offset, sizes)
        given = check.positions(query_positions, key_positions, offset, sizes)
        standing = _standing(given, offset, sizes)
        query, key = self._hooked(query, key, standing, slot)
        context = self._context(
            inputs_q,
            inputs_k,
            standing,
            offset if given[0] is given[1] is None else None,
            slot,
            pair=pair,
            coordinates=(query_coordinates, key_coordinates),
        )
        bias = None if self.bias is None else bias_value("bias", self.bias, context)
        self._check_fading(bias, mask)
        if self.decode:
            key = cached(self, "cached_key", key, slot)
            value = cached(self, "cached_value", value, slot)
        query, key, value = promote_dtype(query, key, value, dtype=self.dtype)
        rate, rng = self._dropout(deterministic, dropout_rng)
        call = canonical(
            query,
            key,
            value,
            bias,
            truth(mask),
            scale=None,
            is_causal=self.is_causal or self.decode,
            query_seq_lengths=query_seq_lengths,
            key_value_seq_lengths=key_value_seq_lengths,
            local_window_size=self.local_window_size,
            query_offset=query_offset,
            query_positions=query_positions,
            key_positions=key_positions,
            query_segment_ids=query_segment_ids,
            key_segment_ids=key_segment_ids,
            normalizer=self._normalizer(),
            logits_soft_cap=self.logits_soft_cap,
            dropout_rate=rate,
            dropout_rng=rng,
            broadcast_dropout=self.broadcast_dropout,
            precision=self.precision,
            implementation=self.implementation,
            config=self.config,
        )
        if sow_weights:
            weights = weights_of(call, dropped=False)
            self.sow("intermediates", "attention_weights", weights)
        x = attended(call, return_residual=False)
        x = spoiled(mask, x)
        if slot is not None:
            x = poisoned(x, slot.homeless[..., None, None])
        return self._out(x, self.out_features or inputs_q.shape[-1])

    def _normalizer(self) -> Softmax | Entmax:
        if not self.sink:
            return self.normalizer
        given = self.normalizer
        if not isinstance(given, Softmax) or given.sink is not None:
            raise ValueError(
                "`sink=True` is a learned sink of `Softmax()`; got `normalizer` "
                f"{given!r}. Leave one of them out."
            )
        zeros = nn.initializers.zeros_init()
        return Softmax(self.param("sink", zeros, (self.num_heads,), self.param_dtype))

    def _projected(self, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        """Query [*B, T, N, H], key and value [*B, S, K, H]."""
        features = self.qkv_features or q.shape[-1]
        if features % self.num_heads:
            raise ValueError(
                "`num_heads` must divide `qkv_features` (by default the features of "
                f"inputs_q); got {self.num_heads} heads and {features} features. Give "
                "`qkv_features`."
            )
        dense = functools.partial(
            nn.DenseGeneral,
            axis=-1,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            use_bias=self.use_bias,
            precision=self.precision,
            dot_general=self.qkv_dot_general,
            dot_general_cls=self.qkv_dot_general_cls,
        )
        H, K = features // self.num_heads, self.num_kv_heads or self.num_heads
        query = dense(features=(self.num_heads, H), name="query")(q)
        key = dense(features=(K, H), name="key")(k)
        value = dense(features=(K, H), name="value")(v)
        if not self.normalize_qk:
            return query, key, value
        norm = functools.partial(
            nn.LayerNorm, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype
        )
        return norm(name="query_ln")(query), norm(name="key_ln")(key), value

    def _out(self, x: Float[Array, "*B T N H"], features: int) -> Array:
        return nn.DenseGeneral(
            features=features,
            axis=(-2, -1),
            kernel_init=self.out_kernel_init or self.kernel_init,
            bias_init=self.out_bias_init or self.bias_init,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            dot_general=self.out_dot_general,
            dot_general_cls=self.out_dot_general_cls,
            name="out",
        )(x)

    def _hooked(
        self, query: Array, key: Array, placed: tuple[Array, Array], slot: Slot | None
    ) -> tuple[Array, Array]:
        """Query and key as the hook leaves them; new keys stand where queries do."""
        if self.query_key_hook is None:
            return query, key
        at = placed if slot is None else (placed[0], placed[0])
        return self.query_key_hook(query, key, *at)

    def _dropout(
        self, deterministic: bool | None, rng: Array | None
    ) -> tuple[float, Array | None]:
        """The rate and key of this call; as flax, only a rate asks for the flag."""
        if self.dropout_rate == 0:
            return 0.0, None
        if nn.merge_param("deterministic", self.deterministic, deterministic):
            return 0.0, None
        return self.dropout_rate, self.make_rng("dropout") if rng is None else rng

    def _context(
        self,
        inputs_q: Array,
        inputs_k: Array,
        standing: tuple[Array, Array],
        offset: int | Array | None,
        slot: Slot | None,
        *,
        pair: Any,
        coordinates: tuple[Any, Any],
    ) -> BiasContext:
        """What bias modules see; refuses what none of them reads."""
        read = read_by(self.bias)
        named = dict(zip(COORDINATES, coordinates, strict=True))
        for name, x in {"pair": pair, **named}.items():
            asked = "coordinates" if name in named else name
            if x is not None and asked not in read:
                raise ValueError(
                    f"`{name}` must be read by the layer's `bias`; got one that does "
                    f"not. Leave `{name}` out, or add a module that reads it."
                )
        batch = inputs_q.shape[:-2]
        if offset is not None and not isinstance(offset, int) and offset.ndim == 0:
            offset = offset.reshape((1,) * len(batch))
        at_queries, at_keys = standing
        if slot is not None:
            at_keys = _counted(slot.max_length, len(batch))
        of_queries, of_keys = coordinates
        if of_keys is None and of_queries is not None and inputs_k is inputs_q:
            of_keys = of_queries
            if self.decode:
                of_queries = jnp.broadcast_to(
                    of_queries, (*batch, *jnp.shape(of_queries)[-2:])
                )
                of_keys = cached(self, "cached_coordinates", of_queries, slot)
        return BiasContext(
            inputs_q,
            inputs_k,
            self.num_heads,
            at_queries,
            at_keys,
            offset,
            pair=pair,
            query_coordinates=of_queries,
            key_coordinates=of_keys,
            decode=self.decode,
            slot=slot,
            layer=self,
        )

    def _check_fading(self, bias: Any, mask: Any) -> None:
        """Refuses gates under which keys after a query, and they alone, never fade."""
        window = self.local_window_size
        ends = isinstance(window, tuple | list) and window[-1] == 0
        if self.is_causal or self.decode or ends or mask is not None:
            return
        if any(term.fades for term in terms_of(bias)):
            raise ValueError(
                "`bias`: a ForgetGate fades what comes before a query, not what comes "
                "after; got is_causal=False, no window that ends at the query and no "
                "mask. Write `MultiHeadAttention(..., is_causal=True)`."
            )

    def _check(self) -> None:
        """Refuses what flax has and no kernel can do, and heads that do not divide."""
        for name in ("qk_attn_weights_einsum_cls", "attn_weights_value_einsum_cls"):
            if getattr(self, name) is not None:
                raise NotImplementedError(
                    f"`{name}` cannot be honoured: the kernels make both products; got "
                    f"{kind(getattr(self, name))}. Leave it None."
                )
        K = self.num_kv_heads
        if K is not None and (K < 1 or self.num_heads % K):
            raise ValueError(
                f"`num_kv_heads` must divide num_heads = {self.num_heads}; got {K}. "
                "Query head n reads key head n // (num_heads // num_kv_heads)."
            )


COORDINATES = ("query_coordinates", "key_coordinates")


def _inputs(
    q: Array, k: Array | None, v: Array | None, kv: Array | None
) -> tuple[Array, Array]:
    """The inputs of key and value."""
    if kv is not None:
        if k is not None or v is not None:
            raise ValueError(
                "`inputs_kv` excludes `inputs_k` and `inputs_v`; got both. Give "
                "`inputs_k` alone."
            )
        _fits("inputs_kv", kv, "inputs_q", q, q.ndim - 2)
        return kv, kv
    if k is None and v is not None:
        raise ValueError(
            "`inputs_k` must be given with `inputs_v`; got None. Give the value's "
            "inputs as `inputs_k` to use them for both."
        )
    k = q if k is None else k
    v = k if v is None else v
    _fits("inputs_k", k, "inputs_q", q, q.ndim - 2)
    _fits("inputs_v", v, "inputs_k", k, k.ndim - 1)
    return k, v


def _fits(name: str, x: Array, other: str, y: Array, shared: int) -> None:
    """Refuses what is no sequence of inputs, as a mask given by its place."""
    if x.dtype == bool or x.ndim != y.ndim or x.shape[:shared] != y.shape[:shared]:
        raise ValueError(
            f"`{name}` must be floating [*B, S, features], its first {shared} axes "
            f"those of `{other}`, {y.shape[:shared]}; got {kind(x)}. A mask is given "
            "by name: `mask=...`."
        )


def _standing(
    given: tuple[Array | None, Array | None], offset: int | Array, sizes: Sizes
) -> tuple[Int[Array, "*#B #N T"], Int[Array, "*#B #N S"]]:
    """The positions of queries and keys, written out."""
    batch = len(sizes.leading)

    def full(x: Array) -> Array:
        return x.reshape((1,) * (batch + 2 - x.ndim) + x.shape)

    q, k = given
    queries = _counted(sizes.T, batch)
    if isinstance(offset, int):
        queries = queries + jnp.int32(offset)
    else:
        queries = queries + full(offset[..., None, None])
    return (
        queries if q is None else full(q),
        _counted(sizes.S, batch) if k is None else full(k),
    )


def _counted(length: int, batch: int) -> Int[Array, "*#B #N L"]:
    return jnp.arange(length, dtype=jnp.int32).reshape((1,) * (batch + 1) + (length,))
