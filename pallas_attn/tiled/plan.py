"""Which passes a gradient needs, and their layout: the one place that chooses."""

from __future__ import annotations

from dataclasses import dataclass, replace

from jax.typing import DTypeLike

from pallas_attn.bias.base import Added
from pallas_attn.call import Call
from pallas_attn.tiled.fields import Field, fields
from pallas_attn.tiled.operands import Wanted
from pallas_attn.tiled.summaries import Sight


# Up to so many queries read a key once: to look at all keys beforehand costs as much.
STEP = 16


@dataclass(frozen=True)
class Plan:
    """The passes of a call. A pass owns each gradient it is listed with, alone."""

    pruned: bool
    large_scores: bool  # no digit may be lost to the size of scores: lse is kept in two
    large_rows: (
        bool  # so large may be what a whole row has: its peak is kept in two as well
    )
    two_sided: bool  # far blocks on both sides of the diagonal are told apart
    batch_group: int  # batch entries side by side, where they share a bias tile
    dense: bool  # a full tile is added
    distances: bool  # a number per distance is added
    looked: bool  # it is known of which blocks a mask shows any
    nonlinear: bool  # a field along queries or keys is not simply added
    transpose_bias: bool  # cols reads a transposed copy of shared full tiles
    columns: int  # of all products
    store_dtype: DTypeLike | None = (
        None  # of a dS that cols writes: the gradient of `own`
    )
    stored_fields: tuple[Field, ...] = ()
    rows: bool = True  # False: dq is a thin pass over a stored dS
    cols: bool = True
    dk: bool = True  # False: dk is a thin pass over a stored dS
    exact_row_sums: bool = False  # cols gets a delta with which each row of dS adds up
    row_fields: tuple[Field, ...] = ()
    col_fields: tuple[Field, ...] = ()
    tile_fields: tuple[Field, ...] = ()
    diagonal_fields: tuple[Field, ...] = ()
    da: tuple[int, ...] = ()
    db: tuple[int, ...] = ()

    @property
    def flip(self) -> bool:
        """Whether cols keeps scores as [keys, queries]: nothing is transposed then."""
        return self.transpose_bias or not self.dense


def plan(
    call: Call, sight: Sight, added: Added, wanted: Wanted, *, may_store: bool = True
) -> Plan:
    """The plan of a call, from its bias' shape and from what is wanted.

    may_store: cols visits every block, so that it may write a dS that is a gradient.
    """
    every = fields(added)
    full = [x for f, x in every.items() if f.span == "qk"]
    sharing = [
        (call.B if x.shape[0] == 1 else 1) * (call.N if x.shape[1] == 1 else 1)
        for x in full
    ]
    bounded = all(t.bounded for t in added.terms) and bool(added.terms)
    several = call.T > STEP and not sight.arrays.placed
    pruned = call.config.prune and bounded and several
    sided = any(t.sided for t in added.terms)
    over_batch = any(x.shape[0] == 1 for x in full) and call.B > 1
    # Among bfloat16's own digits 2^-24 |lse| is nothing, but for an array's -1e9 and
    # where positions are given, from which every key may be 2^30 away.
    given = bool(added.terms) and (sight.arrays.placed or call.offset != 0)
    array = any(f.span and f.steep for f in every)
    large = call.dtype != "bfloat16" or array or given
    forward = Plan(
        pruned=pruned,
        large_scores=large,
        large_rows=large and any(f.span == "q" and f.steep for f in every),
        two_sided=(pruned or sided) and not call.causal and not sight.arrays.placed,
        batch_group=_flock(call.B) if over_batch else 1,
        dense=bool(full),
        distances=any(f.span == "d" for f in every),
        looked=sight.grains is not None,
        nonlinear=any(f.span and not f.additive for f in every),
        transpose_bias=bool(full) and min(sharing) >= 8,
        columns=sum(b.shape[-1] for _, b in added.products),
    )

    def of_span(*spans: str) -> tuple[Field, ...]:
        return tuple(f for f in wanted.fields if f.span in spans)

    # What adds the same to a whole row has no gradient: autodiff.py gives it dlse.
    rows = tuple(f for f in of_span("", "q") if not f.is_row_constant)
    pairs = of_span("qk")
    # so is a sink's gradient, which is a sum of delta
    settled = wanted.sink or any(f.running for f in of_span("k"))
    by_key = bool(wanted.k or wanted.v or wanted.b or of_span("k"))
    others = bool(wanted.q or wanted.a or rows or by_key)
    shape = (call.B, call.N, call.T, call.S)
    own = tuple(f for f in pairs if others and f.additive and every[f].shape == shape)
    # Under a soft cap the dS of a bias is not that of q.k, which thin passes need.
    may_store = may_store and call.soft_cap is None
    own = own if may_store and own and _as_wide(every[own[0]].dtype, call.dtype) else ()
    return replace(
        forward,
        store_dtype=every[own[0]].dtype if own else None,
        stored_fields=own,
        rows=bool(rows or settled or (not own and (wanted.q or wanted.a))),
        cols=bool(by_key or own),
        dk=not own or call.H <= 64,
        exact_row_sums=settled,
        row_fields=rows,
        col_fields=of_span("k"),
        tile_fields=tuple(f for f in pairs if f not in own),
        diagonal_fields=of_span("d"),
        da=wanted.a,
        db=wanted.b,
        transpose_bias=forward.transpose_bias and not own,
    )


def _flock(batch: int) -> int:
    return max(n for n in range(1, min(batch, 16) + 1) if batch % n == 0)


def _as_wide(dtype: DTypeLike, other: str) -> bool:
    """Whether dS kept in `dtype` loses nothing that products in `other` need."""
    return dtype == "float32" or str(dtype) == other
