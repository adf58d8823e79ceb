"""Softmax attention by the passes of any lowering, and how it is differentiated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_attn.bias.base import Added
from pallas_attn.call import Call
from pallas_attn.nearest import from_nearest, shifted
from pallas_attn.normalizers.softmax import LN2, Softmax
from pallas_attn.problem import Problem, sink_of
from pallas_attn.tiled.fields import Field, fields, Values, with_fields
from pallas_attn.tiled.operands import (
    Cols,
    Forward,
    Kept,
    Moves,
    Operands,
    Residuals,
    Rows,
    Wanted,
)
from pallas_attn.tiled.passes import Blocks, Cotangents, Passes
from pallas_attn.tiled.plan import Plan, plan
from pallas_attn.tiled.split_factors import (
    columns,
    columns_of,
    factor_gradient,
    with_columns,
)
from pallas_attn.tiled.summaries import sight
from pallas_attn.tracing.primitives import called


f32 = jnp.float32

# Attention in plain JAX, differentiable any number of times.
Plain: TypeAlias = Callable[[Problem], tuple[Array, Array]]


def attend(
    problem: Problem, passes: Passes, plain: Plain
) -> tuple[Float[Array, "B T N h"], Float[Array, "B T N"]]:
    """Output and log-sum-exp.

    passes: what computes them, their gradients and their tangents.
    plain: what gives all derivatives beyond the first.
    """
    problem, shift = from_nearest(problem)
    ops, call = operands(problem, looked=True)
    o, lse = called(ByPasses(call, passes, plain), ops)
    return o, shifted(jnp.swapaxes(lse, 1, 2), shift)


def operands(problem: Problem, *, looked: bool = False) -> tuple[Operands, Call]:
    """What the passes read, and the call; looked: as `sight` has it."""
    query, call, added = problem.query, problem.call, problem.bias
    assert isinstance(added, Added)
    takes = any(term.hides for term in added.terms)
    seen = sight(call, problem.visibility, takes=takes, looked=looked)
    arrays = (query, problem.key, problem.value)
    return Operands(*arrays, added, seen, sink_of(problem)), call


def visited_blocks(
    problem: Problem, passes: Passes
) -> tuple[Float[Array, "B N"], Float[Array, "B N"], Float[Array, "B N"]]:
    """The share of visible blocks that forward, rows and cols visit."""
    ops, call = operands(from_nearest(problem)[0], looked=True)
    wanted = Wanted(q=True, k=True, v=True)
    _, res, _ = _forward(ops, call, wanted, passes)
    ops, p = res.ops, plan(call, ops.sight, ops.added, wanted)
    cot, pruning = passes.cotangents(res, jnp.zeros_like(res.o), None, call, p)
    rows = passes.rows(ops, cot, pruning, call, p)
    cols = passes.cols(ops, cot, pruning, call, p)

    assert res.visits is not None
    assert rows.visits is not None
    assert cols.visits is not None
    return share(res.visits), share(rows.visits), share(cols.visits)


def share(visits: Int[Array, "B N blocks 2"]) -> Float[Array, "B N"]:
    """Visited blocks over all that there were, of what the programs counted."""
    count = visits.sum(2, dtype=jnp.int32).astype(f32)
    return jnp.where(count[..., 1] > 0, count[..., 0] / count[..., 1], 1.0)


def wanted_of(ops: Operands, asked: Operands) -> Wanted:
    """Which gradients are asked for, by a bool in place of every operand."""
    products = asked.added.products
    return Wanted(
        q=bool(asked.q),
        k=bool(asked.k),
        v=bool(asked.v),
        fields=tuple(f for f in fields(ops.added) if f.of(asked.added.terms)),
        a=tuple(i for i, (a, _) in enumerate(products) if a),
        b=tuple(i for i, (_, b) in enumerate(products) if b),
        sink=bool(asked.sink),
    )


@dataclass(frozen=True)
class ByPasses:
    """Softmax's `Rules`: the passes of a lowering, and a formula in plain JAX."""

    call: Call
    passes: Passes
    plain: Plain

    def forward(
        self, ops: Operands, wanted: Operands
    ) -> tuple[tuple[Array, Array], Forward]:
        """((output, log-sum-exp [B, N, T]), what the forward pass makes)."""
        asked = wanted_of(ops, wanted)
        outs, _, out = _forward(ops, self.call, asked, self.passes)
        return outs, replace(out, visits=None)

    def tangent(
        self, ops: Operands, kept: Forward, tangents: Operands
    ) -> tuple[Array, ...]:
        """Those of output and log-sum-exp."""
        res = _residuals(ops, kept, self.call, Wanted())
        return _tangent(ops, res, tangents, self.call, self.passes)

    def backward(
        self,
        ops: Operands,
        kept: Forward,
        cotangents: tuple[Array | None, Array | None],
        wanted: Operands,
    ) -> Operands:
        """The gradient of every operand; None where nobody asked."""
        do, dlse = cotangents
        do = jnp.zeros_like(kept.o) if do is None else do
        res = _residuals(ops, kept, self.call, wanted_of(ops, wanted))
        return _backward(res, do, dlse, self.call, self.passes)

    def formula(self, ops: Operands) -> tuple[Array, Array]:
        """Output and log-sum-exp in plain JAX."""
        arrays, normalizer = (ops.q, ops.k, ops.v), Softmax(ops.sink)
        problem = Problem(*arrays, ops.added, normalizer, ops.sight.arrays, self.call)
        o, lse = self.plain(problem)
        return o, jnp.swapaxes(lse, 1, 2)


def _forward(
    ops: Operands, call: Call, wanted: Wanted, passes: Passes
) -> tuple[tuple[Array, Array], Residuals, Forward]:
    """((output, lse), residuals, what they are made of)."""
    read, asked = columned(ops, wanted, call)
    p = plan(call, read.sight, read.added, asked)
    out = passes.forward(read, passes.grains(read, call, p), call, p)
    res = Residuals(read, ops.added.products, wanted=asked, **vars(out))
    nothing = -jnp.inf if ops.sink is None else ops.sink[..., None]
    lse = jnp.where(out.lse == jnp.inf, nothing, _natural(res, call))
    return (out.o, lse), res, out


def _residuals(ops: Operands, out: Forward, call: Call, wanted: Wanted) -> Residuals:
    """The residuals of `_forward`: what is a function of operands is made again."""
    read, asked = columned(ops, wanted, call)
    return Residuals(read, ops.added.products, wanted=asked, **vars(out))


def _tangent(
    ops: Operands, res: Residuals, tangents: Operands, call: Call, passes: Passes
) -> tuple[Array, Array]:
    """The tangents of output and log-sum-exp [B, N, T]; None among tangents: 0."""
    moved = ((f, f.of(tangents.added.terms)) for f in fields(ops.added))
    sides = zip(ops.added.products, tangents.added.products, strict=True)
    products = []
    for (a, b), (da, db) in sides:  # (A B)' = A'B + A B'
        products += [] if da is None else columns(da, b, call)
        products += [] if db is None else columns(a, db, call)
    empty, sunk = res.lse == jnp.inf, None
    if ops.sink is not None and tangents.sink is not None:
        log = jnp.minimum(ops.sink[..., None] - _natural(res, call), 0.0)
        weight = jnp.exp(jnp.where(empty, -jnp.inf, log))
        sunk = weight * tangents.sink[..., None]
    p = plan(call, res.ops.sight, res.ops.added, Wanted())
    moves = Moves(
        tangents.q,
        tangents.k,
        tangents.v,
        {f: x for f, x in moved if x is not None},
        tuple(products),
        sunk,
    )
    out = passes.tangent(res, moves, call, p)
    nothing = 0.0 if tangents.sink is None else tangents.sink[..., None]
    return out.o, jnp.where(empty, nothing, out.lse)


def _natural(res: Residuals, call: Call) -> Float[Array, "B N T"]:
    """The log-sum-exp of rows that are not empty."""
    if res.peak is None or res.total is None:
        return res.lse * LN2
    return res.peak * call.scale + res.total * LN2


def columned(ops: Operands, wanted: Wanted, call: Call) -> tuple[Operands, Wanted]:
    """The operands with products as columns, and which columns' gradients are asked."""
    added, places = with_columns(ops.added, call)
    wanted = replace(
        wanted,
        a=tuple(places[i] for i in wanted.a),
        b=tuple(places[i] for i in wanted.b),
        places=places,
    )
    return replace(ops, added=added), wanted


def _backward(
    res: Residuals, do: Array, dlse: Array | None, call: Call, passes: Passes
) -> Operands:
    """The gradient of every operand; None where nobody asked."""
    p = plan(call, res.ops.sight, res.ops.added, res.wanted)
    cot, pruning = passes.cotangents(res, do, dlse, call, p)
    empty, sink = res.lse == jnp.inf, res.ops.sink
    if sink is None:
        total = None if dlse is None else jnp.where(empty, 0.0, dlse)
        return gradients(res, cot, pruning, total, call, p, passes)
    taken = sunk(sink, _natural(res, call), empty, cot.delta, dlse)
    cot = replace(cot, dlse=taken.total)
    return gradients(res, cot, pruning, taken.total, call, p, passes, taken)


class Sunk(NamedTuple):
    """What a sink is to the rows of a backward pass, [B, N, T].

    Args:
        gradient: Its own: exp(sink - lse) (dlse - <do, o>); dlse of an empty row.
        total: What is left of dlse: what a row of dS adds up to, 0 of an empty row.
        weight: exp(sink - lse); 0 of an empty row, whose gradient is no product.
    """

    gradient: Array
    total: Array
    weight: Array

    def settled(self, beyond: Float[Array, "B N T"]) -> Sunk:
        """With what rounding left in delta, which a row of dS has beyond its total."""
        lacks = self.weight * beyond
        return Sunk(self.gradient - lacks, self.total + lacks, self.weight)


def sunk(
    sink: Float[Array, "#B #N"],
    lse: Float[Array, "B N T"],
    empty: Bool[Array, "B N T"],
    delta: Float[Array, "B N T"],
    dlse: Float[Array, "B N T"] | None,
) -> Sunk:
    """What a sink is to rows of a natural log-sum-exp, of delta = <do, o> - dlse."""
    log = jnp.where(empty, -jnp.inf, jnp.minimum(sink[..., None] - lse, 0.0))
    dlse = jnp.zeros_like(lse) if dlse is None else dlse
    weight = jnp.exp(log)
    gradient = jnp.where(empty, dlse, -weight * delta)
    return Sunk(gradient, jnp.where(empty, 0.0, dlse - gradient), weight)


def gradients(
    res: Kept,
    cot: Cotangents,
    blocks: Blocks,
    total: Array | None,
    call: Call,
    p: Plan,
    passes: Passes,
    taken: Sunk | None = None,
) -> Operands:
    """The gradient of every operand by rows, cols and tiles over some blocks.

    total: what a row of dS adds up to, [B, N, T]; None: 0.
    taken: of a sink, if there is one.
    """
    ops = res.ops
    rows = passes.rows(ops, cot, blocks, call, p) if p.rows else Rows()
    if p.exact_row_sums:
        cot = replace(cot, delta=cot.delta + rows.beyond)
        if taken is not None and rows.beyond is not None:
            taken = taken.settled(rows.beyond)
            total = taken.total
    cols = passes.cols(ops, cot, blocks, call, p) if p.cols else Cols()
    pairs: Values = {}
    if cols.ds is not None:
        pairs = dict.fromkeys(p.stored_fields, cols.ds)
        rows, cols = _by_ds(res, rows, cols, cols.ds, call, p, passes)
    for f in p.tile_fields:
        pairs[f] = passes.tiles(ops, cot, blocks, f, rows, call, p)
    for f in p.diagonal_fields:
        pairs[f] = passes.diagonals(ops, cot, blocks, f, rows, call, p)
    sink = None if taken is None else taken.gradient
    return collected(res, Made(rows, cols, pairs, total, sink), p, call)


def _by_ds(
    res: Kept,
    rows: Rows,
    cols: Cols,
    ds: Float[Array, "B N T S"],
    call: Call,
    p: Plan,
    passes: Passes,
) -> tuple[Rows, Cols]:
    """Rows and cols with what one product with a stored dS gives of them."""
    ops, wanted = res.ops, res.wanted
    if not p.rows:
        dq, da = None, {}
        if wanted.q:
            dq = passes.thin_rows(ds, ops.k, ops.q, ops, call, p)
        for i in p.da:
            a, b = ops.added.products[i]
            out = columns_of(a, call.T, call)
            da[i] = passes.thin_rows(ds, b, out, ops, call, p)
        rows = Rows(dq=dq, da=da)
    if not p.dk and wanted.k:
        dk = passes.thin_cols(ds, ops.q, ops.k, ops, call, p)
        cols = replace(cols, dk=dk)
    return rows, cols


class Made(NamedTuple):
    """What the backward passes made, before it has its operands' shapes.

    total: what a row of dS adds up to; sink: the sink's gradient, row by row.
    """

    rows: Rows
    cols: Cols
    pairs: Values
    total: Array | None
    sink: Array | None = None


def collected(res: Kept, made: Made, p: Plan, call: Call) -> Operands:
    """The gradient of every operand, in its shape; None where nobody asked."""
    ops, wanted, rows, cols = res.ops, res.wanted, made.rows, made.cols

    def field_gradient(f: Field, x: Array) -> Array | None:
        if f not in wanted.fields:
            return None
        if f in made.pairs:
            return made.pairs[f].astype(x.dtype)
        if f.is_row_constant:
            return _row_constant(f.home, x, made.total)
        along_queries = f in p.row_fields
        g = (rows if along_queries else cols).fields[f]
        return _to_field(f.home, g, x, along_queries)

    def side_gradient(n: int, side: int) -> Array | None:
        place = wanted.places[n]
        if place not in (wanted.a, wanted.b)[side]:
            return None
        g = (rows.da if side == 0 else cols.db).get(place)
        if g is None:
            return None
        a, b = res.factors[n]
        g = factor_gradient(g, a, b, side, call)
        return reduced(g, (a, b)[side], (0, 2))

    sink = None
    if made.sink is not None and ops.sink is not None and wanted.sink:
        sink = reduced(made.sink.sum(2), ops.sink, (0, 1))
    grads = {f: field_gradient(f, x) for f, x in fields(ops.added).items()}
    sides = tuple(
        (side_gradient(n, 0), side_gradient(n, 1)) for n in range(len(res.factors))
    )
    return replace(
        ops,
        q=rows.dq if wanted.q else None,
        k=cols.dk if wanted.k else None,
        v=cols.dv if wanted.v else None,
        added=replace(ops.added, terms=with_fields(ops.added, grads), products=sides),
        sink=sink,
        sight=jax.tree.map(lambda _: None, ops.sight),
    )


def _row_constant(home: str, x: Array, total: Array | None) -> Array:
    """The gradient of what shifts a whole row: what its dS adds up to."""
    if total is None:
        return jnp.zeros_like(x)
    return _to_field(home, total, x, along_queries=True)


def _to_field(home: str, g: Array, x: Array, along_queries: bool) -> Array:
    """[B, N, T] or [B, N, S] summed to a field's shape."""
    if home == "head":
        return reduced(g.sum(2), x, (0, 1))
    if home in ("pair", "distance"):
        g = g[..., None] if along_queries else g[:, :, None, :]
        return reduced(g, x, (0, 1, 2, 3))
    return reduced(jnp.swapaxes(g, 1, 2), x, (0, 2))


def reduced(g: Array, x: Array, axes: tuple[int, ...]) -> Array:
    """The sum of g over the axes where x has 1."""
    summed = [a for a in axes if x.shape[a] == 1 < g.shape[a]]
    return g.sum(summed, keepdims=True).astype(x.dtype)
