"""The cache of a Flax layer: variables of keys, values and whatever else is kept."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from pallas_attn.checks import arrays as check
from pallas_attn.layers.cache import Slot
from pallas_attn.rules import kind
from pallas_attn.shapes import Sizes


def cached(module: Any, name: str, x: Array, slot: Slot | None) -> Array:
    """All that a module keeps under a name: what is new, with what came before.

    Args:
        module: A bound flax module that decodes.
        name: Of the variable in the collection "cache".
        x: [*B, T, ...].
        slot: Where the new tokens go; None makes a cache of the shape of `x`.

    Returns:
        [*B, S, ...]; `x` itself without a slot.
    """
    kept = module.variable("cache", name, jnp.zeros, x.shape, x.dtype)
    if slot is None:
        return x
    kept.value = slot.written(kept.value, x)
    return kept.value


def slot_of(module: Any, sizes: Sizes, lengths: Any) -> Slot | None:
    """Where the new tokens of an attention layer go; None while its cache is made.

    Args:
        module: The layer, which decodes and is being called; its index moves on.
        sizes: Of the call.
        lengths: int32 [*B], how many of the T tokens are not padding, or None.

    Raises:
        ValueError: if there is no cache, it does not fit the call, or it is full.
    """
    if sizes.T != sizes.S:
        raise ValueError(
            "`inputs_k` must have the length of `inputs_q` where `decode` is True; "
            f"got {sizes.S} and {sizes.T}. The cache has the keys before."
        )
    there = module.has_variable("cache", "cached_key")
    if not there and not module.is_initializing():
        raise ValueError(
            "`decode` needs a cache; got variables without one. Make it: "
            "`layer.init(rng, inputs)['cache']`, with inputs as long as the "
            "longest sequence, and apply with mutable=['cache']."
        )
    zeros = lambda: jnp.zeros(sizes.leading, jnp.int32)
    index = module.variable("cache", "cache_index", zeros)
    if not there:
        return None
    longest = _places_of(module.get_variable("cache", "cached_key").shape, sizes)
    new = check.lengths("query_seq_lengths", lengths, sizes, sizes.T)
    shared = index.value.shape != sizes.leading
    if new is not None and shared:
        raise ValueError(
            "`query_seq_lengths` needs a `cache_index` for each entry, of shape "
            f"{sizes.leading}; got {index.value.shape}. Let this layer make the cache."
        )
    new = None if new is None else new.reshape(sizes.leading)
    slot = Slot(jnp.broadcast_to(index.value, sizes.leading), new, sizes.T, longest)
    slot.check()
    index.value = index.value + jnp.int32(sizes.T) if shared else slot.following
    return slot


def refuse_places(query_offset: Any, **others: Any) -> None:
    """Refuses what the index of the cache says of tokens while decoding.

    Args:
        query_offset: 0 where none was given.
        **others: None where they were not given.

    Raises:
        ValueError: if any was.
    """
    natural = isinstance(query_offset, int) and query_offset == 0
    given = {"query_offset": None if natural else query_offset, **others}
    for name, x in given.items():
        if x is not None:
            raise ValueError(
                f"`{name}` must be left out where `decode` is True: `cache_index` has "
                f"it; got {kind(x)}. `query_seq_lengths` tells padding from tokens."
            )


def _places_of(shape: tuple[int, ...], sizes: Sizes) -> int:
    """S of a cache that fits the call."""
    *batch, longest = shape[:-2]
    if tuple(batch) != sizes.leading or shape[-2:] != (sizes.K, sizes.H):
        letters = (*sizes.leading, "S", sizes.K, sizes.H)
        wanted = ", ".join(map(str, letters))
        raise ValueError(
            "`decode`: the cache must have the batch, key heads and head dim of the "
            f"call, [{wanted}]; got {shape}. Make one with inputs of this batch."
        )
    return longest
