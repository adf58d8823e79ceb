"""The rows that run by default hold all that the tables of the laws have."""

import random

import pytest

from pallas_attn.testing.covering import covering, outside, WORD


PARTS = ["alibi", "dense", "xla", "triton", "causal", "16", "1.5"]


def tables():
    """Tables of up to 12 rows of up to 4 parts, one empty."""
    draw = random.Random(0)
    for rows in range(13):
        names = ["-".join(draw.sample(PARTS, draw.randint(0, 4))) for _ in range(rows)]
        yield pytest.param(sorted({*names}), id=str(rows))


every_table = pytest.mark.parametrize("names", list(tables()))


def words(names):
    return {word for name in names for word in WORD.findall(name)}


@every_table
def test_every_word_is_kept_and_beside_the_kernels(names):
    kept = [names[n] for n in covering(names)]
    assert words(kept) == words(names)
    run_by = [name for name in names if "triton" in name]
    assert words(x for x in kept if "triton" in x) == words(run_by)
    assert bool(kept) == bool(names)


@every_table
def test_a_row_that_adds_nothing_is_left_out(names):
    kept = covering(names)
    pairs = {(x, "triton" in name) for name in names for x in words([name])}
    assert len(kept) <= max(1, len(pairs))


@every_table
def test_of_a_law_that_takes_long_few_rows_stay(names):
    kept = covering(names, 2)
    assert len(kept) <= 2
    assert {*kept} <= {*covering(names)}


def test_each_law_has_its_own_rows():
    ids = [f"test_{law}[{row}]" for law in "ab" for row in ("x", "y", "y-z", "3", "4")]
    assert outside(ids) == {f"test_{law}[{row}]" for law in "ab" for row in ("y", "4")}
    assert outside(["test_a", "test_b"]) == set()
    assert len(outside(ids, {"test_a": 1})) == len(outside(ids)) + 2
