"""One call over several sets of values: what is wrong with it."""

from __future__ import annotations

import contextlib
import math
import traceback
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from pallas_attn.fuzz.derivatives import hvp_errors, jvp_errors, SMOOTH
from pallas_attn.fuzz.elements import Elements
from pallas_attn.fuzz.plan import Plan
from pallas_attn.fuzz.program import Programs
from pallas_attn.fuzz.tolerance import difference, largest, Leaf, leaf, noisy
from pallas_attn.fuzz.values import DTYPES


# A NaN in one row is looked for, not digits in the others: a few roundings.
BESIDE_NAN = {"float32": 1e-4, "float64": 1e-4, "bfloat16": 0.05, "float16": 0.05}


@dataclass(frozen=True)
class Finding:
    """What is wrong: in which set of values, at which leaf, by how much."""

    chosen: str
    leaf: str
    error: float = math.inf
    allowed: float = 0.0
    size: float = 0.0
    note: str = ""

    def __str__(self) -> str:
        found = f"{self.chosen} {self.leaf}"
        if math.isfinite(self.error) or not self.note:
            found += f" error {self.error:.2e}, allowed {self.allowed:.2e}"
            found += f", largest {self.size:.2e}"
        return f"{found} {self.note}".rstrip()


def check(
    plan: Plan, implementation: str, sets: tuple[str, ...], *, repeat: bool = True
) -> tuple[list[Finding], int]:
    """All that is wrong with a call; and how many sets of values ran.

    Args:
        plan: The call.
        implementation: Of the library.
        sets: Of values, all through one compiled program.
        repeat: Whether the first runs twice, for equal bits.
    """
    found: list[Finding] = []
    ran = 0
    programs = Programs(plan)
    wide = jax.enable_x64(True) if plan.x64 else contextlib.nullcontext()
    with wide, np.errstate(all="ignore"):
        for index, chosen in enumerate(sets):
            if chosen not in SMOOTH.get(plan.transform, sets):
                continue
            elements = Elements(plan, chosen, index)
            again = repeat and index == 0
            more = _check_set(programs, implementation, elements, again)
            found += more
            ran += 1
            if any(x.leaf == "raised" for x in more):
                break
    return found, ran


def _check_set(
    programs: Programs, implementation: str, elements: Elements, repeat: bool
) -> list[Finding]:
    plan, chosen = elements.plan, elements.chosen
    try:
        outputs, gradients = programs.run(implementation, elements)
        again = programs.run(implementation, elements) if repeat else None
    except NotImplementedError as error:
        # the one refusal of a call that can be drawn: it names what to do
        return [] if "lists of" in str(error) else [_raised(chosen, error)]
    except Exception as error:
        return [_raised(chosen, error)]
    found = []
    if again is not None and _bytes((outputs, gradients)) != _bytes(again):
        found.append(Finding(chosen, "repeat", note="bits differ between two runs"))
    found += _dtypes(elements, outputs, gradients)
    if chosen == "nan":
        return found + _beside_nan(elements, outputs[0])
    if plan.transform in ("jvp", "hvp"):
        compare: Any = jvp_errors if plan.transform == "jvp" else hvp_errors
        for name, error, allowed, size in compare(elements, gradients):
            if not error <= allowed:
                found.append(Finding(chosen, name, error, allowed, size))
        gradients = {}
    peer = None
    if plan.low and implementation != "xla":
        try:
            theirs, pulled = programs.run("xla", elements)
            forward_mode = plan.transform in ("jvp", "hvp")
            peer = leaves_of(theirs, {} if forward_mode else pulled)
        except Exception as error:
            found.append(_raised(chosen, error, "xla raised"))
    for x in compared(elements, leaves_of(outputs, gradients), peer):
        if peer is not None and not math.isfinite(x.allowed):
            if math.isfinite(x.error):  # else its dtype has no such number
                note = "xla alone is not finite"
                found.append(Finding(chosen, x.name, note=note))
        elif not x.right:
            found.append(Finding(chosen, x.name, x.error, x.allowed, x.size))
    return found


def compared(
    elements: Elements, got: dict[str, np.ndarray], peer: Any = None
) -> list[Leaf]:
    """Outputs and gradients beside the truth, and how far each may be off.

    Args:
        elements: Of the call.
        got: What the library returned, by name.
        peer: What "xla" returned, of a 16-bit call of another implementation.
    """
    plan, exact = elements.plan, elements.truths()
    want, rough = elements.joined(exact), noisy(elements)
    skip = np.stack([x.unselected for x in exact])
    skip = skip.reshape(*plan.map_sizes, *skip.shape[1:])
    skips = {"output": skip[..., None], "residual": skip}
    return [
        leaf(
            plan,
            name,
            x,
            want[name],
            [each[name] for each in rough],
            None if peer is None else peer[name],
            skips.get(name),
        )
        for name, x in got.items()
    ]


def leaves_of(outputs: Any, gradients: Any) -> dict[str, np.ndarray]:
    """By name: "output", "residual", and operands."""
    return dict(zip(("output", "residual"), outputs, strict=False)) | dict(gradients)


def _dtypes(elements: Elements, outputs: Any, gradients: Any) -> list[Finding]:
    plan, operands = elements.plan, elements.values[0][0]
    want = {name: operands[name].dtype for name in plan.wrt}
    want |= {"output": DTYPES[plan.dtype], "residual": DTYPES[plan.accumulator]}
    given = {} if plan.transform == "jvp" else gradients
    return [
        Finding(elements.chosen, "dtype", note=f"{name} is {x.dtype}")
        for name, x in leaves_of(outputs, given).items()
        if x.dtype != want[name]
    ]


def _beside_nan(elements: Elements, output: np.ndarray) -> list[Finding]:
    """NaN in rows that see it; the others right, or NaN where a value may show."""
    plan, marked = elements.plan, elements.marked
    if marked is None:
        return []
    seen, conditions, _ = elements.values[0]
    elements.values[0] = (marked.clean, conditions, elements.values[0][2])
    (found,) = elements.truths()
    elements.values[0] = (seen, conditions, elements.values[0][2])
    got = np.asarray(output).astype(np.float64)
    missed = marked.shown & found.alive & ~np.isnan(got).any(-1)
    findings = []
    if missed.any():
        note = f"{int(missed.sum())} rows that see a NaN {marked.name} are finite"
        findings.append(Finding("nan", "output", note=note))
    rest = ~(marked.touched | found.unselected)
    error = difference(got[rest], found.output[rest])
    allowed = BESIDE_NAN[plan.dtype] * (1 + largest(found.output))
    if not error <= allowed:
        note = f"in rows that do not see the NaN {marked.name}"
        findings.append(
            Finding("nan", "output", error, allowed, largest(found.output), note)
        )
    return findings


def _bytes(tree: Any) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def _raised(chosen: str, error: Exception, name: str = "raised") -> Finding:
    text = " ".join(str(error).split())[:300]
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f"{x.filename.rpartition('/')[2]}:{x.lineno}" for x in frames
            if "pallas_attn" in x.filename]  # fmt: skip
    where = f" ({ours[-1]})" if ours else ""
    return Finding(chosen, name, note=f"{type(error).__name__}: {text}{where}")
