"""Co-ALiBi attention by tiled passes, and how it is differentiated."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_attn.bias.co_alibi import CoALiBi
from pallas_attn.call import Call
from pallas_attn.normalizers.softmax import LN2, Softmax
from pallas_attn.problem import Problem, sink_of
from pallas_attn.tiled.autodiff import Plain, reduced, share, Sunk, sunk
from pallas_attn.tiled.summaries import sight
from pallas_attn.tracing.primitives import called
from pallas_attn.tracing.rules import pushed
from pallas_attn.triton.co_alibi.backward import cols_kernel, rows_kernel
from pallas_attn.triton.co_alibi.forward import forward_kernel
from pallas_attn.triton.co_alibi.operands import (
    Cols,
    Counted,
    Forward,
    Gradients,
    Operands,
    Residuals,
    Rows,
    Saved,
)
from pallas_attn.triton.co_alibi.plan import grid_of, Plan, plan
from pallas_attn.triton.co_alibi.scan import exact, triangles
from pallas_attn.triton.launch import launch, like
from pallas_attn.triton.preprocess import deltas, norms
from pallas_attn.types import outline


f32 = jnp.float32
i32 = jnp.int32


def attend(
    problem: Problem, plain: Plain
) -> tuple[Float[Array, "B T N h"], Float[Array, "B T N"]]:
    """Output and log-sum-exp; plain: as `tiled.autodiff.attend` has it."""
    o, lse = called(ByPasses(problem.call, plain), _operands(problem))
    return o, jnp.swapaxes(lse, 1, 2)


def _operands(problem: Problem) -> Operands:
    assert isinstance(problem.bias, CoALiBi)
    seen = sight(problem.call, problem.visibility)
    slopes = problem.bias.slopes
    arrays = (problem.query, problem.key, problem.value)
    return Operands(*arrays, slopes, seen, sink_of(problem))


def visited_blocks(
    problem: Problem,
) -> tuple[Float[Array, "B N"], Float[Array, "B N"], Float[Array, "B N"]]:
    """The share of visible blocks that forward, rows and cols visit."""
    ops, call = _operands(problem), problem.call
    _, made = _forward(ops, call, graded=True)
    res = Residuals(ops, **vars(made))
    out, _ = _passes(res, jnp.zeros_like(res.o), None, call)

    assert res.visits is not None
    return share(res.visits), share(out.rows.visits), share(out.cols.visits)


@dataclass(frozen=True)
class ByPasses:
    """Co-ALiBi's `Rules`: its passes, and a formula in plain JAX."""

    call: Call
    plain: Plain

    def forward(
        self, ops: Operands, wanted: Operands
    ) -> tuple[tuple[Array, Array], Forward]:
        """((output, log-sum-exp [B, N, T]), what the forward pass makes)."""
        graded = any(jax.tree.leaves(wanted))
        outs, out = _forward(ops, self.call, graded=graded)
        return outs, replace(out, visits=None)

    def tangent(
        self, ops: Operands, kept: Forward, tangents: Operands
    ) -> tuple[Array, ...]:
        """Those of output and log-sum-exp."""
        return pushed(self, ops, tangents)

    def backward(
        self,
        ops: Operands,
        kept: Forward,
        cotangents: tuple[Array | None, Array | None],
        wanted: Operands,
    ) -> Operands:
        """The gradient of every operand."""
        do, dlse = cotangents
        do = jnp.zeros_like(kept.o) if do is None else do
        return _backward(Residuals(ops, **vars(kept)), do, dlse, self.call)

    def formula(self, ops: Operands) -> tuple[Array, Array]:
        """Output and log-sum-exp in plain JAX."""
        arrays, bias = (ops.q, ops.k, ops.v), CoALiBi(ops.slopes)
        normalizer, seen = Softmax(ops.sink), ops.sight.arrays
        o, lse = self.plain(Problem(*arrays, bias, normalizer, seen, self.call))
        return o, jnp.swapaxes(lse, 1, 2)


def _backward(res: Residuals, do: Array, dlse: Array | None, call: Call) -> Operands:
    out, taken = _passes(res, do, dlse, call)
    slopes = res.ops.slopes
    dm = out.rows.dm.sum(2)
    dm = reduced(dm, slopes, (0, 1))
    sink = res.ops.sink
    dsink = None
    if sink is not None and taken is not None and out.rows.beyond is not None:
        by_row = taken.settled(out.rows.beyond).gradient
        dsink = reduced(by_row.sum(2), sink, (0, 1))
    nothing = jax.tree.map(lambda _: None, res.ops.sight)
    return Operands(out.rows.dq, out.cols.dk, out.cols.dv, dm, nothing, dsink)


def _forward(
    ops: Operands, call: Call, graded: bool
) -> tuple[tuple[Array, Array], Forward]:
    """((output, lse), what the pass makes); graded: a backward pass follows."""
    p = plan(call)
    largest = norms(ops.k, ops.v, [], ops.sight, call)
    grid = grid_of(call, "forward", p)
    rows = outline((call.B, call.N, call.T), f32)
    per_block = (call.B, call.N, grid.blocks)
    counted = None
    if exact(call):
        counted = Counted(inside=rows, log_sum=rows, right=rows, right_low=rows)
    outputs = Forward(
        base=rows,
        counted=counted,
        first=outline(per_block, i32),
        gates=rows,
        gates_low=rows,
        lse=rows,
        o=outline((call.B, call.T, call.N, call.h), ops.q.dtype),
        visits=outline((*per_block, 2), i32),
    )
    ones = triangles(call, p.block_k, flip=False)
    inputs = (ops, largest, ones)
    out: Forward = launch(
        forward_kernel,
        grid.shape,
        inputs,
        outputs,
        call,
        p.forward,
        plan=p,
        graded=graded,
    )
    nothing = -jnp.inf if ops.sink is None else ops.sink[..., None]
    natural = jnp.where(out.lse == jnp.inf, nothing, out.lse * LN2)
    return (out.o, natural), out


def _passes(
    res: Residuals, do: Array, dlse: Array | None, call: Call
) -> tuple[Gradients, Sunk | None]:
    """What rows and cols make of everything, and what a sink is to rows.

    Head after head where the carries of all would pass the budget: every group stores
    its part into the whole arrays.
    """
    ops, p = res.ops, plan(call)
    delta, _ = deltas(res.o, do, res.lse, dlse, ops.sight, call)
    taken = None
    if ops.sink is not None:
        taken = sunk(ops.sink, res.lse * LN2, res.lse == jnp.inf, delta, dlse)
    saved = Saved(
        do,
        res.base,
        res.gates,
        res.gates_low,
        delta,
        dlse if taken is None else taken.total,
        res.first,
        res.counted,
    )
    outputs = Gradients(
        cols=Cols(dk=like(ops.k), dv=like(ops.v), visits=_visits(call, "cols", p)),
        rows=Rows(
            beyond=None if taken is None else like(delta),
            dm=like(delta),
            dq=like(ops.q),
            visits=_visits(call, "rows", p),
        ),
    )
    if (p.batch, p.heads) == (call.B, call.K):
        return _group(ops, saved, outputs, None, call, p), taken

    def group(n: Array, into: Gradients) -> Gradients:
        entry, head = n // (call.K // p.heads), n % (call.K // p.heads)
        start = jnp.stack([entry * p.batch, head * p.heads]).astype(i32)
        return _group(ops, replace(saved, start=start), outputs, into, call, p)

    blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), outputs)
    count = (call.B // p.batch) * (call.K // p.heads)
    return lax.fori_loop(i32(0), i32(count), group, blank), taken


def _group(
    ops: Operands,
    saved: Saved,
    outputs: Gradients,
    into: Gradients | None,
    call: Call,
    p: Plan,
) -> Gradients:
    """Rows and cols of a group of heads; the carries between them live no longer."""
    blocks = pl.cdiv(call.S, p.block_k)
    shape = (p.batch, p.heads * call.G, blocks, call.T, 2)
    carry = outline(shape, f32)
    ones = triangles(call, p.block_k, flip=False)
    rows, carry = launch(
        rows_kernel,
        grid_of(call, "rows", p).shape,
        (ops, saved, ones),
        (outputs.rows, carry),
        call,
        p.rows,
        into=None if into is None else into.rows,
        plan=p,
    )
    ones = triangles(call, p.block_k, flip=True)
    cols = launch(
        cols_kernel,
        grid_of(call, "cols", p).shape,
        (ops, saved, carry, ones),
        outputs.cols,
        call,
        p.cols,
        into=None if into is None else into.cols,
        plan=p,
    )
    return Gradients(cols=cols, rows=rows)


def _visits(call: Call, kernel: str, p: Plan) -> Array:
    blocks = grid_of(call, kernel, p).blocks
    return outline((call.B, call.N, blocks, 2), i32)
