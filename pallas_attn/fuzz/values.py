"""The arrays of a call: normal ones, large, tiny, equal, extreme ones."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np

from pallas_attn.fuzz.kinds import KINDS
from pallas_attn.fuzz.plan import Arrays, Plan, Sizes


DTYPES: dict[str, type] = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float64": np.float64,
}
# Sets of values, as they were first drawn: their order is part of every seed.
SETS = (
    "normal",
    "poison",  # NaN and inf wherever nobody may look
    "big",  # scores of some thousands
    "tiny",
    "neg30",  # entries of a bias that take keys away
    "neg9",  # entries of a bias that nearly do
    "ties",
    "dups",  # many equal keys
    "sink",  # a few keys that draw all queries
    "outlier",  # a few large values
    "gates",  # log gates of 0, -1e4 and -1e9
    "slopes",  # slopes of 0, of both signs, and of hundreds
    "zeros",
    "cots",  # cotangents of another size
    "nan",  # one NaN that somebody may see
)
# Sets that came later: of those that a call can have, one runs beside the drawn ones.
MORE = (
    "taken",  # keys that a bias takes away, NaN and inf in them
    "lost",  # log gates of -inf and -3e38
    "far",  # positions 2^31 apart
)
WIDEST = 2**30
# Masks hide or show whole blocks of so many queries and keys; 0: they need not.
BLOCK = 0
# Makes an array from a generator.
Maker = Callable[[np.random.Generator], np.ndarray]


def value_sets(plan: Plan, count: int) -> tuple[str, ...]:
    """The sets of values of a call: "normal", `count - 1` others, one of `MORE`."""
    rng = np.random.default_rng([plan.seed, 11])
    weights: dict[str, float] = dict.fromkeys(SETS, 1.0)
    weights |= {"normal": 0.0, "poison": 2.5, "zeros": 0.3, "nan": 0.5}
    if not set(plan.bias) & {"dense", "pairsin", "parts"}:
        weights["neg30"] = weights["neg9"] = 0
    if "forget" not in plan.bias:
        weights["gates"] = 0
    steep = ("slopes", "weight", "rate")
    if not any(word in name for name in plan.forms for word in steep):
        weights["slopes"] = 0
    if not plan.low:
        weights["cots"] = 0.2
    weights["ties"] = weights["dups"] = 2.0 if plan.normalizer else 0.3
    names = [name for name in SETS if weights[name]]
    w = np.array([weights[name] for name in names])
    if plan.constants or plan.transform == "eager":  # each set is compiled again
        count = min(count, 2)
    size = min(count - 1, len(names))
    some = rng.choice(len(names), size=size, replace=False, p=w / w.sum())
    later = _later(plan)
    if later and count > 1:
        later = [later[np.random.default_rng([plan.seed, 23]).integers(len(later))]]
    return ("normal", *(names[i] for i in some), *later)


def _later(plan: Plan) -> list[str]:
    found = []
    if set(plan.bias) & {"dense", "parts"}:
        found.append("taken")
    if "forget" in plan.bias:
        found.append("lost")
    # a user's own code subtracts positions as it likes
    own = any(name in KINDS and KINDS[name].own for name in plan.bias)
    if not own and (plan.query_positions or plan.key_positions):
        found.append("far")
    return found


def values(
    plan: Plan, chosen: str, index: int, element: Sizes = ()
) -> tuple[Arrays, Arrays, Arrays]:
    """(operands, conditions, cotangents) of one element of a mapped call.

    Every array is drawn by itself, from its name: it stays what it is when another
    fact of the call is changed.

    Args:
        plan: The call.
        chosen: The set of values.
        index: Its place among the sets of the call.
        element: The place along each map.
    """

    def rng_of(name: str) -> np.random.Generator:
        own = [
            i if name in mapped else 0
            for i, mapped in zip(element, plan.maps, strict=bool(element))
        ]
        seed = [plan.seed, index, zlib.crc32(name.encode()), *own]
        return np.random.default_rng(seed)

    conditions = {
        name: make(rng_of(name)) for name, make in _conditions(plan, chosen).items()
    }
    kept = ("mask", "words")
    conditions = {
        name: x if name in kept else np.asarray(x, np.int64)
        for name, x in conditions.items()
    }
    query, key = (*plan.L, plan.T, plan.N, plan.H), (*plan.L, plan.S, plan.K, plan.H)
    shapes: dict[str, tuple[Sizes, str]] = {
        "query": (query, plan.dtype),
        "key": (key, plan.dtype),
        "value": ((*key[:-1], plan.h), plan.dtype),
        **{name: (form.shape, form.dtype) for name, form in plan.forms.items()},
        "scale": ((), plan.accumulator),
        "alpha": ((plan.N,), plan.accumulator),
        "sink": (plan.sink or (), plan.accumulator),
    }
    operands = {}
    for name in plan.operands:
        shape, dtype = shapes[name]
        x = _operand(plan, chosen, name, shape, dtype, rng_of(name))
        with np.errstate(over="ignore"):
            operands[name] = x.astype(DTYPES[dtype])
    output = rng_of("do").standard_normal((*plan.L, plan.T, plan.N, plan.h))
    if chosen == "cots":
        output = output * rng_of("cots").choice((1e-5, 1e-3, 100.0))
    cotangents = {"output": output.astype(DTYPES[plan.dtype])}
    if plan.residual:
        x = rng_of("dres").standard_normal((*plan.L, plan.T, plan.N))
        x = x * (0 if plan.zero_cotangent else 1)
        cotangents["residual"] = x.astype(DTYPES[plan.accumulator])
    return operands, conditions, cotangents


def widened(arrays: Arrays) -> Arrays:
    """Floats as float64."""
    return {
        name: x if x.dtype.kind in "biu" else x.astype(np.float64)
        for name, x in arrays.items()
    }


def _in_blocks(mask: np.ndarray) -> np.ndarray:
    """Of each block all, none or what there was, by numbers of its own."""
    rng = np.random.default_rng(int(mask.sum()))
    *lead, rows, columns = mask.shape
    kinds = rng.integers(0, 3, (*lead, -(-rows // BLOCK), -(-columns // BLOCK)))
    for axis, size in ((-2, rows), (-1, columns)):
        kinds = np.take(np.repeat(kinds, BLOCK, axis), np.arange(size), axis)
    return np.where(kinds == 2, mask, kinds == 1)


def _conditions(plan: Plan, chosen: str) -> dict[str, Maker]:
    L, T, S = plan.L, plan.T, plan.S

    def mask(rng: np.random.Generator) -> np.ndarray:
        assert plan.mask is not None
        m = rng.random(plan.mask) < rng.choice((0.3, 0.6, 0.95))
        if m.ndim >= 2 and rng.random() < 0.5:
            m = m & (rng.random((*m.shape[:-1], 1)) < 0.8)
        m = m & (rng.random(m.shape[-1:]) < 0.9) if rng.random() < 0.5 else m
        return _in_blocks(m) if BLOCK and m.ndim > 1 else m

    def lengths(n: int) -> Maker:
        return lambda rng: (
            rng.integers(-2, n + 3, L) if rng.random() < 0.9 else np.zeros(L, np.int64)
        )

    def segments(n: int) -> Maker:
        def make(rng: np.random.Generator) -> np.ndarray:
            x = rng.integers(0, 3, (*L, n))
            x = np.sort(x, -1) if rng.random() < 0.6 else x
            return np.where(x == 2, rng.choice((2, 2**31 - 1, -(2**31))), x)

        return make

    def positions(form: Sizes | None) -> Maker:
        return lambda rng: _positions(plan, chosen, form or (), rng)

    def words(rng: np.random.Generator) -> np.ndarray:
        count = 4 if plan.rng_kind == "rbg" else 2
        return rng.integers(0, 2**32, count).astype(np.uint32)

    makers: dict[str, Maker] = {
        "mask": mask,
        "query_seq_lengths": lengths(T),
        "key_value_seq_lengths": lengths(S),
        "query_segment_ids": segments(T),
        "key_segment_ids": segments(S),
        "query_offset": lambda rng: rng.integers(-20, 60, plan.offset_form),
        "query_positions": positions(plan.query_positions),
        "key_positions": positions(plan.key_positions),
        "words": words,
    }
    return {name: makers[name] for name in plan.conditions}


def _positions(
    plan: Plan, chosen: str, form: Sizes, rng: np.random.Generator
) -> np.ndarray:
    n = form[-1]
    if chosen == "far":
        near = rng.integers(0, 30, form)
        return np.where(rng.random(form) < 0.5, near - WIDEST, WIDEST - near)
    match plan.order:
        case "shuffle":
            return np.argsort(rng.random(form), -1)
        case "repeat":
            return rng.integers(-5, max(n // 2, 1) + 5, form)
        case "sorted":
            return np.sort(rng.integers(0, 2 * n + 1, form), -1)
        case "sparse":
            return rng.integers(-1000, 1000, form)
        case _:
            near = rng.integers(-20, 20, form)
            return near + rng.choice((-(2**29), 2**29 - 50))


def _operand(
    plan: Plan,
    chosen: str,
    name: str,
    shape: Sizes,
    dtype: str,
    rng: np.random.Generator,
) -> np.ndarray:
    x = rng.standard_normal(shape)
    if name in ("query", "key", "value"):
        return _projected(plan, chosen, name, x, rng)
    if name == "scale":
        return np.asarray(0.3 + 0.2 * x)
    if name == "alpha":
        draw = lambda: rng.choice((1.0, 1.5, 2.0, 1.0 + rng.random(), 1.3))
        return np.asarray([draw() for _ in range(plan.N)])
    if name == "sink":
        x = 3 * x * (100 if chosen == "big" else 1)
        return np.round(x) if chosen == "ties" else x
    place, field = name.removeprefix("bias").split(".")
    term = plan.bias[int(place)]
    if field == "log_gate":
        x = _gates(plan, chosen, dtype, x, rng)
    elif field in ("slopes", "rate", "weight"):
        x = np.abs(x) * rng.choice((0.05, 0.5, 1.0))
        if chosen == "slopes":
            u, big = rng.random(shape), rng.choice((20.0, 300.0))
            steps = np.where(u < 0.5, -x, np.where(u < 0.7, big, x))
            x = np.where(u < 0.25, 0.0, steps)
    elif field == "reach":
        x = np.abs(x) * 10
    elif field in ("q_factor", "k_factor", "x", "y", "a", "c"):
        x = x * 0.7
    if chosen == "ties":
        x = np.round(np.clip(x, -1, 1))
    if chosen == "zeros":
        x = x * 0
    if term in ("dense", "parts") and field in ("bias", "a", "c"):
        x = _lowered(chosen, dtype, x, rng)
    return x


def _projected(
    plan: Plan, chosen: str, name: str, x: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """A query, key or value."""
    S = plan.S
    if name in ("query", "key"):
        match chosen:
            case "big":
                x = x * 60
            case "tiny":
                x = x * 1e-4
            case "ties":
                x = rng.integers(-1, 2, x.shape).astype(float)
            case "zeros":
                x = x * 0
        if abs(plan.scale or 0) > 1e3:
            x = x * 1e-3
    if name == "key" and S and chosen == "dups":
        x = x[..., rng.integers(0, max(S // 4, 1), S), :, :]
    if name == "key" and S and chosen == "sink":
        some = rng.integers(0, S, max(1, S // 20))
        x[..., some, :, :] *= 12 if plan.dtype == "float16" else 30
    if name == "query" and chosen == "sink":
        x = np.abs(x)
    if name == "value" and S and chosen == "outlier":
        some = rng.integers(0, S, max(1, S // 10))
        x[..., some, :, :] *= 1e4 if plan.dtype != "float16" else 100
    return x


def _gates(
    plan: Plan, chosen: str, dtype: str, x: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    x = -np.abs(x) * rng.choice((0.02, 0.3, 3.0))
    if chosen == "gates":
        u = rng.random(x.shape)
        x = np.where(u < 0.3, 0.0, np.where(u > 0.9, -1e4, x))
        x = np.where(u > 0.97, rng.choice((-1e9, -65504.0)), x)
        x = np.maximum(x, -6e4) if dtype == "float16" else x
        if plan.transform != "eager":  # whose values are checked
            x = np.where((u > 0.5) & (u < 0.55), 0.7, x)
    if chosen == "lost":
        u = rng.random(x.shape)
        x = np.where(u < 0.06, -np.inf, x)
        x = np.where(u > 0.95, -6e4 if dtype == "float16" else -3e38, x)
    return x


def _lowered(
    chosen: str, dtype: str, x: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Entries that take a key away, or nearly do; in "taken" whole columns."""
    lows: dict[str, Sequence[float]] = {
        "neg30": (-np.inf, -1e31, -3e30),
        "neg9": (-1e9, -65504.0, -1e4),
        "taken": (-np.inf, -1e31, -3e30),
    }
    if chosen not in lows:
        return x
    hit = rng.random(x.shape) < rng.choice((0.1, 0.5, 0.95))
    low = rng.choice(lows[chosen], x.shape)
    if chosen == "taken":
        columns = rng.random(x.shape[-1:]) < 0.4
        hit = hit & (rng.random() < 0.3) | columns
    if dtype == "float16" and chosen == "neg9":
        low = np.maximum(low, -6e4)
    return np.where(hit, low, x)
