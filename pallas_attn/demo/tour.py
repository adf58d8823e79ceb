"""`python -m pallas_attn demo`: what runs here, that it is right and learns."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from pallas_attn.command import new_file, Parser, whole
from pallas_attn.demo.model import CharacterModel
from pallas_attn.demo.plot import draw, PICTURES
from pallas_attn.demo.text import topics
from pallas_attn.demo.training import Settings, train, Trained
from pallas_attn.implementations import Choice, current_device, Device, resolve
from pallas_attn.verify.check import Verified, verify
from pallas_attn.verify.rows import bias_rows, SIZES


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the three parts in turn, and says how each ended.

    Args:
        argv: Command-line arguments; None: those of the process.

    Returns:
        0, or 1 if a bias was wrong or the loss did not fall below half of its start.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        device = jax.local_devices(backend=options.device)[0]
    except RuntimeError:  # says which platforms jax knows
        here = ", ".join(sorted({x.platform for x in jax.devices()}))
        parser.error(
            f"argument --device: jax finds no {options.device} here, but {here}; "
            "`python -m pallas_attn doctor` says why"
        )
    console = Console(highlight=False)
    settings = Settings(steps=options.steps, seed=options.seed)
    start = time.perf_counter()
    with jax.default_device(device):
        say_what_runs(console)
        right = check_biases(console, options.check_length, options.seed)
        models = train_models(console, settings)
    learned = report(console, models, settings)
    draw(models, settings, options.output)
    console.print(f"\nThe picture: [bold]{options.output.resolve()}[/]")
    console.print(f"All of it took {time.perf_counter() - start:.0f} s.")
    return 0 if right and learned else 1


def say_what_runs(console: Console) -> None:
    """The device, the implementation, and why."""
    device, choice = _chosen()
    console.rule("[bold]1  What runs here", align="left")
    console.print(f"Device: {device.kind}, as --device says; JAX {jax.__version__}.")
    reasons = choice.reason.replace(", and ", ",\n  and ").replace("; ", ";\n  ")
    console.print(f"Implementation: [bold]{choice.name}[/], because\n  {reasons}.")


def check_biases(console: Console, length: int, seed: int) -> bool:
    """Checks every bias, and prints the table; whether all are right."""
    rows = bias_rows({"T": length, "S": length}, seed)
    implementation = _chosen()[1].name
    assert implementation is not None  # one of them runs anywhere
    console.print()
    console.rule("[bold]2  Every bias is right, forward and backward", align="left")
    console.print(
        f"Queries and keys: {length}, float32. The truth: float64 in NumPy, its "
        "gradients\nwritten out by hand, that shares no code with the library."
    )
    found = []
    with _progress(console) as progress:
        task = progress.add_task("checking", total=len(rows))
        for row in rows:
            found.append(verify(row, implementation))
            progress.update(task, advance=1, description=f"checked {row.name}")
    console.print(_table_of_errors(found))
    right = all(checked.passed for checked in found)
    console.print(
        f"Is every error what rounding explains, and every bit the same twice? "
        f"{_said(right)}\nEvery normalizer, option and dtype on your device: "
        "[bold]python -m pallas_attn verify[/]."
    )
    return right


def train_models(console: Console, settings: Settings) -> dict[str, Trained]:
    """Trains the model with ALiBi, and the same with learned absolute positions."""
    text = topics()
    alphabet = len(text.alphabet)
    models = {
        "ALiBi": CharacterModel(alphabet),
        "learned positions": CharacterModel(alphabet, settings.length),
    }
    console.print()
    console.rule("[bold]3  A model learns with it", align="left")
    console.print(
        "A causal character model in Flax reads the topics of Python's help(): "
        f"{len(text.training):,}\ncharacters to train on, {len(text.held_out):,} held "
        f"out, in windows of {settings.length}. Once its\nattention has ALiBi, once "
        "none, and each position a learned vector instead."
    )
    trained = {}
    with _progress(console) as progress:
        for name, model in models.items():
            task = progress.add_task(f"{name:18}", total=settings.steps)

            def on_step(loss: float, task=task, name=name) -> None:
                said = f"{name:18} loss {loss:5.2f}"
                progress.update(task, advance=1, description=said)

            trained[name] = train(model, text, settings, on_step)
    return trained


def report(console: Console, models: Mapping[str, Trained], settings: Settings) -> bool:
    """Prints how well they predict, and whether the first one's loss halved."""
    console.print(_table_of_losses(models, settings))
    console.print(
        f"No vector was learned for positions past {settings.length}: there they share "
        "the last one.\nALiBi says how far a key is, and that goes on at any length."
    )
    alibi = models["ALiBi"]
    console.print(
        f"With ALiBi the training loss went from {alibi.start:.2f} to {alibi.end:.2f} "
        "(mean of the last tenth).\nIs that below half of its start? "
        f"{_said(alibi.halved)}"
    )
    return alibi.halved


def _parser() -> Parser:
    parser = Parser(
        prog="python -m pallas_attn demo",
        description="Checks every bias, trains a small character model, and draws how "
        "it does on texts longer than it was trained on. No downloads; about two "
        "minutes on two cores.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--steps", type=whole(1), default=Settings.steps, help="of training, each model"
    )
    parser.add_argument(
        "--check-length",
        type=whole(1),
        default=SIZES["T"],
        help="queries and keys checked",
    )
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    parser.add_argument(
        "--device", default="cpu", choices=("cpu", "gpu", "tpu"), help="to run on"
    )
    parser.add_argument(
        "--output",
        type=new_file(PICTURES),
        default=Path("pallas_attn_demo.png"),
        help="where the picture goes; its folder is made if it is missing",
    )
    return parser


def _chosen() -> tuple[Device, Choice]:
    device = current_device()
    head = SIZES["H"]
    return device, resolve(None, device, dtype="float32", H=head, h=head)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def _table_of_errors(found: Sequence[Verified]) -> Table:
    table = Table("bias, causal", title="Errors, in units of an array's largest entry")
    for column in ("output", "gradients", "right"):
        table.add_column(column, justify="right", no_wrap=True)
    for checked in found:
        errors = (checked.output_error, checked.gradient_error)
        said = _said(checked.passed)
        table.add_row(_escape(checked.name), *(f"{x:.1e}" for x in errors), said)
    return table


def _table_of_losses(models: Mapping[str, Trained], settings: Settings) -> Table:
    table = Table(title="Held-out loss, nats per character")
    table.add_column("window")
    for name in models:
        table.add_column(name, justify="right")
    for multiple in settings.lengths:
        length = f"{multiple * settings.length} ({multiple}x the training length)"
        losses = (trained.held_out[multiple] for trained in models.values())
        table.add_row(length, *(f"{loss:.3f}" for loss in losses))
    return table


def _said(good: bool) -> str:
    return "[bold green]Yes.[/]" if good else "[bold red]No.[/]"


def _escape(text: str) -> str:
    """Brackets are rich's markup."""
    return text.replace("[", r"\[")
