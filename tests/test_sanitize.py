"""What runs under compute-sanitizer and repeatedly on a card is every kernel."""

import re
from pathlib import Path

import jax.numpy as jnp
import pytest

import pallas_attn
from pallas_attn.testing import repeats, sanitize
from pallas_attn.testing.cases import Case
from pallas_attn.testing.evaluate import (
    kernel_implementation,
    small,
    tangents,
    with_gradients,
)
from pallas_attn.testing.jaxprs import kernel_names
from pallas_attn.triton.entmax import route


FOLDER = Path(pallas_attn.__file__).parent / "triton"


def test_every_kernel_is_sanitized(monkeypatch):
    monkeypatch.setattr(route, "LONG", sanitize.SIZES["S"])
    written = {
        name
        for path in FOLDER.rglob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)
    }
    ran = set()
    for name in sanitize.names():
        if name.startswith("bfloat16 64") or name == "bfloat16 128 2":
            case = sanitize.case_of(name)
            sample, on = case.specs(), "triton_interpret"
            arrays = (sample.operands, sample.conditions, sample.cotangents)
            back = with_gradients(sample.settings, implementation=on)
            along = tangents(sample.settings, implementation=on)
            ran |= set(kernel_names(back, *arrays))
            ran |= set(kernel_names(along, *arrays[:2]))
    # `sparsity` alone runs it
    assert written - ran <= {"census_kernel"}


@pytest.mark.parametrize(
    "argv", [["--tools", "luck"], ["--fuzz", "1"], ["--run", "bfloat16 63 0"]]
)
def test_a_wrong_argument_is_one_line(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        sanitize.main(argv)
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_every_seed_of_a_fuzz_is_a_process(monkeypatch, tmp_path, capsys):
    """A run is well if the program ends well and the tool counts no error."""
    script = tmp_path / "compute-sanitizer"
    script.write_text('#!/bin/sh\necho "ERROR SUMMARY: $9 errors"\n')
    script.chmod(0o755)
    monkeypatch.setattr(sanitize, "which", lambda *_, **__: str(script))
    options = ["--tools", "memcheck", "--logs", str(tmp_path / "logs"), "--jobs", "1"]
    command = ["--fuzz-command", "run seed {seed}"]
    assert sanitize.main([*options, *command, "--fuzz", "0", "1"]) == 0
    assert sanitize.main([*options, *command, "--fuzz", "3", "2"]) == 1
    printed = capsys.readouterr().out
    assert "memcheck seed 4: 4 errors, exit 0" in printed


def test_repeats_tell_a_bit_that_differs(monkeypatch):
    case = Case("none", "causal").at(T=17, S=17, H=16, h=16)
    options = {"implementation": kernel_implementation(), "config": small("none")}
    assert repeats.differing(case, 1, **options) == []
    x = jnp.float32(1.0)
    assert bool(repeats._same_bits(x, x))
    assert not bool(repeats._same_bits(x, jnp.nextafter(x, jnp.float32(2.0))))
    nan = jnp.float32(jnp.nan)
    assert bool(repeats._same_bits(nan, nan))
