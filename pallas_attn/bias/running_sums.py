"""Running sums of log gates, in so many numbers that differences lose no digits."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from pallas_attn.poison import poisoned


# Running sums: a number, what it lacks, and (unless `alone`) the sum of the resets,
# which is in neither.
Sums = tuple[Array, ...]

# A log gate below -RESET is a reset, whose sum may be a number of its own.
RESET = 2.0**14
# Among other gates none acts as more: far above any score, and sums of 4096 such in two
# float32 numbers are known to 2^-20.
MOST = 2.0**18
# What -inf acts as: the weight of everything before is 0, for -1e30 has none.
FORGOTTEN = 2.0**100
# Bits of a sum of resets; float32 has one more.
RESET_BITS = 23

# Bits of a piece, at most: products of such pieces with 1 are exact on any hardware.
PIECE_BITS = 8
# Bits that are kept of gates, from MOST down: a million of them lose 2^-19.
KEPT_BITS = {"float32": 56, "float64": 72}
# Gates whose sums are one product.
RUN = 128


def running_sums(
    log_gate: Float[Array, "*axes S"],
    starts: Bool[Array, "*axes S"] | None = None,
    *,
    alone: bool,
) -> Sums:
    """Running sums of log gates <= 0, -inf included, along the last axis.

    Differences of sums between which no reset lies are exact but for 2^-19 or so. Of
    several resets of very different sizes in one row, a sum over a small one alone may
    be off by 2^-23 of the largest.

    Args:
        log_gate: A NaN spoils every later sum.
        starts: Where other sums begin: differences are wanted of none before with one
            after, and no NaN reaches across.
        alone: Resets are wanted only to be far below all other numbers: none acts as
            more than MOST. No third number then.

    Returns:
        The sums, what these lack, and the sums of resets; the gradient is the first's.
    """
    high, *others = _running(log_gate, starts, alone)
    return high, *map(lax.stop_gradient, others)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _running(
    log_gate: Float[Array, "*axes S"],
    starts: Bool[Array, "*axes S"] | None,
    alone: bool,
) -> Sums:
    """The sums of pieces of a few bits, multiples of one power of two each.

    Those of any length fit the mantissa: no order of adding them up rounds.
    """
    room = jnp.finfo(log_gate.dtype).nmant + 1 - max(log_gate.shape[-1], 2).bit_length()
    bits = room if log_gate.dtype == jnp.float64 else min(room, PIECE_BITS)
    odd = jnp.isnan(log_gate)  # and so are all sums from there on, but none before
    size = jnp.minimum(jnp.where(odd, 0, -log_gate), FORGOTTEN)
    among, apart = _told_apart(size, alone)

    pieces = [odd.astype(size.dtype)]
    pieces += _pieces(among, MOST, KEPT_BITS[log_gate.dtype.name], bits)
    ordinary = len(pieces) - 1
    if apart is not None:
        pieces += _pieces(apart[0], 2.0**RESET_BITS, RESET_BITS, bits)
    count, *sums = jnp.unstack(_prefix(jnp.stack(pieces)))
    if starts is not None:
        before = jnp.where(starts, count - pieces[0], 0)
        count = count - lax.cummax(before, axis=count.ndim - 1)

    high, low = _two_numbers(sums[:ordinary])
    found = (poisoned(-high, count > 0), -low)
    if apart is None:
        return found
    return *found, -functools.reduce(jnp.add, sums[ordinary:]) * apart[1]


@_running.defjvp
def _running_jvp(alone: bool, primals: Any, tangents: Any) -> tuple[Sums, Sums]:
    sums = _running(*primals, alone)
    change = _prefix(tangents[0])
    return sums, (change, *(jnp.zeros_like(x) for x in sums[1:]))


def _told_apart(
    size: Float[Array, "*axes S"], alone: bool
) -> tuple[Array, tuple[Array, Array] | None]:
    """What is summed with other gates, and (counts, unit) of resets beside that."""
    if alone:
        return jnp.minimum(size, MOST), None
    resets = jnp.where(size > RESET, size, 0)
    total = resets.sum(-1, keepdims=True)
    exponent = jnp.maximum(jnp.frexp(total)[1], 0) - RESET_BITS
    unit = jnp.ldexp(jnp.ones_like(total), exponent)
    counts = jnp.floor(resets / unit)
    return jnp.minimum(size - counts * unit, MOST), (counts, unit)


def _pieces(
    x: Float[Array, "*axes S"], most: float, kept: int, bits: int
) -> list[Array]:
    """What adds up to x, at most `most`, but for what `kept` bits do not hold."""
    pieces = []
    for n in range(-(-kept // bits)):
        unit = most * 2.0 ** (-(n + 1) * bits)
        pieces.append(jnp.round(x / unit) * unit)
        x = x - pieces[-1]
    return pieces


def _two_numbers(sums: list[Array]) -> tuple[Array, Array]:
    """What sums add up to, the largest units first, and what that lacks."""
    high, *others = sums
    lost = []
    for x in others:
        high, rest = two_sum(high, x)
        lost.append(rest)
    # the smallest first: a number of few bits then takes all others at once
    low = functools.reduce(lambda a, b: b + a, reversed(lost), jnp.zeros_like(high))
    return two_sum(high, low)


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """The sum and what rounding took from it, in whatever order (Knuth)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def _prefix(x: Float[Array, "*axes S"]) -> Float[Array, "*axes S"]:
    """Running sums by two products with a triangle of ones, in few launches."""
    size = x.shape[-1]
    count = -(-size // RUN)
    runs = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, count * RUN - size)])
    runs = runs.reshape(*x.shape[:-1], count, RUN)
    within = _times_triangle(runs, 0)
    before = _times_triangle(within[..., -1], 1)
    sums = (within + before[..., None]).reshape(*x.shape[:-1], count * RUN)
    return sums[..., :size]


def _times_triangle(x: Float[Array, "*axes n"], skipped: int) -> Array:
    """The sums of entries up to each; up to `skipped` before it."""
    n = x.shape[-1]
    ones = jnp.triu(jnp.ones((n, n), x.dtype), skipped)
    return jnp.matmul(x, ones, precision=lax.Precision.HIGHEST)
