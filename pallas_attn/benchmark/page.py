"""The page of speeds, `README.md` in this folder, and its picture `speed.svg`.

Both are functions of the committed reports:

    python -m pallas_attn bench --markdown > pallas_attn/benchmark/README.md
    python -m pallas_attn bench --picture > pallas_attn/benchmark/speed.svg
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

from pallas_attn.benchmark import tables
from pallas_attn.benchmark.results import Result


FOLDER = Path(__file__).parent
REPORTS = ("h200", "h200_co_alibi", "h200_entmax", "h200_layers")

Reports = Mapping[str, dict[str, Any]]

# The rows of the table in short: what is gained, then what is lost.
SHORT = (
    "alibi-16k",
    "af3",
    "factored-h64",
    "co-alibi-16k",
    "forget-16k",
    "factored-h64-float32",
    "entmax-4k",
    "entmax-dense-4k",
)


class Bar(NamedTuple):
    """A bar of the picture: a case and what it is called there."""

    case: str
    label: str


# The groups of the picture, by what the peer computes.
BARS = {
    "beside cuDNN without a bias": (
        Bar("none-4k", "no bias, 4K"),
        Bar("alibi-4k", "ALiBi, 4K"),
        Bar("alibi-16k", "ALiBi, 16K"),
        Bar("alibi-factored-4k", "ALiBi + factors of rank 8, 4K"),
        Bar("co-alibi-4k", "Co-ALiBi, 4K"),
        Bar("co-alibi-16k", "Co-ALiBi, 16K"),
        Bar("forget-4k", "forget gate, 4K"),
        Bar("forget-16k", "forget gate, 16K"),
        Bar("entmax-4k", "entmax 1.5, 4K"),
        Bar("entmax-alibi-16k", "entmax 1.5 + ALiBi, 16K"),
    ),
    "beside cuDNN with the same bias": (
        Bar("dense-h64", "array of pairs, 4K"),
        Bar("af3", "array of pairs shared by 128, 4K"),
    ),
    "beside cuDNN with factors concatenated": (
        Bar("factored-h64", "factors of rank 16, 8K"),
        Bar("factored-h64-float32", "the same in float32, 8K"),
    ),
}

PAGE = """\
# Speed

What `python -m pallas_attn bench` measured on one {kind}, beside
`jax.nn.dot_product_attention` with cuDNN. This page is made from the reports in this
folder by `python -m pallas_attn bench --markdown`, the picture by
`python -m pallas_attn bench --picture`.

![Time of forward and backward over that of cuDNN]({picture})

## In short

Our time over the peer's; below 1 we are faster.

{summary}

## Where we lose

Every case in which the peer is faster, or a target is missed; the worst first.

{lost}

* *float32 factors* keep float32 accuracy beside 16-bit queries; the peer's are rounded
  to 16 bits and concatenated to queries and keys.
* *Entmax* stands beside a softmax, and has a threshold to find in each row. Its weights
  of exactly 0 give that back with backward, with large scores and with biases that
  leave blocks out.
* *Co-ALiBi* gains by its early exit: without it (`nothing pruned`) the running sums of
  its gates remain, and short rows leave little out.

## How it was measured

`python -m pallas_attn bench` times ours and its peers in one run, compiled before
anything is timed, and prints medians, ratios, errors, temporaries and the share of
blocks visited; `--help` lists the options, `--list` the cases and where their shapes
are from. `python -m pallas_attn bench --json PATH` writes a report,
`python -m pallas_attn bench --markdown PATH` prints the tables of one. Times move by a
few percent from run to run: the targets that a table calls "NOT met" were missed by
less than that.

{columns}

## Softmax with biases

From [h200.json](h200.json).

{h200}

## Co-ALiBi

In a run of its own, [h200_co_alibi.json](h200_co_alibi.json), beside cuDNN's softmax
without any bias. Times move from run to run: `co-alibi-4k-unpruned` forward is 1.51 to
1.53 of it, `co-alibi-16k-q4` with backward 0.80 to 0.83. The budget that its early exit
keeps for every key is not in this run: beside the same kernels without it, forward and
backward take 3 % longer at 4K, 10 % at 16K (3 % with q x 4), the forward alone nothing.

{h200_co_alibi}

## Entmax and top-k

In a run of its own, [h200_entmax.json](h200_entmax.json), beside cuDNN's softmax
without any bias. From 8192 keys on, plain entmax goes through lists of keys where
supports are short; their memory is linear in T (16384 and 65536 below).

{h200_entmax}

## The forget gate

In a run of its own, [h200_layers.json](h200_layers.json), beside cuDNN's softmax
without any bias. Its time is that of what is remembered: in `forget-16k` the gates of
the heads are evenly spaced, in `forget-16k-slow` their memories, 1 / (1 - gate), are in
equal ratios.

{h200_layers}

## A training step

In the same run a training step of a GPT, with `pallas_attn.linen` and its ALiBi, beside
the same model with flax's layer, cuDNN and ALiBi as an array.

{steps}"""

COLUMNS = {
    "shape": "in the [letters of the guide](../GUIDE.md#letters), with S = T and "
    "h = H; bfloat16 where no dtype is named",
    "peer": "what cuDNN computes: attention without a bias, with the same bias as an "
    "array, or with the factors concatenated to queries and keys",
    "ratio": "our time over the peer's; in brackets the target, and whether it is met",
    "TFLOP/s": "ours; {tflops}",
    "temporaries": "memory of forward + backward beside operands and results, as "
    "compiled",
    "errors": "in the reports and in a terminal: {errors}",
    "visited": "in the reports and in a terminal: the share of visible blocks that "
    "each pass reads",
}


def committed() -> dict[str, dict[str, Any]]:
    """The reports in this folder, by name.

    Returns:
        What `bench --json` wrote, read from each file of `REPORTS`.
    """
    return {x: json.loads((FOLDER / f"{x}.json").read_text()) for x in REPORTS}


def page(reports: Reports) -> str:
    """The page of speeds.

    Args:
        reports: As `committed` gives them.

    Returns:
        Markdown, without a newline at its end.
    """
    one = reports["h200_layers"]
    said = {
        "tflops": one["tflops"].removeprefix("TFLOP/s: "),
        "errors": one["errors"].removeprefix("errors: "),
    }
    columns = [(name, text.format(**said)) for name, text in COLUMNS.items()]
    return PAGE.format(
        kind=one["device"]["kind"],
        picture="speed.svg",
        summary=summary(reports),
        lost=_lost(reports),
        columns=tables.rows(("column", "is"), columns),
        **{name: tables.attention(reports[name]) for name in REPORTS},
        steps=tables.steps(one),
    )


def summary(reports: Reports) -> str:
    """The table in short, which the repository's README has too.

    Args:
        reports: As `committed` gives them.

    Returns:
        A table in Markdown of the cases of `SHORT`.
    """
    results = _attention(reports)
    head = ("case", "shape", "beside", "forward", "forward + backward")
    lines = []
    for name in SHORT:
        result = results[name]
        ratios = (result.ratio(work) for work in ("forward", "both"))
        told = ("-" if x is None else f"{x:.2f}" for x in ratios)
        lines.append((f"`{name}`", result.shape, result.peer or "-", *told))
    return tables.rows(head, lines)


def _lost(reports: Reports) -> str:
    """The cases that are slower than the peer, or miss a target."""
    steps = {
        x["name"]: Result.of_json(x)
        for report in reports.values()
        for x in report.get("steps", ())
    }
    found = []
    for results, table in (
        (_attention(reports), functools.partial(tables.attention_rows, rates=False)),
        (steps, tables.step_rows),
    ):
        lost = [result for result in results.values() if result.lost()]
        if lost:
            found.append(table(sorted(lost, key=Result.worst_ratio, reverse=True)))
    return "\n\n".join(found) or "Nowhere."


def _attention(reports: Reports) -> dict[str, Result]:
    """The cases of attention of all reports, by name."""
    found = [
        Result.of_json(x) for report in reports.values() for x in report["results"]
    ]
    return {result.name: result for result in found}


WIDTH, LEFT, RIGHT = 760, 250, 60
ROW, BAR, TOP, BOTTOM = 21, 13, 50, 34
INK, FAINT, GAIN, LOSS = "#222222", "#d0d0d0", "#3b75af", "#c8553d"


def picture(reports: Reports) -> str:
    """Bars of the time of forward and backward over the peer's.

    Args:
        reports: As `committed` gives them.

    Returns:
        An SVG image, without a newline at its end.
    """
    results = _attention(reports)
    ratios = {
        bar: results[bar.case].ratio("both") or 0.0
        for bars in BARS.values()
        for bar in bars
    }
    scale = (WIDTH - LEFT - RIGHT) / max(ratios.values())
    lines, y = [], TOP
    for title, bars in BARS.items():
        lines.append(_text(LEFT, y + BAR, title, weight="bold"))
        y += ROW
        for bar in bars:
            ratio = ratios[bar]
            width, colour = ratio * scale, LOSS if ratio > 1 else GAIN
            lines += [
                _text(LEFT - 8, y + BAR - 2, bar.label, anchor="end"),
                f'<rect x="{LEFT}" y="{y}" width="{width:.1f}" height="{BAR}" '
                f'fill="{colour}"/>',
                _text(LEFT + width + 5, y + BAR - 2, f"{ratio:.2f}"),
            ]
            y += ROW
        y += ROW // 2
    height, one = y + BOTTOM, LEFT + scale
    device = tables.where(reports["h200"])
    title = "Time of forward + backward, every gradient included, over cuDNN's"
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" font-family="sans-serif" font-size="12">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        _text(16, 24, title, weight="bold", size=15),
        f'<line x1="{one:.1f}" y1="{TOP}" x2="{one:.1f}" y2="{y}" stroke="{FAINT}" '
        'stroke-width="1.5"/>',
    ]
    foot = [
        _text(one, y + 14, "1: as fast as cuDNN", anchor="middle"),
        _text(16, height - 8, f"{device}. Shorter is faster.", size=11),
        "</svg>",
    ]
    return "\n".join([*head, *lines, *foot])


def _text(
    x: float,
    y: float,
    said: str,
    *,
    anchor: str = "start",
    weight: str = "normal",
    size: int = 12,
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" '
        f'font-size="{size}" fill="{INK}">{escape(said)}</text>'
    )
