"""Under automatic sharding: each device runs kernels on its batch entries and heads.

XLA cannot look into a kernel and would gather its operands. So the forward and the
backward of a call are one custom-partitioned function each: what is sharded by batch
and heads stays so, all else is whole on each device, and gradients of what devices
share are summed over them. On one device, and under `vmap`, nothing of this remains.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding

from pallas_attn.call import Call
from pallas_attn.letters import axes_of
from pallas_attn.placement.explicit import Layout, Names, names_of, part
from pallas_attn.problem import Problem
from pallas_attn.tracing.names import named
from pallas_attn.tracing.once import once


# What a result of so many axes is: shares, a residual, an output.
RESULTS = {2: "BN", 3: "BTN", 4: "BTNh"}

# A call is traced with so many times the entries and heads to see which axes follow.
ENTRIES, HEADS = 3, 5

# (the layout of a device's part, or None for the whole; arrays) -> arrays
Run = Callable[..., tuple[Any, ...]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(function: Any, problem: Problem) -> tuple[Any, ...]:
    """The results of a function of a problem, partitioned by batch and heads."""
    flat, tree = jax.tree.flatten(problem)

    def run(layout: Layout | None, *flat: Any) -> tuple[Any, ...]:
        return tuple(function(_part(jax.tree.unflatten(tree, flat), layout)))

    letters = letters_of(problem)
    shapes = jax.eval_shape(functools.partial(run, None), *flat)
    made = [RESULTS[x.ndim] for x in shapes]
    return named(partitioned(run, problem.call, flat, letters, shapes, made))


def _forward(function: Any, marked: Any) -> Any:
    problem = jax.tree.map(lambda x: x.value, marked)
    call = problem.call
    flat, tree = jax.tree.flatten(problem)
    asked = tuple(bool(x) for x in jax.tree.leaves(_asked(marked)))
    letters = letters_of(problem)
    pulled = Pulled(function, tree, asked)

    whole, found = pulled.traced(call, None, flat)
    outs, places = _distinct(whole.jaxpr, len(flat))
    every: list[Any] = list(whole.out_avals)
    results = [every[i] for i in outs]
    count = len(every) - found.size
    made = pulled.letters(call, flat, letters, results, outs)
    scalar = [not x.shape for x in results]

    def run(layout: Layout | None, *flat: Any) -> tuple[Any, ...]:
        if layout is None:
            from jax.extend.core import jaxpr_as_fun  # which loads Pallas

            values, size = jaxpr_as_fun(whole)(*flat), call
        else:
            values, size = pulled.run(call, layout, flat)[0], _small(call, layout)
        boxed = (
            jnp.broadcast_to(values[i], (size.B, size.N)) if s else values[i]
            for i, s in zip(outs, scalar, strict=True)
        )
        return tuple(boxed)

    shapes = [
        jax.ShapeDtypeStruct((call.B, call.N) if s else x.shape, x.dtype)
        for x, s in zip(results, scalar, strict=True)
    ]
    values = named(partitioned(run, call, flat, letters, shapes, made))
    pool, pool_letters = (*flat, *values), (*letters, *made)
    kept = [pool[i] for i in places[count:]]
    back = Back(
        pulled,
        call,
        tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in flat),
        letters,
        found.tree,
        tuple(pool_letters[i] for i in places[count:]),
        tuple(not x.shape for x in every[count:]),
    )
    returned = tuple(pool[i] for i in places[:count])
    return returned, jax.tree_util.Partial(back, kept)


def _backward(function: Any, kept: Any, cotangents: Any) -> Any:
    del function
    return (kept(cotangents),)


attend.defvjp(_forward, _backward, symbolic_zeros=True)


@dataclass(frozen=True)
class Found:
    """The structure of a function that pulls cotangents back, its arrays apart."""

    tree: Any
    size: int


@dataclass(frozen=True, eq=False)
class Pulled:
    """A function of a problem's arrays that also keeps what its derivative reads.

    asked: of each array, whether its gradient is asked for.
    """

    function: Any
    tree: Any
    asked: tuple[bool, ...]

    def run(
        self, call: Call, layout: Layout | None, flat: Sequence[Any]
    ) -> tuple[tuple[Any, ...], Found]:
        """(results, then all that the derivative reads), and the latter's structure."""
        wanted = [x for x, a in zip(flat, self.asked, strict=True) if a]

        def of(wanted: list[Any]) -> tuple[Any, ...]:
            left = iter(wanted)
            mixed = [
                next(left) if a else x for x, a in zip(flat, self.asked, strict=True)
            ]
            problem = replace(jax.tree.unflatten(self.tree, mixed), call=call)
            return tuple(self.function(_part(problem, layout)))

        outs, pull = jax.vjp(of, wanted)
        kept, tree = jax.tree.flatten(pull)
        return (*outs, *map(jnp.asarray, kept)), Found(tree, len(kept))

    def traced(
        self, call: Call, layout: Layout | None, flat: Sequence[Any]
    ) -> tuple[Any, Found]:
        """The jaxpr of `run`, and what it found."""
        seen: list[Found] = []

        def f(*flat: Any) -> Any:
            values, found = self.run(call, layout, flat)
            seen.append(found)
            return values

        return jax.make_jaxpr(f)(*flat), seen[-1]

    def letters(
        self,
        call: Call,
        flat: Sequence[Any],
        letters: Sequence[str],
        results: Sequence[Any],
        places: Sequence[int],
    ) -> list[str]:
        """The letters of results at some places, by the axes that grow with a call's.

        Scalars become [B, N], one for each device's part.
        """
        more = {
            "B": ENTRIES if call.B > 1 else 1,
            "N": HEADS if call.N > 1 else 1,
            "K": HEADS if call.K > 1 else 1,
        }
        large = replace(
            call, B=call.B * more["B"], N=call.N * more["N"], K=call.K * more["K"]
        )

        def grown(x: Any, letters: str) -> jax.ShapeDtypeStruct:
            shape = [
                n * more.get(a, 1) if n > 1 else n
                for n, a in zip(x.shape, letters, strict=False)
            ]
            return jax.ShapeDtypeStruct((*shape, *x.shape[len(shape) :]), x.dtype)

        inputs = [grown(x, a) for x, a in zip(flat, letters, strict=True)]
        values = jax.eval_shape(lambda *x: self.run(large, None, x)[0], *inputs)

        def follows(before: int, after: int) -> str:
            if after == before:
                return "_"
            if after == before * ENTRIES and before == call.B:
                return "B"
            assert after == before * HEADS, (before, after)
            return "N" if before == call.N else "K"

        made = []
        for i, x in zip(places, results, strict=True):
            if not x.shape:
                made.append("BN")
                continue
            axes = zip(x.shape, values[i].shape, strict=True)
            made.append("".join(follows(*sizes) for sizes in axes))
        return made


@dataclass(frozen=True, eq=False)
class Back:
    """The backward of a call: what it kept and cotangents in, gradients out."""

    pulled: Pulled
    call: Call
    inputs: tuple[Any, ...]
    letters: Sequence[str]
    tree: Any  # of the whole's pullback
    kept: tuple[str, ...]  # letters
    scalar: tuple[bool, ...]  # kept as [B, N]

    def __call__(self, kept: Sequence[Any], cotangents: Any) -> Any:
        """The gradient of every array; None where nobody asked."""
        given = [_instantiated(x) for x in cotangents]
        asked = [i for i, a in enumerate(self.pulled.asked) if a]
        flat = [
            jnp.broadcast_to(x, (self.call.B, self.call.N)) if x.ndim == 0 else x
            for x in kept
        ]
        letters = (*self.kept, *(RESULTS[x.ndim] for x in given))
        grads = partitioned(
            self.run,
            self.call,
            [*flat, *given],
            letters,
            [self.inputs[i] for i in asked],
            [self.letters[i] for i in asked],
        )
        every: list[Any] = [None] * len(self.inputs)
        for i, g in zip(asked, grads, strict=True):
            every[i] = g
        return jax.tree.unflatten(self.pulled.tree, every)

    def run(self, layout: Layout | None, *flat: Any) -> tuple[Any, ...]:
        """The gradients asked for."""
        kept, cotangents = flat[: len(self.kept)], flat[len(self.kept) :]
        kept = [x[0, 0] if s else x for x, s in zip(kept, self.scalar, strict=True)]
        tree = self.tree if layout is None else self._tree_of(layout)
        (grads,) = jax.tree.unflatten(tree, kept)(tuple(cotangents))
        if layout is None:
            return tuple(grads)
        asked = [i for i, a in enumerate(self.pulled.asked) if a]
        return tuple(
            _summed(g, layout, layout.spec(self.letters[i], self.inputs[i].shape))
            for i, g in zip(asked, grads, strict=True)
        )

    def _tree_of(self, layout: Layout) -> Any:
        """The structure of the pullback of a device's part."""
        mine = [
            jax.ShapeDtypeStruct(_local(x.shape, layout, letters), x.dtype)
            for x, letters in zip(self.inputs, self.letters, strict=True)
        ]
        _, found = self.pulled.traced(self.call, layout, mine)
        assert found.size == len(self.kept)
        return found.tree


def letters_of(problem: Problem) -> list[str]:
    """The letters of every array of a problem."""
    return [axes.letters for axes in axes_of(problem)]


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


def _part(problem: Problem, layout: Layout | None) -> Problem:
    return problem if layout is None else part(problem, layout)


def _small(call: Call, layout: Layout) -> Call:
    return replace(call, B=call.B // layout.entries, N=call.N // layout.groups)


def _local(shape: Sequence[int], layout: Layout, letters: str) -> tuple[int, ...]:
    spec = layout.spec(letters, tuple(shape))
    parts = [Layout(layout.mesh, names_of(entry), ()).entries for entry in spec]
    parts += [1] * (len(shape) - len(parts))
    return tuple(n // p for n, p in zip(shape, parts, strict=True))


def _summed(g: Any, layout: Layout, spec: Any) -> Any:
    """A gradient, summed over the devices that share its array."""
    used = {name for entry in spec for name in names_of(entry)}
    shared = tuple(a for a in (*layout.batch, *layout.heads) if a not in used)
    return lax.psum(g, shared) if shared else g


def _instantiated(x: Any) -> Any:
    if not isinstance(x, SymbolicZero):
        return x
    zero: Any = x.aval
    return jnp.zeros(zero.shape, zero.dtype)


def _asked(marked: Any) -> Any:
    return jax.tree.map(lambda x: x.perturbed, marked)


def _distinct(jaxpr: Any, inputs: int) -> tuple[list[int], list[int]]:
    """Results of a jaxpr that are no input and no other result, by their places.

    And where each result is found: among the inputs, or after them among those.
    """
    known = {id(x): i for i, x in enumerate(jaxpr.invars)}
    outs: list[int] = []
    places = []
    for i, x in enumerate(jaxpr.outvars):
        if id(x) not in known:
            known[id(x)] = inputs + len(outs)
            outs.append(i)
        places.append(known[id(x)])
    return outs, places
