"""`python -m pallas_attn verify`: values, gradients and repeats on this machine."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Sequence
from importlib import metadata
from typing import Any

import jax

from pallas_attn.command import new_file, Parser, write
from pallas_attn.implementations import current_device, NAMES, resolve
from pallas_attn.verify.check import Verified, verify_all
from pallas_attn.verify.large import free_bytes, LARGE, LEAST_BYTES, verify_large
from pallas_attn.verify.rows import Row, rows, SHORT, SIZES, small_rows


# Threads that compile; tracing is Python, and takes turns.
MOST_THREADS = 8


def main(argv: Sequence[str] | None = None) -> int:
    """Verifies this machine, and prints a table.

    Args:
        argv: Command-line arguments; None: those of the process.

    Returns:
        0, or 1 if anything is wrong.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    names = [*(f"{x.group} {x.name}" for x in rows()), *(x.name for x in LARGE)]
    if not any(_holds(name, options.filter) for name in names):
        parser.error(f"argument --filter: no call's name holds {options.filter!r}")
    start = time.perf_counter()
    device = current_device()
    chosen = resolve(options.impl, device, dtype="float32", H=64, h=64)
    if chosen.name is None:
        print(f'"{options.impl}" does not run here: {chosen.reason}', file=sys.stderr)
        return 1
    if device.platform == "cpu":
        # a program runs twice: XLA's optimiser takes longer than it saves
        jax.config.update("jax_disable_most_optimizations", True)
    print(f"{device.kind}, jax {jax.__version__}, {chosen.name}: {chosen.reason}.")
    print(
        "Errors in units of an array's largest entry; limit: the largest error, in "
        "units of what rounding explains.\n"
    )
    found = _all(chosen.name, device.platform, options.filter)
    wrong = [x for x in found if not x.passed]
    seconds = time.perf_counter() - start
    print(f"\n{len(found)} calls, {len(wrong)} wrong, {seconds:.0f} s.")
    if options.json:
        said = {
            "device": device.kind,
            "implementation": chosen.name,
            "jax": metadata.version("jax"),
            "seconds": seconds,
            "wrong": len(wrong),
            "calls": [_plain(x) for x in found],
        }
        write(options.json, json.dumps(said, indent=1) + "\n")
    return int(bool(wrong) or not found)


def _all(implementation: str, platform: str, wanted: str) -> list[Verified]:
    """Every group of calls, a line each as it ends."""
    threads = min(os.cpu_count() or 1, MOST_THREADS)
    keep = lambda given: [x for x in given if _holds(f"{x.group} {x.name}", wanted)]
    chosen = keep(rows(SHORT if platform == "cpu" else SIZES))
    found = show(verify_all(chosen, implementation, threads), len(chosen))
    if platform == "cpu" and implementation == "xla":
        print("\nThe GPU's kernels, interpreted:")
        small: list[Row] = keep(small_rows())
        found += show(verify_all(small, "triton_interpret", threads), len(small))
    print("\nArrays past 2^31 elements:")
    large = [x for x in LARGE if _holds(x.name, wanted)]
    free = free_bytes()
    if platform != "gpu" or free < LEAST_BYTES:
        print(
            f"  left out: they need a GPU with {LEAST_BYTES / 2**30:.0f} GiB free; "
            f"here are {free / 2**30:.0f}."
        )
        return found
    return found + show((verify_large(x, implementation) for x in large), len(large))


def _holds(name: str, wanted: str) -> bool:
    return wanted.casefold() in name.casefold()


def show(found: Iterable[Verified], total: int) -> list[Verified]:
    """Prints a line for each as it ends, under a heading.

    Args:
        found: What was verified.
        total: How many there will be.

    Returns:
        All of them.
    """
    heading = ("output", "gradients", "limit", "bits")
    print(f"{'':9}{'call':48}{'dtype':10}" + "".join(f"{x:>10}" for x in heading))
    shown = []
    for number, x in enumerate(found, 1):
        errors = f"{x.output_error:10.1e}{x.gradient_error:10.1e}{x.share:10.2f}"
        bits = "equal" if x.repeats else "differ"
        line = f"{number:>3}/{total:<4} {x.name:48}{x.dtype:10}{errors}{bits:>10}"
        print(line + ("" if x.passed else f"  WRONG: {x.wrong}"), flush=True)
        shown.append(x)
    return shown


def _parser() -> Parser:
    parser = Parser(
        prog="python -m pallas_attn verify",
        description="Values and every gradient of every bias, normalizer and option, "
        "in float32 and bfloat16, against float64; each call twice, for equal bits; on "
        "a GPU arrays past 2^31 elements. About two minutes. The exit status is 1 if "
        "anything is wrong.",
    )
    parser.add_argument(
        "--impl",
        choices=NAMES,
        help="what to verify; by default what a call would run on",
    )
    parser.add_argument(
        "--filter", default="", help="calls whose name holds this, in any case"
    )
    parser.add_argument(
        "--json", type=new_file((".json",)), help="where to write what was found"
    )
    return parser


def _plain(x: Verified) -> dict[str, Any]:
    """JSON has no NaN."""
    plain = dataclasses.asdict(x) | {"passed": x.passed}
    odd = lambda y: isinstance(y, float) and not math.isfinite(y)
    return {name: None if odd(y) else y for name, y in plain.items()}
