"""Loads and stores of a kernel: views of arrays, masked; single numbers; masks."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_attn.tiled.block_ranges import cut_evenly
from pallas_attn.types import Index, Range, Ref, Scalar, View


i32 = jnp.int32


def load(at: View, mask: jax.Array | None, other: float = 0) -> jax.Array:
    """Entries of a view of an array; `other` where a mask is False."""
    if mask is None:
        return plgpu.load(at)
    fill = bool(other) if at.dtype == jnp.bool_ else other
    return plgpu.load(at, mask=mask, other=fill)


def store(at: View, mask: jax.Array | None, x: jax.Array, ref: Ref) -> None:
    """Write entries of a view of a ref, where a mask is not False."""
    plgpu.store(at, x.astype(ref.dtype), mask=mask)


def load_blocks(
    ref: Ref, lead: tuple[Index, ...], i: jax.Array, ok: jax.Array
) -> jax.Array:
    """Entries i (a vector) of ref[*lead, :]; 0 where not ok."""
    lead = tuple(jnp.broadcast_to(x, i.shape) for x in lead)
    i = jnp.clip(i, 0, ref.shape[-1] - 1)
    return plgpu.load(ref.at[(*lead, i)], mask=ok, other=0)


def load_all(ref: View) -> jax.Array:
    """All of a small array, its sides powers of two."""
    return plgpu.load(ref)


def load_where(at: View, ok: jax.Array) -> jax.Array:
    """Entries of a view of an array; 0 where not ok."""
    return plgpu.load(at, mask=ok, other=0)


def store_where(at: View, x: jax.Array, ok: jax.Array) -> None:
    """Write entries of a view of an array, where ok."""
    plgpu.store(at, x.astype(at.dtype), mask=ok)


def store_row(ref: Ref, lead: tuple[Index, ...], x: jax.Array) -> None:
    """Write all of ref[*lead, :], a power of two long."""
    plgpu.store(ref.at[(*lead, pl.ds(lead[-1] * 0, x.shape[0]))], x.astype(ref.dtype))


def load_number(ref: Ref, index: tuple[Index, ...]) -> jax.Array:
    """One entry of an array, at traced indices."""
    return plgpu.load(ref.at[index])


def store_number(ref: Ref, index: tuple[Index, ...], x: Index | Scalar) -> None:
    """Write one entry of an array."""
    plgpu.store(ref.at[index], jnp.asarray(x).astype(ref.dtype))


def inside(i0: Index, n: int, limits: Range, size: int) -> jax.Array | None:
    """[n]: which of i0, i0 + 1, ... lie in the range; None if all of any block do."""
    if cut_evenly(limits, size, n):
        return None
    i = i0 + jnp.arange(n, dtype=i32)
    ok = i < limits[1]
    first = limits[0]
    return ok if isinstance(first, int) and first == 0 else ok & (i >= first)


def both(checks: list[jax.Array], shape: tuple[int, ...]) -> jax.Array | None:
    """All of the checks, as one of that shape; None if there is none."""
    if not checks:
        return None
    return jnp.broadcast_to(functools.reduce(jnp.logical_and, checks), shape)


def column(x: jax.Array, ndim: int) -> jax.Array:
    """A vector, or the same as a column."""
    return x if ndim == 1 else x[:, None]
