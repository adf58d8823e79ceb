"""Arguments of commands: what is wrong with one is said in a line, before any work."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Prints it, and exits with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """The type of an argument that is a whole number, at least `least`."""
    rule = f"at least {least}" if most is None else f"a number of {least}..{most}"

    def number(text: str) -> int:
        try:
            found = int(text)
        except ValueError:
            found = None
        if found is None or found < least or (most is not None and found > most):
            raise argparse.ArgumentTypeError(f"must be {rule}; got {text}")
        return found

    return number


def new_file(endings: Collection[str] = ()) -> Callable[[str], Path]:
    """The type of an argument that names a file to write; its folder may be missing.

    Args:
        endings: What its name may end with, such as ".png"; none: anything.
    """

    def path(text: str) -> Path:
        found = Path(text)
        if endings and found.suffix.lower() not in endings:
            raise argparse.ArgumentTypeError(
                f"must end in {', '.join(sorted(endings))}; got {text}"
            )
        if found.is_dir():
            raise argparse.ArgumentTypeError(f"must be a file; got the folder {text}")
        there = next(x for x in found.absolute().parents if x.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise argparse.ArgumentTypeError(f"cannot be written: {there} is no folder "
                                             "that takes files")  # fmt: skip
        return found

    return path


def write(path: Path, text: str) -> None:
    """Writes a file, and makes its folder if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
