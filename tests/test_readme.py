"""What the pages say runs, runs: Python blocks, and the names in shell blocks."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import re
import tomllib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import pallas_attn
import pallas_attn.__main__
import pallas_attn.linen
from pallas_attn.__main__ import COMMANDS
from pallas_attn.benchmark import page as speeds
from pallas_attn.testing.numerics import assert_formula


ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for folder in ("pallas_attn", "pallas_attn/benchmark")
    for path in (ROOT / "README.md", *sorted((ROOT / folder).glob("*.md")))
}
README, GUIDE = PAGES["README.md"], PAGES["pallas_attn/GUIDE.md"]
every_page = pytest.mark.parametrize("page", PAGES)


def blocks(language: str) -> dict[str, str]:
    """Code blocks of a language, by page, the heading they stand under and number."""
    found: dict[str, str] = {}
    for page, text in PAGES.items():
        heading = ""
        for title, fence, code in re.findall(
            r"^#+ ([^\n]*)$|^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL
        ):
            if title:
                heading = title
            elif fence == language:
                found[f"{page}: {heading} {len(found)}"] = code
    return found


def headings(page: str) -> list[str]:
    """All headings of a page; what stands in its code blocks is none."""
    prose = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^#+ (.*)$", prose, re.MULTILINE)


def anchors(page: str) -> list[str]:
    """What links to the headings of a page say after `#`."""
    return [
        re.sub(r"[^\w -]", "", title).lower().replace(" ", "-")
        for title in headings(page)
    ]


def section(text: str, title: str) -> str:
    """What stands under a heading of the second level."""
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


PYTHON, SHELL = blocks("python"), blocks("sh")
QUICK_START = next(iter(PYTHON))
MOST_FOLDED = 10_000
MOST_LINES = 220


def run(name: str) -> dict[str, Any]:
    """The names a block leaves behind; it goes on from the README's quick start."""
    namespace = {} if name == QUICK_START else dict(quick_start())
    exec(compile(PYTHON[name], name, "exec"), namespace)
    return namespace


@functools.cache
def quick_start() -> dict[str, Any]:
    """What the first block leaves behind."""
    return run(QUICK_START)


def folded(names: dict[str, Any]) -> set[str]:
    """Large arrays that jitted functions read from outside: XLA folds constants."""
    is_large = lambda x: isinstance(x, jax.Array) and x.size > MOST_FOLDED
    return {
        f"{name}: {read}"
        for name, function in names.items()
        if hasattr(function, "lower") and hasattr(function, "__wrapped__")
        for read in function.__wrapped__.__code__.co_names
        if any(map(is_large, jax.tree.leaves(names.get(read))))
    }


def test_what_a_jitted_function_folds_is_found():
    names: dict[str, Any] = {"large": jnp.ones(MOST_FOLDED + 1), "jax": jax}
    exec("f, g = jax.jit(lambda x: x + large), jax.jit(lambda large: large)", names)
    assert folded(names) == {"f: large"}


@pytest.mark.parametrize("name", PYTHON)
def test_every_python_block_runs(name, capsys):
    assert not folded(run(name))
    printed = capsys.readouterr().out
    for line in PYTHON[name].splitlines():
        if line.startswith("print(") and "  # (" in line:  # the result stands beside it
            assert line.split("  # ")[1] in printed


def test_the_learned_bias_of_the_guide_is_its_formula():
    """Value and every gradient against the dense formula, in float32."""
    guide = run(next(name for name in PYTHON if "Write your own" in name))
    attend, SquaredDistance = guide["dot_product_attention"], guide["SquaredDistance"]
    query, key, value = guide["query"], guide["key"], guide["value"]
    points = jax.random.normal(jax.random.key(5), (2, 2, 256, 1, 3))
    fields = (jnp.linspace(0.2, 0.9, 8)[None], *points)

    def ours(query, key, value, weight, x, y):
        bias = SquaredDistance(weight, x, y)
        return attend(query, key, value, bias, is_causal=True)

    def dense(query, key, value, weight, x, y):
        apart = jnp.sum((x[:, :, None, 0] - y[:, None, :, 0]) ** 2, -1)
        bias = -weight[:, :, None, None] * apart[:, None]
        return attend(
            query, key, value, bias, is_causal=True, implementation="reference"
        )

    def with_gradients(function, dtype):
        operands = (x.astype(dtype) for x in (query, key, value, *fields))
        output, pullback = jax.vjp(function, *operands)
        waves = jnp.cos(jnp.arange(output.size, dtype=dtype)).reshape(output.shape)
        return output, pullback(waves)

    with jax.default_matmul_precision("highest"):
        got = with_gradients(ours, jnp.float32)
    with jax.enable_x64(True):
        want = with_gradients(dense, jnp.float64)
    assert_formula(got, want)


def test_every_shell_command_names_what_exists():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    known = {
        r"python3 -m venv \.venv": (),
        r"\.venv/bin/pip install -e '\.\[(\w+)\]'": extras,
        r"\.venv/bin/python -m pallas_attn (\w+)": COMMANDS,
        r"\.venv/bin/python -m (pytest) -n auto": ("pytest",),
    }
    commands = [
        part.strip() for code in SHELL.values() for part in re.split("&&|\n", code)
    ]
    for command in filter(None, commands):
        forms = [(re.fullmatch(form, command), names) for form, names in known.items()]
        matches = [(match, names) for match, names in forms if match]
        assert matches, f"unknown command: {command}"
        for match, names in matches:
            assert set(match.groups()) <= set(names), command
    assert "pytest-xdist" in extras["test"]  # -n


def options_of(command: str) -> set[str]:
    """The options that a command's help names."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        pallas_attn.__main__.main([command, "--help"])
    return set(re.findall(r"--[\w-]+", printed.getvalue()))


@every_page
def test_commands_named_in_the_text_exist(page):
    text = PAGES[page]
    for command, options in re.findall(
        r"python -m pallas_attn (\w+)((?: --[\w-]+)*)", text
    ):
        assert command in COMMANDS
        if options:
            assert set(options.split()) <= options_of(command), command
    for module in re.findall(r"python -m (pallas_attn\.[\w.]+)", text):
        assert importlib.util.find_spec(module), module


@every_page
def test_files_named_in_the_text_exist(page):
    for path in re.findall(r"`([\w./]+/[\w./]+\.(?:py|json|md))`", PAGES[page]):
        assert (ROOT / path).exists() or (ROOT / "pallas_attn" / path).exists(), path
    for path in re.findall(r"\btests/\w+\.py\b", PAGES[page]):
        assert (ROOT / path).exists(), path


@every_page
def test_links_lead_somewhere(page):
    assert len(set(anchors(page))) == len(anchors(page))
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", PAGES[page]):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            name = target.resolve().relative_to(ROOT.resolve()).as_posix()
            assert anchor in anchors(name), link


def test_every_page_is_linked_from_the_readme():
    for page in PAGES:
        assert page == "README.md" or f"]({page})" in README


def test_the_readme_is_short():
    assert len(README.splitlines()) <= MOST_LINES


def test_the_speeds_of_the_readme_are_those_of_the_reports():
    table = README.split("<!-- speed: begin -->\n")[1].split("\n<!-- speed: end")[0]
    assert table == speeds.summary(speeds.committed())


def test_biases_of_the_tables_are_public():
    table = section(GUIDE, "Biases")
    named = re.findall(r"^\|[^|]*`([A-Z]\w+)` \|", table, re.MULTILINE)
    assert named == [
        *("DenseBias", "FactoredBias", "ALiBi", "CoALiBi", "ForgetGate"),
        "RelativeBias",
    ]
    assert set(named) <= set(vars(pallas_attn))
    rows = re.findall(r"^\|.*", section(README, "Which bias for what"), re.MULTILINE)
    advised = set(re.findall(r"\b[A-Z]\w+(?=`|\()", " ".join(rows)))
    assert {*named, "Bias", "Entmax", "Softmax"} == advised


def test_modules_of_the_table_are_public():
    table = section(GUIDE, "Flax layers")
    rows = [row.split(" | ")[0] for row in re.findall(r"^\| `.*", table, re.MULTILINE)]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert len(named) == 9
    assert set(named) <= set(vars(pallas_attn.linen))


def test_ci_runs_the_test_command_of_the_readme():
    script = (ROOT / ".ci" / "run").read_text()
    assert "grep -m 1 -e '-m pytest' README.md" in script
    lines = [line for line in README.splitlines() if "-m pytest" in line]
    assert lines[0] + "\n" in SHELL.values()
    *install, tests = lines[0].split(" && ")
    assert len(install) == 2
    assert tests == ".venv/bin/python -m pytest -n auto"
