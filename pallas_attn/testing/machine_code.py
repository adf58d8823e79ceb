"""What the `triton` wheel made of each shipped kernel, kept in a file of figures.

To compile a kernel takes seconds, to lower it a fraction of one; and the compiler's
answer depends on nothing but what it is given. So an answer is kept by the digest of
the question (the kernel's Triton IR, its warps and stages, the architecture, the
compiler's version), and only kernels that have changed are compiled again.

`python -m pallas_attn.testing.machine_code` writes the file anew: what is known stays,
what is new is compiled, what no shipped call needs is dropped. The difference of two
commits' files says which kernels have changed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from pallas_attn.lowering.lower import (
    compile_kernel,
    Kernel,
    Record,
    shared_memory,
    triton_ir,
    triton_version,
)
from pallas_attn.testing.cases import Case
from pallas_attn.testing.evaluate import kernels
from pallas_attn.testing.shipped import LOADED, SHARED, SHIPPED


FIGURES = Path(__file__).with_name("machine_code.json")
PLACES = ("copied", "loaded", "accumulated")  # sets of arguments, lists in JSON


@functools.cache
def lowered(case: Case, arch: int = 90) -> tuple[Kernel, ...]:
    """A call's kernels, each once."""
    return tuple(dict.fromkeys(kernels(case, arch=arch)))


def compiled(kernel: Kernel, arch: int = 90) -> Record:
    """`compile_kernel(kernel, arch)`, from the file where it is known."""
    found = _figures().get(digest(kernel, arch))
    return compile_kernel(kernel, arch) if found is None else _record(found)


def shared(kernel: Kernel, arch: int) -> int:
    """`shared_memory(kernel, arch)`, from the file where it is known."""
    found = _figures().get(digest(kernel, arch))
    return shared_memory(kernel, arch) if found is None else found["shared"]


@functools.cache
def digest(kernel: Kernel, arch: int) -> str:
    """What the compiler's answer depends on, as a short name."""
    given = [
        _compiler(),
        arch,
        kernel.num_warps,
        kernel.num_stages,
        triton_ir(kernel),
    ]
    return hashlib.sha256(repr(given).encode()).hexdigest()[:24]


def asked() -> dict[str, Callable[[], dict[str, Any]]]:
    """Every question of the tests, by its digest, and how it is answered anew."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for arch in (80, 90, 100):
        for case in SHIPPED + (LOADED if arch == 90 else []):
            for kernel in lowered(case, arch):
                found[digest(kernel, arch)] = partial(_all_of_it, kernel, arch)
        print(f"lowered for sm_{arch}", file=sys.stderr)
    for case in SHIPPED + SHARED:
        for kernel in lowered(case, 86):
            for arch in (86, 120):
                found[digest(kernel, arch)] = partial(_shared_alone, kernel, arch)
    print("lowered for cards with 99 KiB", file=sys.stderr)
    return found


def main() -> int:
    """Writes the file anew, or counts what would be new in it.

    Returns:
        The exit status, 0.
    """
    parser = argparse.ArgumentParser(
        prog="python -m pallas_attn.testing.machine_code", description=__doc__
    )
    parser.add_argument(
        "--count", action="store_true", help="say how many are new; compile nothing"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    given = parser.parse_args()
    questions = asked()
    known = {name: x for name, x in _figures().items() if name in questions}
    new = [name for name in questions if name not in known]
    if given.count:
        print(f"{len(questions)} kernels, {len(new)} of them new")
        return 0
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(given.processes, context) as pool:
        answers = pool.map(_answered, [questions[name] for name in new])
        for place, (name, answer) in enumerate(zip(new, answers, strict=True), 1):
            known[name] = answer
            print(f"\r{place} of {len(new)} compiled", end="", file=sys.stderr)
    print(f"\n{len(known)} kernels, {len(new)} of them new", file=sys.stderr)
    FIGURES.write_text(_text(known.items()))
    return 0


def _answered(question: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    return question()


def _all_of_it(kernel: Kernel, arch: int) -> dict[str, Any]:
    record = dataclasses.asdict(compile_kernel(kernel, arch))
    return {x: sorted(y) if x in PLACES else y for x, y in record.items()}


def _shared_alone(kernel: Kernel, arch: int) -> dict[str, Any]:
    return {"name": kernel.name, "arch": arch, "shared": shared_memory(kernel, arch)}


def _record(found: dict[str, Any]) -> Record:
    fields: dict[str, Any] = found | {x: frozenset(found[x]) for x in PLACES}
    return Record(**fields)


def _text(items: Iterable[tuple[str, dict[str, Any]]]) -> str:
    """One line for each kernel, those of one name and card beside each other."""
    order = lambda item: (item[1]["arch"], item[1]["name"], item[0])
    lines = [f"{json.dumps(x)}: {json.dumps(y)}" for x, y in sorted(items, key=order)]
    return "{\n" + ",\n".join(lines) + "\n}\n"


@functools.cache
def _figures() -> dict[str, dict[str, Any]]:
    return json.loads(FIGURES.read_text()) if FIGURES.exists() else {}


_compiler = functools.cache(triton_version)


if __name__ == "__main__":
    raise SystemExit(main())
