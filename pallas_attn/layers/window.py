"""Tables of a window's pairs of places, as Swin has them."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_attn.bias.dense import DenseBias
from pallas_attn.bias.diagonals import toeplitz
from pallas_attn.layers.context import BiasContext
from pallas_attn.layers.tables import of_pairs, row
from pallas_attn.rules import known


Window = int | tuple[int, int]


def sides(name: str, window: Window) -> tuple[int, int]:
    """(M_h, M_w) of a window.

    Raises:
        ValueError: if it is not made of ints >= 1.
    """
    pair = tuple(window) if isinstance(window, list | tuple) else (window, window)
    if len(pair) != 2 or not all(isinstance(m, int) and m >= 1 for m in pair):
        raise ValueError(
            f"`{name}` must be an int >= 1 or a pair of them; got {window!r}. Swin has "
            "7, Swin v2 8."
        )
    return pair


def differences(window: Window) -> int:
    """How many differences of two places there are."""
    height, width = sides("window", window)
    return (2 * height - 1) * (2 * width - 1)


def log_spaced(
    window: Window, pretrained: Window | None
) -> Float[np.ndarray, "rows 2"]:
    """Every difference as Swin v2's network takes it, sign(x) log2(1 + 8 |x|) / 3.

    Args:
        window: That has the differences.
        pretrained: In whose units they are; None: its own.
    """
    trained = sides("pretrained_window", pretrained or window)
    axes = [
        np.arange(1 - m, m, dtype=np.float32) / max(M - 1, 1)
        for m, M in zip(sides("window", window), trained, strict=True)
    ]
    x = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
    return np.sign(x) * np.log2(1 + 8 * np.abs(x)) / 3


def window_bias(
    table: Float[Array, "rows N"], context: BiasContext, window: Window
) -> DenseBias:
    """The rows of all pairs of places, or of those that positions name.

    Args:
        table: float32, a row for each of `differences`.
        context: Of the call, which `check_window` took.
        window: M, or (M_h, M_w).
    """
    height, width = sides("window", window)
    places, N = height * width, context.num_heads
    table = table.reshape(2 * height - 1, 2 * width - 1, N)
    across = toeplitz(jnp.moveaxis(table, -1, 0), width, width)
    pairs = toeplitz(jnp.moveaxis(across, 1, -1), height, height)
    # [N, row, row of the key, column, column of the key], less the order
    full = jnp.transpose(pairs, (0, 3, 1, 4, 2)).reshape(N, places, places)
    if _natural(context) and context.slot is None:
        return DenseBias(full.reshape(*(1 for _ in context.batch), *full.shape))
    queries = context.query_positions[..., :, None]
    keys = row(context.key_positions)
    inside = (queries >= 0) & (queries < places) & (keys >= 0) & (keys < places)
    pair = jnp.where(inside, queries * places + keys, places**2)
    return DenseBias(of_pairs(full.reshape(N, places**2).T, pair))


def check_window(context: BiasContext, window: Window) -> None:
    """The tokens are those of a window, or positions say which of it they are.

    Raises:
        ValueError: if they are not.
    """
    height, width = sides("window", window)
    places = height * width
    if context.offset is not None and places != context.S:
        raise ValueError(
            f"`window` must have as many places as there are keys, {context.S}; got "
            f"{places}. Cut the inputs into windows, one per entry of the batch."
        )
    if _natural(context) and context.slot is None and context.T != context.S:
        raise ValueError(
            f"`window` must have as many places as there are queries, {context.T}; got "
            f"{places}. Give positions in the window: `query_positions`."
        )
    for name in ("query_positions", "key_positions"):
        values = None if context.decode else known(getattr(context, name))
        if values is not None and not ((values >= 0) & (values < places)).all():
            raise ValueError(
                f"`{name}` must be places of the window, 0..{places - 1}; got "
                f"{values.min()}..{values.max()}. Count rows first."
            )


def _natural(context: BiasContext) -> bool:
    return isinstance(context.offset, int) and context.offset == 0
