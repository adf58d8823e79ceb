"""Small faults planted by hand, one in each main room: do the tests catch them?

`python -m pallas_attn.testing.mutations` plants each in a copy of the repository and
runs the tests that should catch it: first the rows that the test command runs, then, if
all of those pass, every other row of the same files. What one file catches, the whole
command catches.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).parents[2]
COPIED = ("pallas_attn", "tests", "notebooks", "pyproject.toml", "README.md")


@dataclass(frozen=True)
class Fault:
    """One line as it is and as it would be wrong.

    Args:
        kind: What is wrong.
        path: Of the file, in the package.
        right: Text that the file has once.
        wrong: What stands there instead.
        tests: The files that should catch it, after tests/test_.
    """

    kind: str
    path: str
    right: str
    wrong: str
    tests: str


FAULTS = (
    Fault("a mask's edge", "triton/tile.py",
          "checks.append(k <= q)", "checks.append(k < q)", "values"),
    Fault("a range that ends one early", "tiled/block_ranges.py",
          "least(last, p1 + 1)", "least(last, p1)", "positions"),
    Fault("a window's edge", "positions.py",
          "[k >= moved(q, -left)]", "[k >= moved(q, 1 - left)]", "values positions"),
    Fault("a missing scale", "triton/backward.py",
          "state.dq * call.scale", "state.dq", "gradients"),
    Fault("a tangent whose weights do not add up to 1", "triton/tangent.py",
          "acc - total[:, None] * t0", "acc - 0 * total[:, None] * t0", "forward_mode"),
    Fault("a gradient's sign", "normalizers/softmax.py",
          "return p * (dp - delta)", "return p * (delta - dp)", "gradients"),
    Fault("a missing term of a sum", "normalizers/softmax.py",
          "jnp.inf, reference + jnp.log2(total)", "jnp.inf, reference",
          "values gradients"),
    Fault("a missing reduction", "tiled/autodiff.py",
          "if x.shape[a] == 1 < g.shape[a]]", "if x.shape[a] == 1 < g.shape[a]][:1]",
          "gradients"),
    Fault("dropout that does not rescale", "triton/backward.py",
          "dv = dv * rescale(call) if call.dropout else dv", "dv = dv", "dropout"),
    Fault("dropout alike in every head", "dropout.py",
          "return _mixed(_mixed(seed[0] + b) + n), _mixed(_mixed(seed[1] ^ b) ^ n)",
          "return _mixed(_mixed(seed[0] + b)), _mixed(_mixed(seed[1] ^ b))", "dropout"),
    Fault("a bound that is too low", "triton/pruning.py",
          "schedule.above(norm * reach + bound(", "schedule.above(0.5 * norm * reach + "
          "bound(", "pruning"),
    Fault("an index past the end", "triton/tile.py",
          "checks.append(self.along_k(k < self.frame.keys[1]))",
          "checks.append(self.along_k(k <= self.frame.keys[1]))",
          "padding values guards"),
    Fault("a query that sees another's NaN", "triton/tile.py",
          "visible is None or not self.sight.veiled", "visible is None or True",
          "unseen padding"),
    Fault("a range of another head", "triton/ds_products.py",
          "queries_of(t0, two=False)", "queries_of(x0, two=False)", "positions"),
    Fault("a flag that nobody looks at", "triton/again.py",
          "lax.cond(flagged, lambda: run(number), lambda: None)",
          "lax.cond(flagged & (number < 0), lambda: run(number), lambda: None)",
          "unseen"),
    Fault("entmax of another alpha", "triton/entmax/power.py",
          "a = call.alpha - 1\n", "a = call.alpha - 1.01\n", "entmax"),
    Fault("a sink that rows forget", "tiled/autodiff.py",
          "gradient = jnp.where(empty, dlse, -weight * delta)",
          "gradient = jnp.where(empty, 0.0, -weight * delta)", "sinks"),
    Fault("a dtype", "triton/backward.py",
          "transposed(p.astype(do.dtype))",
          "transposed(p.astype(jnp.bfloat16).astype(do.dtype))", "gradients"),
    Fault("gates of the wrong keys", "triton/co_alibi/scan.py",
          "return self._product(g, self.ones.suffix)",
          "return self._product(g, self.ones.prefix)", "values gradients"),
    Fault("sums one position late", "bias/forget_gate.py",
          "first = min(max(offset, -count), keys) + count",
          "first = min(max(offset, -count), keys) + count - 1", "forget_gate"),
    Fault("a chunk that keys end before", "xla/chunks.py",
          "stop = queries + 1", "stop = queries", "xla"),
    Fault("a token in another's place", "layers/cache.py",
          "places = self.positions.reshape(entries, self.new)",
          "places = self.positions.reshape(entries, self.new) + 1", "linen"),
    Fault("a bucket of the other side", "layers/relative.py",
          "after = (distance < 0) * side", "after = (distance <= 0) * side",
          "linen_bias"),
    Fault("a diagonal beside its own", "bias/diagonals.py",
          "[..., T - 1 :]", "[..., T - 2 : -1]", "linen_bias"),
    Fault("a block diagonal too few", "triton/diagonals.py",
          "last + 1 + ahead", "last + ahead", "relative"),
    Fault("a bound at the wrong end", "bias/alibi.py",
          "jnp.maximum(jnp.maximum(q0 - k1,", "jnp.maximum(jnp.maximum(q0 - k0,",
          "pruning"),
)  # fmt: skip


def main() -> int:
    """Plants every fault, or those whose kind has a word of the command's.

    Returns:
        The exit status: 0 if every fault is caught.
    """
    parser = argparse.ArgumentParser(
        prog="python -m pallas_attn.testing.mutations", description=__doc__
    )
    parser.add_argument("words", nargs="*", help="plant only kinds that hold these")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    given = parser.parse_args()
    chosen = [x for x in FAULTS if all(word in x.kind for word in given.words)]
    at_once = later = 0
    for number, fault in enumerate(chosen, 1):
        start = time.monotonic()
        found = caught(fault, given.processes)
        at_once, later = at_once + (found == "covering"), later + (found == "rest")
        seconds = time.monotonic() - start
        by = f"caught by the {found} rows" if found else "NOT CAUGHT"
        print(f"{number:2} {by}, {seconds:.0f} s: {fault.kind} ({fault.path})")
        sys.stdout.flush()
    total = at_once + later
    print(f"{len(chosen)} faults: the test command catches {at_once}, all rows {total}")
    return int(total < len(chosen))


def caught(fault: Fault, processes: int) -> str | None:
    """Which rows catch a fault, "covering" or "rest"; None if none do."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            whole = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            whole(ROOT / name, copy / name)
        file = copy / "pallas_attn" / fault.path
        file.write_text(planted(fault, file.read_text()))
        for rows in ("covering", "rest"):
            if not _passes(copy, fault, rows, processes):
                return rows
    return None


def planted(fault: Fault, text: str) -> str:
    """A file's text with the fault in it.

    Raises:
        ValueError: if the text has not the right line once.
    """
    if text.count(fault.right) != 1:
        raise ValueError(f"{fault.path} has {fault.right!r} {text.count(fault.right)}x")
    return text.replace(fault.right, fault.wrong)


def _passes(copy: Path, fault: Fault, rows: str, processes: int) -> bool:
    files = [f"tests/test_{name}.py" for name in fault.tests.split()]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--rows", rows, *files]
    command += ["-n", str(processes), "-p", "no:cacheprovider"]
    done = subprocess.run(
        command,
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode in (0, 5):  # 5: there is no such row
        return True
    if " failed" not in done.stdout and " error" not in done.stdout:
        raise RuntimeError(f"pytest for {fault.kind!r}:\n{done.stdout[-2000:]}")
    return False


if __name__ == "__main__":
    raise SystemExit(main())
