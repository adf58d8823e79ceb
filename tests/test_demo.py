"""The demo's parts on tiny settings, and the commands of `python -m pallas_attn`."""

import dataclasses
import subprocess
import sys
from typing import Any

import chex
import jax
import numpy as np
import pytest

from pallas_attn.__main__ import COMMANDS, main
from pallas_attn.demo.model import CharacterModel
from pallas_attn.demo.plot import draw
from pallas_attn.demo.text import batches, Text, topics, windows
from pallas_attn.demo.training import Settings, train, Trained
from pallas_attn.doctor import advice, PACKAGES
from pallas_attn.implementations import Device


TINY = Settings(steps=6, batch=4, length=16, characters=128)
PNG = b"\x89PNG"
# optax's Adam mixes its step count with floats
standard_promotion = jax.numpy_dtype_promotion("standard")


def small(trained_length: int | None, alphabet: int) -> CharacterModel:
    return CharacterModel(alphabet, trained_length, width=16, heads=2, layers=1)


def test_the_text_is_english_and_cut_in_two():
    text = topics()
    codes = np.concatenate([text.training, text.held_out])
    assert len(codes) > 400_000
    words = "".join(text.alphabet[i] for i in codes)
    assert "The following" in words
    assert codes.max() == len(text.alphabet) - 1


def test_windows_hold_inputs_and_next_characters():
    codes = np.arange(100, dtype=np.int32)
    random = next(batches(codes, batch=3, length=8, seed=0))
    held_out = windows(codes, characters=40, length=8)
    chex.assert_shape([random, held_out], [(3, 9), (5, 9)])
    assert (np.diff(random) == 1).all()
    assert (held_out[1:, 0] == held_out[:-1, -1]).all()


@pytest.mark.parametrize("trained_length", [None, 16], ids=["alibi", "learned"])
def test_the_model_sees_no_later_character(trained_length):
    model = small(trained_length, alphabet=7)
    characters = jax.random.randint(jax.random.key(0), (2, 40), 0, 7)
    parameters = model.init(jax.random.key(1), characters)
    logits: Any = model.apply(parameters, characters)
    changed: Any = model.apply(parameters, characters.at[:, 25:].set(0))
    chex.assert_trees_all_equal(logits[:, :25], changed[:, :25])
    assert not np.array_equal(logits[:, 25:], changed[:, 25:])


@pytest.mark.parametrize("trained_length", [None, 16], ids=["alibi", "learned"])
@standard_promotion
def test_training_halves_the_loss_of_an_easy_text(trained_length):
    codes = np.tile(np.arange(8, dtype=np.int32), 200)
    text = Text("abcdefgh", codes, codes)
    settings = dataclasses.replace(TINY, steps=40, learning_rate=2e-2)
    seen: list[float] = []
    trained = train(small(trained_length, 8), text, settings, seen.append)
    assert trained.losses == seen
    assert trained.halved
    assert set(trained.held_out) == {1, 2, 4}


def test_a_loss_that_does_not_fall_is_not_halved():
    assert not Trained(None, [4.0] * 10, {}).halved


def test_the_picture_is_written(tmp_path):
    losses = list(np.linspace(5, 2, 50))
    model = Trained(None, losses, {1: 2.0, 2: 2.1, 4: 2.2})
    path = tmp_path / "new folder" / "demo.png"
    draw({"one": model, "another": model}, TINY, path)
    assert path.read_bytes().startswith(PNG)


@pytest.mark.whole
@standard_promotion
def test_the_demo_from_end_to_end(tmp_path, capsys, monkeypatch):
    """Too few steps to learn: it says so, and its exit status too."""
    monkeypatch.setenv("COLUMNS", "200")
    path = tmp_path / "demo.png"
    arguments = ["--steps", "2", "--check-length", "17", "--output", str(path)]
    assert main(["demo", *arguments]) == 1
    printed = capsys.readouterr().out
    for said in (
        "Implementation: xla",
        "ALiBi + factored",
        "Co-ALiBi",
        "forget gate",
        "512 (4x",
    ):
        assert said in printed, said
    assert "every bit the same twice? Yes." in printed
    assert "python -m pallas_attn verify" in printed
    assert "below half of its start? No." in printed
    assert str(path) in printed
    assert path.read_bytes().startswith(PNG)


def test_doctor_says_what_runs_and_why(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for said in (jax.__version__, "None -> ", "triton_interpret", "Advice"):
        assert said in printed, said


@pytest.mark.parametrize(
    ("platform", "installed", "driver", "said"),
    [
        ("gpu", "jax-cuda12-plugin", True, "bench"),
        ("cpu", None, True, "cuda12"),
        ("cpu", "jax-cuda13-plugin", True, "JAX_PLATFORMS"),
        ("cpu", None, False, "No NVIDIA GPU"),
    ],
)
def test_doctor_advises(platform, installed, driver, said):
    versions = {name: "1" if name == installed else None for name in PACKAGES}
    lines = advice(Device(platform, platform, "a test"), versions, driver=driver)
    assert said in lines[0]
    assert any("optax" in line for line in lines[1:])


def test_a_missing_package_is_named_with_what_to_install(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "pallas_attn.demo.tour", raising=False)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["demo", "--help"]) == 1
    assert "rich" in (said := capsys.readouterr().err)
    assert "'.[demo]'" in said


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
    """In a process of its own, as a user starts it."""
    run = subprocess.run(
        [sys.executable, "-m", "pallas_attn", command, "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"pallas_attn {command}" in run.stdout
