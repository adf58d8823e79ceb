"""The work that a case cannot do without, and what a device can do in a second."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_attn.benchmark.inputs import Inputs, shapes_of
from pallas_attn.benchmark.specs import Case


@dataclass(frozen=True)
class Device:
    """Datasheet rates: bfloat16 matrix products without sparsity, and memory."""

    flops: float
    bytes: float


# The first whose name is part of the device's.
DEVICES = {
    "H200": Device(989e12, 4.8e12),
    "H100 PCIe": Device(756e12, 2.0e12),
    "H100": Device(989e12, 3.35e12),
    "A100": Device(312e12, 2.0e12),
    "B200": Device(2250e12, 8.0e12),
}


@dataclass(frozen=True)
class Work:
    """Floating-point operations of the matrix products, and bytes of memory traffic."""

    flops: float
    bytes: float

    def floor_ms(self, device: Device) -> float:
        """No version that visits every block runs faster."""
        return 1e3 * max(self.flops / device.flops, self.bytes / device.bytes)

    def peak_share(self, device: Device, milliseconds: float) -> float:
        """The rate as a share of the device's; above 1 only if blocks are left out."""
        return self.flops / (1e-3 * milliseconds) / device.flops


def device(kind: str) -> Device | None:
    """The rates of a device by its name; None if unknown."""
    return next((rates for name, rates in DEVICES.items() if name in kind), None)


def pairs(case: Case) -> int:
    """Pairs of query and key that see each other, over the batch and all heads."""
    seen = case.T * (case.T + 1) // 2 if case.causal else case.T * case.T
    return case.B * case.N * seen


def forward(case: Case) -> Work:
    """Two products over H, one over R; every operand read once, the output written.

    flops = pairs (4 H + 2 R)
    """
    shapes = shapes_of(case)
    operands = shapes._replace(cotangent=None)
    moved = _bytes(operands) + _bytes(shapes.query)
    return Work(float(pairs(case) * (4 * case.H + 2 * _rank(case))), moved)


def both(case: Case) -> Work:
    """Forward and backward: seven products over H, four over R.

    Each of the two reads every operand, the backward the output and its cotangent too;
    the output and every gradient are written.

    flops = pairs (14 H + 8 R)
    """
    shapes = shapes_of(case)
    operands: Inputs = shapes._replace(cotangent=None)
    moved = 3 * _bytes(operands) + 3 * _bytes(shapes.query)
    return Work(float(pairs(case) * (14 * case.H + 8 * _rank(case))), moved)


def tflops(case: Case, work: str, milliseconds: float) -> dict[str, float]:
    """10^12 operations in a second, as papers count them: products over H alone.

    Of a forward pass 4 T S H for each head and batch entry, of forward and backward
    3.5 times as many; pairs that causality hides count in one convention and not in the
    other.

    Args:
        case: What ran.
        work: "forward" or "both".
        milliseconds: How long it took.

    Returns:
        "full", of the whole square of queries and keys; and "causal", half of it, for a
        causal case.
    """
    flops = 4 * case.B * case.N * case.T * case.T * case.H
    full = flops * {"forward": 1.0, "both": 3.5}[work] / (1e-3 * milliseconds) / 1e12
    return {"full": full, "causal": full / 2} if case.causal else {"full": full}


def _rank(case: Case) -> int:
    return sum(term.rank for term in case.bias)


def _bytes(tree: object) -> float:
    leaves = jax.tree.leaves(tree)
    return float(sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in leaves))
