"""A wrong argument of a command: one line, status 2, and nothing was begun."""

import json

import pytest

from pallas_attn.__main__ import main
from pallas_attn.fuzz.command import main as fuzz
from pallas_attn.implementations import current_device
from pallas_attn.verify.command import main as verify


OWN = {"fuzz": fuzz, "verify": verify}

# What is typed, and what the line must say: the argument, the rule, what was found.
WRONG = {
    "no such command": (["attend"], ("attend", "demo", "doctor")),
    "no steps": (["demo", "--steps", "0"], ("--steps", "at least 1", "got 0")),
    "steps below 0": (["demo", "--steps", "-5"], ("--steps", "at least 1", "-5")),
    "steps of text": (["demo", "--steps", "few"], ("--steps", "at least 1", "few")),
    "no keys to check": (["demo", "--check-length", "0"], ("--check-length", "got 0")),
    "unknown picture": (["demo", "--output", "x.xyz"], ("--output", ".png", "x.xyz")),
    "picture without an ending": (["demo", "--output", "x"], ("--output", ".png", "x")),
    "picture is a folder": (
        ["demo", "--output", "{folder}/a.png"], ("--output", "must be a file", "a.png"),
    ),
    "picture in a file": (
        ["demo", "--output", "{folder}/file/a.png"], ("--output", "cannot be written"),
    ),
    "no such device": (["demo", "--device", "tpu"], ("--device", "no tpu", "doctor")),
    "no such case": (["bench", "nosuch"], ("nosuch", "is no case", "--list")),
    "one of two is no case": (
        ["bench", "cpu-alibi", "alibi-4k", "nosuch"], ("cases of a", "--list"),
    ),
    "no repeats": (["bench", "--repeats", "0"], ("--repeats", "at least 1", "got 0")),
    "repeats below 0": (["bench", "--repeats", "-3"], ("--repeats", "at least 1")),
    "unknown way": (["bench", "--implementation", "flash"], ("flash", "triton")),
    "no report": (["bench", "--markdown", "{folder}/no.json"], ("no.json", "No such")),
    "text for a report": (
        ["bench", "--markdown", "{folder}/file"], ("file is no report", "--json"),
    ),
    "another report": (
        ["bench", "--markdown", "{folder}/list.json"], ("is no report", "--json"),
    ),
    "report in a file": (
        ["bench", "--json", "{folder}/file/x.json"], ("--json", "cannot be written"),
    ),
    "report is a folder": (["bench", "--json", "{folder}"], ("--json", "a file")),
    "a sweep of text": (["bench", "--sweep", "rows=axb"], ("--sweep", "rows=axb")),
    "wide heads": (["inspect", "--head-dim", "512"], ("--head-dim", "1..256", "512")),
    "no keys": (["inspect", "--length", "0"], ("--length", "at least 1", "got 0")),
    "no such implementation": (["verify", "--impl", "flash"], ("--impl", "flash")),
    "no such call": (["verify", "--filter", "albi"], ("--filter", "holds 'albi'")),
    "findings in a file": (
        ["verify", "--json", "{folder}/file/x.json"], ("--json", "cannot be written"),
    ),
    "no calls": (["fuzz", "--count", "0"], ("--count", "at least 1", "got 0")),
    "no such card": (["inspect", "--arch", "75"], ("--arch", "75")),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_one_line(name, tmp_path, capsys):
    (tmp_path / "a.png").mkdir()
    (tmp_path / "file").write_text("text")
    (tmp_path / "list.json").write_text(json.dumps([1, 2]))
    typed, says = WRONG[name]
    typed = [text.format(folder=tmp_path) for text in typed]
    call = OWN.get(typed[0], lambda _: main(typed))
    with pytest.raises(SystemExit) as exit:
        call(typed[1:])
    out, error = capsys.readouterr()
    assert exit.value.code == 2
    assert not out
    assert error.count("\n") == 1
    assert "error: " in error
    assert not [said for said in says if said not in error], error


@pytest.mark.skipif(
    current_device().platform == "gpu", reason="there is a GPU: its cases run"
)
def test_a_case_of_a_gpu_is_known_without_one(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "alibi-4k"])
    said = capsys.readouterr().err
    assert "alibi-4k needs another device than this cpu" in said
    assert "cpu-alibi" in said


def test_the_default_of_repeats_is_said(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    assert "(default: 11)" in " ".join(capsys.readouterr().out.split())
