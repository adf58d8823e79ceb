"""A few rows of every law that together hold each thing its table has."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence


# Of an id such as "entmax 1.5 top 5, alibi, causal-triton": what each row is made of.
# Numbers alone say how much, not what.
WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")


def covering(names: Sequence[str], most: int | None = None) -> list[int]:
    """Which of the names hold every word that any of them has, in a fixed order.

    Greedy: always the name with the most words that are still missing, the first of
    several. A name without words is like any other; one of them is taken.

    Args:
        names: Ids.
        most: No more than so many, those with the most words.
    """
    words = [_parts(name) for name in names]
    missing, chosen = set().union(*words), []
    while missing and len(chosen) != most:
        best = max(range(len(names)), key=lambda n: (len(words[n] & missing), -n))
        chosen.append(best)
        missing -= words[best]
    return sorted(chosen)


def _parts(name: str) -> frozenset[tuple[str, ...]]:
    """Its words, and each beside the implementation that runs it, if it names one."""
    words = WORD.findall(name) or [""]
    run_by = [x for x in words if x.startswith("triton")]
    return frozenset([(x,) for x in words] + [(x, y) for x in words for y in run_by])


def outside(ids: Iterable[str], most: Mapping[str, int] = {}) -> set[str]:
    """The test ids that `covering` leaves out of their laws, each law by itself.

    Args:
        ids: Of rows.
        most: By law, how many of its rows may stay.
    """
    laws: dict[str, list[str]] = {}
    for name in ids:
        laws.setdefault(name.partition("[")[0], []).append(name)
    left = set()
    for name, rows in laws.items():
        if len(rows) > 1:
            own = [x[len(name) :] for x in rows]
            kept = {rows[n] for n in covering(own, most.get(name))}
            left |= {x for x in rows if x not in kept}
    return left
