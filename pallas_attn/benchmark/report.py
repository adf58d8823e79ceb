"""`python -m pallas_attn bench`: ours and the peers in one run, as tables and JSON."""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax

from pallas_attn.benchmark import measure, page, sweep, tables, timing, training_step
from pallas_attn.benchmark.cases import CASES
from pallas_attn.benchmark.results import Result
from pallas_attn.benchmark.specs import Case
from pallas_attn.benchmark.training_step import StepCase, STEPS
from pallas_attn.command import new_file, Parser, whole, write
from pallas_attn.implementations import Implementation, NAMES


CaseT = TypeVar("CaseT", Case, StepCase, Case | StepCase)

METHOD = (
    "medians of interleaved runs in one process, everything compiled before; "
    "forward + backward is the output and every gradient, the bias's included"
)
TFLOPS = (
    "TFLOP/s: 4 T S H for each head forward, 3.5 times that with backward; full counts "
    "the whole square of queries and keys, causal half of it"
)
ERRORS = (
    "errors: norm(x - truth) / norm(truth) of the first and last key heads (of the "
    "first batch entry, or of all where a bias is shared), the truth by our xla at "
    "twice the precision (float32 HIGHEST or float64); a peer without a bias against "
    "its own truth"
)
STEPS_METHOD = (
    "a training step is forward, backward and AdamW, nothing donated; attention is "
    "that of all its layers, forward and backward; memory is that of operands, results "
    "and temporaries as compiled; errors: of the loss and of the worst gradient, the "
    "truth by our xla at twice the precision"
)
PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
    "flax",
    "numpy",
    "optax",
    "pallas_attn",
)


def main(
    argv: Sequence[str] | None = None,
    cases: Sequence[Case | StepCase] = (*CASES, *STEPS),
) -> int:
    """Measure, print and write what the arguments ask for.

    Args:
        argv: Arguments; None: the process's own.
        cases: What there is to measure.

    Returns:
        The exit status: 0, or 1 where a case failed.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    if options.picture:
        print(page.picture(page.committed()))
        return 0
    if options.markdown:
        print(_tables_of(options.markdown, parser))
        return 0
    if options.list:
        for case in cases:
            print(f"{case.name:22} {case.platform}  {case.shape}\n    {case.origin}")
        return 0
    here = "gpu" if measure.on_gpu() else "cpu"
    chosen = selected(cases, options.cases, here)
    _refuse_others(cases, options.cases, here, parser)
    if not chosen:
        parser.error(f"no case is for a {here}; --list shows all")
    try:
        choices = [x for text in options.sweep for x in sweep.parsed(text)]
    except ValueError as error:
        parser.error(str(error))
    if choices and not any(isinstance(case, Case) for case in chosen):
        parser.error("--sweep needs a case of attention; --list shows all")
    implementation = options.implementation or ("triton" if here == "gpu" else "xla")
    device = jax.devices()[0]
    print(
        f"{device.device_kind}, jax {jax.__version__}, implementation {implementation}"
    )
    if here == "cpu":
        print("No GPU: the CPU cases only (the others need a CUDA device).")
    report = _report(implementation)
    attention = [case for case in chosen if isinstance(case, Case)]
    steps = [case for case in chosen if isinstance(case, StepCase)]
    if choices:
        trials = sweep.swept(attention, choices, implementation, options.repeats, _say)
        report["sweep"] = [dataclasses.asdict(trial) for trial in trials]
        failed = any(trial.failure for trial in trials)
    else:
        how = (implementation, options.repeats, _say)
        done: dict[str, list[Result]] = {"results": [], "steps": []}
        for kind, results in {
            "results": measure.measured(attention, *how),
            "steps": training_step.measured(steps, *how),
        }.items():
            for result in results:
                done[kind].append(result)
                count = sum(map(len, done.values()))
                _say(f"[{count}/{len(chosen)}] {tables.line(result)}")
                report[kind].append(dataclasses.asdict(result))
                _write(report, options.json)
        _summary(**done)
        failed = any(x.failures for results in done.values() for x in results)
    _write(report, options.json)
    return int(failed)


def selected(cases: Sequence[CaseT], names: Sequence[str], here: str) -> list[CaseT]:
    """The cases of this platform that a name or pattern matches; [] matches all."""
    return [
        case
        for case in cases
        if case.platform == here
        and (
            any(fnmatch.fnmatchcase(case.name, name) for name in names)
            if names
            else not case.on_request
        )
    ]


def _refuse_others(
    cases: Sequence[Case | StepCase], names: Sequence[str], here: str, parser: Parser
) -> None:
    """Every name must be that of a case of this platform."""
    for name in names:
        if selected(cases, [name], here):
            continue
        mine = [case.name for case in cases if case.platform == here]
        known = any(fnmatch.fnmatchcase(case.name, name) for case in cases)
        why = f"needs another device than this {here}" if known else "is no case"
        few = ", ".join(mine[:6]) + (", ..." if len(mine) > 6 else "")
        parser.error(f"{name} {why}; cases of a {here}: {few}; --list shows all")


def _tables_of(path: Path, parser: Parser) -> str:
    """The tables of a report that `--json` wrote, or the page of the committed ones."""
    if path == page.FOLDER:
        return page.page(page.committed())
    try:
        return tables.markdown(json.loads(path.read_text()))
    except OSError as error:
        parser.error(f"argument --markdown: {path}: {error.strerror}")
    except (ValueError, KeyError, TypeError):
        parser.error(f"argument --markdown: {path} is no report that --json wrote")


def _parser() -> Parser:
    parser = Parser(
        prog="python -m pallas_attn bench",
        description="Time attention with biases against jax.nn's, in one run.",
    )
    add = parser.add_argument
    add("cases", nargs="*", help="names or patterns of cases (default: all)")
    add("--list", action="store_true", help="print the cases and where they are from")
    add(
        "--json",
        type=new_file(),
        metavar="PATH",
        help="write the report here; its folder is made if it is missing",
    )
    add(
        "--markdown",
        type=Path,
        nargs="?",
        const=page.FOLDER,
        metavar="PATH",
        help="print a report's tables and stop; without PATH the page of the committed "
        "reports, pallas_attn/benchmark/README.md",
    )
    add(
        "--picture",
        action="store_true",
        help="print the picture of the committed reports, as SVG, and stop",
    )
    add(
        "--implementation",
        choices=NAMES,
        help="ours (default: triton on a GPU, else xla)",
    )
    add(
        "--repeats",
        type=whole(1),
        default=timing.REPEATS,
        help="rounds of each timing (default: %(default)s)",
    )
    add(
        "--sweep",
        action="append",
        default=[],
        metavar="PASS=QxKxWARPSxSTAGES,...",
        help="time blocks of one pass beside the shipped choice; may be repeated",
    )
    return parser


def _summary(results: Sequence[Result], steps: Sequence[Result]) -> None:
    if results:
        tables.terminal(tables.HEAD, [tables.cells(result) for result in results])
        _say(f"{METHOD}.\n{TFLOPS}.\n{ERRORS}.")
    if steps:
        lines = [tables.step_cells(result) for result in steps]
        tables.terminal(tables.STEP_HEAD, lines)
        _say(f"{STEPS_METHOD}.")
    met = [met for result in (*results, *steps) for met in result.met().values()]
    _say(f"{sum(met)} of {len(met)} targets met. (Those of pallas_attn's own cases.)")


def _report(implementation: Implementation) -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "method": METHOD,
        "tflops": TFLOPS,
        "errors": ERRORS,
        "steps_method": STEPS_METHOD,
        "implementation": implementation,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "device": {
            "kind": device.device_kind,
            "platform": device.platform,
            "runtime": str(device.client.platform_version),
            "cpu_threads": os.cpu_count(),
        },
        "versions": {"python": platform.python_version(), **_versions()},
        "results": [],
        "steps": [],
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _write(report: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        write(path, json.dumps(report, indent=1) + "\n")


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
