"""Random whole calls against a truth of their own, and the laws of that truth."""

import ast
import functools
import os
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pallas_attn.fuzz import truth as truth_package
from pallas_attn.fuzz.draw import changed, draw
from pallas_attn.fuzz.elements import Elements
from pallas_attn.fuzz.job import Options, plan_of, run
from pallas_attn.fuzz.kept import KEPT
from pallas_attn.fuzz.kinds import KINDS
from pallas_attn.fuzz.plan import Plan, TRANSFORMS
from pallas_attn.fuzz.pool import run_all
from pallas_attn.fuzz.run import compared
from pallas_attn.fuzz.selfcheck import ALLOWED, gradient_gaps
from pallas_attn.fuzz.tolerance import difference, noisy, UNITS
from pallas_attn.fuzz.truth.arrays import unread
from pallas_attn.fuzz.truth.attention import EXACT, nearest, Noise, truth
from pallas_attn.fuzz.values import MORE, SETS, value_sets, values, widened
from pallas_attn.testing.evaluate import kernel_implementation


# Calls that compile in a second or two, and together hold every kind of everything; a
# GPU runs thousands of others with `python -m pallas_attn fuzz`.
SEEDS: dict[str, tuple[int, ...]] = {
    "xla": (
        0, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 17, 18, 19, 21, 24, 25,
        26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 42, 43, 44,
        45, 47, 48, 51, 52, 54, 55, 58, 60, 61, 62, 64, 66, 67, 69, 70, 72, 73,
        74, 75, 77, 78, 79, 80, 81, 82, 83, 84, 85, 86, 87, 88, 91, 92, 93,
        96, 97, 98, 99, 100, 101, 102, 103, 104, 106, 108, 111, 114, 115, 120,
        121, 123, 127, 128, 132, 133, 135, 142, 144, 145, 151, 160, 163, 167,
        168, 176, 177, 186, 195, 202, 208, 228, 238, 244, 245, 259, 266, 267,
        279, 281, 285, 287, 291, 294, 303, 304, 305, 309, 314, 347, 350, 351,
        365, 368, 369, 371, 376, 382, 389, 390, 391,
    ),
    "kernels": (
        0, 3, 4, 5, 6, 7, 8, 9, 12, 13, 14, 15, 18, 29, 32, 35, 45, 58, 60,
        62, 66, 70, 75, 87, 95, 97, 103, 113, 126, 128, 140, 157, 163, 168, 170,
        172, 184, 202, 205, 216, 218, 219, 238, 246, 255, 259, 261, 279, 291,
        303, 305, 309, 311, 336, 347, 369, 382, 384, 391,
    ),
}  # fmt: skip
# Sets of values of a call, one of `MORE` beside them.
VALUES = {"xla": 3, "kernels": 2}
CALLS = [
    (which, seed)
    for which, seeds in SEEDS.items()
    for seed in sorted({*seeds, *KEPT[which]})
]
# Where the rows that cover a table run: every twelfth.
LIGHT = {(which, seed) for which, seeds in SEEDS.items() for seed in seeds[::12]}
ROWS = [pytest.param(*x, marks=[pytest.mark.light] * (x in LIGHT)) for x in CALLS]


def options(which: str) -> Options:
    name = kernel_implementation() if which == "kernels" else which
    return Options(name, values=VALUES[which])


@functools.cache
def plans(which: str) -> tuple[Plan, ...]:
    return tuple(plan_of(seed, options(which)) for w, seed in CALLS if w == which)


@pytest.mark.parametrize(("which", "seed"), ROWS, ids=str)
def test_a_random_call_is_right(which, seed):
    found = run(seed, options(which))
    assert not found.findings, "\n".join([found.call, *map(str, found.findings)])


@pytest.mark.whole
def test_calls_that_once_failed_are_right_where_a_user_runs_them():
    """There XLA contracts products and sums, which the flags of these tests forbid."""
    plain = {name: x for name, x in os.environ.items() if name != "XLA_FLAGS"}
    command = ["-m", "pallas_attn.fuzz", "--kept", "--impl", kernel_implementation()]
    ran = subprocess.run(
        [sys.executable, *command, "--processes", "1"],
        env=plain, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_there_are_calls_enough():
    assert len(CALLS) >= 200


@pytest.mark.parametrize("which", SEEDS)
def test_the_calls_hold_every_kind(which):
    calls = plans(which)
    assert {name for x in calls for name in x.bias} == {*KINDS, "co_alibi"}
    dtypes = {"float32", "bfloat16", "float16"}
    dtypes |= {"float64"} if which == "xla" else set()
    assert {x.dtype for x in calls} == dtypes
    forward_mode = set() if which == "xla" else {"jvp", "hvp"}
    assert {x.transform for x in calls} >= {*TRANSFORMS} - forward_mode
    conditions = {name for x in calls for name in x.conditions}
    assert len(conditions) == 9
    assert {name for x in calls for name in x.operands} >= {"scale", "alpha"}
    assert {len(x.bias) for x in calls} >= {0, 1, 2}
    assert {len(x.L) for x in calls} == {0, 1, 2}
    assert {x.order for x in calls if x.query_positions} >= {"shuffle", "repeat"}
    assert {x.normalizer is None for x in calls} == {True, False}
    assert {bool(x.normalizer and x.normalizer[1]) for x in calls} == {True, False}
    for fact in (
        "causal",
        "window",
        "soft_cap",
        "dropout",
        "config",
        "constants",
        "raw",
    ):
        assert {bool(getattr(x, fact)) for x in calls} == {True, False}, fact
    assert any(0 in (x.T, x.S) for x in calls)
    sets = {name for x in calls for name in value_sets(x, VALUES[which])}
    assert sets == {*SETS, *MORE}


# Gradients written out by hand may be wrong by hand.
@pytest.mark.parametrize("first", range(0, 48, 8))
def test_the_truth_differentiates_itself(first):
    for seed in range(first, first + 8):
        for name, gap in gradient_gaps(seed):
            assert gap <= ALLOWED, f"seed {seed} {name}: {gap:.1e}"


@pytest.mark.parametrize("seed", [360, 300117])
def test_poison_is_nowhere_that_an_element_reads(seed):
    """Of an array that elements of a map share; -inf may be a number of its own."""
    plan = draw(seed, "triton_interpret")
    elements = Elements(plan, "taken", 3)
    changed = 0
    for at, (operands, _, _) in zip(elements.places, elements.values, strict=True):
        clean, conditions, _ = values(plan, "taken", 3, at)
        found = truth(plan, widened(clean), conditions, None, EXACT)
        for name, form in plan.forms.items():
            gone = unread(found.allowed, operands[name].shape, form.home)
            same = operands[name] == clean[name]
            assert (same | gone).all(), name
            changed += (~same).sum()
    assert changed


class Nearest(Noise):
    """Each step rounded to the nearest float: what an honest implementation does."""

    def on(self, x, unit, size=None):
        return nearest(x, unit) if unit else x


@pytest.mark.parametrize(
    ("seed", "chosen"),
    [
        (310651, "far"),  # entmax: distances that a float32 cannot tell apart
        (608092, "far"),
        (609571, "far"),  # of the largest 200
        (600378, "far"),  # softmax
        (604162, "far"),
    ],
)
def test_rounding_to_nearest_is_allowed(seed, chosen):
    plan = draw(seed, "triton_interpret")
    elements = Elements(plan, chosen, value_sets(plan, 5).index(chosen))
    unit = UNITS[plan.accumulator]
    store = UNITS[plan.dtype] if plan.low else unit
    noise = Nearest(np.random.default_rng(0), unit, store)
    with np.errstate(all="ignore"):
        found = elements.joined(elements.truths(noise))
        leaves = compared(elements, {x: y.astype("float32") for x, y in found.items()})
    assert all(x.right for x in leaves), [(x.name, x.error, x.allowed) for x in leaves]


@pytest.mark.parametrize("normalizer", [None, (1.5, None)])
def test_noise_leaves_the_residual_of_empty_rows_and_moves_the_others(normalizer):
    facts = {"normalizer": normalizer, "sink": None}
    plan = changed(draw(310666, "xla"), facts)
    elements = Elements(plan, "normal", 0)
    want = elements.joined(elements.truths())["residual"]
    finite = np.isfinite(want)
    assert finite.any()
    assert not finite.all()
    for rough in noisy(elements):
        np.testing.assert_array_equal(rough["residual"][~finite], want[~finite])
        assert difference(rough["residual"], want) > 0


def test_the_rounding_of_sums_whose_difference_a_gate_has_is_allowed():
    """Each query sees its own key alone: no gate adds to a score, but sums run on."""
    facts = {"normalizer": None, "dropout": 0.0}
    elements = Elements(changed(draw(520133, "xla"), facts), "outlier", 4)
    operands, _, cotangents = elements.values[0]
    total = cotangents["residual"]  # what a row of dS adds up to
    dp = (cotangents["output"] * operands["value"]).sum(-1)
    ds = dp - (dp - total)
    gradient = np.flip(np.cumsum(np.flip(total - ds, 1), 1), 1)
    (found,) = compared(elements, {"bias0.log_gate": gradient})
    assert found.size == 0
    assert 1e-5 < found.error <= found.allowed < 1e-5 * np.abs(dp).max()


def test_the_truth_shares_no_code_with_the_library():
    """Of the package it imports itself and the facts of a call, which import none."""
    folder = Path(truth_package.__file__).parent
    for path in (*folder.glob("*.py"), folder.parent / "plan.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [x.name for x in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            for name in names:
                ours = ("pallas_attn.fuzz.truth", "pallas_attn.fuzz.plan")
                assert name.startswith(ours) or not name.startswith(
                    ("pallas_attn", "jax", "flax")
                ), f"{path.name} imports {name}"


def test_a_seed_stays_the_same_call():
    """What others have run by a number is what that number is here."""
    found = 0
    for seed in (7, 100000, 100040):
        for name in ("xla", "triton"):
            plan = draw(seed, name)
            facts = (plan.L, plan.T, plan.S, plan.N, plan.H, plan.bias, plan.transform)
            found = zlib.crc32(repr(facts).encode(), found)
            element = tuple(0 for _ in plan.maps)
            for part in values(plan, "normal", 0, element):
                for key in sorted(part):
                    found = zlib.crc32(np.ascontiguousarray(part[key]).tobytes(), found)
    assert found == PINNED


def test_a_process_that_dies_is_reported_as_its_seed():
    """And the seeds after it still run: here each in a process that cannot."""
    dead: Any = functools.partial(os._exit, 3)
    found = list(run_all(range(2), Options("xla"), 1, serve=dead))
    assert [x.seed for x in found] == [0, 1]
    assert all("died" in str(x.findings[0]) for x in found)


PINNED = 914195463
