"""What each kind of bias adds to the scores, and its gradients, written out.

A term takes its fields and where the call puts queries and keys. It returns parts that
add up, each of which takes a key away at -1e30 or below, and the way back: from the
cotangent of the sum [*L, N, T, S] to those of its fields.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from pallas_attn.fuzz.plan import Arrays, FIRST
from pallas_attn.fuzz.truth.arrays import (
    of_head,
    of_key,
    of_query,
    reduced,
    to_head,
    to_key,
    to_query,
)
from pallas_attn.fuzz.truth.visibility import Visibility


Back = Callable[[np.ndarray], Arrays]

# XLA's tanh for CPU is off by up to 2.24 times 2^-23 of itself in float32, and each
# program has its own multiply-adds in it.
TANH = 2.25


@dataclass(frozen=True)
class Term:
    """Parts that add up, and the gradients of the fields.

    Args:
        parts: Each broadcasts to [*L, N, T, S].
        back: From the cotangent of the sum.
        sizes: Sums of absolute products, beside which a product is rounded.
        shared: Of the parts, what all keys of a query have alike, and no score that may
            decide is rounded beside: broadcasts to [*L, N, T, 1].
        leaks: From what rounding did to the cotangent, to what of it gets into the
            gradients though no number of theirs is in those pairs.
    """

    parts: list[np.ndarray]
    back: Back
    sizes: list[np.ndarray] = field(default_factory=list)
    shared: np.ndarray | None = None
    leaks: Back | None = None


def dense(f: Arrays, see: Visibility) -> Term:
    """An array."""
    bias = f["bias"]
    return Term([bias], lambda dt: {"bias": reduced(dt, bias.shape)})


def factored(f: Arrays, see: Visibility) -> Term:
    """A product over R."""
    a, b = f["q_factor"], f["k_factor"]
    x, y = np.moveaxis(a, -2, -3), np.moveaxis(b, -2, -3)  # [*, N, T, R]

    def back(dt: np.ndarray) -> Arrays:
        da, db = dt @ y, np.swapaxes(dt, -1, -2) @ x
        return {
            "q_factor": reduced(np.moveaxis(da, -3, -2), a.shape),
            "k_factor": reduced(np.moveaxis(db, -3, -2), b.shape),
        }

    size = np.abs(x) @ np.swapaxes(np.abs(y), -1, -2)
    return Term([x @ np.swapaxes(y, -1, -2)], back, [size])


def alibi(f: Arrays, see: Visibility) -> Term:
    """-slope |d|."""
    slopes, away = f["slopes"], np.abs(see.distance)
    back = lambda dt: {"slopes": to_head(-dt * away, slopes)}
    shared = -of_head(slopes) * see.beyond
    return Term([-of_head(slopes) * away], back, shared=shared)


def forget_gate(f: Arrays, see: Visibility) -> Term:
    """The sum of log gates of keys after j, up to i, of the same segment.

    A gate above 0 counts as 0. Each sum is taken entry by entry, not as a difference:
    -1e9 costs no other sum a digit, and -inf is an ordinary number.
    """
    gate = f["log_gate"]
    x = np.swapaxes(gate, -1, -2)  # [*, N, S]
    counted = see.key_there[..., None, :] & ~(x > 0)
    x = np.where(counted, x, 0.0)
    i = see.query_positions[..., :, None, None]
    j, n = see.key_positions[..., None, :, None], see.key_positions[..., None, None, :]
    same = np.ones((1, 1, 1), bool)
    if see.query_segments is not None and see.key_segments is not None:
        same = see.query_segments[..., :, None] == see.key_segments[..., None, :]
        same = same[..., None, :, None, :]
    between = (n > j) & (n <= i) & same  # [*, T, S, S]
    forgotten = np.isneginf(x)
    value = _added_up(between, np.where(forgotten, 0.0, x))
    if forgotten.any():
        gone = _added_up(between, forgotten.astype(np.float64)) > 0
        value = np.where(gone, -np.inf, value)

    def over(pairs: np.ndarray, dt: np.ndarray) -> Arrays:
        dx = np.zeros((*np.broadcast_shapes(dt.shape[:-2], x.shape[:-1]), x.shape[-1]))
        shape = (*dx.shape[:-1], *pairs.shape[-3:])
        there = np.broadcast_to(pairs, shape)
        for t in range(there.shape[-3]):
            dx += (dt[..., t, :, None] * there[..., t, :, :]).sum(-2)
        dx = np.where(counted & ~forgotten, dx, 0.0)
        return {"log_gate": reduced(np.swapaxes(dx, -1, -2), gate.shape)}

    # Without an array of pairs a gate has what the rows after it add up to less what
    # the columns from it on do, each sum with a rounding of its own: a pair is in both.
    both = (n <= j) & (j <= i) & same
    return Term(
        [value],
        lambda dt: over(between, dt),
        leaks=lambda off: over(both, off),
    )


def _added_up(between: np.ndarray, x: np.ndarray) -> np.ndarray:
    """[.., T, S]: the sum of x [.., n] over what is between; query by query."""
    rows = [(between[..., t, :, :] * x[..., None, :]).sum(-1)
            for t in range(between.shape[-3])]  # fmt: skip
    if rows:
        return np.stack(rows, -2)
    lead = np.broadcast_shapes(between.shape[:-3], x.shape[:-1])
    return np.zeros((*lead, 0, x.shape[-1]))


def log_distance(f: Arrays, see: Visibility) -> Term:
    """-weight log(1 + |d|)."""
    weight, x = f["weight"], np.log1p(np.abs(see.distance))
    back = lambda dt: {"weight": to_head(-dt * x, weight)}
    return Term([-of_head(weight) * x], back)


def key_slope(f: Arrays, see: Visibility) -> Term:
    """-rate_j |d|."""
    rate, away = f["rate"], np.abs(see.distance)
    return Term([-of_key(rate) * away], lambda dt: {"rate": to_key(-dt * away, rate)})


def query_reach(f: Arrays, see: Visibility) -> Term:
    """-weight max(|d| - reach_i, 0)."""
    weight, reach = f["weight"], f["reach"]
    over = np.abs(see.distance) - of_query(reach)
    up = np.where(over > 0, over, 0.0)
    return Term(
        [-of_head(weight) * up],
        lambda dt: {
            "weight": to_head(-dt * up, weight),
            "reach": to_query(dt * of_head(weight) * (over > 0), reach),
        },
    )


def bent(f: Arrays, see: Visibility) -> Term:
    """Weight tanh(a_i + c_j)."""
    weight, a, c = f["weight"], f["a"], f["c"]
    y = np.tanh(of_query(a) + of_key(c))
    value = of_head(weight) * y

    def back(dt: np.ndarray) -> Arrays:
        inner = dt * of_head(weight) * (1 - y * y)
        return {
            "weight": to_head(dt * y, weight),
            "a": to_query(inner, a),
            "c": to_key(inner, c),
        }

    return Term([value], back, [TANH * np.abs(value)])


def pair_sine(f: Arrays, see: Visibility) -> Term:
    """Weight sin(pair_ij)."""
    pair, weight = f["pair"], f["weight"]
    return Term(
        [np.sin(pair) * of_head(weight)],
        lambda dt: {
            "pair": reduced(dt * of_head(weight) * np.cos(pair), pair.shape),
            "weight": to_head(dt * np.sin(pair), weight),
        },
    )


def parts(f: Arrays, see: Visibility) -> Term:
    """a_i, c_j, weight and -weight |d| / 20."""
    a, c, weight = f["a"], f["c"], f["weight"]
    far = 1 - 0.05 * np.abs(see.distance)
    return Term(
        [of_query(a), of_key(c), of_head(weight) * far],
        lambda dt: {
            "a": to_query(dt, a),
            "c": to_key(dt, c),
            "weight": to_head(dt * far, weight),
        },
    )


def mixed(f: Arrays, see: Visibility) -> Term:
    """a_i^2 in a tile and a_i c_j as a product."""
    a, c = f["a"], f["c"]
    x, y = of_query(a), of_key(c)
    return Term(
        [x * x + 0 * y, x * y],
        lambda dt: {"a": to_query(dt * (2 * x + y), a), "c": to_key(dt * x, c)},
    )


def outer(f: Arrays, see: Visibility) -> Term:
    """A product of tanh(x_i) and y_j over R."""
    x, y = f["x"], f["y"]
    product = factored({"q_factor": np.tanh(x), "k_factor": y}, see)

    def back(dt: np.ndarray) -> Arrays:
        g = product.back(dt)
        return {"x": g["q_factor"] * (1 - np.tanh(x) ** 2), "y": g["k_factor"]}

    return Term(product.parts, back, product.sizes)


def periodic(f: Arrays, see: Visibility) -> Term:
    """Weight where d is a multiple of 3."""
    weight, hit = f["weight"], see.distance % 3 == 0
    back = lambda dt: {"weight": to_head(dt * hit, weight)}
    return Term([of_head(weight) * hit], back)


def expander(f: Arrays, see: Visibility) -> Term:
    """-2 slope |d| and half an array."""
    slopes, pair, away = f["slopes"], f["pair"], np.abs(see.distance)
    return Term(
        [-2 * of_head(slopes) * away, 0.5 * pair],
        shared=-2 * of_head(slopes) * see.beyond,
        back=lambda dt: {
            "slopes": to_head(-2 * dt * away, slopes),
            "pair": reduced(0.5 * dt, pair.shape),
        },
    )


def _of_distance(
    x: np.ndarray, see: Visibility
) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """A table [*, #N, D] at all pairs, and the way back."""
    D = x.shape[-1]
    away = see.query_positions[..., :, None] - see.key_positions[..., None, :]
    at = np.clip(away - FIRST, 0, D - 1)
    table = x.reshape((1,) * (2 - x.ndim) + x.shape)

    def back(dt: np.ndarray) -> np.ndarray:
        index = np.broadcast_to(at, dt.shape)
        every = [np.where(index == d, dt, 0).sum((-1, -2)) for d in range(D)]
        return reduced(np.stack(every, -1), x.shape)

    leading = np.broadcast_shapes(table.shape[:-1], at.shape[:-2])
    flat = np.broadcast_to(at, (*leading, *at.shape[-2:]))
    flat = flat.reshape(*leading, at.shape[-2] * at.shape[-1])
    found = np.take_along_axis(np.broadcast_to(table, (*leading, D)), flat, -1)
    return found.reshape(*leading, *at.shape[-2:]), back


def relative(f: Arrays, see: Visibility) -> Term:
    """The number of a distance."""
    value, back = _of_distance(f["table"], see)
    return Term([value], lambda dt: {"table": back(dt)})


def table(f: Arrays, see: Visibility) -> Term:
    """The number of a distance, times that of a key."""
    numbers, back = _of_distance(f["numbers"], see)
    weight = f["weight"]
    return Term(
        [of_key(weight) * numbers],
        lambda dt: {
            "numbers": back(dt * of_key(weight)),
            "weight": to_key(dt * numbers, weight),
        },
    )


TERMS: dict[str, Callable[[Arrays, Visibility], Term]] = {
    "dense": dense,
    "factored": factored,
    "alibi": alibi,
    "forget": forget_gate,
    "logdist": log_distance,
    "keyslope": key_slope,
    "queryreach": query_reach,
    "bent": bent,
    "bentbounded": bent,
    "pairsin": pair_sine,
    "parts": parts,
    "mixed": mixed,
    "outer": outer,
    "periodic": periodic,
    "expander": expander,
    "relative": relative,
    "table": table,
}
