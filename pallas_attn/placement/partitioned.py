"""A function that XLA partitions as its arrays lie: by batch and heads, else whole."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding

from pallas_attn.call import Call
from pallas_attn.placement.explicit import Layout, Names, names_of
from pallas_attn.tracing.once import once


# (the layout of a device's part, or None for the whole; arrays) -> arrays
Run = Callable[..., tuple[Any, ...]]


def partitioned(
    run: Run,
    call: Call,
    flat: Sequence[Any],
    letters: Sequence[str],
    results: Sequence[Any],
    made: Sequence[str],
) -> tuple[Any, ...]:
    """The results of run(None, *flat), or on each device of its part of the arrays.

    Args:
        run: (layout, arrays) -> arrays.
        call: The whole call.
        flat: The arrays.
        letters: Of each of them; sharded along B, N and K.
        results: Shapes of what is made.
        made: Letters of what is made.
    """
    whole = functools.partial(run, None)
    split = custom_partitioning(lambda *flat: whole(*flat))

    def shardings(mesh: Any, args: Any) -> tuple[Layout, Any, Any]:
        layout = _layout(mesh, args, letters, call)
        place = lambda axes, x: NamedSharding(mesh, layout.spec(axes, x.shape))
        return (
            layout,
            tuple(map(place, made, results)),
            tuple(map(place, letters, args)),
        )

    def partition(mesh: Any, args: Any, results: Any) -> Any:
        layout, after, before = shardings(mesh, args)
        return mesh, functools.partial(run, layout), after, before

    rule, sizes, alone = _rule(call, flat, letters, results, made)
    more: dict[str, Any] = {"need_replication_factors": alone, **sizes}
    split.def_partition(
        partition=partition,
        infer_sharding_from_operands=lambda mesh, args, _: shardings(mesh, args)[1],
        sharding_rule=rule,
        **more,
    )
    mapped: Any = custom_vmap(lambda *flat: split(*flat))

    @mapped.def_vmap
    def _(size: int, batched: Sequence[bool], *flat: Any) -> Any:
        del size
        axes = tuple(0 if b else None for b in batched)
        made = jax.vmap(whole, axes)(*flat)
        return made, jax.tree.map(lambda _: True, made)

    return once(mapped)(*flat)


def _rule(
    call: Call,
    flat: Sequence[Any],
    letters: Sequence[str],
    results: Sequence[Any],
    made: Sequence[str],
) -> tuple[str, dict[str, int], tuple[str, ...]]:
    """Which axes are sharded alike, as Shardy writes it; all others are whole."""
    alone: list[str] = []

    def factor(letter: str, size: int) -> str:
        if size > 1 and letter == "B":
            return "b"
        if size > 1 and letter == "K":
            return "k"
        if size > 1 and letter == "N":
            return "k" if call.G == 1 else "g" if call.K == 1 else "(k g)"
        alone.append(f"x{len(alone)}")
        return alone[-1]

    def axes(x: Any, letters: str) -> str:
        padded = letters.ljust(len(x.shape), "_")
        return " ".join(map(factor, padded, x.shape))

    left = ", ".join(map(axes, flat, letters))
    right = ", ".join(map(axes, results, made))
    sizes = {"g": call.G} if call.G > 1 and call.K > 1 else {}
    return f"{left} -> {right}", sizes, tuple(alone)


def _layout(mesh: Any, args: Any, letters: Sequence[str], call: Call) -> Layout:
    """Over which axes of a mesh batch and heads lie, as the first sharded array has it.

    Only as many as divide them evenly; heads only as far as key heads do.
    """
    found: dict[str, Names] = {"B": (), "N": ()}
    for x, axes in zip(args, letters, strict=True):
        spec = getattr(x.sharding, "spec", ())
        for letter, entry in zip(axes, spec, strict=False):
            if entry is not None and letter in found and not found[letter]:
                found[letter] = names_of(entry)

    def fitting(names: Names, *sizes: int) -> Names:
        while any(n % Layout(mesh, names, ()).entries for n in sizes):
            names = names[:-1]
        return names

    batch = fitting(found["B"], call.B)
    heads = tuple(a for a in found["N"] if a not in batch)
    return Layout(mesh, batch, fitting(heads, call.N, *([call.K] * (call.K > 1))))
