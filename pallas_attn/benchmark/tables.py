"""Results as a table: in a terminal, and in the README."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

from pallas_attn.benchmark.results import Result


HEAD = (
    "case",
    "forward ms",
    "peer",
    "ratio",
    "TFLOP/s full, causal",
    "fwd+bwd ms",
    "peer",
    "ratio",
    "TFLOP/s full, causal",
    "temporaries MiB",
    "peer",
    "error output, worst gradient",
    "peer",
    "visited fwd rows cols",
    "peak",
)


def cells(result: Result) -> tuple[str, ...]:
    """A result under `HEAD`."""
    seen = result.visited
    return (
        result.name,
        _number(result.milliseconds("ours forward")),
        _number(result.milliseconds("peer forward")),
        _against(result, "forward"),
        _rates(result, "ours forward"),
        _number(result.milliseconds("ours both")),
        _number(result.milliseconds("peer both")),
        _against(result, "both"),
        _rates(result, "ours both"),
        _memory(result),
        _number(result.temporaries.get("peer both")),
        _errors(result, "ours"),
        _errors(result, "peer"),
        " ".join(f"{seen[name]:.2f}" for name in ("forward", "rows", "cols"))
        if seen
        else "-",
        " ".join(f"{x['peak_share']:.0%}" for x in result.roofline.values()) or "-",
    )


def terminal(head: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Print a table: with rich where it is installed and there is a terminal."""
    if importlib.util.find_spec("rich") and sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(*head)
        for line in lines:
            table.add_row(*line)
        Console().print(table)
        return
    print(aligned(head, lines), flush=True)


def aligned(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table of plain text; the first column is flush left."""
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    return "\n".join(
        "  ".join(
            text.ljust(width) if column == 0 else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (head, *lines)
    )


def line(result: Result) -> str:
    """A result in one line, as it comes."""
    forward, both = (
        f"{_number(result.milliseconds(f'ours {work}'))} ms, {_against(result, work)}"
        for work in ("forward", "both")
    )
    text = f"{result.name}: forward {forward}; forward + backward {both}"
    slow = result.host_bound()
    notes = [f"the host may be what was timed: {', '.join(slow)}"] if slow else []
    reasons: dict[str, list[str]] = {}
    for name, reason in result.failures.items():
        reasons.setdefault(reason, []).append(name)
    notes += [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return "\n".join([text, *(f"  {note}" for note in notes)])


def markdown(report: dict[str, Any]) -> str:
    """The README's Speed table, from a report that `bench --json` wrote."""
    device, versions = report["device"], report["versions"]
    head = (
        "case",
        "shape",
        "peer",
        "forward: ours, peer (ms)",
        "ratio",
        "TFLOP/s full, causal",
        "forward + backward: ours, peer (ms)",
        "ratio",
        "TFLOP/s full, causal",
        "temporaries: ours, peer (MiB)",
    )
    lines = [head, ("---",) * len(head)]
    for values in report["results"]:
        result = Result.of_json(values)
        lines.append(
            (
                f"`{result.name}`",
                result.shape,
                result.peer or "-",
                _pair(result.milliseconds, "forward"),
                _against(result, "forward"),
                _rates(result, "ours forward"),
                _pair(result.milliseconds, "both"),
                _against(result, "both"),
                _rates(result, "ours both"),
                _pair(result.temporaries.get, "both"),
            )
        )
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    where = f"{device['kind']}, {report['implementation']}, jax {versions['jax']}"
    method = "; ".join(report[x] for x in ("method", "tflops") if x in report)
    return f"{where}; {method}.\n\n{table}"


def _pair(value: Any, work: str) -> str:
    return f"{_number(value(f'ours {work}'))}, {_number(value(f'peer {work}'))}"


def _against(result: Result, work: str) -> str:
    ratio, target = result.ratio(work), result.targets.get(work)
    if ratio is None or target is None:
        return _number(ratio)
    return f"{ratio:.2f} (<= {target:.2f}: {_met(result, work)})"


def _rates(result: Result, program: str) -> str:
    return ", ".join(map(_number, result.tflops.get(program, {}).values())) or "-"


def _memory(result: Result) -> str:
    text = _number(result.temporaries.get("ours both"))
    if (most := result.targets.get("temporaries_mib")) is not None:
        return f"{text} (<= {most:.0f}: {_met(result, 'temporaries_mib')})"
    if (share := result.targets.get("temporaries_share")) is not None:
        met = _met(result, "temporaries_share")
        return f"{text} (<= peer * {share:.3g}: {met})"
    return text


def _met(result: Result, target: str) -> str:
    return "met" if result.met()[target] else "NOT met"


def _errors(result: Result, side: str) -> str:
    errors, worst = result.errors.get(side), result.worst_error(side)
    return (
        f"{errors['output']:.1e} {worst:.1e}" if errors and worst is not None else "-"
    )


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.3g}" if x < 100 else f"{x:.0f}"
