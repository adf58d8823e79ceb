"""`python -m pallas_attn verify`: what it holds, and that it sees what is wrong."""

import json

import jax
import numpy as np
import pytest

from pallas_attn.__main__ import main
from pallas_attn.fuzz import program
from pallas_attn.fuzz.values import DTYPES
from pallas_attn.verify.check import Verified, verify
from pallas_attn.verify.large import Large, verify_large
from pallas_attn.verify.rows import (
    BIASES,
    KINDS,
    NORMALIZERS,
    OPTIONS,
    rows,
    small_rows,
)


RIGHT = Verified("a call", "xla", "float32", 1e-7, 1e-7, 0.1, True)


def test_rows_hold_every_bias_normalizer_and_option():
    for dtype in ("float32", "bfloat16"):
        names = [x.name for x in rows() if x.dtype == dtype]
        assert len(names) == len(set(names))
        assert set(BIASES) <= set(names)
        pairs = {f"{x}, {bias}" for x in NORMALIZERS for bias in KINDS}
        assert pairs <= set(names)
        assert {x.split(",")[0] for x in OPTIONS} <= {x.split(",")[0] for x in names}
    assert len(small_rows()) == 5


@pytest.mark.parametrize(
    "changed",
    [{"share": 1.1}, {"share": np.nan}, {"repeats": False}, {"wrong": "raised"}],
    ids=str,
)
def test_what_is_wrong_does_not_pass(changed):
    assert RIGHT.passed
    assert not Verified(**{**vars(RIGHT), **changed}).passed


def test_the_command_writes_what_it_found(tmp_path, capsys):
    path = tmp_path / "found.json"
    assert main(["verify", "--filter", "one key head", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    for said in ("one key head", "bfloat16", "2 calls, 0 wrong", "past 2^31"):
        assert said in printed, said
    found = json.loads(path.read_text())
    assert found["wrong"] == 0
    assert [x["passed"] for x in found["calls"]] == [True, True]


def test_a_number_that_is_off_is_seen(monkeypatch):
    attend = program.dot_product_attention

    def off(*args, **kwargs):
        output, residual = attend(*args, **kwargs)
        return output * 1.0001, residual

    monkeypatch.setattr(program, "dot_product_attention", off)
    found = verify(small_rows()[0], "xla")
    assert not found.passed
    assert "output" in found.wrong


def test_a_call_that_raises_is_wrong(monkeypatch):
    monkeypatch.delattr(program, "dot_product_attention")
    assert "NameError" in verify(small_rows()[0], "xla").wrong


@pytest.mark.parametrize("what", ["mask", "bias"])
def test_rows_and_heads_of_a_large_call_are_a_small_call(what):
    found = verify_large(Large(what, N=5, T=96), "xla")
    assert found.passed, found
    assert found.dtype in DTYPES


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("what", ["mask", "bias"])
def test_arrays_past_2_31_elements(what):
    large = Large(what, N=16 if what == "mask" else 10)
    assert verify_large(large, "triton").passed
    jax.clear_caches()
