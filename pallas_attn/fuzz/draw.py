"""A call from a seed: what is fixed when it is traced."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pallas_attn.config import Block, Config
from pallas_attn.fuzz.kinds import APART, kind_of, KINDS, OFTEN, OWN
from pallas_attn.fuzz.plan import Form, MAPS, Plan, Sizes, TRANSFORMS


# Pairs of query and key in all: a truth, and an interpreted call, in milliseconds.
MOST_PAIRS = 24000

# Sinks are drawn apart from all else, so that a seed's call is else what it was; of
# such numbers the first by which no seed of kept.py gets one.
SINKS = 1507
TABLES = 1567  # likewise
# What a call can be asked to have.
WANTED = (*KINDS, "co_alibi", "own", "sum", "none", "entmax", "topk")
WINDOWS = (0, 1, (3, 0), (0, 5), (17, 2), (40, 40), (2**31 - 1, 3), 2**40)
ALPHAS = (1.5, 2.0, 1.0, 1.25, 4 / 3, 1.7, 1.05, 1.9, 1.001)


class Draw:
    """A generator, and what is drawn from it; the order of draws makes the call."""

    def __init__(self, *seed: int):
        self.rng = np.random.default_rng(seed)

    def coin(self, chance: float) -> bool:
        """True with this chance."""
        return bool(self.rng.random() < chance)

    def pick(self, options: Sequence[Any], weights: Sequence[float] | None = None):
        """One of the options."""
        p = None if weights is None else np.asarray(weights, float) / np.sum(weights)
        return options[self.rng.choice(len(options), p=p)]

    def shared(self, n: int, chance: float = 0.3) -> int:
        """1, for a broadcast axis, or n."""
        return 1 if self.coin(chance) else n

    def lead(self, L: Sizes) -> Sizes:
        """Leading axes, each shared or not."""
        return tuple(self.shared(b, 0.5) for b in L)

    def fewer_axes(self, form: Sizes) -> Sizes:
        """The form, perhaps without its first axes."""
        drop = int(self.pick((0, 1, 2, 3), (6, 1, 1, 1)))
        return form[min(drop, len(form) - 1) :]


def draw(seed: int, implementation: str, wanted: str | None = None) -> Plan:
    """The call of a seed, its transformation and what that maps included.

    Args:
        seed: Any int.
        implementation: What the call must be able to run on.
        wanted: One of `WANTED`, which the call then has.
    """
    random = Draw(seed, 7)
    kernels = implementation.startswith("triton")
    facts: dict[str, Any] = {"seed": seed, **_sizes(random)}
    dtypes = ("float32", "bfloat16", "float16", "float64")
    facts["dtype"] = random.pick(dtypes, (7, 2, 2, 0 if kernels else 1.5))
    facts["x64"] = facts["dtype"] == "float64" or random.coin(0.12)
    facts["bias"] = _bias(random, wanted)
    facts["forms"] = _forms(random, facts)
    facts["raw"] = random.coin(0.5)
    facts |= _visibility(random, facts)
    facts |= _options(random, facts, kernels, wanted)
    facts |= _transform(random, facts, kernels)
    facts["sink"] = _sink(Draw(seed, SINKS), facts)
    facts |= _apart(Draw(seed, TABLES), facts)
    return _mapped(Plan(**facts))


def changed(plan: Plan, facts: dict[str, Any]) -> Plan:
    """The call with other facts, its values the same where their shapes are."""
    plan = dataclasses.replace(plan, **facts)
    if plan.normalizer is None:
        plan = dataclasses.replace(plan, alpha_array=False)
    else:
        plan = dataclasses.replace(plan, sink=None)
    return _mapped(plan)


def _sizes(random: Draw) -> dict[str, Any]:
    rng = random.rng
    rank = random.pick((0, 1, 2), (1, 6, 2))
    lead = (1, 2, 3, 0), (4, 4, 2, 0.15)
    L = tuple(int(random.pick(*lead)) for _ in range(rank))

    def length() -> int:
        u = rng.random()
        if u < 0.03:
            return 0
        if u < 0.12:
            return 1
        if u < 0.35:
            return int(rng.integers(2, 20))
        return int(rng.integers(17, 76)) if u < 0.8 else int(rng.integers(76, 151))

    T, S = length(), length()
    if random.coin(0.35):
        S = T
    K = int(random.pick((1, 2, 3), (5, 3, 1)))
    N = K * int(random.pick((1, 2, 3), (5, 3, 1)))
    dims = (1, 2, 5, 8, 16, 17, 33, 64, 80), (1, 1, 2, 4, 4, 1, 1, 1, 0.5)
    H = int(random.pick(*dims))
    h = H if random.coin(0.6) else int(random.pick((1, 3, 8, 16, 24, 40, 64)))
    while math.prod(L) * N * T * S > MOST_PAIRS:
        T, S = (T + 1) // 2, (S + 1) // 2
    return {"L": L, "T": T, "S": S, "K": K, "N": N, "H": H, "h": h}


def _bias(random: Draw, wanted: str | None) -> tuple[str, ...]:
    contextual = random.coin(0.13)
    names = ("dense", "factored", "alibi", "forget", "own")
    count = int(random.pick((0, 1, 2, 3), (1.2, 6, 2.5, 1)))
    bias = [random.pick(names, (3, 2, 4, 2.5, 4)) for _ in range(count)]
    bias = [random.pick(OWN) if name == "own" else name for name in bias]
    if wanted in KINDS and wanted not in bias:
        bias = [wanted, *bias[1:]]
    if wanted == "own" and not set(bias) & set(OWN):
        bias = [random.pick(OWN), *bias[1:]]
    while wanted == "sum" and len(bias) < 2:
        bias.append(random.pick(OFTEN))
    if wanted == "none":
        bias = []
    if wanted == "co_alibi" or (contextual and wanted is None):
        bias = ["co_alibi"]
    return tuple(bias)


def _forms(random: Draw, facts: dict[str, Any], first: int = 0) -> dict[str, Form]:
    """Of the arrays of terms, from the first on."""
    L, N, T, S = (facts[x] for x in ("L", "N", "T", "S"))
    forms = {}
    for place, name in enumerate(facts["bias"][first:], first):
        rank = int(random.pick((1, 2, 3, 5, 9)))
        for field, home in kind_of(name).homes.items():
            lead, n = random.lead(L), random.shared(N)
            if home == "head":
                form = (N,) if random.coin(0.5) else (*lead, n)
                if not lead and random.coin(0.3):
                    form = (n,)
            elif home.startswith("query"):
                form = (*lead, T, n)
            elif home.startswith("key"):
                form = (*lead, S, n)
            elif home == "distance":
                form = (*lead, n, int(random.pick((1, 4, 19, 70))))
                form = form if lead or random.coin(0.5) else form[-2:]
            else:
                form = (*lead, n, random.shared(T, 0.2), random.shared(S, 0.2))
                form = random.fewer_axes(form)
            if home.endswith("+"):
                form = (*form, rank)
            dtypes = ("float32", facts["dtype"], "bfloat16", "float16")
            dtype = random.pick(dtypes, (6, 2, 0.7, 0.7))
            if facts["dtype"] == "float64":
                dtype = random.pick(("float64", "float32"), (3, 1))
            elif facts["x64"] and random.coin(0.15):
                dtype = "float64"
            forms[f"bias{place}.{field}"] = Form(form, dtype, home)
    return forms


def _visibility(random: Draw, facts: dict[str, Any]) -> dict[str, Any]:
    L, N, T, S = (facts[x] for x in ("L", "N", "T", "S"))
    found: dict[str, Any] = {"causal": random.coin(0.5)}
    found["window"] = random.pick(WINDOWS) if random.coin(0.25) else None
    found["mask"] = None
    if random.coin(0.3):
        form = (*random.lead(L), random.shared(N, 0.6))
        form = (*form, random.shared(T), random.shared(S))
        found["mask"] = random.fewer_axes(form)
    found["query_lengths"], found["key_lengths"] = random.coin(0.2), random.coin(0.2)
    found["segments"] = random.coin(0.15)
    found |= {"offset": 0, "offset_form": None}
    found |= {"query_positions": None, "key_positions": None}
    match random.pick(("none", "int", "array", "positions"), (5, 1.5, 1, 2.5)):
        case "int":
            found["offset"] = int(random.pick((S - T, 1, -3, 40, -200, 1000, 2**20)))
        case "array":
            found["offset_form"] = random.pick(((), random.lead(L)))
        case "positions":
            both = random.pick(("q", "k", "qk"), (1, 1, 5))
            for letter, name, n in (("q", "query", T), ("k", "key", S)):
                if letter not in both:
                    continue
                forms = ((n,), (*random.lead(L), n))
                forms = (*forms, (*random.lead(L), random.shared(N, 0.5), n))
                found[f"{name}_positions"] = random.pick(forms)
    orders = ("shuffle", "repeat", "sorted", "sparse", "far"), (4, 3, 2, 2, 0.7)
    found["order"] = random.pick(*orders)
    return found


def _options(
    random: Draw, facts: dict[str, Any], kernels: bool, wanted: str | None
) -> dict[str, Any]:
    scales = (None, 1.0, 0.0, -0.3, 0.5, 2.0, 1e-7, 3e6)
    found: dict[str, Any] = {
        "scale": random.pick(scales, (9, 2, 1, 1.5, 2, 1, 0.4, 0.2)),
        "scale_array": random.coin(0.12),
        "soft_cap": random.pick((None, 2.0, 0.5, 30.0), (8, 1, 0.6, 1)),
        "dropout": random.pick((0.0, 0.1, 0.5, 0.9, 1e-9), (8, 1.5, 1, 0.5, 0.1)),
        "rng_kind": random.pick(("typed", "raw", "rbg"), (3, 2, 1)),
        "normalizer": None,
        "alpha_array": False,
    }
    sparse = wanted in ("entmax", "topk") or random.coin(0.35)
    if sparse and facts["bias"] != ("co_alibi",):
        alpha = float(random.pick(ALPHAS, (4, 4, 3, 2, 2, 2, 2, 2, 0.5)))
        k = int(random.pick((1, 2, 3, 5, 8, 20, 60, 200)))
        listed = wanted == "topk" or random.coin(0.5)
        found["normalizer"] = (alpha, k if listed else None)
        found["alpha_array"] = random.coin(0.35)
    found["precision"] = "highest"
    if facts["dtype"] != "float32":
        found["precision"] = random.pick((None, "highest"), (3, 1))
    asked = kernels or random.coin(0.3)
    found["config"] = _config(random, facts, found["normalizer"]) if asked else None
    return found


def _apart(random: Draw, facts: dict[str, Any]) -> dict[str, Any]:
    """With a term more, perhaps, of those that are drawn by themselves."""
    bias = facts["bias"]
    if "co_alibi" in bias or len(bias) > 2 or not random.coin(0.1):
        return {}
    more = {**facts, "bias": (*bias, random.pick(APART))}
    forms = facts["forms"] | _forms(random, more, len(bias))
    return {"bias": more["bias"], "forms": forms}


def _sink(random: Draw, facts: dict[str, Any]) -> tuple[int, ...] | None:
    """The shape of a sink, or None: entmax has none."""
    if facts["normalizer"] is not None or not random.coin(0.3):
        return None
    if random.coin(0.5):
        return (facts["N"],)
    leading = (n if random.coin(0.5) else 1 for n in facts["L"])
    return (*leading, facts["N"])


def _config(
    random: Draw, facts: dict[str, Any], normalizer: tuple[float, int | None] | None
) -> Config | None:
    rng = random.rng
    if rng.random() < 0.4:
        return None
    sizes = (16, 32) if facts["dtype"] in ("float32", "float64") else (16, 32, 64)
    prune = bool(rng.random() < 0.75)

    def block(q: Any, k: Any) -> Block:
        return Block(int(q), int(k), 4, int(rng.integers(1, 3)))

    some = lambda: block(rng.choice(sizes), rng.choice(sizes))
    if facts["bias"] == ("co_alibi",):
        q, k = int(rng.choice(sizes)), int(rng.choice(sizes))
        part: Callable[[], int] = lambda: int(
            rng.choice([x for x in sizes if q % x == 0])
        )
        carry = int(rng.choice((0, 1, 512)))
        forward, rows, cols = block(q, k), block(part(), k), block(part(), k)
        return Config(forward, rows, cols, prune=prune, carry_mib=carry)
    if normalizer is not None:
        one = some()
        return Config(one, one, one, prune=prune)
    return Config(some(), some(), some(), some(), prune=prune)


def _transform(random: Draw, facts: dict[str, Any], kernels: bool) -> dict[str, Any]:
    jvp = 0 if kernels else 1.5
    hvp = 0 if kernels or facts["dtype"] != "float64" else 6
    transform = random.pick(TRANSFORMS, (8, 2, 1, 2, 2, 1, 1.5, 1.5, jvp, hvp))
    if 0 in facts["L"] or not facts["T"] or not facts["S"]:
        transform = random.pick(("jit", "value", "eager"))
    found: dict[str, Any] = {"transform": transform}
    found["residual"] = random.coin(0.6)
    found["zero_cotangent"] = random.coin(0.15)
    found["frozen"] = float(random.pick((0.0, 0.3, 0.7), (6, 2, 2)))
    constants = random.coin(0.12)
    plain = transform in ("jit", "value", "eager", "checkpoint")
    found["constants"] = constants and plain
    return found


def _mapped(plan: Plan) -> Plan:
    """What the maps vary, where their axes stand, and what is differentiated."""
    rng = np.random.default_rng([plan.seed, 13])
    names = plan.operands
    maps, sizes = [], []
    for _ in range(MAPS.get(plan.transform, 0)):
        some = {name for name in names + plan.conditions if rng.random() < 0.5}
        some |= {names[int(rng.integers(len(names)))]}
        maps.append(frozenset(some))
        sizes.append(int(rng.integers(1, 4)))
    axes = {}
    if plan.transform == "grad_of_vmap":
        ranks = {"scale": 0, "alpha": 1, "sink": len(plan.sink or ())}
        ranks |= dict.fromkeys(("query", "key", "value"), len(plan.L) + 3)
        ranks |= {name: len(form.shape) for name, form in plan.forms.items()}
        axes = {name: int(rng.integers(0, ranks[name] + 1)) for name in names}
    rng = np.random.default_rng([plan.seed, 17])
    wrt = [name for name in names if rng.random() >= plan.frozen]
    wrt = wrt or [names[int(rng.integers(len(names)))]]
    return dataclasses.replace(
        plan, maps=tuple(maps), map_sizes=tuple(sizes), axes=axes, wrt=tuple(wrt)
    )
