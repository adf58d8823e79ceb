"""Calls on a mesh against the same calls on one device: `python -m` it on many devices.

Devices of a CPU are made by XLA_FLAGS=--xla_force_host_platform_device_count=4, which a
process reads when it starts: the law runs this as a process of its own.
"""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pallas_attn.testing.cases import Case
from pallas_attn.testing.evaluate import attention, EXACT, small, with_gradients
from pallas_attn.testing.numerics import assert_formula, assert_same_bits


# Every size that is split has a number of its own, by which arrays are placed.
SIZES = {"B": 4, "N": 12, "K": 4, "T": 9, "S": 13, "H": 6, "h": 7}

# What moves operands between devices. Sums of gradients, all-reduces, are needed.
MOVES = re.compile(r"(all-gather|all-to-all|collective-permute)(?:-start)?\(")


@dataclass(frozen=True)
class Placed:
    """A case on a mesh.

    Args:
        case: Its sizes are `SIZES`.
        implementation: As in the public function.
        way: "auto", "explicit" or "shard_map".
        split: What is sharded: "B", "N" or "BN".
    """

    case: Case
    implementation: str
    way: str
    split: str

    def __str__(self) -> str:
        return f"{self.case}; {self.implementation}, {self.way}, {self.split}"


# (bias, situation, normalizer), by way and split in turn.
CALLS = (
    ("sum", "dropout GQA soft cap", "softmax"),
    ("dense-1NTS", "mask B11S", "entmax learned"),
    ("co_alibi", "causal lengths GQA", "softmax"),
    ("saturating", "segments", "entmax 1.5 top 3"),
    ("forget gate", "causal", "softmax"),
    ("factored", "positions per head", "softmax"),
    ("alibi", "causal GQA", "sink"),
    ("co_alibi", "causal", "sink"),
)
# The first of these run in every implementation: kernels compile slowly, interpreted.
FIRST = 2
WAYS = ("auto", "explicit", "shard_map")
SPLITS = ("BN", "N", "B")


def placed(devices: int, every: bool = False) -> Iterator[Placed]:
    """The table: each call in "xla", the first in the kernels and the reference too.

    Args:
        devices: How many there are; two take the first calls alone.
        every: Each call in all implementations.
    """
    for n, (bias, situation, normalizer) in enumerate(CALLS):
        first = n < FIRST or every
        if devices == 2 and not first:
            continue
        case = Case(bias, situation, (), normalizer).at(**SIZES)
        for m, name in enumerate(("triton_interpret", "xla", "reference")):
            if name == "xla" or (first and devices > 2):
                way, split = WAYS[(n + m) % 3], SPLITS[(n + m) % 3]
                if "dropout" in situation and way == "shard_map":
                    way = "explicit"  # shards of shard_map have masks of their own
                yield Placed(case, name, way, split)


def check(row: Placed) -> None:
    """Sharded equals unsharded, every gradient too, twice in the same bits.

    And tangents, where kernels make them.

    Raises:
        AssertionError: if it does not, or if the program moves what is sharded.
    """
    sample = row.case.sample()
    options: dict[str, Any] = {
        "implementation": row.implementation,
        "config": small(row.case.bias, row.case.normalizer),
        **EXACT,
    }
    arguments = (sample.operands, sample.conditions, sample.cotangents)
    specs = specs_of(arguments, row.split)
    # a gradient lies as its operand does: that of a shared one is summed
    graded = with_gradients(sample.settings, **options)
    _check(row, graded, arguments, (specs[2], specs[0]))
    if row.implementation != "triton_interpret":
        return
    attend = attention(sample.settings, **options)

    def tangents(operands: Any, conditions: Any, moved: Any) -> Any:
        return jax.jvp(lambda x: attend(x, conditions), (operands,), (moved,))

    moved = jax.tree.map(lambda x: x[..., ::-1], sample.operands)
    given = (sample.operands, sample.conditions, moved)
    _check(row, tangents, given, (specs[2], specs[2]))


def _check(
    row: Placed, function: Callable[..., Any], arguments: tuple[Any, ...], outs: Any
) -> None:
    """A function of a sample, sharded, is what it is unsharded; outs: how it lies."""
    want = jax.jit(function)(*arguments)
    if row.way == "shard_map":
        _check_mapped(row, function, arguments, outs, want)
        return
    kind = AxisType.Auto if row.way == "auto" else AxisType.Explicit
    mesh = _mesh(kind)
    specs = specs_of(arguments, row.split)
    there = jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), arguments, specs
    )
    # with the mesh in the context or known by the arrays alone
    with jax.set_mesh(mesh) if row.split == "BN" else contextlib.nullcontext():
        program = jax.jit(function).lower(*there).compile()
        got = program(*there)
    assert_formula(got, want)
    assert_same_bits(program(*there), got)
    moves = MOVES.findall(program.as_text() or "")
    assert not moves, f"the program has {moves}"
    output = got[0][0]
    lies = NamedSharding(mesh, outs[0][0])
    assert output.sharding.is_equivalent_to(lies, output.ndim)


def _check_mapped(
    row: Placed,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    outs: Any,
    want: Any,
) -> None:
    """Inside `jax.shard_map` as it is by default; dropout would have other masks."""
    mesh, specs = _mesh(AxisType.Auto), specs_of(arguments, row.split)
    run = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=outs)
    program = jax.jit(run)
    got = program(*arguments)
    assert_formula(got, want)
    assert_same_bits(program(*arguments), got)


def specs_of(tree: Any, split: str) -> Any:
    """Where each axis lies: known by its place or its size, all else whole."""
    every = ("batch", "heads")
    entries_over, heads_over = {
        "B": (every, None),
        "N": (None, every),
        "BN": every,
    }[split]

    def spec(path: Any, x: Any) -> PartitionSpec:
        is_key = any(getattr(p, "key", None) in ("key", "value") for p in path)
        entries: list[Any] = [None] * x.ndim
        for axis, n in enumerate(x.shape):
            if axis == 0 and n == SIZES["B"]:
                entries[axis] = entries_over
            elif n == SIZES["N"] or (is_key and axis == 2):
                entries[axis] = heads_over
        return PartitionSpec(*entries)

    return jax.tree_util.tree_map_with_path(spec, tree)


def _mesh(kind: AxisType) -> Any:
    count = jax.device_count()
    shape = (2, 2) if count == 4 else (count, 1)
    return jax.make_mesh(shape, ("batch", "heads"), axis_types=(kind,) * 2)


def main(argv: Sequence[str]) -> int:
    """Checks the table, or of all rows those whose names hold every word given."""
    jax.config.update("jax_disable_most_optimizations", True)
    failures = 0
    for row in placed(jax.device_count(), every=bool(argv)):
        if not all(word in str(row) for word in argv):
            continue
        start = time.process_time()
        try:
            check(row)
            print(f"pass  {row}, {time.process_time() - start:.1f} s", flush=True)
        except Exception as error:
            failures += 1
            print(f"FAIL  {row}\n{type(error).__name__}: {error}", flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
