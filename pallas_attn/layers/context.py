"""What a bias module sees of a call of its attention layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_attn.layers.cache import Cache, Slot
from pallas_attn.layers.inputs import counted
from pallas_attn.rules import wrong_shape


COORDINATES = ("query_coordinates", "key_coordinates")


@dataclass(frozen=True)
class BiasContext:
    """What a bias module sees of a call of its attention layer.

    *B are the leading axes of the inputs; S counts the places of the cache where the
    layer decodes. Axes of positions are 1 where they are shared.

    Args:
        inputs_q: [*B, T, features].
        inputs_kv: [*B, S, features]; while decoding the new tokens alone, [*B, T, ..]:
            see `kept`.
        num_heads: N.
        query_positions: int32 [*#B, #N, T].
        key_positions: int32 [*#B, #N, S].
        offset: An int or int32 [*#B], the position of query 0, where queries stand one
            after the other and keys do from 0 on; None where positions were given.
        pair: Floating [*#A, T, S, channels], or None; *A are the first of *B.
        query_coordinates: Floating [*#B, T, d], or None.
        key_coordinates: Floating [*#B, S, d], or None.
        query: [*B, T, N, H], as the layer projects, normalizes and rotates it; without
            the scale. None, as those of key and value, where no layer made the context.
        key: [*B, S, K, H], likewise; while decoding all that the cache has.
        value: [*B, S, K, h], likewise.
        slot: Where new tokens go in the layer's cache; None while it is made.
        cache: Of a layer that decodes; None: of another.

    Example:
        >>> import jax, jax.numpy as jnp, pallas_attn
        >>> from flax import linen as nn
        >>> from pallas_attn.linen import BiasModule, MultiHeadAttention
        >>> class Importance(BiasModule):  # b_ij = w_n . x_j
        ...     @nn.compact
        ...     def __call__(self, context):
        ...         of_key = nn.Dense(context.num_heads)(context.inputs_kv)
        ...         of_key = context.kept(self, "importance", of_key)  # [B, S, N]
        ...         of_key = jnp.swapaxes(of_key, -1, -2)[..., None, :]
        ...         return pallas_attn.DenseBias(of_key)  # [B, N, 1, S]
        >>> layer = MultiHeadAttention(num_heads=2, bias=Importance())
        >>> x = jnp.ones((1, 5, 8))
        >>> layer.init_with_output(jax.random.key(0), x)[0].shape
        (1, 5, 8)
    """

    inputs_q: Float[Array, "*B T features"]
    inputs_kv: Float[Array, "*B S features"]
    num_heads: int
    query_positions: Int[Array, "*#B #N T"]
    key_positions: Int[Array, "*#B #N S"]
    offset: int | Int[Array, "*#B"] | None = None
    pair: Float[Array, "*#A T S channels"] | None = None
    query_coordinates: Float[Array, "*#B T d"] | None = None
    key_coordinates: Float[Array, "*#B S d"] | None = None
    query: Float[Array, "*B T N H"] | None = None
    key: Float[Array, "*B S K H"] | None = None
    value: Float[Array, "*B S K h"] | None = None
    slot: Slot | None = None
    cache: Cache | None = None

    @property
    def batch(self) -> tuple[int, ...]:
        """The sizes of the leading axes."""
        return self.inputs_q.shape[:-2]

    @property
    def decode(self) -> bool:
        """Whether the layer has a cache."""
        return self.cache is not None

    @property
    def T(self) -> int:
        """Queries."""
        return self.inputs_q.shape[-2]

    @property
    def S(self) -> int:
        """Keys."""
        return self.key_positions.shape[-1]

    def kept(self, module: Any, name: str, x: Array) -> Array:
        """What a module makes of every key: while decoding, with that of keys before.

        It lies in the cache of the attention layer: a module may serve several.

        Args:
            module: The bias module, which is being called.
            name: Of what is kept; the variable's name has the module's before it.
            x: [*B, S, ...], made of `inputs_kv`: while decoding [*B, T, ...].

        Returns:
            [*B, S, ...].
        """
        if self.cache is None:
            return x
        return self.cache.kept(self.cache.name_of(module, name), x, self.slot)


def completed(given: BiasContext, read: frozenset[str]) -> BiasContext:
    """The context of a call with what its layer's cache adds.

    Args:
        given: What the call gave: its own positions and coordinates.
        read: The optional inputs that the layer's bias reads.

    Raises:
        ValueError: if an optional input is given that no bias reads.
    """
    for name in ("pair", *COORDINATES):
        asked = "coordinates" if name in COORDINATES else name
        if getattr(given, name) is not None and asked not in read:
            raise ValueError(
                f"`{name}` must be read by the layer's `bias`; got one that does "
                f"not. Leave `{name}` out, or add a module that reads it."
            )
    axes, offset, at_keys = len(given.batch), given.offset, given.key_positions
    if offset is not None and not isinstance(offset, int) and offset.ndim == 0:
        offset = offset.reshape((1,) * axes)
    if given.slot is not None:
        at_keys = counted(given.slot.max_length, axes)
    given = replace(given, offset=offset, key_positions=at_keys)
    of_queries, of_keys = given.query_coordinates, given.key_coordinates
    oneself = given.inputs_kv is given.inputs_q
    if of_queries is None or of_keys is not None or not oneself:
        return given
    of_keys = of_queries
    if given.cache is not None:
        shape = (*given.batch, *jnp.shape(of_queries)[-2:])
        of_queries = jnp.broadcast_to(of_queries, shape)
        of_keys = given.cache.kept("cached_coordinates", of_queries, given.slot)
    return replace(given, query_coordinates=of_queries, key_coordinates=of_keys)


def coordinates(
    context: BiasContext, position_unit: float | None
) -> tuple[Float[Array, "*#B T d"], Float[Array, "*#B S d"]]:
    """Points of queries and keys: those of the call, or positions on a line.

    Args:
        context: The inputs of the layer.
        position_unit: How many positions make a distance of 1; None: read coordinates.

    Returns:
        Two arrays with the leading axes of the inputs, each 1 or full.

    Raises:
        ValueError: if there are none, or a shape is wrong.
    """
    if position_unit is not None:
        for side in (context.query_positions, context.key_positions):
            if side.shape[-2] != 1:
                raise ValueError(
                    "`position_unit` needs positions that heads share; got positions "
                    f"of shape {side.shape}. Give coordinates to the layer's call."
                )
        query, key = context.query_positions, context.key_positions
        return _on_a_line(query, position_unit), _on_a_line(key, position_unit)
    query, key = context.query_coordinates, context.key_coordinates
    if query is None or key is None:
        name = "query_coordinates" if query is None else "key_coordinates"
        raise ValueError(
            f"`{name}` must be given to the layer's call, for its bias reads them; got "
            "None. Pass coordinates, or set `position_unit` to read positions."
        )
    return (
        _placed("query_coordinates", query, context.batch, context.T),
        _placed("key_coordinates", key, context.batch, context.S),
    )


def _on_a_line(
    positions: Int[Array, "*#B 1 T"], unit: float
) -> Float[Array, "*#B T 1"]:
    return positions[..., 0, :, None].astype(jnp.float32) / unit


def _placed(
    name: str, x: Any, batch: tuple[int, ...], length: int
) -> Float[Array, "*#B L d"]:
    x = jnp.asarray(x)
    leading = (1,) * (len(batch) + 2 - x.ndim) + x.shape[:-2]
    fits = len(leading) == len(batch) and all(
        m in (1, n) for m, n in zip(leading, batch, strict=True)
    )
    if x.ndim < 2 or not fits or x.shape[-2] != length:
        rule = f"[*#B, {length}, d] with *B = {batch}"
        wrong_shape(name, x, rule, "Give a point for each token.")
    return x.reshape(*leading, *x.shape[-2:])
