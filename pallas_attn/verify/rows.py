"""What is verified: every bias, every normalizer with each, and every option."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pallas_attn.fuzz.draw import changed
from pallas_attn.fuzz.kinds import kind_of
from pallas_attn.fuzz.plan import Form, plain, Plan


@dataclass(frozen=True)
class Row:
    """A call to verify; group: "bias", "normalizer" or "option"."""

    group: str
    name: str
    plan: Plan

    @property
    def dtype(self) -> str:
        """Of query, key and value."""
        return self.plan.dtype


# Ragged: no length is a multiple of a block. The letters are those of GUIDE.md.
SIZES = {"T": 161, "S": 193, "N": 4, "K": 4, "H": 64, "h": 64}
# Of a CPU, which has no blocks to be ragged by.
SHORT = SIZES | {"T": 67, "S": 83, "H": 32, "h": 32}
SMALL = {"T": 37, "S": 53, "N": 2, "K": 2, "H": 16, "h": 16}

# A name, the terms, and the forms of arrays that are not whole: letters, 1 for shared.
BIASES: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "none": ((), {}),
    "dense [B,N,T,S]": (("dense",), {}),
    "dense [1,N,T,S]": (("dense",), {"bias0.bias": "1NTS"}),
    "dense [B,1,1,S]": (("dense",), {"bias0.bias": "B11S"}),
    "factored": (("factored",), {}),
    "factored, shared": (
        ("factored",),
        {"bias0.q_factor": "1T1R", "bias0.k_factor": "1S1R"},
    ),
    "ALiBi": (("alibi",), {}),
    "Co-ALiBi": (("co_alibi",), {}),
    "forget gate": (("forget",), {}),
    "a table of distances": (("relative",), {}),
    "ALiBi + factored + dense": (("alibi", "factored", "dense"), {}),
    "your own, a tile": (("logdist",), {}),
    "your own, parts": (("parts",), {}),
    "your own, a tile and a product": (("mixed",), {}),
    "your own, a sum": (("expander",), {}),
    "your own, of a table": (("table",), {}),
}
# Of each kind, one, for what goes with every kind.
KINDS = (
    "none",
    "dense [1,N,T,S]",
    "factored",
    "ALiBi",
    "forget gate",
    "your own, parts",
)
NORMALIZERS: dict[str, dict[str, Any]] = {
    "entmax 1.5": {"normalizer": (1.5, None)},
    "sparsemax, top 8": {"normalizer": (2.0, 8)},
    "entmax, learned alpha": {"normalizer": (1.5, None), "alpha_array": True},
    "a sink": {"sink": "N"},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "not causal": {"causal": False},
    "grouped heads": {"K": 2},
    "one key head": {"K": 1},
    "bottom-right": {"offset": 32},
    "lengths": {"query_lengths": True, "key_lengths": True},
    "segments": {"segments": True},
    "mask": {"mask": "BNTS", "causal": False},
    "mask of keys": {"mask": "B11S"},
    "window": {"window": (40, 0)},
    "positions": {"query_positions": "BT", "key_positions": "BS", "order": "shuffle"},
    "dropout": {"dropout": 0.1},
    "soft cap": {"soft_cap": 2.0},
    "scale, learned": {"scale_array": True},
    "ragged head dims": {"H": 24, "h": 40},
}
PRECISIONS = {"float32": "highest", "bfloat16": None}


def rows(sizes: dict[str, int] = SIZES) -> list[Row]:
    """All of them, with the default blocks, in float32 and bfloat16."""
    return [row for dtype in PRECISIONS for row in _rows(dtype, sizes)]


def bias_rows(sizes: dict[str, int], seed: int) -> list[Row]:
    """Every bias in float32, causal; `sizes` differ from `SIZES`."""
    found = [x for x in _rows("float32", SIZES | sizes) if x.group == "bias"]
    plans = (dataclasses.replace(x.plan, seed=seed + x.plan.seed) for x in found)
    return [
        dataclasses.replace(x, plan=plan) for x, plan in zip(found, plans, strict=True)
    ]


def small_rows() -> list[Row]:
    """Few small calls that hold every kernel, for the interpreter."""
    wanted = (
        ("bias", "dense [1,N,T,S]"),
        ("bias", "Co-ALiBi"),
        ("normalizer", "entmax 1.5, ALiBi"),
        ("normalizer", "sparsemax, top 8, factored"),
        ("option", "lengths, forget gate"),
    )
    found = _rows("float32", SMALL)
    return [row for row in found if (row.group, row.name) in wanted]


def _rows(dtype: str, sizes: dict[str, int]) -> Iterator[Row]:
    count = itertools.count()

    def row(group: str, name: str, bias: str, facts: dict[str, Any]) -> Row:
        terms, forms = BIASES[bias]
        plan = _plan(dtype, sizes, terms, forms, {"causal": True} | facts)
        return Row(group, name, dataclasses.replace(plan, seed=next(count)))

    for bias in BIASES:
        yield row("bias", bias, bias, {})
    for name, facts in NORMALIZERS.items():
        for bias in KINDS:
            yield row("normalizer", f"{name}, {bias}", bias, facts)
    taking_turns = itertools.cycle((*KINDS, "Co-ALiBi"))
    for (name, facts), bias in zip(OPTIONS.items(), taking_turns, strict=False):
        yield row("option", f"{name}, {bias}", bias, facts)


def _plan(
    dtype: str,
    sizes: dict[str, int],
    terms: tuple[str, ...],
    forms: dict[str, str],
    facts: dict[str, Any],
) -> Plan:
    letters = {"B": 2, "R": 5, "D": 40, "1": 1} | sizes | facts
    spelled = lambda form: tuple(letters[x] for x in form)
    arrays = {}
    for place, kind in enumerate(terms):
        for field, home in kind_of(kind).homes.items():
            name = f"bias{place}.{field}"
            form = forms.get(name, _whole(home))
            arrays[name] = Form(spelled(form), "float32", home)
    shaped = {
        name: spelled(x)
        for name, x in facts.items()
        if name in ("mask", "query_positions", "key_positions", "sink")
    }
    given: dict[str, Any] = sizes | facts | shaped
    given |= {"dtype": dtype, "precision": PRECISIONS[dtype], "residual": True}
    return changed(plain(bias=terms, forms=arrays, **given), {})


def _whole(home: str) -> str:
    forms = {
        "head": "N",
        "query": "BTN",
        "key": "BSN",
        "pair": "BNTS",
        "distance": "ND",
    }
    return forms[home.rstrip("+")] + ("R" if home.endswith("+") else "")
