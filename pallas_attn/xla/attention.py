"""Softmax attention chunk by chunk: linear memory on any platform.

`lax.map` over `jax.checkpoint`-ed chunks of query rows. JAX differentiates it, twice
too and in forward mode; a backward keeps no scores but computes each chunk's again.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_attn.bias.base import Added, homes, Region
from pallas_attn.call import Call, positions, Visibility
from pallas_attn.visible import allowed, seen, seen_added, weighty


ROWS = 128  # query rows of a chunk


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K h"],
    added: Added,
    visibility: Visibility,
    call: Call,
) -> tuple[Float[Array, "B T N h"], Float[Array, "B T N"]]:
    """Attention of every query; see `reference.attention.attend`."""
    size = min(ROWS, call.T)
    chunks = -(-call.T // size)
    # the last chunk ends with the last row and may overlap the one before
    starts = jnp.minimum(jnp.arange(chunks, dtype=jnp.int32) * size, call.T - size)
    overlap = chunks * size - call.T

    @jax.checkpoint
    def chunk(start: Array) -> tuple[Array, Array]:
        q, bias, seeing = _rows(query, added, visibility, call, start, size)
        return _attend(q, key, value, bias, seeing, dataclasses.replace(call, T=size))

    def joined(x: Array) -> Array:
        """[chunks, B, size, ...] as [B, T, ...]."""
        first, last = x[:-1], x[-1][:, overlap:]
        first = jnp.moveaxis(first, 0, 1).reshape(call.B, -1, *x.shape[3:])
        return jnp.concatenate([first, last], axis=1)

    output, lse = lax.map(chunk, starts)
    return joined(output), joined(lse)


def _rows(
    query: Array,
    added: Added,
    visibility: Visibility,
    call: Call,
    start: Array,
    size: int,
) -> tuple[Array, Added, Visibility]:
    """The rows start..start + size of all that has rows."""

    def cut(x: Array, axis: int) -> Array:
        if x.shape[axis] != call.T or call.T == 1:
            return x
        return lax.dynamic_slice_in_dim(x, start, size, axis)

    axes = {"query": 1, "pair": 2}
    terms = tuple(
        dataclasses.replace(
            term,
            **{
                name: cut(getattr(term, name), axes[home])
                for name, home in homes(term).items()
                if home in axes
            },
        )
        for term in added.terms
    )
    products = tuple((cut(a, 1), b) for a, b in added.products)
    queries, keys = positions(call, visibility)
    lengths = visibility.query_lengths
    segments = visibility.query_segments
    mask = visibility.mask
    seeing = dataclasses.replace(
        visibility,
        offset=None,
        query_positions=cut(queries, 2),
        key_positions=keys,
        query_lengths=None if lengths is None else lengths - start,
        query_segments=None if segments is None else cut(segments, 1),
        mask=None if mask is None else cut(mask, 2),
    )
    return cut(query, 1), Added(terms, products), seeing


def _attend(
    query: Array,
    key: Array,
    value: Array,
    added: Added,
    visibility: Visibility,
    call: Call,
) -> tuple[Float[Array, "B T N h"], Float[Array, "B T N"]]:
    """Attention of one chunk."""
    dtype = jnp.float64 if call.dtype == "float64" else jnp.float32
    dot = functools.partial(
        jnp.einsum, precision=call.precision, preferred_element_type=dtype
    )
    queries, keys = positions(call, visibility)
    region = Region(queries[..., :, None], keys[..., None, :], dtype)
    q = query.reshape(call.B, call.T, call.K, call.G, call.H)
    shape = (call.B, call.N, call.T, call.S)

    places = jnp.broadcast_to(allowed(call, visibility), shape)
    by_key = places.reshape(call.B, call.K, call.G, call.T, call.S).any(2)
    q = seen(places, query, "query").reshape(q.shape)
    k, v = seen(by_key, key, "key"), seen(by_key, value, "key")
    values = seen_added(places, added)
    values = values.on(region)
    t = call.scale * dot("BTKGH,BSKH->BKGTS", q, k).reshape(shape)
    t = sum(values, t)
    places = functools.reduce(jnp.logical_and, map(weighty, (t, *values)), places)
    alive = places.any(3)
    t = jnp.where(places, t, -jnp.inf)
    m = lax.stop_gradient(jnp.where(alive, t.max(3), 0))
    e = jnp.exp(t - m[..., None])
    l = jnp.where(alive, e.sum(3), 1)
    e = e.reshape(call.B, call.K, call.G, call.T, call.S).astype(value.dtype)
    o = dot("BKGTS,BSKh->BTKGh", e, v).reshape(call.B, call.T, call.N, call.h)
    alive, l, m = (jnp.swapaxes(x, 1, 2) for x in (alive, l, m))
    o = jnp.where(alive[..., None], o / l[..., None], 0)
    lse = jnp.where(alive, m + jnp.log(l), -jnp.inf)
    return o.astype(query.dtype), lse
