"""Fields of a bias against [*L, N, T, S], and gradients back to their shapes."""

from __future__ import annotations

import numpy as np


def reduced(gradient: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The gradient of an array of this shape that was broadcast."""
    while gradient.ndim > len(shape):
        gradient = gradient.sum(0)
    for axis, n in enumerate(shape):
        if n == 1 != gradient.shape[axis]:
            gradient = gradient.sum(axis, keepdims=True)
    return np.broadcast_to(gradient, shape).copy()  # axes of 0


def of_head(x: np.ndarray) -> np.ndarray:
    """[.., N] as [.., N, 1, 1]."""
    return x[..., None, None]


def of_query(x: np.ndarray) -> np.ndarray:
    """[.., T, N] as [.., N, T, 1]."""
    return np.swapaxes(x, -1, -2)[..., None]


def of_key(x: np.ndarray) -> np.ndarray:
    """[.., S, N] as [.., N, 1, S]."""
    return np.swapaxes(x, -1, -2)[..., None, :]


def to_head(dt: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The gradient of a field that `of_head` spread."""
    return reduced(dt.sum((-1, -2)), x.shape)


def to_query(dt: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The gradient of a field that `of_query` spread."""
    return reduced(np.swapaxes(dt.sum(-1), -1, -2), x.shape)


def to_key(dt: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The gradient of a field that `of_key` spread."""
    return reduced(np.swapaxes(dt.sum(-2), -1, -2), x.shape)


def finite(x: np.ndarray) -> np.ndarray:
    """X, 0 where it is not finite."""
    return np.where(np.isfinite(x), x, 0.0)


def unread(allowed: np.ndarray, shape: tuple[int, ...], home: str) -> np.ndarray:
    """Which entries of a field no allowed pair reads.

    Args:
        allowed: [*L, N, T, S].
        shape: Of the field.
        home: "head", "query", "key", "pair" or "distance"; a "+" says that it holds
            vectors.
    """
    if home in ("head", "distance") or not allowed.size:
        return np.zeros(shape, bool)
    match home.rstrip("+"):
        case "pair":
            pairs = allowed
        case "query":
            pairs = np.swapaxes(allowed.any(-1), -1, -2)
        case _:
            pairs = np.swapaxes(allowed.any(-2), -1, -2)
    read = reduced(pairs.astype(np.int64), shape[: -1 if home.endswith("+") else None])
    read = read.reshape(read.shape + (1,) * (len(shape) - read.ndim))
    return np.broadcast_to(read == 0, shape)
