"""The mask of dropout, from the page that describes it."""

from __future__ import annotations

from typing import Any

import numpy as np


FIRST, SECOND = np.uint32(0x7FEB352D), np.uint32(0x846CA68B)
GOLDEN = np.uint32(0x9E3779B9)


def kept(
    words: np.ndarray, rate: float, shape: tuple[int, int, int, int]
) -> np.ndarray:
    """Which weights stay.

    Args:
        words: uint32, the key's data.
        rate: The share that goes.
        shape: [B, N, T, S], the batch flattened.
    """
    state: list[Any] = [np.uint32(0), np.uint32(1)]
    with np.errstate(over="ignore"):
        for place, word in enumerate(words):
            mixed = _mix(state[place % 2] ^ np.uint32(word))
            state[place % 2] = _mix(np.uint32(mixed + np.uint32(1)))
        state[0] = state[0] ^ _mix(_mix(state[1]))
        state[1] = state[1] ^ _mix(_mix(state[0]))
        b, n, i, j = np.ogrid[tuple(slice(x) for x in shape)]
        b, n, i, j = (x.astype(np.uint32) for x in (b, n, i, j))
        u, v = _mix(_mix(state[0] + b) + n), _mix(_mix(state[1] ^ b) ^ n)
        query, rest = _mix(u ^ (GOLDEN * i)), v + GOLDEN * i
        value = _mix(query ^ _mix(j)) + rest
    return value >= np.uint32(min(round(rate * 2**32), 2**32 - 1))


def _mix(x: Any) -> Any:
    y = (x * FIRST).astype(np.uint32)
    y = y ^ (y >> np.uint32(15))
    return (y * SECOND).astype(np.uint32)
