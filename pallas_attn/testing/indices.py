"""Every index of the interpreted kernels, held against the shape of its array.

The interpreter pads or clamps what a GPU would read from other memory, or fault at; so
a stray index is seen only where somebody looks at it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_attn.triton import memory


i32 = jnp.int32
u32 = jnp.uint32


class Stray(NamedTuple):
    """A load or store that left its array: the axis, and indices it used there."""

    what: str  # "load" or "store"
    shape: tuple[int, ...]  # of the array
    axis: int
    least: int
    most: int


@contextlib.contextmanager
def watched() -> Iterator[list[Stray]]:
    """A context in which kernels are traced with every index looked at.

    A program that was traced in it goes on to look, outside it too. Its strays are in
    the list once it has run and `jax.effects_barrier()` returned. Masked-off places do
    not count: nothing is read there.
    """
    strays: list[Stray] = []
    pallas: Any = memory.plgpu

    def load(ref: Any, *, mask: Any = None, **options: Any) -> Any:
        _look(strays, "load", ref, mask)
        return pallas.load(ref, mask=mask, **options)

    def store(ref: Any, x: Any, *, mask: Any = None, **options: Any) -> Any:
        _look(strays, "store", ref, mask)
        return pallas.store(ref, x, mask=mask, **options)

    seen: Any = SimpleNamespace(load=load, store=store)
    memory.plgpu = seen
    try:
        yield strays
    finally:
        memory.plgpu = pallas


def _look(strays: list[Stray], what: str, ref: Any, mask: Any) -> None:
    """As few operations as may be, for compiling them is what the law costs."""
    if not getattr(ref, "transforms", None):
        return  # the whole array
    view = ref.transforms[-1]
    shape = view.get_indexer_shape()
    places = _places(view)
    sizes = tuple(getattr(ref, "sizes", view.shape))  # without bands (guards.py)
    outside: Any = False
    for place, size in zip(places, sizes, strict=True):  # below 0: past 2^31
        outside |= jax.lax.bitcast_convert_type(place, u32) >= u32(size)
    if mask is not None:
        outside &= jnp.broadcast_to(mask, shape)

    def note(outside: Any, *places: Any) -> None:
        for axis, (place, size) in enumerate(zip(places, sizes, strict=True)):
            bad = outside & ((place < 0) | (place >= size))
            if bad.any():
                place = np.broadcast_to(place, bad.shape)[bad]
                least, most = int(place.min()), int(place.max())
                strays.append(Stray(what, sizes, axis, least, most))

    jax.lax.cond(
        jnp.any(outside),
        lambda *x: jax.debug.callback(note, *x),
        lambda *x: None,
        *(outside, *places),
    )


def _places(view: Any) -> list[jax.Array]:
    """The indices of a view along each axis of its array, to broadcast together."""
    rank = len(view.get_indexer_shape())
    sliced = [hasattr(i, "start") and hasattr(i, "size") for i in view.indices]
    behind = sum(sliced)  # a slice has an axis of its own, after those of vectors
    axis, places = 0, []
    for index, is_slice in zip(view.indices, sliced, strict=True):
        if is_slice:
            axis += 1
            place, after = (
                index.start + jnp.arange(index.size, dtype=i32),
                behind - axis,
            )
        else:
            place, after = jnp.asarray(index, i32), behind
        if place.ndim:
            before = rank - place.ndim - after
            place = place.reshape((1,) * before + place.shape + (1,) * after)
        places.append(place)
    return places
