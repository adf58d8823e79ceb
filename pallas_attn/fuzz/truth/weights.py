"""Softmax and entmax of rows, and which keys a `top_k` selects."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pallas_attn.fuzz.plan import Arrays, Plan
from pallas_attn.fuzz.truth.arrays import of_head


# Roundings of a float32 score that may lie between the last selected and the next.
CLOSE = 64 * 2.0**-24
# A float32 x that is this near the threshold may lie on either side of it.
EDGE = 2e-5
# From here on an entmax weight's derivative jumps at the threshold.
STEEP = 0.7


@dataclass(frozen=True)
class Weights:
    """Of every row; [*L, N, T, S] or [*L, N, T, 1] unless said.

    Args:
        p: The weights.
        u: p^(2 - alpha) on the support; p where alpha is 1.
        total: The sum of u; 1 in rows that see nothing.
        residual: lse or tau, [*L, N, T].
        t: The logits, -inf where hidden or not selected.
        slope: alpha - 1, [N, 1, 1].
        unselected: Rows whose selection is within rounding, [*L, N, T].
        unsure: Those, and rows whose gradient jumps within rounding, [*L, N, T].
    """

    p: np.ndarray
    u: np.ndarray
    total: np.ndarray
    residual: np.ndarray
    t: np.ndarray
    slope: np.ndarray
    unselected: np.ndarray
    unsure: np.ndarray


def weights(
    plan: Plan,
    operands: Arrays,
    t: np.ndarray,
    size: np.ndarray,
    shared: np.ndarray | float = 0.0,
) -> Weights:
    """The weights of logits t + shared.

    Args:
        plan: The call.
        operands: Alpha, if it is an array, and a sink.
        t: Logits [*L, N, T, S], -inf where hidden.
        size: The largest sum of absolute values in a row of logits, [*L, N, T].
        shared: What all of a row have, [*L, N, T, 1]: no weight sees it but a sink's.
    """
    alpha, top_k = plan.normalizer or (1.0, None)
    alphas = operands.get("alpha", np.full(1, alpha))
    a = np.broadcast_to(alphas - 1, (plan.N,))[:, None, None]
    alive = np.asarray(np.isfinite(t).any(-1))
    unselected = np.zeros(alive.shape, bool)
    if top_k is not None and top_k < plan.S:
        t, unselected = _selected(plan, t, top_k, size)
    if not math.prod(t.shape):
        nothing = np.zeros(t.shape)
        empty = np.where((a == 0)[..., 0], -np.inf, np.inf) + np.zeros(alive.shape)
        if "sink" in operands:
            empty = of_head(operands["sink"])[..., 0] + np.zeros(alive.shape)
        one = np.ones((*alive.shape, 1))
        return Weights(nothing, nothing, one, empty, t, a, unselected, unselected)
    peak = np.where(alive, t.max(-1), 0.0)[..., None]
    if "sink" in operands:
        return _with_sink(of_head(operands["sink"]), t, peak, alive, shared, a)
    e = np.exp(t - peak)
    total = np.where(alive, e.sum(-1), 1.0)[..., None]
    p = u = e / total
    residual = np.where(alive, (peak + np.log(total))[..., 0], -np.inf)
    unsure = unselected
    if (a > 0).any():
        slope = np.where(a > 0, a, 0.5)
        on = np.broadcast_to(a > 0, (*alive.shape, 1))
        sparse, support, tau, above = entmax(t, slope)
        p, u = np.where(on, sparse, p), np.where(on, support, u)
        residual = np.where(on[..., 0], np.where(alive, tau, np.inf), residual)
        there = np.isfinite(t)
        reach = EDGE * (1 + np.abs(np.where(there, t, 0)))
        near = there & (np.abs(np.where(there, above, np.inf)) < reach)
        unsure = unselected | (near.any(-1) & (a[..., 0] > STEEP))
    total = np.where(alive, u.sum(-1), 1.0)[..., None]
    apart = np.where(alive, np.broadcast_to(shared, (*alive.shape, 1))[..., 0], 0.0)
    residual = residual + np.where(a == 0, 1.0, a)[..., 0] * apart
    return Weights(p, u, total, residual, t + shared, a, unselected, unsure)


def _with_sink(
    sink: np.ndarray,
    t: np.ndarray,
    peak: np.ndarray,
    alive: np.ndarray,
    shared: np.ndarray | float,
    a: np.ndarray,
) -> Weights:
    """Softmax with one more score; of rows that see nothing it is the residual."""
    score = sink - shared + np.zeros_like(peak)
    top = np.maximum(peak, score)
    e = np.exp(t - top)
    total = np.where(
        alive[..., None], e.sum(-1, keepdims=True) + np.exp(score - top), 1
    )
    whole = np.where(score > peak, sink, peak + shared) + np.log(total)
    residual = np.where(alive[..., None], whole, sink)[..., 0]
    p, sure = e / total, np.zeros(alive.shape, bool)
    return Weights(p, p, np.ones_like(total), residual, t + shared, a, sure, sure)


def entmax(
    t: np.ndarray, a: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(p, u, tau [..], x - tau) of rows, a = alpha - 1 > 0; t is -inf where hidden.

    Newton's iteration for the gap max x - tau, on sum(p)^a, which is concave in it:
    from gap 1, where the sum is at least 1, it falls to the root without overshooting.
    """
    there = np.isfinite(t)
    alive = there.any(-1, keepdims=True)
    peak = np.where(alive, np.where(there, t, -np.inf).max(-1, keepdims=True), 0.0)
    x = np.where(there, a * (np.where(there, t, 0) - peak), -np.inf)
    gap = np.ones_like(peak + a)
    for _ in range(60):
        z = np.maximum(x + gap, 0)
        p = z ** (1 / a)
        u = np.where(z > 0, z ** (1 / a - 1), 0)
        total = np.where(alive, p.sum(-1, keepdims=True), 1)
        slope = np.where(alive, u.sum(-1, keepdims=True), 1)
        gap = gap - (total**a - 1) / (total ** (a - 1) * slope)
        if np.abs(total - 1).max(initial=0) < 1e-15:
            break
    z = np.maximum(x + gap, 0)
    p = np.where(alive, z ** (1 / a), 0)
    u = np.where(alive & (z > 0), z ** (1 / a - 1), 0)
    return p, u, (a * peak - gap)[..., 0], np.where(there, x + gap, -np.inf)


def alpha_gradient(
    found: Weights,
    rounded: np.ndarray,
    u: np.ndarray,
    pulled: np.ndarray,
    delta: np.ndarray,
    dresidual: np.ndarray,
) -> np.ndarray:
    """dL/dalpha of every row, [*L, N, T, 1].

    With a = alpha - 1: [(<p, dP> - delta)/a - sum p log p (dP - delta)]/a, and at
    alpha = 1 its limit <dP, p/2 (sum p log^2 p - log^2 p)>.

    Args:
        found: The weights.
        rounded: The weights, with what rounding did to them.
        u: As `found` has it, rounded.
        pulled: dP.
        delta: <u, dP> / sum u.
        dresidual: The cotangent of the residual, [*L, N, T, 1].
    """
    p, a = found.p, found.slope
    logp = np.where(p > 0, np.log(np.where(p > 0, p, 1)), 0.0)
    plogp = p * logp
    inner = (rounded * pulled).sum(-1, keepdims=True) - delta
    safe = np.where(a > 0, a, 1.0)
    bent = (plogp * (pulled - delta)).sum(-1, keepdims=True)
    flat = rounded / 2 * ((plogp * logp).sum(-1, keepdims=True) - logp**2)
    t = np.where(np.isfinite(found.t), found.t, 0.0)
    dtau = (u * t - plogp).sum(-1, keepdims=True) / found.total
    sparse = (inner / safe - bent) / safe + dresidual * dtau
    return np.where(a > 0, sparse, (pulled * flat).sum(-1, keepdims=True))


def _selected(
    plan: Plan, t: np.ndarray, top_k: int, size: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the largest keys, and rows where rounding may select others."""
    order = np.argsort(-t, axis=-1, kind="stable")
    rank = np.argsort(order, axis=-1, kind="stable")
    falling = np.sort(t, -1)[..., ::-1]
    last, after = falling[..., top_k - 1], falling[..., top_k]
    # a query times an array scale is rounded to 16 bits
    coarse = 4096 if plan.scale_array and plan.low else 1
    with np.errstate(invalid="ignore"):
        close = (last - after) < CLOSE * (1 + size) * coarse
    unselected = close & (last != after) & np.isfinite(after)
    return np.where(rank < top_k, t, -np.inf), unselected
