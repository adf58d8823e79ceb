"""Under automatic sharding: each device runs kernels on its batch entries and heads.

XLA cannot look into a kernel and would gather its operands. So the forward, the tangent
and the backward of a call are one custom-partitioned function each: what is sharded by
batch and heads stays so, all else is whole on each device, and gradients of what
devices share are summed over them. On one device, and under `vmap`, nothing of this
remains.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_attn.call import Call
from pallas_attn.letters import axes_of
from pallas_attn.placement.explicit import Layout, names_of, part
from pallas_attn.placement.partitioned import partitioned
from pallas_attn.problem import Problem


# What a result of so many axes is: shares, a residual, an output.
RESULTS = {2: "BN", 3: "BTN", 4: "BTNh"}

# A call is traced with so many times the entries and heads to see which axes follow.
ENTRIES, HEADS = 3, 5


def attend(function: Any, problem: Problem) -> tuple[Any, ...]:
    """The results of a function of a problem, partitioned by batch and heads.

    function: has its results in plain JAX too, of which XLA partitions derivatives.
    """
    from pallas_attn.tracing.primitives import called  # which loads Pallas

    return called(Spread(function), problem)


@dataclass(frozen=True)
class Spread:
    """The `Rules` of a function of a problem, each pass partitioned."""

    function: Any

    def forward(self, problem: Problem, wanted: Any) -> tuple[tuple[Any, ...], Any]:
        """(results, `Back` and what it reads)."""
        asked = tuple(map(bool, jax.tree.leaves(wanted)))
        if any(asked):
            return _with_back(self.function, problem, asked)
        flat, tree = jax.tree.flatten(problem)

        def run(layout: Layout | None, *flat: Any) -> tuple[Any, ...]:
            return tuple(self.function(_part(jax.tree.unflatten(tree, flat), layout)))

        shapes = jax.eval_shape(functools.partial(run, None), *flat)
        made = [RESULTS[x.ndim] for x in shapes]
        letters = letters_of(problem)
        return partitioned(run, problem.call, flat, letters, shapes, made), ()

    def tangent(self, problem: Problem, kept: Any, tangents: Any) -> tuple[Any, ...]:
        """Those of the results; each device has its part of the results once more."""
        flat, tree = jax.tree.flatten(problem)
        letters, every = letters_of(problem), tree.flatten_up_to(tangents)
        moving = [i for i, t in enumerate(every) if t is not None]

        def run(layout: Layout | None, *given: Any) -> tuple[Any, ...]:
            flat, ts = given[: len(every)], given[len(every) :]

            def of(*some: Any) -> tuple[Any, ...]:
                new = dict(zip(moving, some, strict=True))
                mixed = [new.get(i, x) for i, x in enumerate(flat)]
                return tuple(self.function(_part(tree.unflatten(mixed), layout)))

            return jax.jvp(of, [flat[i] for i in moving], list(ts))[1]

        given = [*flat, *(every[i] for i in moving)]
        shapes = jax.eval_shape(functools.partial(run, None), *given)
        made = [RESULTS[x.ndim] for x in shapes]
        letters = [*letters, *(letters[i] for i in moving)]
        return partitioned(run, problem.call, given, letters, shapes, made)

    def backward(
        self, problem: Problem, kept: Any, cotangents: tuple[Any, ...], wanted: Any
    ) -> Any:
        """The gradients that were asked for, those wanted among them."""
        return kept(cotangents)

    def formula(self, problem: Problem) -> tuple[Any, ...]:
        """The results in plain JAX."""
        return self.function.plain(problem)


def _with_back(
    function: Any, problem: Problem, asked: tuple[bool, ...]
) -> tuple[tuple[Any, ...], Any]:
    """(results, `Back` and what it reads)."""
    call = problem.call
    flat, tree = jax.tree.flatten(problem)
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
    values = partitioned(run, call, flat, letters, shapes, made)
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
        tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in every[:count]),
    )
    returned = tuple(pool[i] for i in places[:count])
    return returned, jax.tree_util.Partial(back, kept)


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
    results: tuple[Any, ...]

    def __call__(self, kept: Sequence[Any], cotangents: Any) -> Any:
        """The gradient of every array; None where nobody asked."""
        given = [
            jnp.zeros(x.shape, x.dtype) if ct is None else ct
            for x, ct in zip(self.results, cotangents, strict=True)
        ]
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
