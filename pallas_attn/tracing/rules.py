"""What is to be known of a function for all of its derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp


class Rules(Protocol):
    """A function and its derivatives; compares and hashes by value."""

    def forward(self, ops: Any, wanted: Any, /) -> tuple[tuple[Any, ...], Any]:
        """(results, a pytree of what its derivatives read of them and beside them).

        wanted: in place of every array of ops, whether it will have a tangent or a
            gradient.
        """
        ...

    def tangent(self, ops: Any, kept: Any, tangents: Any, /) -> tuple[Any, ...]:
        """Those of the results.

        tangents: of ops; None: 0.
        """
        ...

    def backward(
        self, ops: Any, kept: Any, cotangents: tuple[Any, ...], wanted: Any, /
    ) -> Any:
        """The gradients of ops; of arrays that are not wanted anything.

        cotangents: of the results; None: 0.
        """
        ...

    def formula(self, ops: Any, /) -> tuple[Any, ...]:
        """The results in plain JAX, differentiable any number of times."""
        ...


def pushed(rules: Rules, ops: Any, tangents: Any) -> tuple[Any, ...]:
    """The results' tangents in plain JAX; None among tangents: 0."""
    given, of = _varied(rules, ops, jax.tree.leaves(_known(ops, tangents)))
    return jax.jvp(of, given, jax.tree.leaves(tangents))[1]


def pulled(
    rules: Rules, ops: Any, cotangents: tuple[Any, ...], wanted: Any
) -> list[Any]:
    """The wanted gradients in plain JAX, one after another; None: 0."""
    given, of = _varied(rules, ops, jax.tree.leaves(wanted))
    outs, pull = jax.vjp(of, *given)
    full = (
        jnp.zeros_like(x) if ct is None else ct
        for x, ct in zip(outs, cotangents, strict=True)
    )
    return list(pull(tuple(full)))


def _known(ops: Any, tangents: Any) -> list[bool]:
    tree = jax.tree.structure(ops)
    return [t is not None for t in tree.flatten_up_to(tangents)]


def _varied(
    rules: Rules, ops: Any, which: Sequence[bool]
) -> tuple[list[Any], Callable[..., tuple[Any, ...]]]:
    """(some arrays of ops, the formula as a function of these)."""
    leaves, tree = jax.tree.flatten(ops)

    def of(*some: Any) -> tuple[Any, ...]:
        left = iter(some)
        mixed = [next(left) if w else x for x, w in zip(leaves, which, strict=True)]
        return rules.formula(tree.unflatten(mixed))

    return [x for x, w in zip(leaves, which, strict=True) if w], of
