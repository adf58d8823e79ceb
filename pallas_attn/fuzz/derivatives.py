"""Forward mode and second order against the truth's gradients."""

from __future__ import annotations

import math

import numpy as np

from pallas_attn.fuzz.elements import Elements, tangents
from pallas_attn.fuzz.plan import Arrays
from pallas_attn.fuzz.tolerance import difference, DOUBLE, DRAWS, largest, UNITS
from pallas_attn.fuzz.truth.arrays import finite
from pallas_attn.fuzz.truth.attention import Noise, truth
from pallas_attn.fuzz.values import widened
from pallas_attn.testing.numerics import FORMULA


# A step of differences in float64, and the sets of values that are smooth enough.
STEP = 1e-5
SMOOTH = {
    "jvp": ("normal", "poison", "ties", "neg30", "zeros"),
    "hvp": ("normal",),
}
# Name, error, allowed, size.
Compared = tuple[str, float, float, float]


def jvp_errors(elements: Elements, got: tuple[np.ndarray, ...]) -> list[Compared]:
    """<cotangent, tangent of outputs> beside <gradient, tangent of operands>.

    Args:
        elements: Of a call without maps.
        got: The tangents of the outputs.
    """
    plan = elements.plan
    cotangents = elements.values[0][2]
    (exact,) = elements.truths()
    along = tangents(elements)
    left = size = 0.0
    for name, x in zip(("output", "residual"), got, strict=False):
        if name not in cotangents:
            continue
        known = np.isfinite(exact.residual)
        alive = exact.alive[..., None] if name == "output" else known
        wide = (np.asarray(y).astype(np.float64) for y in (cotangents[name], x))
        product = np.prod([np.where(alive, y, 0) for y in wide], axis=0)
        left, size = left + product.sum(), size + np.abs(product).sum()

    def right_of(gradients: Arrays) -> float:
        wide = widened(along)
        return sum((gradients[name] * finite(x)).sum() for name, x in wide.items())

    right = right_of(exact.gradients)
    unit = UNITS[plan.accumulator]
    store = UNITS[plan.dtype] if plan.low else unit
    noise = 0.0
    for n in range(DRAWS):
        rng = np.random.default_rng([plan.seed, elements.index, 1000 + n])
        (rough,) = elements.truths(Noise(rng, unit, store))
        noise = max(noise, abs(right_of(rough.gradients) - right))
    units = {"float64": DOUBLE, "float32": FORMULA}
    unit = units.get(plan.dtype, 4 * UNITS[plan.dtype])
    allowed = unit * max(size, abs(right)) + 4 * noise
    return [("jvp", abs(left - right), allowed, abs(right))]


def hvp_errors(elements: Elements, got: Arrays) -> list[Compared]:
    """The derivative of the truth's gradients along the tangents, by differences."""
    plan = elements.plan
    operands, conditions, cotangents = elements.values[0]
    wide, pulled, along = (
        widened(x) for x in (operands, cotangents, tangents(elements))
    )

    def at(step: float):
        moved = {name: wide[name] + step * x for name, x in along.items()}
        return truth(plan, wide | moved, conditions, pulled)

    with np.errstate(all="ignore"):
        middle = at(0)
        near, far = ([at(s * STEP * n) for s in (1, -1)] for n in (1, 2))
    others = (*near, *far)
    edges = [x.unsure for x in others]
    if middle.unsure.any() or any((x != middle.unsure).any() for x in edges):
        return []
    held = middle.weights > 0  # a key that comes or goes bends the gradient
    if any(((x.weights > 0) != held).any() for x in others):
        return []
    found = []
    for name in plan.wrt:
        one = (near[0].gradients[name] - near[1].gradients[name]) / (2 * STEP)
        two = (far[0].gradients[name] - far[1].gradients[name]) / (4 * STEP)
        best = one + (one - two) / 3  # Richardson
        size, rough = largest(best), difference(one, two)
        allowed = FORMULA * size + 4 * rough + 1e-7 * largest(middle.gradients[name])
        allowed += 1e-6 + (1e-6 * size if got[name].dtype == np.float32 else 0)
        error = difference(got[name], best)
        found.append((f"hvp {name}", error, allowed, size))
    return [x for x in found if math.isfinite(x[2])]
