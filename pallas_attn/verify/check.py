"""A row verified: outputs and every gradient against float64, and equal bits twice."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from pallas_attn.fuzz.elements import Elements
from pallas_attn.fuzz.program import Programs
from pallas_attn.fuzz.run import compared, leaves_of
from pallas_attn.verify.rows import Row


@dataclass(frozen=True)
class Verified:
    """What was found. Errors are in units of the largest entry of an array.

    Args:
        name: Of the call.
        implementation: That ran.
        dtype: Of query, key and value.
        output_error: Of the output.
        gradient_error: The largest of all gradients.
        share: The largest error, in units of what it may be.
        repeats: Whether two runs had the same bits.
        seconds: Of all of it, compiles included.
        wrong: What is wrong, in words; "" if nothing is.
    """

    name: str
    implementation: str
    dtype: str
    output_error: float = math.nan
    gradient_error: float = math.nan
    share: float = math.nan
    repeats: bool = False
    seconds: float = 0.0
    wrong: str = ""

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.wrong and self.repeats and self.share <= 1


def verify_all(
    rows: Sequence[Row], implementation: str, threads: int
) -> Iterator[Verified]:
    """Every row as it ends; they compile side by side."""
    with ThreadPoolExecutor(threads) as pool:
        jobs = [pool.submit(verify, row, implementation) for row in rows]
        for job in as_completed(jobs):
            yield job.result()


def verify(row: Row, implementation: str) -> Verified:
    """One row on one implementation; an error of the call is what is wrong with it."""
    start = time.perf_counter()
    taken = lambda: time.perf_counter() - start
    names = (row.name, implementation, row.dtype)
    try:
        elements = Elements(row.plan, "normal", 0)
        programs = Programs(row.plan)
        got = leaves_of(*programs.run(implementation, elements))
        again = leaves_of(*programs.run(implementation, elements))
        peer = None
        if row.plan.low and implementation != "xla":
            peer = leaves_of(*programs.run("xla", elements))
        with np.errstate(all="ignore"):
            found = compared(elements, got, peer)
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        return Verified(
            *names, seconds=taken(), wrong=f"{type(error).__name__}: {text}"
        )
    relative = {x.name: x.error / x.size if x.size else x.error for x in found}
    output = relative.pop("output")
    relative.pop("residual")
    off = [x.name for x in found if not x.error <= x.allowed]
    same = all(x.tobytes() == again[name].tobytes() for name, x in got.items())
    wrong = [f"{', '.join(off)} too far from float64"] if off else []
    wrong += [] if same else ["two runs differ"]
    return Verified(
        *names,
        output,
        max(relative.values()),
        max(x.error / x.allowed for x in found),
        same,
        taken(),
        "; ".join(wrong),
    )
