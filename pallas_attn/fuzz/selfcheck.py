"""The truth itself: its gradients against differences of its outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from pallas_attn.fuzz.draw import draw
from pallas_attn.fuzz.plan import Arrays
from pallas_attn.fuzz.truth.attention import truth
from pallas_attn.fuzz.values import values, widened


# A step passes over an edge of a sparse weight, or is lost beside large scores: the
# next one is tried.
STEPS = (1e-6, 1e-7, 1e-5)
# A formula errs by more, differences in float64 by less.
ALLOWED = 1e-4


def gradient_gaps(seed: int) -> Iterator[tuple[str, float]]:
    """Each operand of a call, and how far its gradient is from differences of the loss.

    Args:
        seed: Of a call that "xla" could have; its dtype is float64 here.
    """
    plan = draw(seed, "xla")
    plan = dataclasses.replace(
        plan, dtype="float64", maps=(), map_sizes=(), transform="jit"
    )
    drawn, conditions, pulled = values(plan, "normal", 0)
    operands, cotangents = widened(drawn), widened(pulled)
    if not operands["query"].size or not operands["key"].size:
        return
    with np.errstate(all="ignore"):
        unsure = truth(plan, operands, conditions).unsure
        for name, x in cotangents.items():
            gone = unsure[..., None] if name == "output" else unsure
            cotangents[name] = np.where(gone, 0.0, x)
        found = truth(plan, operands, conditions, cotangents)

        def loss(moved: Arrays) -> float:
            got = truth(plan, moved, conditions)
            sum_of = (got.output * cotangents["output"]).sum()
            if "residual" in cotangents:
                known = np.isfinite(got.residual)
                sum_of += (got.residual[known] * cotangents["residual"][known]).sum()
            return float(sum_of)

        rng = np.random.default_rng(seed)
        for name, x in operands.items():
            way = rng.standard_normal(x.shape)
            if name == "alpha":  # an edge of its range
                way = np.where(np.isclose(x, 1) | np.isclose(x, 2), 0, way)
            if name.endswith("log_gate"):  # a gate above 0 acts as 0
                way = way * (np.abs(x) > 1e-3)
            mine = float((found.gradients[name] * way).sum())
            gap = np.inf
            for step in STEPS:
                up, down = (
                    loss(operands | {name: x + sign * step * way}) for sign in (1, -1)
                )
                off = abs((up - down) / (2 * step) - mine) / (1e-3 + abs(mine))
                gap = min(gap, off)
                if gap <= ALLOWED:
                    break
            yield name, gap
