"""Every tolerance, and why it is what it is.

The error of a leaf is ||x - y|| / ||y||, y being the float64 reference: one number per
output and gradient that neither grows with the size of an array nor with its scale. Two
levels are needed. In float32 with exact products an implementation that computes the
right formula is within `FORMULA`; a wrong one is not, but rounding in 16 bits stays
unseen. In 16 bits the measure is another computation of the same precision; that one is
blind below a few hundredths of a leaf's maximum.
"""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np


# float32 rounds by u = 2^-24 = 6e-8. A score of size s is off by a few u s, and exp
# turns that into a relative error of its weight: with |s| <= 10, products of up to 256
# numbers and sums over rows, about 40 u = 2.4e-6. A wrong formula errs by over 1e-3.
FORMULA = 1e-5

# float64 beside float64, and the unit of float32.
DOUBLE = 1e-10
FLOAT32 = 2.0**-23

# Two computations that round in different places err differently by a factor of about
# sqrt(2); a backward of seven products has more such places than a forward of two.
OUTPUT_RATIO = 2.0
GRADIENT_RATIO = 3.0

# A sum of some 20 log gates, rounded where it is stored and where it is read, entry by
# entry; after thousands of them spec's law, part absolute and part relative.
SUM = 2e-6
LONG_SUM = (1e-5, 1e-6)

# Pruning leaves out 2^-24 = 6e-8 of a row's (a key's) weight, of values that may be the
# largest there are, per side and per query head of a group.
PRUNING = 1e-6
# `prune=False` is another kernel, which takes its exponents from other references and
# so rounds elsewhere, by about as much as each of the two errs.
PRUNING_ROUNDING = 3.0

# Where a row has one key, its output is that value, whatever the score: half a unit of
# 16 bits on values of up to 4, or the last digits of a power of two by one instruction.
# Gradients of scores are then 0, but for two numbers near 1 that 16 bits round, times
# sums of dO v over 80 columns; a sum of 37 dO in 16 bits is rounded as it is stored.
ONLY_VALUE = 4e-3
ONLY_WEIGHT = 2.0**-22
NO_GRADIENT = 0.1
SUM_OF_COTANGENTS = (0.02, 0.05)  # relative, absolute

# Calls in an operands' dtype beside a float32 reference, of the largest entry of a
# leaf: a slope's gradient is a sum of some thousand products.
BESIDE_REFERENCE = {"float32": 2.0**-15, "bfloat16": 2.0**-7}

# Bytes that a kernel may keep in local memory because registers ran out, stores and
# loads together: a few words, touched once outside a loop, cost nothing measurable.
SPILLS = 64

# The system that Co-ALiBi reimplements accepts 1 - 2<x,y> / (|x|^2 + |y|^2), which is
# |x - y|^2 / (|x|^2 + |y|^2), up to 1e-4, and prints it for bfloat16. Rounding the true
# output to bfloat16 alone is 1.4e-6 (a relative error e is e^2 / 2), to float16 2e-8.
SIMILAR = {"float16": 1e-6, "float32": 1e-6, "bfloat16": 1e-5}

# A gradient that is 0 in exact arithmetic (of a bias [.., T, 1] under softmax: the sum
# of a row of dS) is a sum of terms of size |do| |v| = 1 to 10 whose rounding stays: as
# FORMULA, but absolute. In float64 the truth itself is then about 1e-15.
NOTHING = 1e-11


def relative_error(x: Any, y: Any) -> float:
    """||x - y|| / ||y|| over the places where y is finite.

    Args:
        x: What was computed.
        y: The truth.

    Returns:
        The error; inf if the two are not infinite (or NaN) in the same places; the
        largest |x| where y is 0 in exact arithmetic.
    """
    x, y = _float64(x), _float64(y)
    chex.assert_equal_shape([x, y])
    finite = np.isfinite(y)
    if not np.array_equal(x[~finite], y[~finite], equal_nan=True):
        return float("inf")
    x, y = x[finite], y[finite]
    if not np.isfinite(x).all():
        return float("inf")
    if not y.size:
        return 0.0
    if np.abs(y).max() < NOTHING:
        return float(np.abs(x).max())
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


def errors(got: Any, want: Any) -> dict[str, float]:
    """The relative error of each leaf, by its path in `got`."""
    leaves = jax.tree_util.tree_leaves_with_path(got)
    return {
        jax.tree_util.keystr(path) or "the result": relative_error(x, y)
        for (path, x), y in zip(leaves, jax.tree.leaves(want), strict=True)
    }


def assert_formula(got: Any, want: Any) -> None:
    """float32 at full precision: every leaf within `FORMULA` of float64.

    A leaf of a narrower dtype (the gradient of a bfloat16 factor) is rounded once more,
    by half a unit of each entry.
    """
    leaves = jax.tree_util.tree_leaves_with_path(got)
    allowed = {}
    for path, x in leaves:
        once = jnp.finfo(x.dtype).eps / 2 if x.dtype.itemsize < 4 else 0.0
        allowed[jax.tree_util.keystr(path) or "the result"] = FORMULA + float(once)
    wrong = {
        name: f"{error:.2e}, allowed {allowed[name]:.0e}"
        for name, error in errors(got, want).items()
        if not error <= allowed[name]
    }
    assert not wrong, _table("too far from float64", wrong)


def assert_rounded_once(got: Any, want: Any) -> None:
    """Narrow leaves: every entry within half a unit of float64, and `FORMULA` of all.

    So that a sum was taken in float32: of n entries that are each rounded first, it is
    off by about sqrt(n) half units of one of them. A float32 leaf is that of a float64
    call, within `DOUBLE` of all.
    """
    leaves = jax.tree_util.tree_leaves_with_path(got)
    wrong = {}
    for (path, x), y in zip(leaves, jax.tree.leaves(want), strict=True):
        x, y, eps = _float64(x), _float64(y), float(jnp.finfo(x.dtype).eps)
        others = FORMULA if eps > FLOAT32 else DOUBLE
        half = eps / 2 * np.abs(y) + others * np.abs(y).max()
        if not (worst := float((np.abs(x - y) / half).max())) <= 1 + eps:
            name = jax.tree_util.keystr(path) or "the result"
            wrong[name] = f"{worst:.2f} times half a unit"
    assert not wrong, _table("not rounded once", wrong)


def assert_sum(got: Any, want: Any) -> None:
    """Every entry of a short sum within `SUM` of its own size."""
    np.testing.assert_allclose(got, want, rtol=SUM)


def assert_long_sum(got: Any, want: Any) -> None:
    """Every entry of a long sum as `LONG_SUM` says, relative to its own size."""
    absolute, relative = LONG_SUM
    np.testing.assert_allclose(got, want, atol=absolute, rtol=relative)


def assert_moved_at_most(got: Any, want: Any, distance: float) -> None:
    """Every entry within a known distance, and `FORMULA` for rounding."""
    np.testing.assert_allclose(got, want, atol=distance + FORMULA)


def assert_rounding(got: Any, peer: Any, want: Any, ratio: float) -> None:
    """Lower precision: no leaf much worse than the same-precision computation `peer`.

    ||x - y|| <= ratio ||peer - y|| + eps max|y| sqrt(size): the last term is one unit
    of the leaf's dtype, at the leaf's largest value, in each entry, for where the peer
    happens to be exact.

    Args:
        got: What was computed.
        peer: The same, by XLA on arrays of the same dtypes.
        want: The float64 truth.
        ratio: `OUTPUT_RATIO` or `GRADIENT_RATIO`.
    """
    wrong = {}
    paths = jax.tree_util.tree_leaves_with_path(got)
    for (path, x), z, y in zip(
        paths, jax.tree.leaves(peer), jax.tree.leaves(want), strict=True
    ):
        unit = float(jnp.finfo(x.dtype).eps)
        truth = _float64(y)
        finite = truth[np.isfinite(truth)]
        if not finite.size:
            continue
        mine, theirs = relative_error(x, y), relative_error(z, y)
        slack = unit
        if np.abs(finite).max() >= NOTHING:
            rms = np.linalg.norm(finite) / np.sqrt(finite.size)
            slack = unit * np.abs(finite).max() / rms
        if not mine <= ratio * theirs + slack:
            times = mine / theirs if theirs else float("inf")
            name = jax.tree_util.keystr(path) or "the result"
            wrong[name] = f"{mine:.2e}, peer {theirs:.2e}, ratio {times:.2f}"
    assert not wrong, _table(f"more than {ratio:g} times the error of the peer", wrong)


def assert_nothing_missed(pruned: Any, whole: Any) -> None:
    """Every entry within `PRUNING` of the leaf's largest, NaN and inf where they were.

    Args:
        pruned: What was computed.
        whole: The same kernel, where the bound left out nothing.
    """
    _assert_close(pruned, whole, PRUNING)


def assert_rounded_apart(pruned: Any, unpruned: Any, want: Any) -> None:
    """The same of `prune=False`, and what both are rounded by.

    Args:
        pruned: What was computed.
        unpruned: The same by `prune=False`.
        want: The float64 truth.
    """
    rounding = max(largest_errors(unpruned, want, same_places=False).values())
    _assert_close(pruned, unpruned, PRUNING + PRUNING_ROUNDING * rounding)


def _assert_close(pruned: Any, whole: Any, allowed: float) -> None:
    chex.assert_trees_all_equal_shapes_and_dtypes(pruned, whole)
    wrong = {
        name: f"{error:.2e}"
        for name, error in largest_errors(pruned, whole).items()
        if not error <= allowed
    }
    title = f"pruned and unpruned differ by more than {allowed:.1e} of the maximum"
    assert not wrong, _table(title, wrong)


def largest_errors(
    got: Any, want: Any, *, same_places: bool = True
) -> dict[str, float]:
    """The largest difference of each leaf, in units of its largest entry.

    Args:
        got: What was computed.
        want: What it is compared with.
        same_places: Whether an infinity or NaN in one alone is an infinite error; else
            places where either has one are passed over.
    """
    found = {}
    leaves = jax.tree_util.tree_leaves_with_path(got)
    for (path, x), y in zip(leaves, jax.tree.leaves(want), strict=True):
        x, y = _float64(x), _float64(y)
        finite = np.isfinite(x) & np.isfinite(y)
        error = 0.0
        if same_places and not np.array_equal(x[~finite], y[~finite], equal_nan=True):
            error = float("inf")
        elif finite.any():
            largest = max(np.abs(y[finite]).max(), np.finfo(np.float32).tiny)
            error = float(np.abs(x[finite] - y[finite]).max() / largest)
        found[jax.tree_util.keystr(path) or "the result"] = error
    return found


def assert_same_bits(first: Any, second: Any) -> None:
    """Bitwise equality of every leaf, of zeros' signs and NaNs too."""
    chex.assert_trees_all_equal_shapes_and_dtypes(first, second)
    leaves = jax.tree_util.tree_leaves_with_path(first)
    different = {}
    for (path, x), y in zip(leaves, jax.tree.leaves(second), strict=True):
        x, y = np.atleast_1d(np.asarray(x)), np.atleast_1d(np.asarray(y))
        bits = x.view(np.uint8) != y.view(np.uint8)
        if bits.any():
            name = jax.tree_util.keystr(path) or "the result"
            different[name] = f"{int(bits.sum())} of {bits.size} bytes"
    assert not different, _table("bits differ", different)


def assert_zero(tree: Any) -> None:
    """Every entry of every leaf is exactly 0."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    wrong = {
        jax.tree_util.keystr(path): f"largest {np.abs(_float64(x)).max():.2e}"
        for path, x in leaves
        if np.size(x) and not (_float64(x) == 0).all()
    }
    assert not wrong, _table("not 0", wrong)


def _float64(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def _table(title: str, rows: dict[str, str]) -> str:
    return "\n".join(
        [f"{title}:", *(f"  {name}: {text}" for name, text in rows.items())]
    )
