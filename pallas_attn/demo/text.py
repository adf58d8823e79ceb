"""English text that every Python has: the topics of `help()`, as integers."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Text:
    """Characters as integers, cut into a part to train on and a held-out end.

    Args:
        alphabet: All characters, sorted; a character's number is its place here.
        training: int32, the first nine tenths.
        held_out: int32, the rest.
    """

    alphabet: str
    training: np.ndarray
    held_out: np.ndarray


def topics() -> Text:
    """All topics of the standard library's `pydoc_data.topics`, one after another."""
    text = "\n".join(pydoc_data.topics.topics.values())
    alphabet = "".join(sorted(set(text)))
    number = {character: i for i, character in enumerate(alphabet)}
    codes = np.array([number[character] for character in text], np.int32)
    cut = len(codes) * 9 // 10
    return Text(alphabet, codes[:cut], codes[cut:])


def batches(
    codes: np.ndarray, batch: int, length: int, seed: int
) -> Iterator[np.ndarray]:
    """Random windows without end: int32 [batch, length + 1], inputs and next ones."""
    random = np.random.default_rng(seed)
    while True:
        starts = random.integers(0, len(codes) - length, batch)
        yield codes[starts[:, None] + np.arange(length + 1)]


def windows(codes: np.ndarray, characters: int, length: int) -> np.ndarray:
    """Consecutive windows of about that many characters: [count, length + 1]."""
    count = min(characters, len(codes) - 1) // length
    return codes[(np.arange(count) * length)[:, None] + np.arange(length + 1)]
