"""`python -m pallas_attn fuzz`: random whole calls against a float64 truth."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from pallas_attn.command import new_file, Parser, whole, write
from pallas_attn.fuzz.draw import WANTED
from pallas_attn.fuzz.job import Options, Result
from pallas_attn.fuzz.kept import KEPT
from pallas_attn.fuzz.plan import describe, Plan
from pallas_attn.fuzz.pool import run_all
from pallas_attn.fuzz.selfcheck import ALLOWED, gradient_gaps
from pallas_attn.fuzz.shrink import shrink
from pallas_attn.fuzz.values import MORE, SETS


IMPLEMENTATIONS = ("xla", "triton", "triton_interpret", "reference")
# Between two lines of progress where there is no terminal.
QUIET_SECONDS = 20.0
# A process for each core; more than that many only wait for one GPU.
MOST_PROCESSES = 32


def main(argv: Sequence[str] | None = None) -> int:
    """Runs seeds, says what is wrong with each that fails, and counts.

    Args:
        argv: Command-line arguments; None: those of the process.

    Returns:
        0, or 1 if any call was wrong.
    """
    given = _parser().parse_args(argv)
    seeds = range(given.seed, given.seed + given.count)
    if given.kept:
        seeds = KEPT["kernels" if "triton" in given.impl else "xla"]
    if given.selfcheck:
        return _selfcheck(seeds)
    options = Options(
        implementation=given.impl,
        values=given.values,
        sets=given.sets,
        wanted=given.wanted,
        facts=dict(given.set),
        repeat=not given.no_repeat,
        small_chunks=given.small_chunks,
        lists=given.lists,
        looked=given.looked,
    )
    if given.shrink:
        return _shrunk(given.seed, options)
    deadline = time.monotonic() + 60 * given.minutes if given.minutes else None
    report = _Report(len(seeds), options.implementation, verbose=given.verbose)
    for result in run_all(seeds, options, given.processes, deadline=deadline):
        report.add(result)
    report.end()
    if given.json:
        write(given.json, json.dumps(report.as_json(given.seed), indent=1) + "\n")
    return int(bool(report.failed))


class _Report:
    """Failures as they are found, progress on standard error, a count at the end."""

    def __init__(self, total: int, implementation: str, *, verbose: bool):
        self.total, self.implementation, self.verbose = total, implementation, verbose
        self.start = self.said = time.monotonic()
        self.calls = self.sets = 0
        self.failed: list[Result] = []

    def add(self, result: Result) -> None:
        self.calls += 1
        self.sets += result.ran
        if result.findings:
            self.failed.append(result)
        if self.verbose or result.findings:
            self._clear()
        if self.verbose:
            print(f"seed {result.seed}, {result.seconds:.1f} s: {result.call}")
        for finding in result.findings:
            print(f"FAIL seed={result.seed} {finding} | {result.call}", flush=True)
        self._progress()

    def end(self) -> None:
        self._clear()
        print(self._line(), flush=True)
        if self.failed:
            print("seeds that failed:", *sorted(x.seed for x in self.failed))

    def as_json(self, first: int) -> dict[str, Any]:
        return {
            "implementation": self.implementation,
            "jax": metadata.version("jax"),
            "first_seed": first,
            "calls": self.calls,
            "sets": self.sets,
            "seconds": time.monotonic() - self.start,
            "failed": [x.as_json() for x in self.failed],
        }

    def _line(self) -> str:
        taken = time.monotonic() - self.start
        rate = 60 * self.calls / max(taken, 1e-3)
        return (
            f"{self.calls} of {self.total} calls, {self.sets} sets of values, "
            f"{len(self.failed)} calls failed, {taken:.0f} s, {rate:.0f} a minute, "
            f"{self.implementation}"
        )

    def _progress(self) -> None:
        now = time.monotonic()
        if sys.stderr.isatty():
            print(f"\r{self._line()}\033[K", end="", file=sys.stderr, flush=True)
        elif now - self.said > QUIET_SECONDS:
            self.said = now
            print(self._line(), file=sys.stderr, flush=True)

    def _clear(self) -> None:
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m pallas_attn fuzz",
        description="Runs random whole calls, every argument and transformation, on "
        "normal, extreme and poisoned values, against a float64 truth in NumPy that "
        "shares no code with the library. A seed is a call: the same one everywhere.",
        epilog=f"sets of values: {', '.join((*SETS, *MORE))}",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--impl", default="xla", choices=IMPLEMENTATIONS, help="what to run")
    add("--seed", type=whole(0), default=0, help="the first one")
    add("--count", type=whole(1), default=100, help="of seeds")
    add("--minutes", type=float, default=0, help="start no call later; 0: no limit")
    cores = min(os.cpu_count() or 1, MOST_PROCESSES)
    add("--processes", "--threads", type=whole(1), default=cores, help="at a time")
    add("--json", type=new_file((".json",)), help="where to write what was found")
    add("--values", type=whole(1), default=5, help="sets of values for a compiled call")
    add(
        "--sets", type=_sets, default=(), help="these sets of values alone, with commas"
    )
    add("--wanted", choices=WANTED, metavar="WHAT",
        help=f"what every call has: {', '.join(WANTED)}")  # fmt: skip
    add("--set", type=_fact, action="append", default=[], metavar="NAME=VALUE",
        help="a fact of every plan (fuzz/plan.py), such as mask=None")  # fmt: skip
    add("--kept", action="store_true", help="the seeds that once failed")
    add("--shrink", action="store_true", help="make the failing --seed plain")
    add("--selfcheck", action="store_true", help="differentiate the truth numerically")
    add("--small-chunks", action="store_true", help='"xla" in chunks of 8 rows')
    add("--lists", action="store_true", help="entmax through lists at any length")
    add("--looked", action="store_true",
        help="every call with a mask of blocks, left out at any length")  # fmt: skip
    add("--no-repeat", action="store_true", help="do not run the first set twice")
    add("--verbose", action="store_true", help="a line for every call")
    return parser


def _sets(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in (*SETS, *MORE):
            raise argparse.ArgumentTypeError(
                f"must be of {', '.join((*SETS, *MORE))}; got {name}"
            )
    return names


def _fact(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    known = [x.name for x in dataclasses.fields(Plan)]
    if name not in known:
        raise argparse.ArgumentTypeError(f"must be of {', '.join(known)}; got {name}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _shrunk(seed: int, options: Options) -> int:
    plan, facts = shrink(seed, options)
    print(describe(plan))
    print(" ".join(f"--set {name}={value!r}" for name, value in facts.items()))
    return 0


def _selfcheck(seeds: Sequence[int]) -> int:
    worst = 0.0
    for seed in seeds:
        for name, gap in gradient_gaps(seed):
            worst = max(worst, gap)
            if gap > ALLOWED:
                print(f"seed {seed} {name}: {gap:.1e} from differences")
    print(f"{len(seeds)} calls, the worst gradient {worst:.1e} from differences")
    return int(worst > ALLOWED)
