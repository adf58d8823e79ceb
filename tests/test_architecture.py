"""Imports go down only: the law that `pallas_attn/README.md` draws, held by `ast`."""

import ast
import functools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parent.parent / "pallas_attn"
MAP = (PACKAGE / "README.md").read_text()
LAW = re.search(r"^```law\n(.*?)^```$", MAP, re.MULTILINE | re.DOTALL)
TREE = re.search(r"^## Rooms\n\n```text\n(.*?)^```$", MAP, re.MULTILINE | re.DOTALL)

LOWERING = "jax.experimental.pallas.triton"


def levels() -> list[list[str]]:
    """The rooms from the top of the drawing to its ground, a list for each line."""
    assert LAW is not None
    return [line.replace("|", " ").split() for line in LAW[1].splitlines()]


def computing() -> set[str]:
    """The rooms that compute attention, each for itself: those with `|` between."""
    assert LAW is not None
    (line,) = [line for line in LAW[1].splitlines() if "|" in line]
    return set(line.replace("|", " ").split())


def room_of(module: str) -> str:
    """The room of a module of the package; of the package itself its own name."""
    _, _, inner = module.partition(".")
    return inner.partition(".")[0] or "pallas_attn"


@functools.cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    return {
        ".".join(("pallas_attn", *parts)).removesuffix(".__init__"): path
        for path in sorted(PACKAGE.rglob("*.py"))
        for parts in [path.relative_to(PACKAGE).with_suffix("").parts]
    }


def imported(source: str) -> set[str]:
    """The modules that a source imports, wherever in it the import stands."""
    found = set()
    for node in statements(ast.parse(source).body):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_module = inner in modules() or inner == LOWERING
                found.add(inner if is_module else node.module)
    return found


def statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements and those within them; expressions, which import nothing, are many."""
    for node in body:
        yield node
        for block in ("body", "orelse", "finalbody", "handlers", "cases"):
            yield from statements(getattr(node, block, ()))


@functools.cache
def imports() -> dict[str, set[str]]:
    """What every module of the package imports."""
    return {name: imported(path.read_text()) for name, path in modules().items()}


def broken(module: str, found: Iterable[str]) -> list[str]:
    """The imports of a module that the law forbids."""
    height = {room: -n for n, line in enumerate(levels()) for room in line}
    testing, implementations = height["testing"], height["implementations"]
    own, wrong = room_of(module), []
    for name in sorted(x for x in found if x.split(".")[0] == "pallas_attn"):
        room = room_of(name)
        up = room != own and height[room] >= height[own]
        outside = implementations < height[own] < testing and room in computing()
        if up or outside:
            wrong.append(f"{module} imports {name}")
    return wrong


def test_the_drawing_has_every_room_once():
    drawn = [room for line in levels() for room in line]
    assert sorted(drawn) == sorted({room_of(name) for name in modules()})


def test_imports_go_down():
    assert [x for name, found in imports().items() for x in broken(name, found)] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pallas_attn.xla.entmax", "from pallas_attn.reference.entmax import largest"),
        ("pallas_attn.bias.base", "from pallas_attn.checks import arrays"),
        ("pallas_attn.bias.base", "def f():\n    import pallas_attn"),
        ("pallas_attn.tiled.plan", "from pallas_attn.triton.launch import launch"),
        ("pallas_attn.linen.plug", "from pallas_attn.triton.tile import Tile"),
        ("pallas_attn.normalizers.softmax", "from pallas_attn.bias import base"),
        ("pallas_attn.api", "import pallas_attn.testing.cases"),
    ],
)
def test_what_goes_up_or_across_is_found(module, source):
    (wrong,) = broken(module, imported(source))
    assert wrong.startswith(f"{module} imports pallas_attn")


def test_what_the_law_allows_is_not_found():
    allowed = "from pallas_attn.triton.tile import Tile"
    for module in ("triton.forward", "testing.guards", "implementations"):
        assert not broken(f"pallas_attn.{module}", imported(allowed))


def test_the_map_says_which_files_import_the_lowering():
    found = {name for name, x in imports().items() if LOWERING in x}
    sentence = MAP.split(f"\n* `{LOWERING}`")[1].split("\n\n")[0]
    named = re.findall(r"`([\w/]+)\.py`", sentence)
    assert found == {"pallas_attn." + x.replace("/", ".") for x in named}


def test_the_tree_names_every_room():
    assert TREE is not None
    named = set(re.findall(r"^(?:\S+ )*?\S+(?=  |$)", TREE[1], re.MULTILINE))
    named = {x.rstrip("/").removesuffix(".py") for line in named for x in line.split()}
    lying = {path.stem for path in PACKAGE.iterdir() if is_room(path)}
    assert named == lying - {"__init__"}


def is_room(path: Path) -> bool:
    """Whether a path in the package is a module or a folder of modules."""
    return path.suffix == ".py" or (path / "__init__.py").exists()
