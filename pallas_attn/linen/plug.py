"""One line for flax's own attention layers: a function that they take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn, nnx
from flax.linen.dtypes import promote_dtype as promoted
from jaxtyping import Array, Float

from pallas_attn.api import attended, weights_of
from pallas_attn.bias.base import as_bias, Bias, has_tile, homes, terms_of, tile_on
from pallas_attn.canonical import canonical
from pallas_attn.config import Config
from pallas_attn.implementations import Implementation
from pallas_attn.layers.mask import truth
from pallas_attn.normalizers.entmax import Entmax
from pallas_attn.normalizers.softmax import Softmax
from pallas_attn.rules import kind


def as_flax_attention_fn(
    bias: Any = None,
    *,
    scale: Any = None,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: int | tuple[int, int] | None = None,
    query_offset: Any = None,
    query_positions: Any = None,
    key_positions: Any = None,
    query_segment_ids: Any = None,
    key_segment_ids: Any = None,
    normalizer: Softmax | Entmax = Softmax(),
    logits_soft_cap: float | None = None,
    implementation: Implementation | Sequence[Implementation] | None = None,
    config: Config | None = None,
) -> Callable[..., Array]:
    """An `attention_fn` for flax's layers that adds a bias, in these kernels.

        output = softmax(scale q.k + bias) v

    The function takes what `flax.linen.MultiHeadDotProductAttention` and
    `flax.nnx.MultiHeadAttention` pass, by name, and raises where it cannot do what is
    asked: einsums are not replaced. `sow_weights` keeps the dense weights, before
    dropout, where flax's own function does, computed beside the output. Masks of any
    dtype hide where they are 0. Dropout is that of `dot_product_attention`, for
    `broadcast_dropout` (flax's default) the same in all batch entries and heads. A
    layer's `input_positions` are the positions of queries and of keys.

    Where T != S (a step of decoding) a bias or mask of positions needs some: make the
    function with `query_offset` or positions, as the step's. Without them it raises.

    Args:
        bias: A bias value, an array [#B, #N, #T, #S], or a sum; not a module, for a
            function has no parameters.
        scale: As of `dot_product_attention`; None: 1/sqrt(H).
        is_causal: Attend to positions up to the query's.
        query_seq_lengths: int32 [*B].
        key_value_seq_lengths: int32 [*B].
        local_window_size: An int or (left, right), in positions.
        query_offset: The position of query 0, an int or int32 [*#B]; None: 0 where T
            is S, else unknown.
        query_positions: int32 [T], [*#B, T] or [*#B, #N, T].
        key_positions: int32 [S], [*#B, S] or [*#B, #N, S].
        query_segment_ids: int32 [*B, T].
        key_segment_ids: int32 [*B, S].
        normalizer: `Softmax()` or `Entmax(alpha, top_k)`.
        logits_soft_cap: c > 0: c tanh(scale q.k / c) stands for the product.
        implementation: As of `dot_product_attention`.
        config: As of `dot_product_attention`.

    Returns:
        A function of query [*B, T, N, H], key [*B, S, K, H], value [*B, S, K, h] and
        what flax passes by name; its result is [*B, T, N, h].

    Raises:
        TypeError: if `bias` is a module. The function raises what
            `dot_product_attention` raises.
        ValueError: by the function, if positions are missing, or given twice.
        NotImplementedError: by the function, if einsums are asked for.

    Example:
        >>> import jax, jax.numpy as jnp, pallas_attn
        >>> from flax import linen as nn
        >>> from pallas_attn.linen import as_flax_attention_fn
        >>> alibi = pallas_attn.ALiBi(pallas_attn.alibi_slopes(4))
        >>> layer = nn.MultiHeadDotProductAttention(
        ...     num_heads=4, attention_fn=as_flax_attention_fn(alibi, is_causal=True)
        ... )
        >>> layer.init_with_output(jax.random.key(0), jnp.ones((2, 5, 16)))[0].shape
        (2, 5, 16)

    Source: `flax.linen.dot_product_attention`, `flax.nnx.dot_product_attention`.
    """
    if isinstance(bias, nn.Module):
        raise TypeError(
            f"`bias` must be a value; got {kind(bias)}, a module. Modules are the bias "
            "of pallas_attn.linen.MultiHeadAttention."
        )
    own_bias, own_causal, own_offset = bias, is_causal, query_offset
    own_queries, own_keys = query_positions, key_positions

    def attention_fn(
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K h"],
        bias: Any = None,
        mask: Any = None,
        broadcast_dropout: bool = True,
        dropout_rng: Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        force_fp32_for_softmax: bool = False,
        einsum_dot_general: Any = None,
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
        promote_dtype: Any = None,
        is_causal: bool = False,
        input_positions: Any = None,
    ) -> Float[Array, "*B T N h"]:
        """Attention as the function was made; `force_fp32_for_softmax` always holds."""
        _refuse_overrides(
            einsum_dot_general=einsum_dot_general,
            qk_attn_weights_einsum=qk_attn_weights_einsum,
            attn_weights_value_einsum=attn_weights_value_einsum,
        )
        if promote_dtype is None:
            query, key, value = promoted(query, key, value, dtype=dtype)
        else:
            query, key, value = promote_dtype((query, key, value), dtype=dtype)
        T, S = query.shape[-3], key.shape[-3]
        added = _sum(own_bias, bias)
        causal = own_causal or bool(is_causal)
        queries, keys = own_queries, own_keys
        if input_positions is not None:
            queries, keys = _both(input_positions, own_offset, queries, keys, T, S)
        if T != S and queries is None and keys is None and own_offset is None:
            _refuse_unplaced(added, causal, local_window_size, T, S)
        rate = 0.0 if deterministic else dropout_rate
        call = canonical(
            query,
            key,
            value,
            added,
            truth(mask),
            scale=scale,
            is_causal=causal,
            query_seq_lengths=query_seq_lengths,
            key_value_seq_lengths=key_value_seq_lengths,
            local_window_size=local_window_size,
            query_offset=0 if own_offset is None else own_offset,
            query_positions=queries,
            key_positions=keys,
            query_segment_ids=query_segment_ids,
            key_segment_ids=key_segment_ids,
            normalizer=normalizer,
            logits_soft_cap=logits_soft_cap,
            dropout_rate=rate,
            dropout_rng=dropout_rng if rate else None,
            broadcast_dropout=broadcast_dropout,
            precision=precision,
            implementation=implementation,
            config=config,
        )
        if module is not None:
            _sow(module, weights_of(call, dropped=False))
        return attended(call, return_residual=False)

    return attention_fn


def _refuse_overrides(**overrides: Any) -> None:
    for name, x in overrides.items():
        if x is None:
            continue
        raise NotImplementedError(
            f"`{name}` cannot be honoured: the kernels make both products; got "
            f"{kind(x)}. Leave it None."
        )


def _sow(module: Any, weights: Array) -> None:
    """Keeps weights in a layer, of linen or nnx, that asked for them."""
    place: Any = "intermediates" if isinstance(module, nn.Module) else nnx.Intermediate
    module.sow(place, "attention_weights", weights)


def _sum(own: Any, given: Any) -> Any:
    if own is None or given is None:
        return given if own is None else own
    return as_bias(own) + as_bias(given)


def _both(
    positions: Any, offset: Any, queries: Any, keys: Any, T: int, S: int
) -> tuple[Any, Any]:
    """A layer's positions, of queries and keys both."""
    if offset is not None or queries is not None:
        name = "query_positions" if offset is None else "query_offset"
        raise ValueError(
            f"`input_positions` and the `{name}` that the attention function was made "
            "with exclude each other; got both. Give one of them."
        )
    if keys is None and T != S:
        raise ValueError(
            f"`input_positions` are those of the T = {T} queries, and the S = {S} keys "
            "need some of their own; got none. Make the attention function with "
            "`key_positions=jnp.arange(S)` if keys were cached in their order."
        )
    return positions, positions if keys is None else keys


def _refuse_unplaced(added: Any, causal: bool, window: Any, T: int, S: int) -> None:
    named = {"is_causal": causal, "local_window_size": window is not None}
    reads = [name for name, given in named.items() if given]
    for term in terms_of(added):
        if _of_positions(term):
            reads.append(f"`bias` ({type(term).__name__})")
    if reads:
        raise ValueError(
            f"`query_offset` must be given where T != S, for positions count in "
            f"{', '.join(reads)}; got T = {T}, S = {S} and none. A step of decoding "
            "makes its function with the position of its token, "
            "`as_flax_attention_fn(..., query_offset=index)`; S - T or 0 are others."
        )


def _of_positions(term: Bias) -> bool:
    """Whether a term depends on where queries and keys stand."""
    if term.family or term.placed:
        return True
    parts = term.expand()
    if len(parts) != 1 or type(parts[0]) is not type(term):
        return any(_of_positions(part) for part in parts)
    if not has_tile(term) or set(homes(term)) == set(term.identity):
        return False
    seen: Any = _Seen()
    jax.eval_shape(lambda x: tile_on(x, seen), term)
    return seen.read


class _Seen:
    """A tile's place that remembers whether it was asked for."""

    dtype = jnp.float32
    read = False

    def __getattr__(self, name: str) -> Any:
        self.read = True
        zero = jnp.zeros((1, 1, 1, 1), jnp.int32)
        if name == "away":
            return (zero.astype(jnp.float32),)
        return zero.astype(jnp.float32) if name == "distance" else zero
