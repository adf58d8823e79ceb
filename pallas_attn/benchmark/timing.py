"""Compile everything, then time it side by side."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import as_completed, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import jax


Name = TypeVar("Name")

# One repeat on a GPU is a run of calls of about this length: long beside the clock's
# and the queue's own time, short beside the changes of a device's frequency.
RUN_SECONDS = 0.04
# Beside a slow program the number of repeats falls, to no less than LEAST_REPEATS; one
# that takes longer than LONG_SECONDS runs once.
REPEATS, LEAST_REPEATS, SECONDS, LONG_SECONDS = 11, 3, 20.0, 10.0


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call.

    Args:
        median: Over the repeats.
        low: The least.
        high: The largest.
        repeats: How often it was taken.
        calls: How many calls ran back to back in one repeat.
        host: What it takes to enqueue one call. Where it is not well below the median,
            the host is what was timed.
    """

    median: float
    low: float
    high: float
    repeats: int
    calls: int
    host: float


@dataclass(frozen=True)
class Failure:
    """Why there is no result."""

    text: str

    @staticmethod
    def of(error: BaseException) -> Failure:
        """The error's type and the start of its text."""
        return Failure(f"{type(error).__name__}: {error}"[:2000])


def summary(seconds: Sequence[float], calls: int, host: float) -> Timing:
    """Of runs of `calls` calls each, and the time to enqueue one call; in seconds."""
    each = [1e3 * x / calls for x in seconds]
    return Timing(
        median=statistics.median(each),
        low=min(each),
        high=max(each),
        repeats=len(each),
        calls=calls,
        host=1e3 * host,
    )


def compile_all(
    jobs: Mapping[Name, Callable[[], Any]],
    done: Callable[[Name, Any], None] = lambda name, result: None,
) -> dict[Name, Any]:
    """The result of each job, or its Failure; jobs run in threads.

    Args:
        jobs: Each lowers and compiles one program.
        done: Called with the name and the result of each, as they come.
    """
    results: dict[Name, Any] = {}
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        futures = {pool.submit(job): name for name, job in jobs.items()}
        for future in as_completed(futures):
            error = future.exception()
            result = future.result() if error is None else Failure.of(error)
            results[futures[future]] = result
            done(futures[future], result)
    return results


def interleaved(
    calls: Mapping[Name, Callable[[], Any]],
    *,
    queued: bool,
    repeats: int = REPEATS,
) -> dict[Name, Timing | Failure]:
    """The time of each call, all taken in turns so that drift hits all alike.

    Args:
        calls: Compiled programs with their arguments.
        queued: Whether a repeat is many calls with one wait at the end (a GPU: the
            queue hides the host's time) or a single call (a CPU).
        repeats: At most this many rounds.
    """
    results: dict[Name, Timing | Failure] = {}
    first: dict[Name, float] = {}
    for name, call in calls.items():
        try:
            warm_up = _run(call, 1)
            if warm_up > LONG_SECONDS:
                results[name] = summary([warm_up], 1, 0.0)
                continue
            first[name] = _run(call, 3 if queued else 1) / (3 if queued else 1)
        except Exception as error:
            results[name] = Failure.of(error)
    many = {
        name: max(1, math.ceil(RUN_SECONDS / seconds)) if queued else 1
        for name, seconds in first.items()
    }
    round_seconds = sum(first[name] * many[name] for name in first)
    rounds = min(repeats, max(LEAST_REPEATS, int(SECONDS / max(round_seconds, 1e-9))))
    taken: dict[Name, list[float]] = {name: [] for name in first}
    for turn in range(rounds):
        for name in list(first)[:: 1 if turn % 2 == 0 else -1]:
            taken[name].append(_run(calls[name], many[name]))
    for name in first:
        host = _enqueue(calls[name]) if queued else 0.0
        results[name] = summary(taken[name], many[name], host)
    return results


def _run(call: Callable[[], Any], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count - 1):
        call()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def _enqueue(call: Callable[[], Any], count: int = 8) -> float:
    """Few enough calls that no limit on those in flight makes the host wait."""
    start = time.perf_counter()
    for _ in range(count - 1):
        call()
    last = call()
    seconds = time.perf_counter() - start
    jax.block_until_ready(last)
    return seconds / count
