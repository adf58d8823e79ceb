"""Softmax: how a row of scores becomes weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Softmax:
    """P = exp(t - lse), lse = log sum exp t over the visible keys.

    The residual of a call is lse, float32 [B, T, N] in natural units, differentiable.
    """
