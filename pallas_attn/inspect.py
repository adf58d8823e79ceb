"""`python -m pallas_attn inspect`: what each kernel uses on a GPU, without a GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from pallas_attn.command import Parser, whole
from pallas_attn.implementations import WIDEST_HEAD
from pallas_attn.lowering.lower import (
    compile_kernel,
    DEVICES,
    Kernel,
    Record,
    SHARED_LIMIT,
    triton_version,
    unavailable,
)
from pallas_attn.testing.cases import Case
from pallas_attn.testing.evaluate import kernels


# The calls whose kernels are shown: they hold each kernel and each plan of a backward.
CASES = {
    "none": Case("none", "causal"),
    "alibi": Case("alibi", "causal"),
    "window": Case("none", "window"),
    "factored": Case("factored", "full"),
    "alibi + factored": Case("sum-alibi factored", "causal"),
    "dense": Case("dense", "full"),
    "dense shared": Case("dense-1NTS", "full"),
    "dense per key": Case("dense-B11S", "full"),
    "relative": Case("relative-long", "causal"),
    "Co-ALiBi": Case("co_alibi", "causal"),
    "own tile": Case("saturating", "causal"),
    "entmax": Case("none", "causal", (), "entmax 1.5"),
    "entmax top 33": Case("none", "causal", (), "entmax 1.5 top 33"),
}
DTYPES = ("bfloat16", "float16", "float32")
COLUMNS = (
    "case",
    "kernel",
    "warps",
    "stages",
    "registers",
    "spills",
    "shared",
    "wgmma",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table of registers, spills, shared memory and wgmma of each kernel.

    Args:
        argv: Command-line arguments; None: those of the process.

    Returns:
        The exit status: 0, or 1 where the `triton` package is missing.
    """
    options = _parser().parse_args(argv)
    if reason := unavailable():
        print(f"inspect compiles kernels, and {reason}", file=sys.stderr)
        return 1
    sizes = {
        "B": 1,
        "N": 16,
        "K": 16,
        "T": options.length,
        "S": options.length,
        "H": options.head_dim,
        "h": options.head_dim,
        "dtype": options.dtype,
    }
    arch = options.arch
    limit = SHARED_LIMIT[arch] // 1024
    print(f"sm_{arch} ({DEVICES[arch]}, at most {limit} KiB shared), {options.dtype}")
    print(f"B 1, N 16, T = S = {options.length}, H = h = {options.head_dim}")
    print(f"compiled by {triton_version()}; XLA brings its own Triton\n")
    rows = [COLUMNS]
    for name in options.case or CASES:
        rows += [
            _row(name, kernel, compile_kernel(kernel, arch))
            for kernel in dict.fromkeys(kernels(CASES[name].at(**sizes), arch=arch))
        ]
    print("\n".join(aligned(rows)))
    return 0


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows as lines with columns of one width, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def _row(name: str, kernel: Kernel, record: Record) -> tuple[str, ...]:
    wgmma = f"{record.wgmma}, serialised" if record.serialised else str(record.wgmma)
    return (
        name,
        kernel.name,
        str(kernel.num_warps),
        str(kernel.num_stages),
        str(record.registers),
        f"{record.spills} B",
        f"{record.shared / 1024:.1f} KiB",
        wgmma,
    )


def _parser() -> Parser:
    parser = Parser(prog="python -m pallas_attn inspect", description=__doc__)
    parser.add_argument(
        "--arch", type=int, choices=list(DEVICES), default=90, help="sm_ (default: 90)"
    )
    parser.add_argument(
        "--case",
        action="append",
        choices=list(CASES),
        metavar="NAME",
        help=f"one of {', '.join(CASES)}; may be repeated (default: all)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument(
        "--head-dim",
        type=whole(1, WIDEST_HEAD),
        default=128,
        help=f"H and h, at most {WIDEST_HEAD} (default: 128)",
    )
    parser.add_argument(
        "--length", type=whole(1), default=4096, help="T and S (default: 4096)"
    )
    return parser
