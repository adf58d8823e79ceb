"""A call as the library takes it, under a transformation of JAX."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_attn.api import dot_product_attention
from pallas_attn.bias.base import Bias
from pallas_attn.fuzz.elements import Elements, tangents
from pallas_attn.fuzz.kinds import kind_of
from pallas_attn.fuzz.plan import Arrays, Plan
from pallas_attn.normalizers.entmax import Entmax
from pallas_attn.normalizers.softmax import Softmax


# (operands, conditions, cotangents) -> (outputs, gradients or tangents).
Program = Callable[[Any, Any, Any], tuple[Any, Any]]
# query, key, value, bias, {scale, alpha}: pytrees, so that maps see biases as values.
Given = tuple[Any, Any, Any, Any, dict[str, Any]]


class Programs:
    """The compiled programs of a call, one for each implementation."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self._compiled: dict[tuple[str, int], Program] = {}

    def run(self, implementation: str, elements: Elements) -> tuple[Any, Any]:
        """(outputs, gradients or tangents) as NumPy arrays."""
        plan = self.plan
        operands, conditions, cotangents = elements.stacked()
        key = (implementation, elements.index if plan.constants else 0)
        if key not in self._compiled:
            known = _int32s(elements.values[0][1])
            self._compiled[key] = program(plan, implementation, known)
        given: list[Any] = [
            cotangents[x] for x in ("output", "residual") if x in cotangents
        ]
        if plan.transform in ("jvp", "hvp"):
            given.append(tangents(elements))
        arguments = (operands, _int32s(conditions), tuple(given))
        found = self._compiled[key](*jax.tree.map(jnp.asarray, arguments))
        return jax.tree.map(np.asarray, found)


def program(plan: Plan, implementation: str, known: Arrays) -> Program:
    """The call under its transformation, jitted unless that is "eager".

    Args:
        plan: The call.
        implementation: Of the library.
        known: Conditions, for a call that has them as constants.
    """
    call = _caller(plan, implementation)

    def plain(operands: Any, conditions: Any) -> Any:
        return call(_given(plan, operands), known if plan.constants else conditions)

    evaluate = plain
    match plan.transform:
        case "checkpoint":
            evaluate = jax.checkpoint(plain)
        case "grad_of_vmap":
            evaluate = _mapped(plan, call, plan.maps[0])
        case "vmap2":
            evaluate = _mapped_twice(plan, call)
        case "scan":
            evaluate = _scanned(plan, plain)

    def vjp(operands: Any, conditions: Any, cotangents: Any) -> Any:
        mine = {name: operands[name] for name in plan.wrt}
        outputs, back = jax.vjp(lambda x: evaluate(operands | x, conditions), mine)
        return outputs, back(cotangents)[0]

    def values(operands: Any, conditions: Any, cotangents: Any) -> Any:
        return plain(operands, conditions), {}

    def mapped_vjp(operands: Any, conditions: Any, cotangents: Any) -> Any:
        axes = lambda x: {name: 0 if name in plan.maps[0] else None for name in x}
        in_axes = (axes(operands), axes(conditions), 0)
        return jax.vmap(vjp, in_axes=in_axes)(operands, conditions, cotangents)

    def jvp(operands: Any, conditions: Any, cotangents: Any) -> Any:
        mine = {name: operands[name] for name in plan.wrt}
        f = lambda x: plain(operands | x, conditions)
        return jax.jvp(f, (mine,), (cotangents[-1],))

    def hvp(operands: Any, conditions: Any, cotangents: Any) -> Any:
        mine = {name: operands[name] for name in plan.wrt}
        *pulled, direction = cotangents

        def gradient(x: Any) -> Any:
            f = lambda y: plain(operands | y, conditions)
            return jax.vjp(f, x)[1](tuple(pulled))[0]

        bent = jax.jvp(gradient, (mine,), (direction,))[1]
        return plain(operands, conditions), bent

    special: dict[str, Program] = {
        "value": values,
        "vmap_of_grad": mapped_vjp,
        "jvp": jvp,
        "hvp": hvp,
    }
    run = special.get(plan.transform, vjp)
    return run if plan.transform == "eager" else jax.jit(run)


def _bias(plan: Plan, x: dict[str, Any]) -> Any:
    """The bias value of a call, from arrays (or axes) by name."""
    terms: list[Bias] = []
    for place, name in enumerate(plan.bias):
        fields = plan.fields(place)
        cls = kind_of(name).cls
        terms.append(cls(**{field: x[f"bias{place}.{field}"] for field in fields}))
    if not terms:
        return None
    first = x.get("bias0.bias")
    if plan.raw and plan.bias[0] == "dense" and isinstance(first, jax.Array):
        others = plan.bias[1:]
        if not others or others[0] != "dense":
            return first + _added_up(terms[1:]) if others else first
    elif plan.raw and plan.bias == ("dense",):
        return first
    return _added_up(terms)


def _added_up(terms: Sequence[Bias]) -> Bias:
    return functools.reduce(operator.add, terms)


def _given(plan: Plan, x: dict[str, Any]) -> Given:
    more = {name: x[name] for name in ("scale", "alpha", "sink") if name in x}
    return x["query"], x["key"], x["value"], _bias(plan, x), more


def _unpacked(plan: Plan, given: Given) -> dict[str, Any]:
    query, key, value, bias, more = given
    flat = dict(zip(plan.forms, jax.tree.leaves(bias), strict=True))
    return {"query": query, "key": key, "value": value, **more, **flat}


def _caller(plan: Plan, implementation: Any) -> Callable[[Given, Any], Any]:
    def call(given: Given, conditions: Any) -> Any:
        query, key, value, bias, more = given
        conditions = dict(conditions)
        words = conditions.pop("words", None)
        options: dict[str, Any] = {}
        if plan.dropout:
            options["dropout_rate"] = plan.dropout
            options["dropout_rng"] = words
            if plan.rng_kind != "raw":
                impl = "rbg" if plan.rng_kind == "rbg" else "threefry2x32"
                options["dropout_rng"] = jax.random.wrap_key_data(words, impl=impl)
        if plan.normalizer is not None:
            alpha, top_k = plan.normalizer
            options["normalizer"] = Entmax(more.get("alpha", alpha), top_k)
        elif plan.sink is not None:
            options["normalizer"] = Softmax(more["sink"])
        if plan.offset:
            options["query_offset"] = plan.offset
        mask = conditions.pop("mask", None)
        found = dot_product_attention(
            query,
            key,
            value,
            bias,
            mask,
            scale=more.get("scale", plan.scale),
            is_causal=plan.causal,
            local_window_size=plan.window,
            logits_soft_cap=plan.soft_cap,
            precision=plan.precision,
            implementation=implementation,
            config=plan.config,
            return_residual=plan.residual,
            **options,
            **conditions,
        )
        return found if plan.residual else (found,)

    return call


def _mapped(
    plan: Plan, f: Callable[[Given, Any], Any], names: frozenset[str]
) -> Callable[[Any, Any], Any]:
    """`f` mapped over the arrays of these names, its bias a pytree argument."""
    assert plan.axes is not None
    places = plan.axes

    def run(operands: Any, conditions: Any) -> Any:
        axes = {
            name: places.get(name, 0) if name in names else None for name in operands
        }
        operands = {
            name: jnp.moveaxis(x, 0, axis) if (axis := axes[name]) else x
            for name, x in operands.items()
        }
        in_axes = (
            _given(plan, axes),
            {name: 0 if name in names else None for name in conditions},
        )
        return jax.vmap(f, in_axes=in_axes)(_given(plan, operands), conditions)

    return run


def _mapped_twice(plan: Plan, call: Callable[[Given, Any], Any]) -> Any:
    inner = _mapped(plan, call, plan.maps[1])

    def once(given: Given, conditions: Any) -> Any:
        return inner(_unpacked(plan, given), conditions)

    return _mapped(plan, once, plan.maps[0])


def _scanned(plan: Plan, plain: Callable[[Any, Any], Any]) -> Any:
    (names,) = plan.maps

    def run(operands: Any, conditions: Any) -> Any:
        some = lambda x: {name: y for name, y in x.items() if name in names}

        def body(count: Any, x: Any) -> Any:
            return count, plain(operands | x[0], conditions | x[1])

        return jax.lax.scan(body, 0, (some(operands), some(conditions)))[1]

    return run


def _int32s(conditions: Arrays) -> Arrays:
    return {
        name: x if x.dtype in (bool, np.uint32) else x.astype(np.int32)
        for name, x in conditions.items()
    }
