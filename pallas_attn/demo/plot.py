"""The demo's picture: how the losses fall, and what happens past the trained length."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pallas_attn.demo.training import Settings, Trained


# Endings of what a figure can be written as.
PICTURES = tuple(f".{x}" for x in ("jpeg", "jpg", "pdf", "png", "svg", "webp"))
COLOURS = ("#0b6e99", "#c8553d")
GREY = "#8a8a8a"
LABEL: Any = {"color": GREY, "fontsize": 8, "va": "bottom"}


def draw(models: Mapping[str, Trained], settings: Settings, path: Path) -> None:
    """Writes a picture with both panels.

    Args:
        models: By their name; as many as there are colours.
        settings: Those they were trained with.
        path: Of the picture, which ends in one of PICTURES; its folder is made.
    """
    figure = Figure(figsize=(9, 3.6), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, trained), colour in zip(models.items(), COLOURS, strict=True):
        _draw_training(left, name, trained, colour)
        _draw_extrapolation(right, name, trained, settings, colour)
    half = next(iter(models.values())).start / 2
    left.axhline(half, color=GREY, linestyle=":", linewidth=1)
    left.set(xlabel="step", ylabel="training loss, nats per character")
    left.text(settings.steps, half, "half of the start", ha="right", **LABEL)
    left.legend(frameon=False)
    lengths = [multiple * settings.length for multiple in settings.lengths]
    right.set(xlabel="characters in a window", ylabel="held-out loss")
    right.set_xscale("log", base=2)
    right.set_xticks(lengths, [str(length) for length in lengths])
    right.axvline(settings.length, color=GREY, linestyle=":", linewidth=1)
    right.annotate(
        "trained length",
        (settings.length, 0.92),
        xycoords=("data", "axes fraction"),
        xytext=(4, 0),
        textcoords="offset points",
        **LABEL,
    )
    right.margins(x=0.08, y=0.2)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    left.set_title("Two models learn to predict characters", fontsize=10)
    right.set_title("Read further than they were trained", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_training(axes: Axes, name: str, trained: Trained, colour: str) -> None:
    """Every step faintly, and the mean of its neighbourhood."""
    losses = np.asarray(trained.losses)
    axes.plot(losses, color=colour, alpha=0.2, linewidth=0.7)
    size = max(1, len(losses) // 30)
    smooth = np.convolve(losses, np.ones(size) / size, mode="valid")
    steps = np.arange(len(smooth)) + (size - 1) / 2
    axes.plot(steps, smooth, color=colour, linewidth=1.8, label=name)


def _draw_extrapolation(
    axes: Axes, name: str, trained: Trained, settings: Settings, colour: str
) -> None:
    lengths = [multiple * settings.length for multiple in trained.held_out]
    losses = list(trained.held_out.values())
    axes.plot(lengths, losses, "o-", color=colour, linewidth=1.8, markersize=5)
    axes.annotate(
        name,
        (lengths[-1], losses[-1]),
        xytext=(0, 8),
        textcoords="offset points",
        color=colour,
        ha="right",
    )
