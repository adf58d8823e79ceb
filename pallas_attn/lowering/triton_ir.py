"""Questions about the text of Triton IR: how each argument of a kernel is read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass


# What changes neither which entry of a tile a value is nor its linearity: a bias that
# passes through these alone is still "the bias".
_SHAPELESS = frozenset(
    [
        "arith.addf",
        "arith.extf",
        "arith.mulf",
        "arith.negf",
        "arith.subf",
        "arith.truncf",
        "tt.broadcast",
        "tt.expand_dims",
        "tt.trans",
        "ttg.convert_layout",
    ]
)


@dataclass(frozen=True)
class Operation:
    """One line of IR: `result = name operands`, and whether it stands in a loop."""

    result: str
    name: str
    operands: tuple[str, ...]
    looped: bool


def operations(text: str) -> Iterator[Operation]:
    """The operations of a kernel; a loop's carried values are called "carried"."""
    loops: list[int] = []  # the indentation of each loop around the line
    for line in text.splitlines():
        indentation = len(line) - len(line.lstrip())
        if loops and indentation <= loops[-1] and line.lstrip().startswith("}"):
            # `} do {` opens the second region of a while loop
            if "do {" not in line:
                loops.pop()
            continue
        code = line.split(" loc(")[0]
        found = re.match(r"\s*(?:(%\w+)(?::\d+)? = )?\"?([\w.]+)", code)
        if found is None or "%" not in code:
            continue
        result, name = found.group(1) or "", found.group(2)
        if name in ("scf.for", "scf.while"):
            for carried, start in re.findall(
                r"(%\w+) = (%[\w#]+)", code[found.end() :]
            ):
                yield Operation(carried, "carried", (start,), bool(loops))
            loops.append(indentation)
            continue
        operands = tuple(re.findall(r"%[\w#]+", code[found.end() :].split(" : ")[0]))
        yield Operation(result, name, operands, bool(loops))


def copied(ttgir: str) -> frozenset[int]:
    """Arguments that are read by asynchronous copies to shared memory."""
    table = _table(ttgir)
    copies = [
        x for x in table.values() if x.name.startswith("ttg.async_copy_global_to_local")
    ]
    return _arguments(ttgir, table, copies)


def loaded_in_loops(ttgir: str) -> frozenset[int]:
    """Arguments that are loaded into registers inside a loop, whole tiles of them."""
    table = _table(ttgir)
    tiles = {
        found.group(1)
        for found in re.finditer(
            r"(%\w+) = tt\.load .*?: tensor<\d+x\d+x!tt\.ptr", ttgir
        )
    }
    # names are told apart within a function only, and there may be several
    loads = [x for x in table.values() if x.looped and x.result in tiles and x.operands]
    return _arguments(ttgir, table, loads)


def accumulated(ttir: str) -> frozenset[int]:
    """Arguments that some product takes, elementwise, as the start of its accumulator.

    Triton does not pipeline the load of such an argument.
    """
    table = _table(ttir)
    found: list[Operation] = []
    for operation in table.values():
        if operation.name == "tt.dot":
            _loads_behind(operation.operands[2], table, found)
    return _arguments(ttir, table, found)


def turned_choices(ttir: str) -> list[str]:
    """Products, by name, of a transpose of rows of which some were chosen.

    XLA's Triton may move the row's bit to the layout of such a product, through shared
    memory, which holds no bits: it then does not compile.
    """
    table = _table(ttir)

    def chosen(value: str) -> bool:
        operation = table.get(value)
        if operation is None or operation.name != "arith.select":
            return False
        condition = table.get(operation.operands[0])
        return condition is not None and condition.name == "tt.broadcast"

    return [
        x.result
        for x in table.values()
        if x.name == "tt.dot"
        for turned in (table.get(operand) for operand in x.operands[:2])
        if turned and turned.name == "tt.trans" and chosen(turned.operands[0])
    ]


def offset_bits(ttir: str) -> dict[int, int]:
    """The fewest bits that offsets into each argument have, by its place."""
    owners = _places(ttir)  # whose address a value is
    bits: dict[int, int] = {}
    for line in ttir.splitlines():
        code = line.split(" loc(")[0]
        found = re.match(r"\s*(%\w+) = ([\w.]+) (%\w+)?", code)
        if found is None:
            continue
        result, name, source = found.groups()
        owner = owners.get(source) if name.startswith("tt.") else None
        owners.pop(result, None)  # regions beside each other share names
        if owner is None or name == "tt.load":
            continue
        owners[result] = owner
        width = re.search(r"i(\d+)>?$", code)
        if name == "tt.addptr" and width is not None:
            bits[owner] = min(bits.get(owner, 64), int(width.group(1)))
    return bits


def _loads_behind(
    value: str, table: dict[str, Operation], found: list[Operation]
) -> None:
    operation = table.get(value)
    if operation is None:
        return
    if operation.name == "tt.load":
        found.append(operation)
    elif operation.name == "tt.dot":
        _loads_behind(operation.operands[2], table, found)
    elif operation.name in _SHAPELESS:
        for operand in operation.operands:
            _loads_behind(operand, table, found)


def _table(text: str) -> dict[str, Operation]:
    return {x.result: x for x in operations(text) if x.result}


def _arguments(
    text: str, table: dict[str, Operation], reads: list[Operation]
) -> frozenset[int]:
    """The kernel's pointer arguments behind the addresses of `reads`."""
    places = _places(text)
    pending = [x.operands[0] for x in reads]
    seen: set[str] = set()
    while pending:
        value = pending.pop().split("#")[0]
        if value in seen:
            continue
        seen.add(value)
        operation = table.get(value)
        # an index that was loaded itself does not belong to the address' array
        if operation is not None and operation.name != "tt.load":
            pending.extend(operation.operands)
    return frozenset(places[x] for x in seen if x in places)


def _places(text: str) -> dict[str, int]:
    """The arguments' places by their names."""
    signature = re.search(r"tt\.func [^\n]*", text)
    assert signature is not None
    names = re.findall(r"(%\w+): ", signature.group())
    return {name: place for place, name in enumerate(names)}
