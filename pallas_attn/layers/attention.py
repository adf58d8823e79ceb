"""Attention between the projections of a layer, whatever library made the layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict

from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float, Int

from pallas_attn.api import attended, weights_of
from pallas_attn.bias.base import terms_of
from pallas_attn.canonical import canonical
from pallas_attn.checks import arrays as check
from pallas_attn.config import Config
from pallas_attn.implementations import Implementation
from pallas_attn.layers.cache import Cache, refuse_places, Slot
from pallas_attn.layers.context import BiasContext, completed
from pallas_attn.layers.inputs import standing
from pallas_attn.layers.mask import spoiled, truth
from pallas_attn.normalizers.entmax import Entmax
from pallas_attn.normalizers.softmax import Softmax
from pallas_attn.poison import poisoned
from pallas_attn.rules import wrong_shape
from pallas_attn.shapes import Sizes


# query [*B, T, N, H], key [*B, S, K, H] and the positions of each -> query, key
QueryKeyHook = Callable[[Array, Array, Array, Array], tuple[Array, Array]]
# output [*B, T, N, h], residual [*B, T, N], inputs_q [*B, T, features] -> output
OutputHook = Callable[[Array, Array, Array], Array]


class Layer(Protocol):
    """The fields of `MultiHeadAttention` that attention itself reads."""

    num_heads: int
    dtype: Any
    broadcast_dropout: bool
    precision: Any
    is_causal: bool
    local_window_size: int | tuple[int, int] | None
    logits_soft_cap: float | None
    query_key_hook: QueryKeyHook | None
    output_hook: OutputHook | None
    scale: float | None
    implementation: Implementation | Sequence[Implementation] | None
    config: Config | None


class Named(TypedDict, total=False):
    """The conditions of a call but for its mask: for type checkers alone."""

    query_seq_lengths: Int[Array, "*B"] | None
    key_value_seq_lengths: Int[Array, "*B"] | None
    query_segment_ids: Int[Array, "*B T"] | None
    key_segment_ids: Int[Array, "*B S"] | None
    query_positions: Any
    key_positions: Any
    query_offset: Any
    pair: Any
    query_coordinates: Any
    key_coordinates: Any


@dataclass(frozen=True)
class Conditions:
    """What a layer's call says beside its inputs, as `MultiHeadAttention` has it."""

    mask: Any = None
    query_seq_lengths: Int[Array, "*B"] | None = None
    key_value_seq_lengths: Int[Array, "*B"] | None = None
    query_segment_ids: Int[Array, "*B T"] | None = None
    key_segment_ids: Int[Array, "*B S"] | None = None
    query_positions: Any = None
    key_positions: Any = None
    query_offset: Any = 0
    pair: Float[Array, "*#A T S channels"] | None = None
    query_coordinates: Float[Array, "*#B T d"] | None = None
    key_coordinates: Float[Array, "*#B S d"] | None = None


def context_of(
    layer: Layer,
    inputs: tuple[Float[Array, "*B T features"], Float[Array, "*B S features"]],
    projected: tuple[Array, Array, Array],
    given: Conditions,
    *,
    cache: Cache | None,
    read: frozenset[str],
) -> BiasContext:
    """What bias modules see of a call: where tokens stand, heads with those cached.

    Args:
        layer: Which is being called.
        inputs: Of queries, and of keys.
        projected: Query [*B, T, N, H], key [*B, S, K, H] and value [*B, S, K, h].
        given: What else the call says.
        cache: Of a layer that decodes; None: of another.
        read: The optional inputs that the layer's bias reads.

    Raises:
        ValueError: if a condition is wrong, nobody reads it, or the cache has it.
    """
    query, key, value = projected
    *batch, T, N, H = query.shape
    S, K, h = value.shape[-3:]
    sizes = Sizes(tuple(batch), T, S, N, K, H, h)
    slot = None if cache is None else cache.slot(sizes, given.query_seq_lengths)
    if slot is not None:
        refuse_places(
            given.query_offset,
            query_positions=given.query_positions,
            key_positions=given.key_positions,
            key_value_seq_lengths=given.key_value_seq_lengths,
        )
    offset = check.offset(_offset(given, slot), sizes)
    positions = (given.query_positions, given.key_positions)
    positions = check.positions(*positions, offset, sizes)
    at = standing(positions, offset, sizes)
    if layer.query_key_hook is not None:  # new keys stand where queries do
        key_at = at[1] if slot is None else at[0]
        query, key = layer.query_key_hook(query, key, at[0], key_at)
    if cache is not None:
        key = cache.kept("cached_key", key, slot)
        value = cache.kept("cached_value", value, slot)
    context = BiasContext(
        *inputs,
        layer.num_heads,
        *at,
        offset if positions[0] is positions[1] is None else None,
        query=query,
        key=key,
        value=value,
        pair=given.pair,
        query_coordinates=given.query_coordinates,
        key_coordinates=given.key_coordinates,
        slot=slot,
        cache=cache,
    )
    return completed(context, read)


def attend(
    layer: Layer,
    context: BiasContext,
    bias: Any,
    given: Conditions,
    *,
    normalizer: Softmax | Entmax,
    dropout: tuple[float, Array | None],
    sow: Callable[[Array], None] | None,
) -> Float[Array, "*B T N h"]:
    """What a layer projects to its output.

    Args:
        layer: Which is being called.
        context: Of the call.
        bias: The value of the layer's bias, or None.
        given: What the call says beside its inputs.
        normalizer: Of the layer, its learned sink with it.
        dropout: The rate of this call, and its key.
        sow: Takes the dense weights before dropout, [*B, N, T, S]; None: nobody does.

    Raises:
        ValueError: if an argument of `dot_product_attention` is wrong, or keys after a
            query would never fade.
    """
    causal = layer.is_causal or context.decode
    if not causal and given.mask is None:
        _refuse_unfading(layer, bias)
    slot, (rate, rng) = context.slot, dropout
    query, key, value = promote_dtype(
        context.query, context.key, context.value, dtype=layer.dtype
    )
    call = canonical(
        query,
        key,
        value,
        bias,
        truth(given.mask),
        scale=layer.scale,
        is_causal=causal,
        query_seq_lengths=given.query_seq_lengths,
        key_value_seq_lengths=given.key_value_seq_lengths,
        local_window_size=layer.local_window_size,
        query_offset=_offset(given, slot),
        query_positions=given.query_positions,
        key_positions=given.key_positions,
        query_segment_ids=given.query_segment_ids,
        key_segment_ids=given.key_segment_ids,
        normalizer=normalizer,
        logits_soft_cap=layer.logits_soft_cap,
        dropout_rate=rate,
        dropout_rng=rng,
        broadcast_dropout=layer.broadcast_dropout,
        precision=layer.precision,
        implementation=layer.implementation,
        config=layer.config,
    )
    if sow is not None:
        sow(weights_of(call, dropped=False))
    x, residual = attended(call, return_residual=True)
    x = spoiled(given.mask, x)
    if slot is not None:
        x = poisoned(x, slot.homeless[..., None, None])
    if layer.output_hook is None:
        return x
    hooked = layer.output_hook(x, residual, context.inputs_q)
    if hooked.shape != x.shape:
        wrong_shape(
            "output_hook",
            hooked,
            f"the output it was given, {x.shape}",
            "It is a gate.",
        )
    return hooked


def _offset(given: Conditions, slot: Slot | None) -> Any:
    return given.query_offset if slot is None else slot.index


def _refuse_unfading(layer: Layer, bias: Any) -> None:
    """Refuses gates under which keys after a query, and they alone, never fade."""
    window = layer.local_window_size
    ends = isinstance(window, tuple | list) and window[-1] == 0
    if not ends and any(term.fades for term in terms_of(bias)):
        raise ValueError(
            "`bias`: a ForgetGate fades what comes before a query, not what comes "
            "after; got is_causal=False, no window that ends at the query and no "
            "mask. Write `MultiHeadAttention(..., is_causal=True)`."
        )
