"""Kernels between guard bands: no buffer ends where its array ends.

Every array that a kernel gets lies inside a larger one. What surrounds an input is NaN
(0x7f7f7f7f for integers), so that a number read past an end shows in a result; what
surrounds an output is a number that is looked for afterwards. An output starts as the
poison, which fresh memory does not: what no kernel writes shows too.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_attn.triton import launch, memory


# Numbers on either side of an array, at least; whole entries of its first axis.
BAND = 256
# Around an output: a number of every dtype that no kernel makes by chance.
MARK = 107


@contextlib.contextmanager
def guarded() -> Iterator[list[str]]:
    """A context in which kernels are traced between guard bands.

    Once such a program has run and `jax.effects_barrier()` returned, the list names
    each kernel that wrote into a band.
    """
    damage: list[str] = []
    pallas, triton = launch.pl, memory.plgpu

    def load(at: Any, **options: Any) -> Any:
        return triton.load(_banded(at), **options)

    def store(at: Any, x: Any, **options: Any) -> None:
        triton.store(_banded(at), x, **options)

    def pallas_call(kernel: Any, **options: Any) -> Any:
        return _between_bands(pallas.pallas_call, damage, kernel, **options)

    calls: Any = SimpleNamespace(
        pallas_call=pallas_call, program_id=pallas.program_id, cdiv=pallas.cdiv
    )
    accesses: Any = SimpleNamespace(load=load, store=store)
    launch.pl, memory.plgpu = calls, accesses
    try:
        yield damage
    finally:
        launch.pl, memory.plgpu = pallas, triton


def _between_bands(
    pallas_call: Callable[..., Any],
    damage: list[str],
    kernel: Any,
    *,
    out_shape: Any,
    input_output_aliases: dict[int, int],
    **options: Any,
) -> Callable[..., Any]:
    wanted, made = jax.tree.flatten(out_shape)
    several = isinstance(out_shape, (tuple, list))

    def run(*inputs: Any) -> Any:
        leaves, given = jax.tree.flatten(inputs)
        fed = input_output_aliases.values()
        fresh = [n for n in range(len(wanted)) if n not in fed]
        outputs = [_poison(wanted[n].shape, wanted[n].dtype) for n in fresh]
        arrays = [
            _with_bands(x, MARK if i in input_output_aliases else None)
            for i, x in enumerate(leaves)
        ] + [_with_bands(x, MARK) for x in outputs]
        aliases = {len(leaves) + i: n for i, n in enumerate(fresh)}

        def inner(*refs: Any) -> None:
            first = len(leaves) + len(fresh)
            ins = given.unflatten(map(_inside, refs[: len(leaves)], leaves))
            outs = made.unflatten(map(_inside, refs[first:], wanted))
            kernel(*ins, *(outs if several else (outs,)))

        found = pallas_call(
            inner,
            out_shape=[jax.ShapeDtypeStruct(_around(x), x.dtype) for x in wanted],
            input_output_aliases={**input_output_aliases, **aliases},
            **options,
        )(*arrays)
        for x, bare in zip(found, wanted, strict=True):
            _compare(damage, options["name"], x, bare)
        return made.unflatten(
            x[_band(bare) : x.shape[0] - _band(bare)]
            for x, bare in zip(found, wanted, strict=True)
        )

    return run


def _band(x: Any) -> int:
    """Entries of the first axis in a band."""
    return math.ceil(BAND / max(1, math.prod(x.shape[1:])))


def _around(x: Any) -> tuple[int, ...]:
    return (x.shape[0] + 2 * _band(x), *x.shape[1:])


def _poison(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.full(shape, jnp.nan, dtype)
    whole = {1: 0x7F, 2: 0x7F7F, 4: 0x7F7F7F7F}[jnp.dtype(dtype).itemsize]
    return jnp.full(shape, whole, dtype)


def _with_bands(x: jax.Array, mark: int | None) -> jax.Array:
    shape = (_band(x), *x.shape[1:])
    band = _poison(shape, x.dtype) if mark is None else jnp.full(shape, mark, x.dtype)
    return jnp.concatenate([band, x, band])


def _compare(damage: list[str], name: str, x: jax.Array, bare: Any) -> None:
    band = _band(bare)
    bands = jnp.concatenate([x[:band], x[x.shape[0] - band :]])

    def note(whole: Any) -> None:
        if not whole:
            damage.append(f"{name} writes past an end of {bare.shape} {bare.dtype}")

    jax.debug.callback(note, jnp.all(bands == jnp.asarray(MARK, x.dtype)))


@dataclass(frozen=True)
class _Inside:
    """A ref as a kernel knows it: without the bands of the array behind it."""

    ref: Any
    shape: tuple[int, ...]
    dtype: Any

    @property
    def at(self) -> Any:
        return _At(self)


@dataclass(frozen=True)
class _At:
    inside: _Inside

    def __getitem__(self, index: Any) -> _View:
        index = index if isinstance(index, tuple) else (index,)
        return _View(self.inside, index)


@dataclass(frozen=True)
class _View:
    """`ref.at[index]` of what lies between the bands."""

    inside: _Inside
    index: tuple[Any, ...]

    @property
    def dtype(self) -> Any:
        return self.inside.dtype

    @property
    def sizes(self) -> tuple[int, ...]:
        """What every index has to stay below."""
        return self.inside.shape

    @property
    def transforms(self) -> Any:
        """Those of the index as the kernel wrote it."""
        return self.inside.ref.at[self.index].transforms

    def banded(self) -> Any:
        first, *rest = self.index
        band = _band(self.inside)
        if isinstance(first, pl.Slice):
            first = pl.ds(first.start + band, first.size)
        else:
            first = first + jnp.int32(band)
        return self.inside.ref.at[(first, *rest)]


def _inside(ref: Any, x: Any) -> _Inside:
    return _Inside(ref, tuple(x.shape), jnp.dtype(x.dtype))


def _banded(at: Any) -> Any:
    if isinstance(at, _Inside):
        at = at.at[pl.ds(0, at.shape[0])]
    return at.banded() if isinstance(at, _View) else at
