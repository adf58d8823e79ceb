"""The static facts of a random call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


# Arrays by name: operands, conditions, cotangents or gradients of a call.
Arrays = dict[str, np.ndarray]
Sizes = tuple[int, ...]

TRANSFORMS = (
    "jit",
    "value",
    "eager",
    "vmap_of_grad",
    "grad_of_vmap",
    "vmap2",
    "scan",
    "checkpoint",
    "jvp",
    "hvp",
)
# The distance of the first entry of a table of distances.
FIRST = -9
# How many maps a transformation puts around the call.
MAPS = {"vmap_of_grad": 1, "grad_of_vmap": 1, "scan": 1, "vmap2": 2}


class Form(NamedTuple):
    """Of an array of a bias; home: as `kinds.Kind` has it, "+" for vectors."""

    shape: Sizes
    dtype: str
    home: str


@dataclass(frozen=True)
class Plan:
    """What is fixed when a call is traced.

    Letters are those of GUIDE.md; L are the leading batch axes. Where a field is a
    shape, None means that the call has no such argument.

    Args:
        seed: What it was drawn from, and its values are.
        dtype: Of query, key and value.
        x64: Whether JAX is in its 64-bit mode.
        bias: Names of terms, in `kinds.KINDS`.
        forms: Each array of a bias, by "bias<place>.<field>".
        raw: Whether a dense bias is given as an array.
        order: How positions are drawn.
        normalizer: (alpha, top_k); None: softmax.
        sink: Of softmax, its shape.
        config: Block sizes.
        transform: One of `TRANSFORMS`.
        residual: Whether it is asked for, and has a cotangent.
        frozen: The share of operands that are not differentiated.
        constants: Whether conditions are known when the call is traced.
        maps: The names that vary along each map of the transformation.
        map_sizes: Elements of each map.
        axes: Where an operand's mapped axis stands.
        wrt: The operands that are differentiated.
    """

    seed: int
    L: Sizes
    T: int
    S: int
    K: int
    N: int
    H: int
    h: int
    dtype: str
    x64: bool
    bias: tuple[str, ...]
    forms: dict[str, Form]
    raw: bool
    causal: bool
    window: int | tuple[int, int] | None
    mask: Sizes | None
    query_lengths: bool
    key_lengths: bool
    segments: bool
    offset: int
    offset_form: Sizes | None
    query_positions: Sizes | None
    key_positions: Sizes | None
    order: str
    scale: float | None
    scale_array: bool
    soft_cap: float | None
    dropout: float
    rng_kind: str
    normalizer: tuple[float, int | None] | None
    alpha_array: bool
    precision: str | None
    config: Any
    transform: str
    residual: bool
    zero_cotangent: bool
    frozen: float
    constants: bool
    sink: Sizes | None = None
    maps: tuple[frozenset[str], ...] = ()
    map_sizes: Sizes = ()
    axes: dict[str, int] | None = None
    wrt: tuple[str, ...] = ()

    @property
    def contextual(self) -> bool:
        """Whether the bias depends on the scores."""
        return self.bias == ("co_alibi",)

    @property
    def low(self) -> bool:
        """Whether query, key and value have 16 bits."""
        return self.dtype in ("float16", "bfloat16")

    @property
    def full(self) -> Sizes:
        """[*L, N, T, S]."""
        return (*self.L, self.N, self.T, self.S)

    def fields(self, place: int) -> dict[str, Form]:
        """The arrays of the term at a place, by field."""
        start = f"bias{place}."
        return {
            name.removeprefix(start): form
            for name, form in self.forms.items()
            if name.startswith(start)
        }

    @property
    def accumulator(self) -> str:
        """The dtype of sums, and of the residual."""
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def operands(self) -> list[str]:
        """Names of the floating arrays, in the order in which they are drawn."""
        scale = ["scale"] if self.scale_array else []
        alpha = ["alpha"] if self.alpha_array else []
        sink = ["sink"] if self.sink is not None else []
        return ["query", "key", "value", *self.forms, *scale, *alpha, *sink]

    @property
    def conditions(self) -> list[str]:
        """Names of the arrays of integers and booleans."""
        given = {
            "mask": self.mask is not None,
            "query_seq_lengths": self.query_lengths,
            "key_value_seq_lengths": self.key_lengths,
            "query_segment_ids": self.segments,
            "key_segment_ids": self.segments,
            "query_offset": self.offset_form is not None,
            "query_positions": self.query_positions is not None,
            "key_positions": self.key_positions is not None,
            "words": self.dropout > 0,
        }
        return [name for name, there in given.items() if there]


# What a call is when nothing is said: `describe` names what differs.
PLAIN: dict[str, Any] = {
    "mask": None,
    "query_lengths": False,
    "key_lengths": False,
    "segments": False,
    "offset": 0,
    "offset_form": None,
    "query_positions": None,
    "key_positions": None,
    "causal": False,
    "window": None,
    "scale": None,
    "scale_array": False,
    "soft_cap": None,
    "dropout": 0.0,
    "normalizer": None,
    "alpha_array": False,
    "sink": None,
    "config": None,
    "transform": "jit",
    "residual": False,
    "zero_cotangent": False,
    "frozen": 0.0,
    "constants": False,
    "x64": False,
}


def describe(plan: Plan) -> str:
    """The call on one line: what is not as `PLAIN`."""
    sizes = " ".join(f"{x}{getattr(plan, x)}" for x in ("T", "S", "N", "K", "H", "h"))
    rest = [
        f"{name}={getattr(plan, name)}"
        for name, usual in PLAIN.items()
        if getattr(plan, name) != usual
    ]
    if plan.query_positions or plan.key_positions:
        rest.append(f"order={plan.order}")
    arrays = ",".join(
        f"{name}{list(form)}{'' if dtype == 'float32' else dtype}"
        for name, (form, dtype, _) in plan.forms.items()
    )
    bias = "+".join(plan.bias) or "none"
    return f"{plan.dtype} L{plan.L} {sizes} bias={bias} [{arrays}] {' '.join(rest)}"


def plain(**facts: Any) -> Plan:
    """A call that is as `PLAIN`, but for these facts."""
    rest: dict[str, Any] = {
        "seed": 0,
        "L": (2,),
        "dtype": "float32",
        "bias": (),
        "forms": {},
        "raw": False,
        "order": "sorted",
        "rng_kind": "typed",
        "precision": "highest",
    }
    return Plan(**{**PLAIN, **rest, **facts})
