"""What a traced computation holds: its equations, arrays and kernels."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from pallas_attn.tracing.primitives import tangent_p


def equations(f: Callable[..., Any], *arguments: Any) -> list[JaxprEqn]:
    """All equations of a traced function, inner ones too, but none of a kernel."""
    return list(_equations(jax.make_jaxpr(f)(*arguments).jaxpr))


def kernel_names(f: Callable[..., Any], *arguments: Any) -> list[str]:
    """The names of the kernels that a function launches."""
    return [
        str(x.params["name"] or x.params["name_and_src_info"]).split(" ")[0]
        for x in equations(f, *arguments)
        if x.primitive.name == "pallas_call"
    ]


def largest_array(f: Callable[..., Any], *arguments: Any) -> tuple[int, ...]:
    """The shape of the largest array that a function makes."""
    shapes = [
        tuple(getattr(x.aval, "shape", ()))
        for equation in equations(f, *arguments)
        for x in equation.outvars
    ]
    return max(shapes, key=math.prod)


def _equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    for equation in jaxpr.eqns:
        yield equation
        if equation.primitive.name == "pallas_call":
            continue
        if equation.primitive is tangent_p:  # traced only where it is lowered
            run = functools.partial(tangent_p.impl, **equation.params)
            avals = [x.aval for x in equation.invars]
            yield from _equations(jax.make_jaxpr(run)(*avals).jaxpr)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if isinstance(inner, ClosedJaxpr):
                yield from _equations(inner.jaxpr)
            elif isinstance(inner, Jaxpr):
                yield from _equations(inner)


def _is_jaxpr(x: Any) -> bool:
    return isinstance(x, ClosedJaxpr | Jaxpr)
