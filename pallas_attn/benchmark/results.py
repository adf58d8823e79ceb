"""What was measured of a case, beside what it is to reach."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pallas_attn.benchmark.timing import Timing


@dataclass(frozen=True)
class Result:
    """The results of one case. Programs are "ours forward", "peer both" and so on.

    Args:
        name: The case's.
        shape: The problem in one line.
        origin: Where the shape is from.
        peer: The peer's title.
        targets: "forward" and "both", or "attention" and "step": the ratio to reach;
            "temporaries_mib", "temporaries_share", "memory_share".
        timings: By program.
        tflops: By program, 10^12 operations in a second: "full" of the whole square of
            queries and keys, "causal" of the visible half.
        temporaries: MiB, by program.
        memory: MiB of operands, results and temporaries, by program; of training steps.
        errors: By side, "ours" and "peer": the relative error by leaf, on a few heads.
        truth: In what the errors' reference was computed.
        visited: The mean share of visible blocks that each pass visits.
        roofline: For "forward" and "both" the least milliseconds if every visible block
            is visited, and our share of the device's peak; empty for unknown devices.
        failures: By program, why it has no result.
    """

    name: str
    shape: str
    origin: str
    peer: str | None
    targets: dict[str, float] = field(default_factory=dict)
    timings: dict[str, Timing] = field(default_factory=dict)
    tflops: dict[str, dict[str, float]] = field(default_factory=dict)
    temporaries: dict[str, float] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    truth: str = ""
    visited: dict[str, float] = field(default_factory=dict)
    roofline: dict[str, dict[str, float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def of_json(values: dict[str, Any]) -> Result:
        """A result as `dataclasses.asdict` gave it to a file."""
        timings = {name: Timing(**x) for name, x in values["timings"].items()}
        return Result(**{**values, "timings": timings})

    def milliseconds(self, program: str) -> float | None:
        """The median of a program, if it ran."""
        timing = self.timings.get(program)
        return None if timing is None else timing.median

    def ratio(self, work: str) -> float | None:
        """Our time over the peer's, for "forward", "both", "attention" or "step"."""
        ours = self.milliseconds(f"ours {work}")
        peer = self.milliseconds(f"peer {work}")
        return None if ours is None or peer is None else ours / peer

    def met(self) -> dict[str, bool]:
        """By target, whether it is reached; what was not measured is not."""
        reached = {
            **{x: self.ratio(x) for x in ("forward", "both", "attention", "step")},
            "temporaries_mib": self.temporaries.get("ours both"),
            "temporaries_share": _share(self.temporaries, "both"),
            "memory_share": _share(self.memory, "step"),
        }
        return {
            name: (value := reached[name]) is not None and value <= target
            for name, target in self.targets.items()
        }

    def worst_ratio(self) -> float:
        """The largest of our times over the peer's; 0 where there is no peer."""
        works = ("forward", "both", "attention", "step")
        return max((x for work in works if (x := self.ratio(work))), default=0.0)

    def lost(self) -> bool:
        """Whether the peer is faster in anything, or a target is missed."""
        return self.worst_ratio() > 1 or not all(self.met().values())

    def worst_error(self, side: str) -> float | None:
        """The largest relative error of a gradient."""
        errors = self.errors.get(side)
        if not errors:
            return None
        return max(error for leaf, error in errors.items() if leaf != "output")

    def host_bound(self) -> list[str]:
        """Programs whose time may be that of the host that enqueues them."""
        return [name for name, t in self.timings.items() if t.host > 0.8 * t.median]


def _share(mib: dict[str, float], work: str) -> float | None:
    ours, peer = mib.get(f"ours {work}"), mib.get(f"peer {work}")
    return None if ours is None or not peer else ours / peer
