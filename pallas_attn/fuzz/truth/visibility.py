"""Who may attend to whom."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pallas_attn.fuzz.plan import Arrays, Plan


# Differences of positions saturate here; comparisons do not.
FARTHEST = 2**31 - 1


@dataclass(frozen=True)
class Visibility:
    """Positions, and which pairs a call allows before its bias is asked.

    Args:
        query_positions: int64 [*#L, #N, T].
        key_positions: int64 [*#L, #N, S].
        allowed: bool [*L, N, T, S].
        query_there: bool [*L, T] or [T]: queries within the lengths.
        key_there: bool [*L, S] or [S]: keys within the lengths.
        query_segments: [*L, T], or None.
        key_segments: [*L, S], or None.
        placed: Whether positions are given one by one.
    """

    query_positions: np.ndarray
    key_positions: np.ndarray
    allowed: np.ndarray
    query_there: np.ndarray
    key_there: np.ndarray
    query_segments: np.ndarray | None
    key_segments: np.ndarray | None
    placed: bool = False

    @property
    def beyond(self) -> np.ndarray:
        """[*#L, #N, T, 1]: how far a query stands beyond all keys, nearly.

        0 where positions are given: keys may stand anywhere.
        """
        queries = self.query_positions[..., None].astype(np.float64)
        if self.placed:
            return np.zeros_like(queries)
        return np.abs(queries - np.clip(queries, 0, self.key_positions.size - 1))

    @property
    def distance(self) -> np.ndarray:
        """Query position minus key position, as terms see it."""
        d = self.query_positions[..., :, None] - self.key_positions[..., None, :]
        return np.clip(d, -FARTHEST, FARTHEST).astype(np.float64)


def visibility(plan: Plan, conditions: Arrays) -> Visibility:
    """Positions and allowed pairs of a call."""
    queries, keys = _positions(plan, conditions)
    d = queries[..., :, None] - keys[..., None, :]
    ok = np.ones(plan.full, bool)
    if plan.causal:
        ok = ok & (d >= 0)
    if plan.window is not None:
        window = plan.window
        left, right = window if isinstance(window, tuple) else (window, window)
        ok = ok & (d <= left) & (d >= -right)
    query_there = np.ones(plan.T, bool)
    if "query_seq_lengths" in conditions:
        query_there = np.arange(plan.T) < conditions["query_seq_lengths"][..., None]
        ok = ok & query_there[..., None, :, None]
    key_there = np.ones(plan.S, bool)
    if "key_value_seq_lengths" in conditions:
        most = conditions["key_value_seq_lengths"][..., None]
        key_there = np.arange(plan.S) < most
        ok = ok & key_there[..., None, None, :]
    query_segments = conditions.get("query_segment_ids")
    key_segments = conditions.get("key_segment_ids")
    if query_segments is not None and key_segments is not None:
        same = query_segments[..., :, None] == key_segments[..., None, :]
        ok = ok & same[..., None, :, :]
    if "mask" in conditions:
        ok = ok & conditions["mask"]
    return Visibility(
        queries,
        keys,
        np.broadcast_to(ok, plan.full),
        query_there,
        key_there,
        query_segments,
        key_segments,
        placed="query_positions" in conditions,
    )


def _positions(plan: Plan, conditions: Arrays) -> tuple[np.ndarray, np.ndarray]:
    queries, keys = np.arange(plan.T, dtype=np.int64), np.arange(plan.S, dtype=np.int64)
    if "query_positions" in conditions:
        queries = conditions["query_positions"].astype(np.int64)
    elif "query_offset" in conditions:
        queries = queries + conditions["query_offset"].astype(np.int64)[..., None]
    else:
        queries = queries + plan.offset
    if "key_positions" in conditions:
        keys = conditions["key_positions"].astype(np.int64)

    def with_heads(x: np.ndarray) -> np.ndarray:
        return x if x.ndim in (1, len(plan.L) + 2) else x[..., None, :]

    return with_heads(queries), with_heads(keys)
