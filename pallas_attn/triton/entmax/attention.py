"""Entmax attention behind one custom_vjp, and how sparse it is."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from pallas_attn.problem import Problem
from pallas_attn.tiled.autodiff import share, wanted_of
from pallas_attn.tiled.operands import Operands, Wanted
from pallas_attn.triton.entmax.call import SparseCall
from pallas_attn.triton.entmax.operands import Residuals
from pallas_attn.triton.entmax.route import backward, forward, prepared
from pallas_attn.triton.entmax.sparsity import census


def attend(problem: Problem) -> tuple[Float[Array, "B T N h"], Float[Array, "B T N"]]:
    """Output and threshold; differentiable once, in reverse mode."""
    ops, alpha, call = prepared(problem)
    o, tau = _attend((ops, alpha), call)
    return o, jnp.swapaxes(tau, 1, 2)


def sparsity_shares(
    problem: Problem,
) -> tuple[Float[Array, "B N"], Float[Array, "B N"]]:
    """The shares of visible pairs whose weight is 0, and of blocks without any."""
    ops, alpha, call = prepared(problem)
    _, res = forward(ops, alpha, call, Wanted(), wants_alpha=False)
    found = census(res, call)
    return 1 - found.weighty, 1 - found.active


def visited_blocks(
    problem: Problem,
) -> tuple[Float[Array, "B N"], Float[Array, "B N"], Float[Array, "B N"]]:
    """The share of visible blocks that the output, rows and cols visit."""
    ops, alpha, call = prepared(problem)
    _, res = forward(ops, alpha, call, Wanted(), wants_alpha=False)
    active = census(res, call).active
    if res.dense is None:
        return active, active, active
    return share(res.dense.visits), active, active


def _values(operands: tuple[Operands, Any], call: SparseCall) -> tuple[Array, Array]:
    return forward(*operands, call, Wanted(), wants_alpha=False)[0]


def _attend_fwd(operands: Any, call: SparseCall) -> Any:
    (ops, alpha), asked = (
        jax.tree.map(lambda x, i=i: (x.value, x.perturbed)[i], operands)
        for i in range(2)
    )
    wants_alpha = call.alpha is None and bool(asked[1])
    return forward(ops, alpha, call, wanted_of(ops, asked[0]), wants_alpha=wants_alpha)


def _attend_bwd(call: SparseCall, residuals: Residuals, cotangents: Any) -> Any:
    do, dtau = cotangents
    if isinstance(do, SymbolicZero):
        do = jnp.zeros((call.B, call.T, call.N, call.h), residuals.ops.q.dtype)
    dtau = None if isinstance(dtau, SymbolicZero) else dtau
    return (backward(residuals, do, dtau, call),)


_attend: Any = jax.custom_vjp(_values, nondiff_argnums=(1,))
_attend.defvjp(_attend_fwd, _attend_bwd, symbolic_zeros=True)
