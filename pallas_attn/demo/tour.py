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
from pallas_attn.demo.check import biases, check, Checked, Sizes
from pallas_attn.demo.model import CharacterModel
from pallas_attn.demo.plot import draw, PICTURES
from pallas_attn.demo.text import topics
from pallas_attn.demo.training import Settings, train, Trained
from pallas_attn.implementations import current_device, resolve
from pallas_attn.testing.numerics import FORMULA


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
    sizes = Sizes(T=options.check_length)
    start = time.perf_counter()
    with jax.default_device(device):
        say_what_runs(console, sizes)
        right = check_biases(console, sizes, options.seed)
        models = train_models(console, settings)
    learned = report(console, models, settings)
    draw(models, settings, options.output)
    console.print(f"\nThe picture: [bold]{options.output.resolve()}[/]")
    console.print(f"All of it took {time.perf_counter() - start:.0f} s.")
    return 0 if right and learned else 1


def say_what_runs(console: Console, sizes: Sizes) -> None:
    """The device, the implementation, and why."""
    device = current_device()
    choice = resolve(None, device, dtype="float32", H=sizes.H, h=sizes.H)
    console.rule("[bold]1  What runs here", align="left")
    console.print(f"Device: {device.kind}, as --device says; JAX {jax.__version__}.")
    reasons = choice.reason.replace(", and ", ",\n  and ").replace("; ", ";\n  ")
    console.print(f"Implementation: [bold]{choice.name}[/], because\n  {reasons}.")


def check_biases(console: Console, sizes: Sizes, seed: int) -> bool:
    """Checks every bias, and prints the table; whether all are right."""
    shape = (sizes.B, sizes.T, sizes.N, sizes.H)
    console.print()
    console.rule("[bold]2  Every bias is right, forward and backward", align="left")
    console.print(
        f"Query, key and value: float32 {list(shape)}. The truth: the dense\nreference "
        "in float64. The peer: jax.nn.dot_product_attention, its bias an array;\n"
        "Co-ALiBi depends on the scores and is none."
    )
    found = []
    with _progress(console) as progress:
        task = progress.add_task("checking", total=len(biases(sizes, seed)))
        for checked in check(sizes, seed):
            found.append(checked)
            progress.update(task, advance=1, description=f"checked {checked.name}")
    console.print(_table_of_errors(found))
    right = all(checked.passed for checked in found)
    console.print(
        f"Is every relative error, |x - y| / |y|, within {FORMULA:g}? {_said(right)}"
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
        default=Sizes.T,
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


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def _table_of_errors(found: Sequence[Checked]) -> Table:
    table = Table("bias, causal", title="Relative errors; milliseconds, ours / jax.nn")
    for column in ("output", "gradients", "forward", "with backward"):
        table.add_column(column, justify="right", no_wrap=True)
    for checked in found:
        errors = (checked.output_error, checked.gradient_error)
        taken = {run: f"{x:.1f}" for run, x in checked.milliseconds.items()}
        times = (
            (taken[f"ours {passes}"], taken.get(f"jax.nn {passes}", "-"))
            for passes in ("forward", "both")
        )
        table.add_row(
            _escape(checked.name),
            *(f"{error:.1e}" for error in errors),
            *(f"{ours} / {theirs:>5}" for ours, theirs in times),
        )
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
