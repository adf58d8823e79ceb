"""Try several blocks for a pass in one run: `bench --sweep rows=128x64x8x3,...`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_attn.benchmark import measure, timing
from pallas_attn.benchmark.inputs import draw, shapes_of
from pallas_attn.benchmark.programs import compiled, ours
from pallas_attn.benchmark.specs import Case
from pallas_attn.benchmark.timing import Failure, Timing
from pallas_attn.config import Block, Config
from pallas_attn.implementations import Implementation


# What is timed for the blocks of each pass.
PASSES = {
    "forward": "forward",
    "rows": "both",
    "cols": "both",
    "tiles": "both",
    "tangent": "tangents",
}


@dataclass(frozen=True)
class Trial:
    """One Config on one case.

    Args:
        case: The case's name.
        name: The pass and its block, as in "rows=128x64x8x3", or "shipped".
        work: What was timed, a method of `Side`.
        timing: Its time; None if it failed.
        difference: The largest norm(result - shipped) / norm(shipped) of its results: a
            Config that races or is not lowered well shows here.
        failure: Why it failed.
    """

    case: str
    name: str
    work: str
    timing: Timing | None = None
    difference: float | None = None
    failure: str | None = None


def parsed(text: str) -> list[tuple[str, Block]]:
    """Of `pass=QxK[xWARPS[xSTAGES]],...` the pass and each block.

    Raises:
        ValueError: says what the form is.

    >>> parsed("forward=128x64x8x3")
    [('forward', Block(block_q=128, block_k=64, num_warps=8, num_stages=3))]
    """
    which, _, blocks = text.partition("=")
    try:
        found = [Block(*map(int, block.split("x"))) for block in blocks.split(",")]
    except (TypeError, ValueError):
        found = []
    if which not in PASSES or not found:
        raise ValueError(
            "`--sweep` takes PASS=QUERIESxKEYS[xWARPS[xSTAGES]][,...], PASS one of "
            f"{', '.join(PASSES)}; got {text!r}."
        )
    return [(which, block) for block in found]


def swept(
    cases: Sequence[Case],
    choices: Sequence[tuple[str, Block]],
    implementation: Implementation,
    repeats: int,
    say: Callable[[str], None],
) -> list[Trial]:
    """All blocks on all cases, beside the shipped choice; the fastest first."""
    jobs = {
        (case.name, *key): functools.partial(
            _compile, case, implementation, key, config
        )
        for case in cases
        for key, config in _configs(case, choices).items()
    }
    draws = {
        (case.name, "draw"): functools.partial(
            compiled, functools.partial(draw, case), jax.random.key(0)
        )
        for case in cases
    }
    programs = measure.compiled_programs(jobs | draws, say)
    trials = []
    for case in cases:
        own = {key[1:]: x for key, x in programs.items() if key[0] == case.name}
        found = _timed(case, own, repeats)
        for trial in found:
            say(line(trial))
        trials += found
    return trials


def line(trial: Trial) -> str:
    """A trial as text."""
    start = f"  {trial.case:20} {trial.work:8} {trial.name:24}"
    if trial.timing is None:
        return f"{start} failed: {(trial.failure or '').splitlines()[0]}"
    return f"{start} {trial.timing.median:8.3f} ms  differs by {trial.difference:.1e}"


def _configs(
    case: Case, choices: Sequence[tuple[str, Block]]
) -> dict[tuple[str, str], Config | None]:
    """By work and name: the case's own choice for each work, and the others."""
    own = case.config or Config()
    found: dict[tuple[str, str], Config | None] = {
        (PASSES[which], "shipped"): None for which, _ in choices
    }
    for which, b in choices:
        name = f"{which}={b.block_q}x{b.block_k}x{b.num_warps}x{b.num_stages}"
        found[PASSES[which], name] = dataclasses.replace(own, **{which: b})
    return found


def _compile(
    case: Case,
    implementation: Implementation,
    key: tuple[str, str],
    config: Config | None,
) -> Any:
    side = ours(case, implementation, config)
    return compiled(getattr(side, key[0]), shapes_of(case))


def _timed(case: Case, programs: dict[Any, Any], repeats: int) -> list[Trial]:
    draws = programs.pop(("draw",))
    if isinstance(draws, Failure):
        return [Trial(case.name, "draw", "draw", failure=draws.text)]
    inputs = draws(jax.random.key(0))
    ready = {key: x for key, x in programs.items() if not isinstance(x, Failure)}
    calls = {key: functools.partial(x, inputs) for key, x in ready.items()}
    taken = timing.interleaved(calls, queued=measure.on_gpu(), repeats=repeats)
    trials = []
    for (work, name), program in programs.items():
        result = program if isinstance(program, Failure) else taken[work, name]
        if isinstance(result, Failure):
            trials.append(Trial(case.name, name, work, failure=result.text))
            continue
        shipped = taken.get((work, "shipped"))
        difference = None
        if isinstance(shipped, Timing):
            difference = _difference(calls[work, name](), calls[work, "shipped"]())
        trials.append(Trial(case.name, name, work, result, difference))
    last = float("inf")
    return sorted(trials, key=lambda t: (t.work, t.timing.median if t.timing else last))


@jax.jit
def _differences(one: Any, other: Any) -> list[jax.Array]:
    def relative(x: jax.Array, y: jax.Array) -> jax.Array:
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        return jnp.sqrt(jnp.sum((x - y) ** 2) / jnp.sum(y**2))

    return jax.tree.leaves(jax.tree.map(relative, one, other))


def _difference(one: Any, other: Any) -> float:
    return max(map(float, _differences(one, other)))
