"""`python -m pallas_attn demo | verify | fuzz | bench | doctor | inspect`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from pallas_attn.command import Parser


class Command(NamedTuple):
    """Where a command's `main(argv)` lives, what it does, the extra it needs."""

    module: str
    purpose: str
    extra: str


COMMANDS = {
    "demo": Command(
        "pallas_attn.demo.tour",
        "check every bias, train a small model, see it extrapolate",
        "demo",
    ),
    "verify": Command(
        "pallas_attn.verify.command",
        "values, gradients and repeats of everything on this device, in two minutes",
        "test",
    ),
    "fuzz": Command(
        "pallas_attn.fuzz.command",
        "random whole calls against a float64 truth, in many processes",
        "test",
    ),
    "bench": Command(
        "pallas_attn.benchmark.report", "time ours and its peers in one run", "bench"
    ),
    "doctor": Command(
        "pallas_attn.doctor",
        "say what would run here, why, and what to install",
        "test",
    ),
    "inspect": Command(
        "pallas_attn.inspect",
        "print registers, spills and shared memory of each kernel, without a GPU",
        "test",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command, and imports it only then.

    Args:
        argv: Command-line arguments; None: those of the process.

    Returns:
        The exit status.
    """
    lines = [f"  {name:9}{command.purpose}" for name, command in COMMANDS.items()]
    parser = Parser(
        prog="python -m pallas_attn",
        description="Attention with biases for JAX.",
        epilog="\n".join(["commands:", *lines, "", "each takes --help"]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=tuple(COMMANDS), metavar="command")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...")
    given = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(given or ["--help"])
    command = COMMANDS[options.command]
    try:
        status = importlib.import_module(command.module).main(options.arguments)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "pallas_attn":
            raise
        print(
            f"`{options.command}` needs the package `{error.name}`: "
            f"pip install -e '.[{command.extra}]'",
            file=sys.stderr,
        )
        return 1
    return status or 0


if __name__ == "__main__":
    sys.exit(main())
