"""Output, residual and gradients of a whole call, and what rounding makes of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from pallas_attn.fuzz.plan import Arrays, Plan
from pallas_attn.fuzz.truth.arrays import finite, of_head, to_head, unread
from pallas_attn.fuzz.truth.dropout import kept
from pallas_attn.fuzz.truth.terms import Term, TERMS
from pallas_attn.fuzz.truth.visibility import Visibility, visibility
from pallas_attn.fuzz.truth.weights import alpha_gradient, Weights, weights


# A logit, or a term's own value, from which on a key has no weight.
NO_WEIGHT = -1e30
# The share of a row's weight that a key without any may have: less is pruned.
NOTHING_LESS = 2.0**-24


@dataclass(frozen=True)
class Noise:
    """What rounding may do at each step: nothing, without a generator.

    Args:
        random: Where the noise comes from.
        score: The unit in which scores and sums are rounded.
        store: The unit in which weights and stored arrays are.
        least: The least number that is stored: below the normal ones, the unit.
    """

    random: np.random.Generator | None = None
    score: float = 0.0
    store: float = 0.0
    least: float = 0.0

    def on(
        self, x: np.ndarray, unit: float, size: np.ndarray | None = None
    ) -> np.ndarray:
        """X, off by at most `unit` of `size`, else of itself; an infinity as it is."""
        if self.random is None or unit == 0:
            return x
        off = self.random.uniform(-1, 1, np.shape(x))
        return x + off * unit * np.abs(finite(x if size is None else size))

    def stored(self, x: np.ndarray) -> np.ndarray:
        """X as one may be off that is stored, or is an operand of a product."""
        if self.random is None:
            return x
        off = self.random.uniform(-0.5, 0.5, np.shape(x)) * self.least
        return self.on(x, self.store) + np.where(x == 0, 0, off)

    def held(self, x: np.ndarray) -> np.ndarray:
        """X as a float of the unit of scores holds it: what is unequal may be equal.

        Noise alone parts any two numbers. But scores of -2e9 that are 10 apart are one
        number of float32, and where the largest are, their keys share the weight.
        """
        if self.random is None or self.score == 0:
            return x
        return nearest(x, self.score)


@dataclass(frozen=True)
class Truth:
    """What a call is.

    Args:
        output: [*L, T, N, h].
        residual: [*L, T, N].
        unsure: Rows whose gradient, or selection, is on an edge, [*L, T, N].
        unselected: Rows whose selection is on an edge, [*L, T, N].
        alive: Rows that see a key, [*L, T, N].
        reach: Pairs that are allowed, and not taken away by the bias, [*L, N, T, S].
        allowed: Pairs that are allowed, [*L, N, T, S].
        weights: [*L, N, T, S].
        kept: Pairs that dropout leaves, [*L, N, T, S].
        gradients: By operand.
    """

    output: np.ndarray
    residual: np.ndarray
    unsure: np.ndarray
    unselected: np.ndarray
    alive: np.ndarray
    reach: np.ndarray
    allowed: np.ndarray
    weights: np.ndarray
    kept: np.ndarray
    gradients: Arrays = field(default_factory=dict)


@dataclass(frozen=True)
class _Readable:
    """What a call reads: 0 where nobody may look."""

    q: np.ndarray  # [*L, N, T, H]
    k: np.ndarray  # [*L, N, S, H]
    v: np.ndarray  # [*L, N, S, h]
    terms: list[tuple[int, Term]]
    reach: np.ndarray


@dataclass(frozen=True)
class _Logits:
    """Of every pair, and the way back to scaled products."""

    t: np.ndarray  # without what is shared; -inf where hidden
    products: np.ndarray  # q.k, unscaled
    size: np.ndarray  # sums of |q||k|
    scale: float
    bent: np.ndarray | float  # the derivative of a soft cap
    gates: tuple[np.ndarray, np.ndarray] | None = None  # g and z of Co-ALiBi
    shared: np.ndarray | float = 0.0  # what all keys of a query have, [*L, N, T, 1]


EXACT = Noise()


def nearest(x: np.ndarray, unit: float) -> np.ndarray:
    """The nearest float to x; `unit` is that from 1 to the next."""
    step = np.ldexp(unit, np.frexp(finite(x))[1] - 1)
    return np.where(np.isfinite(x), np.round(finite(x) / step) * step, x)


def truth(
    plan: Plan,
    operands: Arrays,
    conditions: Arrays,
    cotangents: Arrays | None = None,
    noise: Noise = EXACT,
) -> Truth:
    """The call in float64; without cotangents, without gradients.

    Args:
        plan: The static facts.
        operands: float64.
        conditions: Integers and booleans.
        cotangents: float64, of "output" and perhaps "residual".
        noise: What rounding does at each step.
    """
    see = visibility(plan, conditions)
    read = _readable(plan, operands, see)
    logits = _logits(plan, operands, read, noise)
    visible: np.ndarray = np.asarray(~np.isneginf(logits.t))
    alive = np.asarray(visible.any(-1))
    parts = (part for _, term in read.terms for part in term.parts)
    size = logits.size.max(-1, initial=0) + sum(
        np.where(visible, np.abs(finite(x)), 0.0).max(-1, initial=0) for x in parts
    )
    found = weights(plan, operands, logits.t, size, logits.shared)
    if plan.sink is not None:  # what is no row has none
        there = see.query_there[..., None, :]
        found = replace(found, residual=np.where(there, found.residual, -np.inf))
        if cotangents is not None and "residual" in cotangents:
            its = np.where(np.swapaxes(there, -1, -2), cotangents["residual"], 0.0)
            cotangents = {**cotangents, "residual": its}
    p, u = found.p, found.u
    if noise.random is not None:
        unit = min(NOTHING_LESS, noise.score)
        flat = noise.random.uniform(-1, 1, p.shape) * unit * visible
        p = noise.on(p, noise.store) + flat
        u = noise.on(u, noise.store) + (flat if plan.normalizer is None else 0)
    left = np.ones(plan.full, bool)
    if plan.dropout:
        flattened = (math.prod(plan.L), plan.N, plan.T, plan.S)
        mask = kept(conditions["words"], plan.dropout, flattened)
        left = mask.reshape(plan.full)
    keep = left / (1 - plan.dropout)
    output = noise.on(
        (p * keep) @ read.v, noise.store, (found.p * keep) @ np.abs(read.v)
    )
    output = np.where(alive[..., None], output, 0.0)
    gradients = {}
    if cotangents is not None:
        given = _Backward(plan, operands, cotangents, noise, read, logits, found)
        gradients = given.gradients(p, u, keep, alive)
    rows = lambda x: np.swapaxes(x, -1, -2)
    # beside the peak stands the log of a sum of at least 1, which is rounded as it is
    beside = 1 + np.abs(finite(found.residual))
    return Truth(
        np.moveaxis(output, -3, -2),
        rows(noise.on(found.residual, noise.score, beside)),
        rows(found.unsure),
        rows(found.unselected),
        rows(alive),
        read.reach,
        see.allowed,
        found.p,
        left,
        gradients,
    )


def _readable(plan: Plan, operands: Arrays, see: Visibility) -> _Readable:
    group = plan.N // plan.K
    terms = []
    reach, total = see.allowed, np.zeros(plan.full)
    for n, name in enumerate(plan.bias):
        if name == "co_alibi":
            continue
        fields = {}
        for name_of_field, form in plan.fields(n).items():
            x = operands[f"bias{n}.{name_of_field}"]
            gone = unread(see.allowed, x.shape, form.home) & ~np.isfinite(x)
            if name == "forget":  # a gate is read by the keys before it
                gone = np.zeros_like(gone)
            fields[name_of_field] = np.where(gone, 0.0, x)
        term = TERMS[name](fields, see)
        for part in term.parts:
            reach = reach & ~(part <= NO_WEIGHT)
            total = total + part
        terms.append((n, term))
    reach = reach & ~(total <= NO_WEIGHT)
    q = np.moveaxis(operands["query"], -2, -3)
    k, v = (
        np.repeat(np.moveaxis(operands[name], -2, -3), group, axis=-3)
        for name in ("key", "value")
    )
    seen = reach.any(-2).reshape(*plan.L, plan.K, group, plan.S).any(-2)
    seen = np.repeat(seen, group, axis=-2)[..., None]
    q = np.where(reach.any(-1, keepdims=True), q, 0.0)
    return _Readable(q, np.where(seen, k, 0.0), np.where(seen, v, 0.0), terms, reach)


def _logits(plan: Plan, operands: Arrays, read: _Readable, noise: Noise) -> _Logits:
    scale = 1 / math.sqrt(plan.H) if plan.scale is None else plan.scale
    q = read.q
    if "scale" in operands:
        scale = float(operands["scale"])
        q = noise.on(q, noise.store)
    products = q @ np.swapaxes(read.k, -1, -2)
    size = np.abs(q) @ np.swapaxes(np.abs(read.k), -1, -2) * abs(scale)
    s = noise.on(scale * products, noise.score, size)
    bent: np.ndarray | float = 1.0
    if plan.soft_cap is not None:
        y = np.tanh(s / plan.soft_cap)
        s = noise.on(plan.soft_cap * y, noise.score)
        # of a tanh that may be off by a few units itself
        bent = noise.on(1 - y * y, 2 * noise.score, np.ones_like(y))
    if plan.contextual:
        return _contextual(operands, read, noise, s, products, size, scale, bent)
    t, shared = s, np.zeros((*s.shape[:-1], 1))
    for _, term in read.terms:
        for n, part in enumerate(term.parts):
            of_row = np.zeros(()) if n or term.shared is None else term.shared
            if np.shape(part)[-1:] == (1,):
                of_row = finite(part)
            own = np.where(np.isfinite(part), part - of_row, part)
            t = t + noise.on(own, noise.score)
            shared = shared + of_row
        for big in term.sizes:
            shape = np.broadcast_shapes(t.shape, big.shape)
            t = t + noise.on(np.zeros(shape), noise.score, big)
    reach = read.reach & ~(t + shared <= NO_WEIGHT)
    t = np.where(reach, noise.held(t), -np.inf)
    return _Logits(t, products, size, scale, bent, shared=shared)


def _contextual(
    operands: Arrays,
    read: _Readable,
    noise: Noise,
    s: np.ndarray,
    products: np.ndarray,
    size: np.ndarray,
    scale: float,
    bent: np.ndarray | float,
) -> _Logits:
    """Co-ALiBi: t = s - m z, z the suffix sums of the gates of visible keys."""
    places = read.reach & ~(s <= NO_WEIGHT)
    s = np.where(places, s, 0.0)
    gates = np.where(places, 1 / (1 + np.exp(-np.clip(s, -700, 700))), 0.0)
    # 16-bit calls take a gate from 10 bits of it
    unit = 2.0**-10 if noise.store > 1e-5 else 0.0
    gates = np.clip(noise.on(gates, unit, np.ones_like(gates)), 0, 1) * places
    z = noise.on(np.flip(np.cumsum(np.flip(gates, -1), -1), -1), noise.score)
    t = s - of_head(operands["bias0.slopes"]) * z
    t = np.where(places & ~(t <= NO_WEIGHT), noise.held(t), -np.inf)
    return _Logits(t, products, size, scale, bent, (gates, z))


@dataclass(frozen=True)
class _Backward:
    plan: Plan
    operands: Arrays
    cotangents: Arrays
    noise: Noise
    read: _Readable
    logits: _Logits
    found: Weights

    def gradients(
        self,
        p: np.ndarray,
        u: np.ndarray,
        keep: np.ndarray | float,
        alive: np.ndarray,
    ) -> Arrays:
        """Of every operand; p and u as they were rounded."""
        noise, found, read = self.noise, self.found, self.read
        do = np.moveaxis(self.cotangents["output"], -2, -3)
        do = np.where(alive[..., None], do, 0.0)
        dres = np.zeros(alive.shape)
        if "residual" in self.cotangents:
            dres = np.swapaxes(self.cotangents["residual"], -1, -2)
        dres = np.where(alive, dres, 0.0)[..., None]
        pulled = do @ np.swapaxes(read.v, -1, -2)
        size = np.abs(do) @ np.swapaxes(np.abs(read.v), -1, -2)
        pulled, size = keep * noise.on(pulled, noise.score, size), keep * size
        delta = (u * pulled).sum(-1, keepdims=True) / found.total
        # a product with the mean of the values, which was stored: where dP is noisy
        # because its own products nearly cancel, delta is so by itself
        stored = np.abs(u * pulled).sum(-1, keepdims=True) / found.total
        summed = (u * size).sum(-1, keepdims=True) / found.total
        delta = noise.on(delta, noise.store, stored)
        delta = noise.on(delta, noise.score, summed)
        unit = np.where(found.slope == 0, 1.0, found.slope)
        dt = u * (pulled - delta + unit * dres / found.total)
        dt = np.where(np.isneginf(self.logits.t), 0.0, noise.stored(dt))
        result = self._to_products(dt)
        # dS of a pair is off by roundings of dP and delta, which nearly cancel
        off = u * (np.abs(pulled) + np.abs(delta))
        for n, term in read.terms:
            if term.leaks is None or noise.random is None:
                continue
            leaked = term.leaks(noise.on(np.zeros(dt.shape), noise.score, off))
            for name, x in leaked.items():
                result[f"bias{n}.{name}"] += x
        if "alpha" in self.operands:
            da = alpha_gradient(found, p, u, pulled, delta, dres)
            # logarithms of weights are rounded beside 1, and nearly cancel
            logs = 1 + np.log(np.where(found.p > 0, found.p, 1)) ** 2
            beside = (np.abs(pulled) * found.p * logs).sum(-1, keepdims=True)
            beside = np.where(alive[..., None], beside + np.abs(dres), 0)
            da = da + noise.on(np.zeros(da.shape), noise.score, beside)
            da = np.where(alive[..., None], da, 0.0)
            result["alpha"] = to_head(da, self.operands["alpha"])
        if "sink" in self.operands:
            result["sink"] = self._of_sink(alive, delta)
        dv = np.swapaxes(p * keep, -1, -2) @ do
        result["value"] = self._of_keys(dv)
        return result

    def _to_products(self, dt: np.ndarray) -> Arrays:
        """Gradients of query, key, scale and bias, from that of the logits."""
        result: Arrays = {}
        ds = dt
        if self.logits.gates is not None:
            g, z = self.logits.gates
            slopes = self.operands["bias0.slopes"]
            ds = dt - of_head(slopes) * g * (1 - g) * np.cumsum(dt, -1)
            result["bias0.slopes"] = to_head(-dt * z, slopes)
        for n, term in self.read.terms:
            for name, x in term.back(dt).items():
                result[f"bias{n}.{name}"] = x
        ds = ds * self.logits.bent
        scale = self.logits.scale
        if "scale" in self.operands:
            result["scale"] = np.asarray((ds * self.logits.products).sum())
        result["query"] = np.moveaxis(scale * (ds @ self.read.k), -3, -2)
        result["key"] = self._of_keys(scale * (np.swapaxes(ds, -1, -2) @ self.read.q))
        return result

    def _of_sink(self, alive: np.ndarray, delta: np.ndarray) -> np.ndarray:
        """Of each row exp(sink - lse) (dlse - delta); dlse of one that sees nothing."""
        sink, residual = self.operands["sink"], self.found.residual[..., None]
        lse, dres = finite(residual), np.zeros_like(residual)
        if "residual" in self.cotangents:
            dres = np.swapaxes(self.cotangents["residual"], -1, -2)[..., None]
        above = self.noise.on(of_head(sink) - lse, self.noise.score, 1 + np.abs(lse))
        weight = np.exp(np.minimum(above, 1e-3))
        of_rows = weight * (dres - delta)
        return to_head(np.where(alive[..., None], of_rows, dres), sink)

    def _of_keys(self, x: np.ndarray) -> np.ndarray:
        """[*L, N, S, .] as [*L, S, K, .]."""
        plan = self.plan
        x = x.reshape(*plan.L, plan.K, plan.N // plan.K, plan.S, x.shape[-1])
        return np.moveaxis(x.sum(-3), -3, -2)
