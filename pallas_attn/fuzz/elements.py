"""All elements of a mapped call: their values, what is poisoned, what they add to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pallas_attn.fuzz.kinds import kind_of
from pallas_attn.fuzz.plan import Arrays, Plan, Sizes
from pallas_attn.fuzz.truth.arrays import unread
from pallas_attn.fuzz.truth.attention import EXACT, Noise, Truth, truth
from pallas_attn.fuzz.values import values, widened


POISONS = (np.nan, np.inf, -np.inf)


@dataclass(frozen=True)
class Marked:
    """One NaN that somebody may see; rows are [*L, T, N].

    Args:
        name: The operand that holds it.
        clean: The operands without it.
        shown: Rows whose output must be NaN.
        touched: Rows whose output may be.
    """

    name: str
    clean: Arrays
    shown: np.ndarray
    touched: np.ndarray


class Elements:
    """The operands, conditions and cotangents of every element of a call's maps.

    Rows whose true gradient jumps within rounding have no cotangent.

    Args:
        plan: The call.
        chosen: The set of values.
        index: Its place among the sets.
        given: Operands, conditions and cotangents that are not to be drawn, of a call
            without maps.
    """

    def __init__(
        self,
        plan: Plan,
        chosen: str,
        index: int,
        given: tuple[Arrays, Arrays, Arrays] | None = None,
    ):
        self.plan, self.chosen, self.index = plan, chosen, index
        self.places: list[Sizes] = list(np.ndindex(*plan.map_sizes))
        self.values = [given or values(plan, chosen, index, at) for at in self.places]
        self.marked: Marked | None = None
        clean = self._truths(gradients=False)
        rng = np.random.default_rng([plan.seed, index, 99])
        if chosen in ("poison", "taken"):
            self._poison(rng, clean)
        if chosen == "nan" and not plan.maps and clean[0].allowed.any():
            self._mark(rng, clean[0])
        for (_, _, cotangents), found in zip(self.values, clean, strict=True):
            for name, x in cotangents.items():
                gone = found.unsure[..., None] if name == "output" else found.unsure
                cotangents[name] = np.where(gone, 0, x).astype(x.dtype)

    def truths(self, noise: Noise = EXACT) -> list[Truth]:
        """The truth of every element, gradients included."""
        return self._truths(gradients=True, noise=noise)

    def _truths(self, *, gradients: bool, noise: Noise = EXACT) -> list[Truth]:
        with np.errstate(all="ignore"):
            return [
                truth(
                    self.plan,
                    widened(operands),
                    conditions,
                    widened(cotangents) if gradients else None,
                    noise,
                )
                for operands, conditions, cotangents in self.values
            ]

    def _poison(self, rng: np.random.Generator, clean: Sequence[Truth]) -> None:
        """NaN and inf in all that nobody may read; shared by what shares an array."""
        bad = [
            poisoned(self.plan, *given, found, rng)
            for given, found in zip(self.values, clean, strict=True)
        ]
        for name in self.values[0][0]:
            groups: dict[Sizes, list[int]] = {}
            for n, at in enumerate(self.places):
                groups.setdefault(self._own(name, at), []).append(n)
            for members in groups.values():
                if len(members) == 1:
                    continue
                first = members[0]
                own = self.values[first][0][name]  # -inf may be a number of its own
                held = np.stack([bad[n][0][name] for n in members])
                mixed = np.where((held != own).all(0), held[0], own)
                for n in members:
                    bad[n][0][name] = mixed
        self.values = [
            (operands, conditions, cotangents)
            for (operands, cotangents), (_, conditions, _) in zip(
                bad, self.values, strict=True
            )
        ]

    def _own(self, name: str, at: Sizes) -> Sizes:
        """The place along the maps that vary this name."""
        pairs = zip(at, self.plan.maps, strict=True)
        return tuple(i if name in mapped else 0 for i, mapped in pairs)

    def _mark(self, rng: np.random.Generator, found: Truth) -> None:
        operands, conditions, cotangents = self.values[0]
        name = rng.choice(("query", "key", "value"))
        x = operands[name].copy()
        places = np.argwhere(found.allowed)
        *lead, n, i, j = (int(y) for y in places[rng.integers(len(places))])
        group = self.plan.N // self.plan.K
        shown = np.zeros(found.alive.shape, bool)
        if name == "query":
            x[(*lead, i, n)] = np.nan
            shown[(*lead, i, n)] = True
            touched = shown.copy()
        else:
            x[(*lead, j, n // group)] = np.nan
            heads = slice(n // group * group, n // group * group + group)
            see = found.allowed
            if name == "value":  # one that weighs next to nothing may show or not
                see = see & found.kept & (found.weights > 2.0**-20)
            at = (*lead, slice(None), heads)
            shown[at] = np.swapaxes(see[(*lead, heads, slice(None), j)], -1, -2)
            touched = shown.copy()
            touched[at] = True
        if name != "value":  # NaN is the weight of whatever a row has
            shown &= np.swapaxes(self._weighs(found), -1, -2)
        self.marked = Marked(name, operands, shown, touched)
        self.values[0] = (operands | {name: x}, conditions, cotangents)

    def _weighs(self, found: Truth) -> np.ndarray:
        """Rows [*L, N, T] of which dropout leaves a key, whichever ones top_k takes."""
        if self.plan.normalizer is not None and self.plan.normalizer[1] is not None:
            return np.asarray((found.kept | ~found.reach).all(-1))
        return np.asarray((found.kept & found.reach).any(-1))

    def stacked(self) -> tuple[Arrays, Arrays, Arrays]:
        """The axes of maps in front of what they vary, and of all cotangents."""
        operands, conditions, cotangents = (
            {name: self._stack(part, name) for name in self.values[0][part]}
            for part in range(3)
        )
        return operands, conditions, cotangents

    def _stack(self, part: int, name: str) -> np.ndarray:
        plan = self.plan
        axes = [n for n, mapped in enumerate(plan.maps) if part == 2 or name in mapped]
        shape = [plan.map_sizes[n] for n in axes]
        found = []
        for at in np.ndindex(*shape):
            place = [0] * len(plan.maps)
            for n, i in zip(axes, at, strict=True):
                place[n] = i
            element = self.places.index(tuple(place))
            found.append(np.asarray(self.values[element][part][name]))
        return np.stack(found).reshape((*shape, *found[0].shape))

    def joined(self, found: Sequence[Truth]) -> Arrays:
        """Output, residual and gradients, added up over what shares an operand."""
        plan = self.plan

        def together(arrays: list[np.ndarray]) -> np.ndarray:
            return np.stack(arrays).reshape((*plan.map_sizes, *arrays[0].shape))

        result = {
            "output": together([x.output for x in found]),
            "residual": together([x.residual for x in found]),
        }
        for name in found[0].gradients:
            x = together([each.gradients[name] for each in found])
            if plan.transform != "vmap_of_grad":
                shared = (n for n, mapped in enumerate(plan.maps) if name not in mapped)
                x = x.sum(tuple(shared))
            result[name] = x
        return result


def poisoned(
    plan: Plan,
    operands: Arrays,
    conditions: Arrays,
    cotangents: Arrays,
    found: Truth,
    rng: np.random.Generator,
) -> tuple[Arrays, Arrays]:
    """Operands and cotangents with NaN and inf in all that nobody may read."""
    group = plan.N // plan.K
    operands, cotangents = dict(operands), dict(cotangents)
    bad = lambda x: rng.choice(POISONS, x.shape).astype(x.dtype)
    seen = np.swapaxes(found.reach.any(-1), -1, -2)[..., None]
    operands["query"] = np.where(seen, operands["query"], bad(operands["query"]))
    seen = found.reach.any(-2).reshape(*plan.L, plan.K, group, plan.S).any(-2)
    seen = np.swapaxes(seen, -1, -2)[..., None]
    for name in ("key", "value"):
        operands[name] = np.where(seen, operands[name], bad(operands[name]))
    for name, form in plan.forms.items():
        kind, x = plan.bias[int(name[4:].partition(".")[0])], operands[name]
        if kind == "co_alibi":
            continue
        if kind_of(kind).guarded:
            gone = unread(found.allowed, x.shape, form.home)
            operands[name] = np.where(gone, bad(x), x)
        elif kind == "forget" and "key_value_seq_lengths" in conditions:
            most = conditions["key_value_seq_lengths"]
            for axis in range(len(plan.L)):  # x is [#B, S, #N]
                if x.shape[axis] == 1:
                    most = most.max(axis, keepdims=True, initial=0)
            gone = np.arange(plan.S)[:, None] >= most[..., None, None]
            # a call that knows its gates refuses inf, wherever it stands
            eager = plan.transform == "eager"
            operands[name] = np.where(gone, np.nan if eager else bad(x), x)
    dead = ~found.alive
    output = cotangents["output"]
    cotangents["output"] = np.where(dead[..., None], bad(output), output)
    if "residual" in cotangents:
        residual = cotangents["residual"]
        if plan.sink is not None:  # whose gradient reads what a row without keys has
            lengths = conditions.get("query_seq_lengths", np.array(plan.T))
            dead = np.arange(plan.T)[:, None] >= lengths[..., None, None]
        cotangents["residual"] = np.where(dead, bad(residual), residual)
    return operands, cotangents


def tangents(elements: Elements) -> Arrays:
    """A direction for every differentiated operand of the first element."""
    plan, operands = elements.plan, elements.values[0][0]
    rng = np.random.default_rng([plan.seed, elements.index, 5])
    found = {
        name: rng.standard_normal(operands[name].shape).astype(operands[name].dtype)
        for name in plan.wrt
    }
    if "alpha" in found and plan.transform == "hvp":  # differences need both sides
        edge = (operands["alpha"] == 1) | (operands["alpha"] == 2)
        found["alpha"] = np.where(edge, 0, found["alpha"]).astype(found["alpha"].dtype)
    for name in found:  # nor may a gate pass 0, above which it counts as 0
        if name.endswith("log_gate") and plan.transform == "hvp":
            found[name] = np.where(operands[name] > -0.1, 0, found[name])
            found[name] = found[name].astype(operands[name].dtype)
    return found
