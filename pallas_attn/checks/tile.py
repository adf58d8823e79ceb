"""What can be wrong about a `tile`: traced once, on axes that differ, before a call.

A tile is a part of the scores, another one in each implementation. So `tile` may only
do what it does entry by entry, and knows no arrays but its fields.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from pallas_attn.bias.base import Bias, homes, parts_of
from pallas_attn.bias.region import Region
from pallas_attn.rules import kind


if TYPE_CHECKING:
    from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

# No two axes are alike: whatever turns, drops or joins one changes a shape.
B, N, T, S = 2, 3, 5, 7
SHAPES = {
    "head": (B, N, 1, 1),
    "query": (B, N, T, 1),
    "key": (B, N, 1, S),
    "pair": (B, N, T, S),
    "distance": (B, N, T, S),
}
PLACE = ("distance", "query_position", "key_position", "away")

# Primitives that run functions, and those that look beyond an entry but keep shapes.
CALLS = {
    *("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"),
    *("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"),
    *("scan", "while", "cond"),
}
BEYOND = (
    *("cum", "sort", "rev", "fft", "pad", "reduce_window", "select_and", "conv_"),
    *("gather", "scatter", "dynamic_update_slice", "dot_general", "cholesky"),
    *("triangular_solve", "pure_callback", "io_callback"),
)


def elementwise(name: str, term: Bias, dtype: Any) -> None:
    """A `tile` that reads its fields alone, entry by entry; ours have their laws.

    Args:
        name: Of the term in the call.
        term: Its fields have homes.
        dtype: Of scores.

    Raises:
        ValueError: if it reads other arrays, or other entries.
        AttributeError: if it reads what a tile does not know.
        TypeError: if it returns no array.
    """
    cls = type(term)
    if cls.__module__.startswith("pallas_attn.bias."):
        return
    fields = dataclasses.fields(term)
    static = tuple(
        (f.name, getattr(term, f.name)) for f in fields if f.metadata.get("static")
    )
    arguments = (f"{name}.tile", cls, static, jnp.dtype(dtype))
    try:
        hash(arguments)
    except TypeError:
        _check.__wrapped__(*arguments)
    else:
        _check(*arguments)


@functools.lru_cache(maxsize=256)
def _check(
    name: str, cls: type[Bias], static: tuple[tuple[str, Any], ...], dtype: Any
) -> None:
    """Whatever the shapes of a call are."""
    for jaxpr, captured in _jaxprs(_traced(name, cls, dict(static), dtype)):
        for x in captured:
            raise ValueError(
                f"`{name}` must read no arrays but its fields; got {kind(x)} from "
                f"outside of {cls.__name__}. Make it a field, such as "
                "`x: jax.Array = head_home()`, a number per head; a Python number may "
                "stay."
            )
        for equation in jaxpr.eqns:
            if not _is_elementwise(equation):
                raise ValueError(
                    f"`{name}` must work entry by entry, as jnp.exp and jnp.where do; "
                    f"got {equation.primitive.name} in {cls.__name__}, which reads "
                    "other entries or changes axes: a tile is a part of the scores, "
                    "of another size in each implementation. Compute it outside, and "
                    "pass it as a field."
                )


def _traced(
    name: str, cls: type[Bias], static: dict[str, Any], dtype: Any
) -> ClosedJaxpr:
    def parts(fields: dict[str, Any], queries: Any, keys: Any) -> tuple[Any, ...]:
        place: Any = _Place(name, Region(queries, keys, dtype))
        found = parts_of(cls(**fields, **static).tile(place))
        for x in found:
            if not isinstance(x, jax.Array | np.ndarray | np.number | float | int):
                raise TypeError(
                    f"`{name}` must return an array, or a tuple of parts that add up; "
                    f"got {kind(x)}. See pallas_attn.Bias."
                )
        return found

    numbers = {
        field: jax.ShapeDtypeStruct(SHAPES[home], dtype)
        for field, home in homes(cls).items()
    }
    queries, keys = (
        jax.ShapeDtypeStruct(SHAPES[side], jnp.int32) for side in ("query", "key")
    )
    return jax.make_jaxpr(parts)(numbers, queries, keys)


class _Place:
    """What a tile knows of where it is, and an error of ours for all else."""

    def __init__(self, name: str, region: Region) -> None:
        self.name, self.region = name, region

    def __getattr__(self, attribute: str) -> Any:
        if attribute in PLACE:
            return getattr(self.region, attribute)
        raise AttributeError(
            f"`{self.name}` must read {', '.join(PLACE)} of its argument; got "
            f"{attribute!r}. See pallas_attn.Bias.tile."
        )


def _jaxprs(closed: ClosedJaxpr) -> Iterator[tuple[Jaxpr, list[Any]]]:
    """All functions within, each with the arrays it captured."""
    yield from _within(closed.jaxpr, list(closed.consts))


def _within(jaxpr: Jaxpr, captured: list[Any]) -> Iterator[tuple[Jaxpr, list[Any]]]:
    from jax.extend.core import ClosedJaxpr, Jaxpr, Literal  # which loads Pallas

    literals = (x.val for e in jaxpr.eqns for x in e.invars if isinstance(x, Literal))
    yield jaxpr, [*captured, *(x for x in literals if np.ndim(x))]
    for equation in jaxpr.eqns:
        if equation.primitive.name not in CALLS:
            continue
        is_jaxpr = lambda x: isinstance(x, ClosedJaxpr | Jaxpr)
        for x in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
            if isinstance(x, ClosedJaxpr):
                yield from _within(x.jaxpr, list(x.consts))
            elif isinstance(x, Jaxpr):
                yield from _within(x, [])


def _is_elementwise(equation: JaxprEqn) -> bool:
    """Whether an entry of the result is one of the arguments' at the same place."""
    name = equation.primitive.name
    if name == "scan":  # a loop that counts, but takes or leaves no slices of an axis
        body = equation.params["jaxpr"].jaxpr
        sides = [(equation.invars, body.invars), (equation.outvars, body.outvars)]
        return all(list(map(_shape, x)) == list(map(_shape, y)) for x, y in sides)
    if name in CALLS:
        return True
    if name.startswith(BEYOND):
        return False
    shapes = [_shape(x) for x in equation.invars]
    return all(_spread(shapes, _shape(x)) for x in equation.outvars)


def _shape(x: Any) -> tuple[int, ...]:
    return getattr(x.aval, "shape", ())


def _spread(shapes: list[tuple[int, ...]], to: tuple[int, ...]) -> bool:
    """Whether `to` is what these become where each axis of size 1 is repeated."""
    fits = lambda x: len(x) == len(to) and all(map(_one_or_same, x, to))
    return all(not x or fits(x) for x in shapes) if shapes else not to


def _one_or_same(m: int, n: int) -> bool:
    return m in (1, n)
