"""A seed as a job: what to run it on, and what was found."""

from __future__ import annotations

import dataclasses
import gc
import math
import time
import traceback
from dataclasses import dataclass, field
from typing import Any

import jax

from pallas_attn.fuzz.draw import changed, draw
from pallas_attn.fuzz.plan import describe, Plan
from pallas_attn.fuzz.run import check, Finding
from pallas_attn.fuzz.values import value_sets


# What an error says after which a CUDA process can compute nothing more.
FATAL = ("CUDA_ERROR", "illegal memory", "misaligned address", "unspecified launch")


@dataclass(frozen=True)
class Options:
    """What all seeds of a run have in common.

    Args:
        implementation: Of the library.
        values: Sets of values for a compiled call.
        sets: These sets, instead of drawn ones.
        wanted: What every call has; one of `draw.WANTED`.
        facts: Facts of every plan that are not as drawn.
        repeat: Whether the first set runs twice, for equal bits.
        small_chunks: "xla" in chunks of 8 rows.
        lists: Entmax without top_k through lists of keys, whatever the length.
        looked: Every call has a mask of whole blocks, left out whatever the length.
    """

    implementation: str
    values: int = 5
    sets: tuple[str, ...] = ()
    wanted: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    repeat: bool = True
    small_chunks: bool = False
    lists: bool = False
    looked: bool = False


@dataclass(frozen=True)
class Result:
    """What a seed's call is and what is wrong with it."""

    seed: int
    call: str
    findings: list[Finding]
    ran: int
    seconds: float

    @property
    def fatal(self) -> bool:
        """Whether the process that found it can run nothing more."""
        return any(word in x.note for x in self.findings for word in FATAL)

    def as_json(self) -> dict[str, Any]:
        """Plain values; an infinite error as None."""
        findings = [dataclasses.asdict(x) for x in self.findings]
        for x in findings:
            x["error"] = x["error"] if math.isfinite(x["error"]) else None
        return dataclasses.asdict(self) | {"findings": findings}


def prepare(options: Options) -> None:
    """Settings of a process, before its first call."""
    from pallas_attn.fuzz import values
    from pallas_attn.tiled import summaries
    from pallas_attn.triton.entmax import route
    from pallas_attn.xla import chunks

    # tracing makes objects by the million that hold one another and live on
    gc.set_threshold(200_000, 20, 100)
    if jax.default_backend() == "cpu":
        # a program runs few times: XLA's optimiser takes longer than it saves
        jax.config.update("jax_disable_most_optimizations", True)
    if options.small_chunks:
        chunks.BYTES, chunks.MOST_ROWS, chunks.LEAST_ROWS = 1, 8, 8
    if options.lists:
        route.LONG = 1
    if options.looked:
        summaries.LOOKED_AT, values.BLOCK = 1, 32


def plan_of(seed: int, options: Options) -> Plan:
    """The call of a seed, with the run's facts."""
    plan = draw(seed, options.implementation, options.wanted)
    pairs = (plan.T, plan.S)
    if options.looked and (plan.mask is None or plan.mask[-2:] != pairs):
        plan = changed(plan, {"mask": pairs})
    return changed(plan, options.facts) if options.facts else plan


def run(seed: int, options: Options) -> Result:
    """The call of a seed; a fault of the fuzzer itself is a finding too."""
    start = time.perf_counter()
    plan = plan_of(seed, options)
    sets = options.sets or value_sets(plan, options.values)
    try:
        findings, ran = check(plan, options.implementation, sets, repeat=options.repeat)
    except Exception:
        note = " ".join(traceback.format_exc().split())[-600:]
        findings, ran = [Finding("?", "fuzzer", note=note)], 0
    return Result(seed, describe(plan), findings, ran, time.perf_counter() - start)
