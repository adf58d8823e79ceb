"""A failing call made plain: fact after fact left out, as long as it still fails.

A greedy walk instead of hypothesis's search: every try compiles a call, and arrays are
drawn by name, so that a fact can go without any other number changing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pallas_attn.fuzz.draw import changed
from pallas_attn.fuzz.job import Options, plan_of
from pallas_attn.fuzz.plan import PLAIN, Plan
from pallas_attn.fuzz.run import check
from pallas_attn.fuzz.values import value_sets


def shrink(seed: int, options: Options) -> tuple[Plan, dict[str, Any]]:
    """The plainest call found that fails alike, and the facts that it took.

    Args:
        seed: Of a call that fails.
        options: Of the run.
    """
    plan = plan_of(seed, options)
    sets = options.sets or value_sets(plan, options.values)
    found, _ = check(plan, options.implementation, sets)
    if not found:
        return plan, {}
    first = found[0]
    sets = sets[: sets.index(first.chosen) + 1] if first.chosen in sets else sets
    taken: dict[str, Any] = {}
    for facts in _simpler(plan):
        attempt = changed(plan, taken | facts)
        again, _ = check(attempt, options.implementation, sets, repeat=False)
        if any((x.chosen, x.leaf) == (first.chosen, first.leaf) for x in again):
            taken |= facts
    return changed(plan, taken), taken


def _simpler(plan: Plan) -> Iterator[dict[str, Any]]:
    """Facts to try, one after another: what makes the largest difference first."""
    for count in range(len(plan.bias)):
        kept = tuple(f"bias{n}." for n in range(count))
        forms = {name: x for name, x in plan.forms.items() if name.startswith(kept)}
        yield {"bias": plan.bias[:count], "forms": forms}
    for name, usual in PLAIN.items():
        if name != "transform" and getattr(plan, name) != usual:
            yield {name: usual}
    for transform in ("jit", "value"):
        if plan.transform != transform:
            yield {"transform": transform}
