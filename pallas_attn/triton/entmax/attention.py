"""Entmax attention by tiles or lists, its derivatives, and how sparse it is."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_attn.bias.base import Added, Bias, homes, parts_on
from pallas_attn.bias.dense import DenseBias
from pallas_attn.bias.region import Region
from pallas_attn.nearest import from_nearest, shifted
from pallas_attn.normalizers.entmax import Entmax
from pallas_attn.problem import Problem
from pallas_attn.tiled.autodiff import Plain, share, wanted_of
from pallas_attn.tiled.operands import Operands, Wanted
from pallas_attn.tracing.primitives import called
from pallas_attn.tracing.rules import pushed
from pallas_attn.triton.entmax.call import SparseCall
from pallas_attn.triton.entmax.route import (
    Alpha,
    backward,
    forward,
    Left,
    prepared,
    residual_by_score,
    residuals,
)
from pallas_attn.triton.entmax.sparsity import census
from pallas_attn.visibility import positions


f32 = jnp.float32

# Of a score near -1e30, where keys lose their weight, a float32 does not hold so much.
UNSEEN = 1e22


def attend(
    problem: Problem, plain: Plain
) -> tuple[Float[Array, "B T N h"], Float[Array, "B T N"]]:
    """Output and threshold; plain: as `tiled.autodiff.attend` has it."""
    problem, shift = without_shift(problem)
    ops, alpha, call = prepared(problem)
    o, tau = called(ByPasses(call, plain), (ops, alpha))
    if shift is not None:
        shift = residual_by_score(alpha, call) * shift
    return o, shifted(jnp.swapaxes(tau, 1, 2), shift)


def without_shift(
    problem: Problem,
) -> tuple[Problem, Float[Array, "#B #N #T"] | None]:
    """A problem without what its bias gives all keys of a query alike, and that.

    Weights do not see it, and a threshold beside -1e9 has no digits left for scores.
    What takes a row away, or is no number, stays. In a user's term it meets its
    negative: these are added up first.
    """
    problem, beyond = from_nearest(problem, lengths=problem.call.exact)
    added = problem.bias
    assert isinstance(added, Added)
    met, others = [], []
    shifts = [] if beyond is None else [beyond]
    for term in added.terms:
        if isinstance(term, DenseBias):
            if term.bias.shape[3] == 1:
                unseen = jnp.abs(term.bias) < UNSEEN
                shifts.append(jnp.where(unseen, term.bias, 0)[..., 0].astype(f32))
                kept = jnp.where(unseen, 0, lax.stop_gradient(term.bias))
                term = replace(term, bias=kept)
        elif term.steep and not term.running:
            x = _of_rows(term, problem)
            if x is not None:
                x = jnp.where(jnp.abs(x) < UNSEEN, x, 0)
                shifts.append(x[..., 0])
                met += [DenseBias(-x), term]
                continue
        others.append(term)
    shift = sum(shifts[1:], shifts[0]) if shifts else None
    added = Added((*met, *others), added.products)
    return replace(problem, bias=added), shift


def _of_rows(term: Bias, problem: Problem) -> Float[Array, "#B #N #T 1"] | None:
    """The sum of a term's parts that do not depend on the key, looked at on one key."""
    queries, keys = positions(problem.call, problem.visibility)
    of_keys = {"key": (slice(None), slice(1)), "pair": (..., slice(1))}
    fields = {
        name: getattr(term, name)[of_keys[home]]
        for name, home in homes(term).items()
        if home in of_keys
    }
    on = lambda keys: Region(queries[..., :, None], keys[..., None, :])
    whole = jax.eval_shape(lambda: parts_on(term, on(keys)))
    alike = [jnp.ndim(part) < 4 or part.shape[3] == 1 for part in whole]
    if not any(alike):
        return None
    parts = parts_on(replace(term, **fields), on(keys[..., :1]))
    rows = [part for part, is_row in zip(parts, alike, strict=True) if is_row]
    return lax.stop_gradient(sum(rows, jnp.zeros((1, 1, 1, 1), f32)))


def sparsity_shares(
    problem: Problem,
) -> tuple[Float[Array, "B N"], Float[Array, "B N"]]:
    """The shares of visible pairs whose weight is 0, and of blocks without any."""
    problem, _ = without_shift(problem)
    ops, alpha, call = prepared(problem)
    _, res = forward(ops, alpha, call, Wanted(), False)
    found = census(res, call)
    return 1 - found.weighty, 1 - found.active


def visited_blocks(
    problem: Problem,
) -> tuple[Float[Array, "B N"], Float[Array, "B N"], Float[Array, "B N"]]:
    """The share of visible blocks that the output, rows and cols visit."""
    problem, _ = without_shift(problem)
    ops, alpha, call = prepared(problem)
    _, res = forward(ops, alpha, call, Wanted(), False)
    active = census(res, call).active
    if res.dense is None:
        return active, active, active
    return share(res.dense.visits), active, active


@dataclass(frozen=True)
class ByPasses:
    """Entmax's `Rules`: its passes, and a formula in plain JAX; alpha is an operand."""

    call: SparseCall
    plain: Plain

    def forward(
        self, ops: tuple[Operands, Alpha], wanted: tuple[Operands, Alpha]
    ) -> tuple[tuple[Array, Array], Left]:
        """((output, threshold [B, N, T]), what the forward pass leaves)."""
        outs, res = forward(*ops, self.call, *self._asked(ops, wanted))
        return outs, (res.m, res.level, res.dense, res.lists)

    def tangent(
        self, ops: tuple[Operands, Alpha], kept: Left, tangents: tuple[Operands, Alpha]
    ) -> tuple[Array, ...]:
        """Those of output and threshold."""
        return pushed(self, ops, tangents)

    def backward(
        self,
        ops: tuple[Operands, Alpha],
        kept: Left,
        cotangents: tuple[Array | None, Array | None],
        wanted: tuple[Operands, Alpha],
    ) -> tuple[Operands, Array | None]:
        """The gradient of every operand; None where nobody asked."""
        do, dtau = cotangents
        call, q = self.call, ops[0].q
        if do is None:
            do = jnp.zeros_like(q, shape=(call.B, call.T, call.N, call.h))
        asked, wants_alpha = self._asked(ops, wanted)
        res = residuals(*ops, kept, call, asked, wants_alpha)
        return backward(res, do, dtau, call)

    def formula(self, ops: tuple[Operands, Alpha]) -> tuple[Array, Array]:
        """Output and threshold in plain JAX."""
        (arrays, alpha), call = ops, self.call
        power = call.alpha if alpha is None else alpha
        assert power is not None
        problem = Problem(
            arrays.q,
            arrays.k,
            arrays.v,
            arrays.added,
            Entmax(power, call.top_k),
            arrays.sight.arrays,
            call,
        )
        o, tau = self.plain(problem)
        return o, jnp.swapaxes(tau, 1, 2)

    def _asked(
        self, ops: tuple[Operands, Alpha], wanted: tuple[Operands, Alpha]
    ) -> tuple[Wanted, bool]:
        """Which gradients are asked for: of the operands, and whether of alpha."""
        return wanted_of(ops[0], wanted[0]), bool(wanted[1])
