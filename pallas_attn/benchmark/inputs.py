"""The arrays of a case: normal random numbers of fixed keys, and slopes of ALiBi."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from pallas_attn.benchmark.specs import Case, Term
from pallas_attn.bias.alibi import ALiBi, alibi_slopes
from pallas_attn.bias.base import Bias
from pallas_attn.bias.co_alibi import co_alibi_slopes, CoALiBi
from pallas_attn.bias.dense import DenseBias
from pallas_attn.bias.factored import FactoredBias
from pallas_attn.bias.forget_gate import ForgetGate
from pallas_attn.bias.relative import RelativeBias
from pallas_attn.normalizers.entmax import Entmax
from pallas_attn.normalizers.softmax import Softmax


# Of the first and the last head, one for all keys.
GATES = (0.5, 0.999)


class Inputs(NamedTuple):
    """What attention differentiates, the cotangent of its output, and a mask."""

    query: Float[Array, "B T N H"]
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K H"]
    bias: Bias | None
    normalizer: Softmax | Entmax
    cotangent: Float[Array, "B T N H"]
    mask: Bool[Array, "1 1 T T"] | None = None


def draw(case: Case, seed: PRNGKeyArray) -> Inputs:
    """All arrays of a case."""
    seeds = jax.random.split(seed, 5)
    queries = (case.B, case.T, case.N, case.H)
    keys = (case.B, case.T, case.key_heads, case.H)
    return Inputs(
        query=case.query_factor * _normal(seeds[0], queries, case.dtype),
        key=_normal(seeds[1], keys, case.dtype),
        value=_normal(seeds[2], keys, case.dtype),
        bias=_bias(case, seeds[3]),
        normalizer=Softmax(_sink(case)) if case.sink else case.normalizer,
        cotangent=_normal(seeds[4], queries, case.dtype),
        mask=_bigbird(case.T) if case.mask else None,
    )


def shapes_of(case: Case) -> Inputs:
    """The shapes and dtypes of all arrays, without the arrays."""
    return jax.eval_shape(lambda: draw(case, jax.random.key(0)))


def _sink(case: Case) -> Float[Array, " N"]:
    """Scores as high as those of one key together, for the first head, to all."""
    return jnp.log(jnp.linspace(1.0, case.T, case.N, dtype=jnp.float32))


def _bigbird(T: int, block: int = 64, share: float = 0.1) -> Bool[Array, "1 1 T T"]:
    """The pattern of BigBird (arXiv 2007.14062), of a share of all blocks."""
    n = T // block
    shown, i = np.zeros((n, n), bool), np.arange(n)
    shown[:2] = shown[:, :2] = True
    shown |= abs(i[:, None] - i) <= 1
    left = np.flatnonzero(~shown)
    more = max(0, round(share * n * n) - int(shown.sum()))
    shown.flat[np.random.default_rng(0).choice(left, more, replace=False)] = True
    blocks = jnp.asarray(shown)
    return jnp.repeat(jnp.repeat(blocks, block, 0), block, 1)[None, None]


def _bias(case: Case, seed: PRNGKeyArray) -> Bias | None:
    if not case.bias:
        return None
    first, *rest = (
        _term(case, term, jax.random.fold_in(seed, i))
        for i, term in enumerate(case.bias)
    )
    return sum(rest, start=first)


def _term(case: Case, term: Term, seed: PRNGKeyArray) -> Bias:
    dtype = term.dtype or case.dtype
    match term.kind:
        case "alibi":
            return ALiBi(alibi_slopes(case.N))
        case "co_alibi":
            return CoALiBi(co_alibi_slopes(case.N))
        case "dense":
            batch = 1 if term.shared else case.B
            return DenseBias(_normal(seed, (batch, case.N, case.T, case.T), dtype))
        case "factored":
            one, other = jax.random.split(seed)
            shape = (case.B, case.T, case.N, term.rank)
            return FactoredBias(
                _normal(one, shape, dtype), _normal(other, shape, dtype)
            )
        case "relative":
            return RelativeBias(_normal(seed, (1, case.N, case.T), dtype))
        case "forget" | "forget slowly":
            if term.kind == "forget":
                gates = jnp.linspace(*GATES, case.N, dtype=jnp.float32)
            else:  # 1 / (1 - gate), which is how far a head remembers, in equal ratios
                first, last = (1 - gate for gate in GATES)
                gates = 1 - jnp.geomspace(first, last, case.N, dtype=jnp.float32)
            log_gate = jnp.log(gates)[None, None]
            return ForgetGate(jnp.broadcast_to(log_gate, (case.B, case.T, case.N)))


def _normal(seed: PRNGKeyArray, shape: tuple[int, ...], dtype: Any) -> Array:
    return jax.random.normal(seed, shape, jnp.dtype(dtype))
