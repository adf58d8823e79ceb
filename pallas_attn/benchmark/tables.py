"""Results as a table: in a terminal, and in Markdown."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Sequence
from typing import Any

from pallas_attn.benchmark.results import Result


RATES = "TFLOP/s full, causal"

HEAD = (
    "case",
    "forward ms",
    "peer",
    "ratio",
    RATES,
    "fwd+bwd ms",
    "peer",
    "ratio",
    RATES,
    "temporaries MiB",
    "peer",
    "error output, worst gradient",
    "peer",
    "visited fwd rows cols",
    "peak",
)


STEP_HEAD = (
    "case",
    "attention ms",
    "peer",
    "ratio",
    "step ms",
    "peer",
    "ratio",
    "memory MiB",
    "peer",
    "ratio",
    "error loss, worst gradient",
    "peer",
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


def step_cells(result: Result) -> tuple[str, ...]:
    """The result of a training step under `STEP_HEAD`."""
    return (
        result.name,
        _number(result.milliseconds("ours attention")),
        _number(result.milliseconds("peer attention")),
        _against(result, "attention"),
        _number(result.milliseconds("ours step")),
        _number(result.milliseconds("peer step")),
        _against(result, "step"),
        _number(result.memory.get("ours step")),
        _number(result.memory.get("peer step")),
        _step_memory(result),
        _step_errors(result, "ours"),
        _step_errors(result, "peer"),
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
    works = {"forward": "forward", "both": "forward + backward"}
    if "ours step" in result.timings:
        works = {"attention": "attention", "step": "step"}
    told = "; ".join(
        f"{title} {_number(result.milliseconds(f'ours {work}'))} ms, "
        f"{_against(result, work)}"
        for work, title in works.items()
    )
    text = f"{result.name}: {told}"
    slow = result.host_bound()
    notes = [f"the host may be what was timed: {', '.join(slow)}"] if slow else []
    reasons: dict[str, list[str]] = {}
    for name, reason in sorted(result.failures.items(), reverse=True):
        reasons.setdefault(reason, []).append(name)
    notes += [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return "\n".join([text, *(f"  {note}" for note in notes)])


def markdown(report: dict[str, Any]) -> str:
    """The tables of a report that `bench --json` wrote, each under how it was measured.

    Args:
        report: The report, read from its file.

    Returns:
        One table of attention, one of training steps, or both, in Markdown.
    """
    return "\n\n".join(filter(None, (attention(report), steps(report))))


def attention(report: dict[str, Any]) -> str:
    """A report's cases of attention in Markdown; "" where it has none."""
    if not report["results"]:
        return ""
    method = "; ".join(report[x] for x in ("method", "tflops") if x in report)
    results = [Result.of_json(values) for values in report["results"]]
    table = attention_rows(results, rates=any(result.tflops for result in results))
    return f"{where(report)}; {method}.\n\n{table}"


def steps(report: dict[str, Any]) -> str:
    """A report's training steps in Markdown; "" where it has none."""
    if not report.get("steps"):
        return ""
    table = step_rows([Result.of_json(values) for values in report["steps"]])
    return f"{where(report)}; {report['steps_method']}.\n\n{table}"


def where(report: dict[str, Any]) -> str:
    """Device, implementation and version of jax, as a line."""
    kind, version = report["device"]["kind"], report["versions"]["jax"]
    return f"{kind}, {report['implementation']}, jax {version}"


def attention_rows(results: Sequence[Result], *, rates: bool) -> str:
    """Cases of attention as a table in Markdown, with their TFLOP/s or without."""
    head = (
        "case",
        "shape",
        "peer",
        "forward: ours, peer (ms)",
        "ratio",
        RATES,
        "forward + backward: ours, peer (ms)",
        "ratio",
        RATES,
        "temporaries: ours, peer (MiB)",
    )
    lines = [
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
        for result in results
    ]
    kept = [rates or title != RATES for title in head]
    short = [tuple(itertools.compress(line, kept)) for line in (head, *lines)]
    return rows(short[0], short[1:])


def step_rows(results: Sequence[Result]) -> str:
    """Training steps as a table in Markdown."""
    head = (
        "case",
        "shape",
        "peer",
        "attention: ours, peer (ms)",
        "ratio",
        "step: ours, peer (ms)",
        "ratio",
        "memory of a step: ours, peer (MiB)",
        "ratio",
    )
    lines = []
    for result in results:
        lines.append(
            (
                f"`{result.name}`",
                result.shape,
                result.peer or "-",
                _pair(result.milliseconds, "attention"),
                _against(result, "attention"),
                _pair(result.milliseconds, "step"),
                _against(result, "step"),
                _pair(result.memory.get, "step"),
                _step_memory(result),
            )
        )
    return rows(head, lines)


def rows(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    whole = (head, ("---",) * len(head), *lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in whole)


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


def _step_memory(result: Result) -> str:
    ours, peer = (result.memory.get(f"{side} step") for side in ("ours", "peer"))
    if ours is None or not peer:
        return "-"
    text, most = f"{ours / peer:.2f}", result.targets.get("memory_share")
    if most is None:
        return text
    return f"{text} (<= {most:.2f}: {_met(result, 'memory_share')})"


def _step_errors(result: Result, side: str) -> str:
    errors = result.errors.get(side)
    if not errors:
        return "-"
    worst = max(error for leaf, error in errors.items() if leaf != "loss")
    return f"{errors['loss']:.1e} {worst:.1e}"


def _met(result: Result, target: str) -> str:
    return "met" if result.met()[target] else "NOT met"


def _errors(result: Result, side: str) -> str:
    errors, worst = result.errors.get(side), result.worst_error(side)
    return (
        f"{errors['output']:.1e} {worst:.1e}" if errors and worst is not None else "-"
    )


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.3g}" if x < 100 else f"{x:.0f}"
