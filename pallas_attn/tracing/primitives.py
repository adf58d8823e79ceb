"""Functions that kernels compute, in every mode of JAX: three primitives.

JAX cannot look into a kernel, and a `custom_vjp` has no forward mode. So a function has
a primitive for itself and one for each of its derivatives:

    forward   (ops)            -> outs, kept      its jvp: tangent
    tangent   (ops, kept; t)   -> outs'           linear in t; its transpose: backward
    backward  (ops, kept; ct)  -> gradients       linear in ct; its transpose: tangent

`kept` is what kernels leave for their derivatives, results among it: nothing but
functions of ops. So the derivative of a tangent or of a gradient along ops is the whole
one of the same in plain JAX, `Rules.formula`, which is differentiable again.

The names of JAX that are not public are those imported here from `jax.interpreters`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun, Primitive
from jax.interpreters import ad, batching, mlir

from pallas_attn.tracing.names import named
from pallas_attn.tracing.rules import pulled, pushed, Rules
from pallas_attn.tracing.varying import lifted, varying


# (axes of ops and of what is kept, size, the mesh axes over which it is spread)
Map = tuple[tuple[int | None, ...], int, Any]


def called(rules: Rules, ops: Any) -> tuple[Any, ...]:
    """The results of a function of a pytree of arrays, integers among them."""
    leaves, tree = jax.tree.flatten(ops)
    facts = Facts(rules, tree, (False,) * len(leaves))
    made, facts = _forward(facts, leaves)
    return tuple(made[: len(facts.outs)])


@dataclass(frozen=True)
class Kept:
    """What derivatives read: of ops, of results, and of what else was made.

    read: which of all that a forward pass made, by their places there.
    leaves: which of ops and of these the pytree has, one after another.
    """

    tree: Any
    read: tuple[int, ...]
    leaves: tuple[int, ...]

    @staticmethod
    def of(
        ops: Sequence[Any], outs: Sequence[Any], kept: Any
    ) -> tuple[Kept, list[Any]]:
        """(what is kept, the arrays of it that are neither of ops nor results)."""
        leaves, tree = jax.tree.flatten(kept)
        known, n = [*ops, *outs], len(ops)
        places = {id(x): place for place, x in enumerate(known)}
        for x in leaves:
            if id(x) not in places:
                places[id(x)] = len(known)
                known.append(x)
        at = [places[id(x)] for x in leaves]
        read = sorted({place for place in at if place >= n})
        own = tuple(place if place < n else n + read.index(place) for place in at)
        more = known[n + len(outs) :]
        return Kept(tree, tuple(place - n for place in read), own), more

    def tree_of(self, xs: Sequence[Any]) -> Any:
        """The pytree, of the arrays of ops and those that are read."""
        return self.tree.unflatten([xs[n] for n in self.leaves])


@dataclass(frozen=True)
class Facts:
    """What is static about a call of a primitive.

    tree: of ops.
    wanted: by array of ops, whether it has a tangent or a gradient.
    kept: of the derivatives.
    outs: shape and dtype of every result, without the axes of maps.
    live: by result, whether it has a cotangent.
    maps: of `jax.vmap`, inmost first.
    """

    rules: Rules
    tree: Any
    wanted: tuple[bool, ...]
    kept: Kept | None = None
    outs: tuple[tuple[tuple[int, ...], Any], ...] = ()
    live: tuple[bool, ...] = ()
    maps: tuple[Map, ...] = ()

    @property
    def fixed(self) -> int:
        """How many inputs are not linear: ops and what is kept."""
        return self.tree.num_leaves + len(self.kept.read if self.kept else ())

    def given(self, xs: Sequence[Any]) -> tuple[Any, Any, list[Any]]:
        """(ops, kept, linear inputs) of a derivative."""
        assert self.kept is not None
        ops = self.tree.unflatten(xs[: self.tree.num_leaves])
        kept = self.kept.tree_of(xs[: self.fixed])
        return ops, kept, list(xs[self.fixed :])


# ------------------------------------------------------- what runs, of flat arrays


def _tangent(facts: Facts, *xs: Any) -> list[Any]:
    ops, kept, ts = facts.given(xs)
    tangents = facts.tree.unflatten(_spaced(ts, facts.wanted))
    return list(facts.rules.tangent(ops, kept, tangents))


def _tangent_formula(facts: Facts, *xs: Any) -> list[Any]:
    ops, _, ts = facts.given(xs)
    tangents = facts.tree.unflatten(_spaced(ts, facts.wanted))
    return list(pushed(facts.rules, ops, tangents))


def _backward(facts: Facts, *xs: Any) -> list[Any]:
    ops, kept, cts = facts.given(xs)
    cotangents = tuple(_spaced(cts, facts.live))
    wanted = facts.tree.unflatten(facts.wanted)
    grads = facts.rules.backward(ops, kept, cotangents, wanted)
    return _chosen(facts.tree.flatten_up_to(grads), facts.wanted)


def _backward_formula(facts: Facts, *xs: Any) -> list[Any]:
    ops, _, cts = facts.given(xs)
    cotangents = tuple(_spaced(cts, facts.live))
    wanted = facts.tree.unflatten(facts.wanted)
    return pulled(facts.rules, ops, cotangents, wanted)


def _mapped(run: Callable[..., list[Any]], facts: Facts) -> Callable[..., list[Any]]:
    """A function of flat arrays, under the maps of a call."""

    def of(*xs: Any) -> list[Any]:
        f = lambda *xs: run(facts, *xs)
        for axes, size, spread in facts.maps:
            every = axes + (0,) * (len(xs) - len(axes))
            f = jax.vmap(f, every, axis_size=size, spmd_axis_name=spread)
        return f(*xs)

    return of


def _forward(facts: Facts, xs: Sequence[Any]) -> tuple[list[Any], Facts]:
    """(results and then what else is kept for those wanted, facts for derivatives)."""
    found = []

    def run(facts: Facts, *leaves: Any) -> list[Any]:
        ops, wanted = (facts.tree.unflatten(x) for x in (leaves, facts.wanted))
        outs, tree = facts.rules.forward(ops, wanted)
        kept, more = Kept.of(leaves, outs, tree)
        found.append((kept, tuple((x.shape, x.dtype) for x in outs)))
        return [*outs, *(more if any(facts.wanted) else ())]

    jaxpr = jax.make_jaxpr(_mapped(run, facts))(*xs)
    made = forward_p.bind(*xs, facts=facts, jaxpr=jaxpr)
    kept, types = found[-1]
    return made, replace(facts, kept=kept, outs=types, live=(True,) * len(types))


def _bound(primitive: Any, facts: Facts, xs: Sequence[Any]) -> list[Any]:
    """What a primitive makes; of the backward one, traced here."""
    if primitive is tangent_p:
        return tangent_p.bind(*xs, facts=facts)
    if primitive is backward_p:
        jaxpr = jax.make_jaxpr(_mapped(_backward, facts))(*xs)
        return backward_p.bind(*xs, facts=facts, jaxpr=jaxpr)
    return _forward(facts, xs)[0]


# -------------------------------------------------------------------- primitives


def _run_traced(*xs: Any, facts: Facts, jaxpr: Any) -> list[Any]:
    return jaxpr_as_fun(jaxpr)(*xs)


def _types_traced(*xs: Any, facts: Facts, jaxpr: Any) -> list[Any]:
    return jaxpr.out_avals


def _run_tangent(*xs: Any, facts: Facts) -> list[Any]:
    return _mapped(_tangent, facts)(*xs)


def _types_of_tangent(*xs: Any, facts: Facts) -> list[Any]:
    """Those of the results: a tangent that is transposed is never traced."""
    lead = tuple(size for _, size, _ in reversed(facts.maps))

    def zeros(*xs: Any) -> list[Any]:
        made = [jnp.zeros((*lead, *shape), dtype) for shape, dtype in facts.outs]
        return lifted(made, varying(xs))

    return jax.make_jaxpr(zeros)(*xs).out_avals


def _primitive(kind: str, run: Callable[..., Any], types: Callable[..., Any]) -> Any:
    p: Any = Primitive(f"attention_{kind}")
    p.multiple_results = True
    p.def_impl(run)
    p.def_abstract_eval(types)
    p.to_lojax = run  # from jax 0.12 on asked where a traced part is yet to be lowered
    mlir.register_lowering(p, mlir.lower_fun(run, multiple_results=True))

    def batch(
        axis: Any, xs: Sequence[Any], dims: Sequence[Any], *, facts: Facts, **_: Any
    ) -> tuple[list[Any], list[Any]]:
        if all(d is None for d in dims):  # JAX asks here too
            made = _bound(p, facts, xs)
            return made, [None] * len(made)
        n = facts.fixed

        def front(x: Any, d: Any) -> Any:  # what is linear: its transpose adds up
            if d is None:
                return jnp.broadcast_to(x, (axis.size, *x.shape))
            return jnp.moveaxis(x, d, 0)

        linear = [front(x, d) for x, d in zip(xs[n:], dims[n:], strict=True)]
        here = (tuple(dims[:n]), axis.size, axis.spmd_name)
        facts = replace(facts, maps=(*facts.maps, here))
        made = _bound(p, facts, [*xs[:n], *linear])
        return made, [0] * len(made)

    batching.fancy_primitive_batchers[p] = batch
    return p


forward_p = _primitive("forward", _run_traced, _types_traced)
tangent_p = _primitive("tangent", _run_tangent, _types_of_tangent)
backward_p = _primitive("backward", _run_traced, _types_traced)


# ------------------------------------------------------------------- derivatives


def _forward_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, facts: Facts, **_: Any
) -> tuple[list[Any], list[Any]]:
    wanted = tuple(map(_moves, tangents))
    covered = all(old or not new for old, new in zip(facts.wanted, wanted, strict=True))
    asked = facts if covered else replace(facts, wanted=wanted)
    made, known = _forward(asked, primals)
    made = named(made)  # one array is returned and read by derivatives
    assert known.kept is not None
    read = [made[n] for n in known.kept.read]
    own = (0,) * len(read)
    maps = tuple((axes + own, size, spread) for axes, size, spread in known.maps)
    ts = [_in_front(t, n, maps) for n, t in enumerate(tangents) if wanted[n]]
    ts = lifted(ts, varying((primals, ts)))
    known = replace(known, wanted=wanted, maps=maps)
    dots = tangent_p.bind(*primals, *read, *ts, facts=known)
    results, more = made[: len(dots)], made[len(dots) :]
    if not covered:  # a derivative that was taken before reads what it asked for
        before = any(facts.wanted)
        more = named(_forward(facts, primals)[0][len(dots) :]) if before else []
    return [*results, *more], [*dots, *map(_zero, more)]


def _in_front(t: Any, place: int, maps: Iterable[Map]) -> Any:
    """A tangent of an array of ops with an axis for every map, in front."""
    f = lambda t: t
    for axes, size, spread in maps:
        f = jax.vmap(f, axes[place], axis_size=size, spmd_axis_name=spread)
    return f(t)


def _linear_jvp(p: Any, formula: Callable[..., list[Any]], name: str) -> None:
    """The rule of a function that is linear in its last arrays, with its formula."""

    def jvp(
        primals: Sequence[Any], tangents: Sequence[Any], *, facts: Facts, **_: Any
    ) -> tuple[list[Any], list[Any]]:
        outs, n = _bound(p, facts, primals), facts.fixed
        dots = list(map(_zero, outs))
        ts = tangents[n:]
        if any(map(_moves, ts)):
            left = map(_moves, ts)
            flags = tuple(f and next(left) for f in getattr(facts, name))
            moving = replace(facts, **{name: flags})
            given = [*primals[:n], *filter(_moves, ts)]
            dots = _bound(p, moving, lifted(given, varying(primals)))
        places = [i for i in range(facts.tree.num_leaves) if _moves(tangents[i])]
        if places:

            def along(*moved: Any) -> list[Any]:
                new = dict(zip(places, moved, strict=True))
                xs = [new.get(i, x) for i, x in enumerate(primals)]
                return _mapped(formula, facts)(*xs)

            at, to = ([xs[i] for i in places] for xs in (primals, tangents))
            more = jax.jvp(along, at, to)[1]
            dots = [ad.add_tangents(x, y) for x, y in zip(dots, more, strict=True)]
        return outs, dots

    ad.primitive_jvps[p] = jvp


def _tangent_transpose(cts: Sequence[Any], *xs: Any, facts: Facts) -> list[Any]:
    live = tuple(map(_moves, cts))
    fixed, linear = xs[: facts.fixed], xs[facts.fixed :]
    if not any(live):
        return [None] * len(xs)
    grads = _bound(
        backward_p, replace(facts, live=live), [*fixed, *filter(_moves, cts)]
    )
    assert len(grads) == len(linear)
    return [*(None for _ in fixed), *grads]


def _backward_transpose(
    cts: Sequence[Any], *xs: Any, facts: Facts, **_: Any
) -> list[Any]:
    fixed = xs[: facts.fixed]
    left = map(_moves, cts)
    wanted = tuple(w and next(left) for w in facts.wanted)
    if not any(wanted):
        return [None] * len(xs)
    dots = tangent_p.bind(
        *fixed, *filter(_moves, cts), facts=replace(facts, wanted=wanted)
    )
    return [*(None for _ in fixed), *_chosen(dots, facts.live)]


ad.primitive_jvps[forward_p] = _forward_jvp
_linear_jvp(tangent_p, _tangent_formula, "wanted")
_linear_jvp(backward_p, _backward_formula, "live")
ad.primitive_transposes[tangent_p] = _tangent_transpose
ad.primitive_transposes[backward_p] = _backward_transpose


def _moves(t: Any) -> bool:
    """Whether a tangent or a cotangent is not 0 by its type."""
    return type(t) is not ad.Zero


def _zero(x: Any) -> Any:
    return ad.Zero(jax.typeof(x).to_tangent_aval())


def _chosen(xs: Sequence[Any], which: Sequence[bool]) -> list[Any]:
    return [x for x, w in zip(xs, which, strict=True) if w]


def _spaced(xs: Iterable[Any], which: Iterable[bool]) -> list[Any]:
    """The arrays at their places, None at the others."""
    left = iter(xs)
    return [next(left) if w else None for w in which]
