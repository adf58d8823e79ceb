"""Measure cases: all programs of all cases are compiled before anything is timed."""

from __future__ import annotations

import dataclasses
import functools
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from pallas_attn.benchmark import roofline, timing
from pallas_attn.benchmark.errors import truth_dtype
from pallas_attn.benchmark.inputs import Inputs
from pallas_attn.benchmark.peers import PEERS
from pallas_attn.benchmark.programs import jobs, sides
from pallas_attn.benchmark.results import Result
from pallas_attn.benchmark.specs import Case
from pallas_attn.benchmark.timing import Failure
from pallas_attn.implementations import Implementation


Say = Callable[[str], None]
MIB = 2**20


def measured(
    cases: Sequence[Case], implementation: Implementation, repeats: int, say: Say
) -> Iterator[Result]:
    """A result for each case, as they are done.

    Args:
        cases: What to measure.
        implementation: Ours.
        repeats: The most rounds of each timing.
        say: Gets a line of progress.
    """
    work, failed = {}, {}
    for case in cases:
        try:
            found = jobs(case, implementation)
        except Exception as error:
            failed[case.name] = {"case": Failure.of(error).text}
        else:
            work |= {(case.name, program): job for program, job in found.items()}
    compiled = compiled_programs(work, say)
    for case in cases:
        programs = {p: x for (name, p), x in compiled.items() if name == case.name}
        result = blank(case, failed.get(case.name, {}))
        try:
            if programs:
                result = _measure(case, result, programs, implementation, repeats)
        except Exception as error:  # the other cases go on
            failures = {**result.failures, "case": Failure.of(error).text}
            result = dataclasses.replace(result, failures=failures)
        gc.collect()
        yield result


def compiled_programs(
    work: Mapping[Any, Callable[[], Any]], say: Say
) -> dict[Any, Any]:
    """All programs, or why one failed; says how far it is, ten times."""
    start, count = time.perf_counter(), 0

    def done(name: Any, result: Any) -> None:
        del name, result
        nonlocal count
        count += 1
        seconds = time.perf_counter() - start
        if count % -(-len(work) // 10) == 0 or count == len(work):
            say(f"  compiled {count} of {len(work)} programs, {seconds:.0f} s")

    return timing.compile_all(work, done)


def blank(case: Case, failures: dict[str, str]) -> Result:
    """What is known of a case before it runs."""
    targets = {} if case.target is None else dataclasses.asdict(case.target)
    return Result(
        name=case.name,
        shape=case.shape,
        origin=case.origin,
        peer=None if case.peer is None else PEERS[case.peer].title,
        targets={name: x for name, x in targets.items() if x is not None},
        truth=truth_dtype(case),
        failures=failures,
    )


def on_gpu() -> bool:
    """Whether JAX computes on a GPU."""
    return jax.default_backend() == "gpu"


def _measure(
    case: Case,
    result: Result,
    programs: Mapping[str, Any],
    implementation: Implementation,
    repeats: int,
) -> Result:
    failures = result.failures | {
        name: x.text for name, x in programs.items() if isinstance(x, Failure)
    }

    def numbers(name: str, *arguments: Any) -> dict[str, float]:
        """What a compiled program says; nothing where it failed or fails now."""
        if name in failures:
            return {}
        try:
            found = programs[name](*(x() for x in arguments))
            return {leaf: float(x) for leaf, x in found.items()}
        except Exception as error:
            failures[name] = Failure.of(error).text
            return {}

    if "draw" in failures:
        return dataclasses.replace(result, failures=failures)
    inputs: Inputs = programs["draw"](jax.random.key(0))
    given = {
        name: side.inputs(inputs) for name, side in sides(case, implementation).items()
    }
    calls = {
        f"{side} {work}": functools.partial(programs[f"{side} {work}"], given[side])
        for work in ("forward", "both")
        for side in given
        if f"{side} {work}" not in failures
    }
    taken = timing.interleaved(calls, queued=on_gpu(), repeats=repeats)
    timings = {name: x for name, x in taken.items() if not isinstance(x, Failure)}
    failures |= {name: x.text for name, x in taken.items() if isinstance(x, Failure)}
    errors = {
        side: numbers(f"{side} errors", lambda s=side: given[s], calls[f"{side} both"])
        for side in given
        if f"{side} both" in timings
    }
    return dataclasses.replace(
        result,
        timings=timings,
        tflops={
            name: roofline.tflops(case, name.split()[1], taken.median)
            for name, taken in timings.items()
        },
        temporaries={
            name: found
            for name in calls
            if (found := temporaries_mib(programs[name])) is not None
        },
        errors=errors,
        visited=numbers("visited", lambda: inputs),
        roofline=_roofline(case, timings),
        failures=failures,
    )


def temporaries_mib(compiled: jax.stages.Compiled) -> float | None:
    """Memory of a program beside its operands and results; None if it is not said."""
    analysis: Any = compiled.memory_analysis()
    return None if analysis is None else analysis.temp_size_in_bytes / MIB


def memory_mib(compiled: jax.stages.Compiled) -> float | None:
    """Memory of a program, operands and results included; None if it is not said."""
    found: Any = compiled.memory_analysis()
    if found is None:
        return None
    held = found.argument_size_in_bytes + found.output_size_in_bytes
    return (held - found.alias_size_in_bytes + found.temp_size_in_bytes) / MIB


def _roofline(
    case: Case, timings: Mapping[str, timing.Timing]
) -> dict[str, dict[str, float]]:
    device = roofline.device(jax.devices()[0].device_kind)
    if device is None:
        return {}
    works = {"forward": roofline.forward(case), "both": roofline.both(case)}
    return {
        name: {
            "floor_ms": work.floor_ms(device),
            "peak_share": work.peak_share(device, timings[f"ours {name}"].median),
        }
        for name, work in works.items()
        if f"ours {name}" in timings
    }
