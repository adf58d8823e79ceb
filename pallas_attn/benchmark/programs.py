"""The programs of a case, lowered and compiled ahead of time."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array

from pallas_attn.api import dot_product_attention, visited
from pallas_attn.benchmark.errors import relative_errors, truth_dtype
from pallas_attn.benchmark.inputs import draw, Inputs, shapes_of
from pallas_attn.benchmark.peers import PEERS
from pallas_attn.benchmark.specs import Case
from pallas_attn.config import Config
from pallas_attn.implementations import Implementation
from pallas_attn.normalizers.softmax import Softmax


@dataclass(frozen=True)
class Side:
    """Ours or the peer: (query, key, value, bias, normalizer) -> output.

    A peer's normalizer is softmax, and its bias None unless it is `biased`.
    """

    attend: Callable[..., Array]
    is_peer: bool = False
    biased: bool = True

    def inputs(self, inputs: Inputs) -> Inputs:
        """What it is given of a case's arrays."""
        if self.is_peer:
            inputs = inputs._replace(normalizer=Softmax())
            inputs = inputs._replace(mask=None)
        return inputs if self.biased else inputs._replace(bias=None)

    def forward(self, inputs: Inputs) -> Array:
        """The output."""
        return self._of(inputs)(*inputs[:5])

    def _of(self, inputs: Inputs) -> Callable[..., Array]:
        if inputs.mask is None:
            return self.attend
        return functools.partial(self.attend, mask=inputs.mask)

    def both(self, inputs: Inputs) -> dict[str, Any]:
        """The output, and the gradient of every operand, those of pytrees included."""
        output, pullback = jax.vjp(self._of(inputs), *inputs[:5])
        query, key, value, bias, normalizer = pullback(inputs.cotangent)
        return {
            "output": output,
            "query": query,
            "key": key,
            "value": value,
            "bias": bias,
            "normalizer": normalizer,
        }

    def tangents(self, inputs: Inputs) -> tuple[Array, Array]:
        """The output, and its tangent where every operand moves by itself."""
        return jax.jvp(self._of(inputs), inputs[:5], inputs[:5])


def ours(
    case: Case, implementation: Implementation, config: Config | None = None
) -> Side:
    """The public function, as a case calls it, or with another config."""

    def attend(*operands: Any, mask: Array | None = None) -> Array:
        *others, normalizer = operands
        return dot_product_attention(
            *others,
            mask=mask,
            is_causal=case.causal,
            normalizer=normalizer,
            implementation=implementation,
            config=config or case.config,
        )

    return Side(attend)


def sides(case: Case, implementation: Implementation) -> dict[str, Side]:
    """By name: "ours", and "peer" where a case has one."""
    both = {"ours": ours(case, implementation)}
    if case.peer is None:
        return both
    peer = PEERS[case.peer]
    attend = lambda *x: peer.attend(*x[:4], causal=case.causal)
    return {**both, "peer": Side(attend, True, peer.biased and bool(case.bias))}


def jobs(case: Case, implementation: Implementation) -> dict[str, Callable[[], Any]]:
    """By name, what compiles each program of a case.

    "draw", "visited", and for "ours" and "peer": "ours forward", "ours both",
    "ours errors".
    """
    shapes = shapes_of(case)
    found: dict[str, Callable[[], Any]] = {
        "draw": functools.partial(compiled, functools.partial(draw, case), _seed()),
        "visited": functools.partial(compiled, _visited(case, implementation), shapes),
    }
    for name, side in sides(case, implementation).items():
        given = side.inputs(shapes)
        results = {"output": given.query, **given._asdict()}
        del results["cotangent"], results["mask"]
        found[f"{name} forward"] = functools.partial(compiled, side.forward, given)
        found[f"{name} both"] = functools.partial(compiled, side.both, given)
        found[f"{name} errors"] = functools.partial(
            compiled,
            functools.partial(relative_errors, case),
            given,
            results,
            wide=truth_dtype(case) == "float64",
        )
    return found


def _visited(
    case: Case, implementation: Implementation
) -> Callable[[Inputs], dict[str, Array]]:
    """The mean share of visible blocks that each pass visits."""

    def shares(inputs: Inputs) -> dict[str, Array]:
        found = visited(
            *inputs[:4],
            mask=inputs.mask,
            is_causal=case.causal,
            normalizer=inputs.normalizer,
            implementation=implementation,
            config=case.config,
        )
        return {
            "forward": found.forward.mean(),
            "rows": found.rows.mean(),
            "cols": found.cols.mean(),
        }

    return shares


def _seed() -> Array:
    return jax.random.key(0)


def compiled(
    program: Callable[..., Any], *shapes: Any, wide: bool = False
) -> jax.stages.Compiled:
    """A program, compiled for arrays of these shapes; `wide`: float64 is float64."""
    with jax.enable_x64(True) if wide else contextlib.nullcontext():
        return jax.jit(program).lower(*shapes).compile()
