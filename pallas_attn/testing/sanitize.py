"""`python -m pallas_attn.testing.sanitize`: every kernel under compute-sanitizer.

Each call runs in a process of its own, many at a time: forward, backward and tangents,
with the shipped blocks. "dirty" is memcheck over memory that was filled with 0x7f: an
index that nobody wrote then leaves its array, which fresh memory, all 0, hides.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from shutil import which
from typing import Any

from pallas_attn.command import Parser


TOOLS = ("memcheck", "dirty", "racecheck", "initcheck", "synccheck")
FUZZ = (
    f"{shlex.quote(sys.executable)} -m pallas_attn fuzz --impl triton --processes 1 "
    "--seed {seed} --count 1"
)
SECONDS = 200  # of one call; a hang is an error

# (bias, situation, normalizer), in bfloat16 and float32, heads of 64 and 128.
CALLS = (
    ("none", "full", "softmax"),
    ("alibi", "causal GQA", "softmax"),
    ("dense", "mask BNTS", "softmax"),
    ("alibi", "mask TS GQA", "softmax"),
    ("dense-1NTS", "causal lengths GQA", "softmax"),
    ("sum", "causal window lengths", "softmax"),
    ("saturating", "causal segments", "softmax"),
    ("forget gate", "causal", "softmax"),
    ("factored-float32 R20", "positions per head", "softmax"),
    ("none", "dropout GQA soft cap", "softmax"),
    ("co_alibi", "all at once", "softmax"),
    ("relative", "causal GQA", "softmax"),
    ("relative-long", "full", "softmax"),
    ("alibi", "all at once", "sink"),
    ("none", "causal", "entmax 1.5"),
    ("sum-factored dense", "lengths", "entmax learned"),
    ("sum", "causal GQA", "entmax 1.5 top 33"),
    ("none", "all at once", "entmax learned top 8"),
    ("none", "full", "entmax 2.0"),  # through lists, and over tiles
)
SIZES = {"T": 161, "S": 193}

# Without a limit on its threads the sanitizer itself crashes; the autotuner compares
# padding, which initcheck reports; command buffers hide who launched a kernel.
XLA_FLAGS = (
    "--xla_gpu_enable_command_buffer= --xla_gpu_force_compilation_parallelism=1 "
    "--xla_gpu_autotune_level=0"
)
POISON = 0x7F7F7F7F


@dataclass(frozen=True)
class Found:
    """What one process under one tool did."""

    name: str
    tool: str
    errors: int | None  # None: there is no summary
    status: int
    seconds: float
    places: tuple[str, ...]  # kernels that the tool names
    log: Path

    @property
    def well(self) -> bool:
        """Whether the program ended well and the tool found nothing."""
        return self.status == 0 and self.errors == 0


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line for every process that is not well, and a table.

    Args:
        argv: Command-line arguments; None: those of the process.

    Returns:
        The exit status: 0, or 1 where an error was found or a process failed.
    """
    options = _parser().parse_args(argv)
    if options.run is not None:
        return run(options.run, dirty=options.dirty)
    sanitizer = which("compute-sanitizer") or which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if sanitizer is None:
        print("compute-sanitizer is missing: it comes with CUDA", file=sys.stderr)
        return 1
    logs = options.logs or Path(tempfile.mkdtemp(prefix="sanitize-"))
    logs.mkdir(parents=True, exist_ok=True)
    work = [
        (sanitizer, tool, name, command, logs)
        for tool in options.tools
        for name, command in _commands(options, dirty=tool == "dirty")
    ]
    print(
        f"{len(work)} processes, {options.jobs} at a time; logs in {logs}", flush=True
    )
    start = time.monotonic()
    with ThreadPoolExecutor(options.jobs) as pool:
        found = list(pool.map(lambda x: _reported(_sanitized(*x)), work))
    for tool in options.tools:
        ours = [x for x in found if x.tool == tool]
        errors = sum(x.errors or 0 for x in ours)
        print(
            f"{tool:10} {len(ours):4} calls  {sum(x.well for x in ours):4} well  "
            f"{errors:4} errors  {sum(x.seconds for x in ours):6.0f} s of processes"
        )
    print(f"{time.monotonic() - start:.0f} s")
    return 0 if found and all(x.well for x in found) else 1


def names() -> list[str]:
    """The calls: "dtype H: place in CALLS" each."""
    return [
        f"{dtype} {H} {place}"
        for place in range(len(CALLS))
        for dtype, H in (("bfloat16", 64), ("bfloat16", 128), ("float32", 64))
    ]


def case_of(name: str) -> Any:
    """The case of a name."""
    from pallas_attn.testing.cases import Case

    dtype, H, place = name.split()
    bias, situation, normalizer = CALLS[int(place)]
    sizes = {**SIZES, "H": int(H), "h": int(H), "dtype": dtype}
    return Case(bias, situation, (), normalizer).at(**sizes)


def run(name: str, *, dirty: bool = False) -> int:
    """One call, forward, backward and tangents, compiled; 1 if any is not finite."""
    import jax
    import jax.numpy as jnp

    from pallas_attn.config import Config
    from pallas_attn.testing.evaluate import gradients, tangents
    from pallas_attn.tiled import summaries
    from pallas_attn.triton.entmax import route

    if dirty:
        _fill()
    route.LONG = SIZES["S"]  # plain entmax looks at lists too
    summaries.LOOKED_AT = 1  # and softmax at what masks hide
    case = case_of(name)
    # groups of heads: all but the first store into the arrays of the one before
    config = Config(carry_mib=0) if case.bias.startswith("co_alibi") else None
    sample = case.sample()
    options: dict[str, Any] = {"implementation": "triton", "config": config}
    found = gradients(sample, **options)
    along = jax.jit(tangents(sample.settings, **options))
    moved = along(sample.operands, sample.conditions)
    found = (found[0][0], found[1], moved)
    finite = jax.tree.map(lambda x: bool(jnp.isfinite(x).all()), found)
    if not all(jax.tree.leaves(finite)):
        print(f"{case}: not finite: {finite}")
        return 1
    print(f"{case}: ran")
    return 0


def _fill() -> None:
    """Fills the device's pool with a number that no index may be, and hands it back."""
    import jax
    import jax.numpy as jnp

    blocks = []
    try:
        while True:
            blocks.append(jax.block_until_ready(jnp.full(2**25, POISON, jnp.int32)))
    except jax.errors.JaxRuntimeError:  # the pool is full
        pass
    for block in blocks:
        block.delete()


def _commands(
    options: argparse.Namespace, *, dirty: bool
) -> list[tuple[str, list[str]]]:
    if options.fuzz:
        first, count = options.fuzz
        return [
            (f"seed {seed}", shlex.split(options.fuzz_command.format(seed=seed)))
            for seed in range(first, first + count)
        ]
    this = [sys.executable, "-m", "pallas_attn.testing.sanitize"]
    more = ["--dirty"] if dirty else []
    return [
        (str(case_of(name)), [*this, "--run", name, *more])
        for name in names()
        if re.search(options.only, str(case_of(name)))
    ]


def _sanitized(
    sanitizer: str, tool: str, name: str, command: list[str], logs: Path
) -> Found:
    dirty = tool == "dirty"
    under = [sanitizer, "--tool", "memcheck" if dirty else tool]
    under += ["--target-processes", "all", "--print-limit", "2000"]
    environment = {**os.environ, "XLA_FLAGS": XLA_FLAGS, "PYTHONUNBUFFERED": "1"}
    if dirty:  # memory needs a pool to be dirty in
        environment.pop("XLA_PYTHON_CLIENT_ALLOCATOR", None)
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "true"
        environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = ".03"
    else:  # one pool for all buffers would hide small overruns
        environment["XLA_PYTHON_CLIENT_ALLOCATOR"] = "platform"
    log = logs / f"{tool}.{re.sub(r'[^A-Za-z0-9=.]+', '-', name)}"
    start = time.monotonic()
    with log.open("w") as file:
        try:
            status = subprocess.run(
                [*under, *command],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                timeout=SECONDS,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            status = 124
    errors, places = summary(log.read_text(errors="replace"))
    seconds = time.monotonic() - start
    return Found(name, tool, errors, status, seconds, places, log)


def summary(log: str) -> tuple[int | None, tuple[str, ...]]:
    r"""How many errors a log of compute-sanitizer counts, and the kernels it names.

    >>> text = "Invalid __global__ read of size 4 bytes\n==  at rows_kernel+0x80"
    >>> summary(text + " in x.cu\n========= ERROR SUMMARY: 3 errors")
    (3, ('rows_kernel',))
    >>> summary("Segmentation fault")
    (None, ())
    """
    counts = re.findall(r"SUMMARY: (\d+)", log)
    places = re.findall(r"\bat (?:void )?(\w+)\+0x", log)
    errors = sum(map(int, counts)) if counts else None
    return errors, tuple(sorted(set(places)))


def _reported(found: Found) -> Found:
    if not found.well:
        errors = "no summary" if found.errors is None else f"{found.errors} errors"
        print(
            f"{found.tool} {found.name}: {errors}, exit {found.status}, "
            f"{found.seconds:.0f} s, {', '.join(found.places)} ({found.log})",
            flush=True,
        )
    return found


def _parser() -> Parser:
    parser = Parser(prog="python -m pallas_attn.testing.sanitize", description=__doc__)
    add = parser.add_argument
    add(
        "--tools",
        nargs="+",
        choices=TOOLS,
        default=["memcheck", "dirty", "racecheck", "initcheck"],
    )
    jobs = max(1, (os.cpu_count() or 1) - 2)
    add("--jobs", type=int, default=jobs, help=f"processes at a time ({jobs} here)")
    add("--only", default="", metavar="PATTERN", help="calls whose name has it")
    add("--logs", type=Path, help="a folder for the tool's reports")
    add(
        "--fuzz",
        nargs=2,
        type=int,
        metavar=("FROM", "COUNT"),
        help="random calls instead, a process for each seed",
    )
    add("--fuzz-command", default=FUZZ, help="runs one {seed}")
    add("--run", choices=names(), metavar="NAME", help="one call, not sanitized")
    add("--dirty", action="store_true", help="with --run: fill the memory first")
    return parser


if __name__ == "__main__":
    sys.exit(main())
