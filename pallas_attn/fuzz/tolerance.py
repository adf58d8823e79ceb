"""How far a leaf may be off, and how far it is.

A leaf may be off by a unit of its largest entry, 1e-5 in float32 and one rounding in 16
bits, by half the least number of its dtype, and by what rounding makes of it: six times
what noise in the truth's own steps moved it by. That is honest conditioning: a
sum of large scores that float32 cannot hold moves the truth as it moves the library,
and digits that the library alone loses do not. In 16 bits it may also be three times as
far off as "xla".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from pallas_attn.canonical import LEAST_SCALE, MOST_SCALE
from pallas_attn.fuzz.elements import Elements
from pallas_attn.fuzz.plan import Arrays, Plan
from pallas_attn.fuzz.truth.attention import Noise
from pallas_attn.testing.numerics import FORMULA, GRADIENT_RATIO


UNITS = {
    "float32": 2.0**-23,
    "bfloat16": 2.0**-7,
    "float16": 2.0**-10,
    "float64": 2.0**-52,
}
# float64 sums of up to 150 products, and 60 steps of an entmax threshold.
DOUBLE = 1e-10
# Draws of noise, each of its steps off by a unit at most: six times the root of their
# mean square, for a leaf of one number may hardly move in one draw or two.
NOISE = 6
DRAWS = 8
# Where rounding decides which key of a row has its weight, few draws may choose as the
# truth does not. Of all draws the largest, twice, for the choice may fall to either
# side; where noise moves a leaf smoothly, this is less.
CHOICE = 2
# Of a leaf that is 0 but for rounding there is no size to be relative to.
NOTHING = 1e-9
# A limit is never 0.
LEAST = 1e-30


@dataclass(frozen=True)
class Leaf:
    """An output or gradient beside its truth, and how far it may be off."""

    name: str
    got: np.ndarray
    want: np.ndarray
    error: float
    allowed: float
    size: float

    @property
    def right(self) -> bool:
        """Whether it is within what is allowed, or perhaps no number of its dtype."""
        beyond = self.size + self.allowed > largest_of(self.got.dtype)
        return self.error <= self.allowed or beyond


def noisy(elements: Elements) -> list[Arrays]:
    """What rounding at each step may make of the truth, `DRAWS` times."""
    plan = elements.plan
    unit = UNITS[plan.accumulator]
    store = UNITS[plan.dtype] if plan.low else unit
    seeds = ([plan.seed, elements.index, 1000 + n] for n in range(DRAWS))
    rngs = (np.random.default_rng(seed) for seed in seeds)
    least = float(ml_dtypes.finfo(plan.dtype).smallest_subnormal)
    noises = (Noise(rng, unit, store, least) for rng in rngs)
    return [elements.joined(elements.truths(noise)) for noise in noises]


def leaf(
    plan: Plan,
    name: str,
    got: np.ndarray,
    want: np.ndarray,
    rough: list[np.ndarray],
    peer: np.ndarray | None,
    skip: np.ndarray | None,
) -> Leaf:
    """A leaf compared.

    Args:
        plan: The call.
        name: Of the leaf.
        got: What the library returned.
        want: The truth.
        rough: The truth with noise in its steps.
        peer: What "xla" returned, of a 16-bit call.
        skip: Where rounding decides; broadcasts to the leaf.
    """
    error, size = difference(got, want, skip), largest(want)
    moved = [difference(x, want, skip) for x in rough]
    moved = [x if math.isfinite(x) else 0.0 for x in moved]
    mean = math.sqrt(sum(x * x for x in moved) / len(moved))
    noise = max(NOISE * mean, CHOICE * max(moved))
    dtype = got.dtype.name
    unit = UNITS[plan.dtype] if plan.low else _unit(plan)
    allowed = max(unit, UNITS[dtype]) * size + LEAST
    allowed += noise * (1 if size else 2)
    # A number below the normal ones is rounded to a multiple of the least, and so is
    # each that is added up in 16 bits, or is multiplied by a scale beforehand.
    folded = plan.scale is not None and not LEAST_SCALE <= abs(plan.scale) <= MOST_SCALE
    roundings = 1 + plan.scale_array + folded + sum(plan.map_sizes)
    allowed += roundings * float(ml_dtypes.finfo(got.dtype).smallest_subnormal) / 2
    if plan.low and peer is not None:
        allowed += GRADIENT_RATIO * difference(peer, want, skip)
    if size < NOTHING:  # a sum of what cancels
        allowed += UNITS[plan.dtype] if plan.low else FORMULA
    if name not in ("output", "residual") and dtype in ("bfloat16", "float16"):
        # JAX adds up the elements of a map in it
        allowed += sum(UNITS[dtype] * n * size for n in plan.map_sizes)
    return Leaf(name, got, want, error, allowed, size)


def difference(
    got: np.ndarray, want: np.ndarray, skip: np.ndarray | None = None
) -> float:
    """The largest |got - want| where want is finite; inf where the others differ."""
    got, want = (np.asarray(x).astype(np.float64) for x in (got, want))
    if got.shape != want.shape:
        return math.inf
    if skip is not None:
        skip = np.broadcast_to(skip, got.shape)
        got, want = got[~skip], want[~skip]
    finite = np.isfinite(want)
    if not np.array_equal(got[~finite], want[~finite], equal_nan=True):
        return math.inf
    if not np.isfinite(got[finite]).all():
        return math.inf
    return float(np.abs(got[finite] - want[finite]).max(initial=0))


def largest(x: np.ndarray) -> float:
    """The largest finite |x|."""
    return float(np.abs(x[np.isfinite(x)]).max(initial=0))


def largest_of(dtype: np.dtype) -> float:
    """The largest number of a dtype."""
    return float(ml_dtypes.finfo(dtype).max)


def _unit(plan: Plan) -> float:
    return DOUBLE if plan.dtype == "float64" else FORMULA
