"""How far a result is from the truth, on the first and the last heads of a case.

A whole case at twice its precision would take longer than all the timing. Attention
treats each key head and its query heads alone, so a few heads of the timed result are
compared with the same heads computed from the same inputs: in float32 at HIGHEST
precision for 16-bit inputs, in float64 for float32 ones, by the implementation "xla".
(Where that is what is timed, the error is of its rounding alone.) Of the batch the
first entry is taken, or all of it where a bias is shared over it and its gradient is a
sum.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_attn.api import dot_product_attention
from pallas_attn.benchmark.inputs import Inputs
from pallas_attn.benchmark.specs import Case
from pallas_attn.bias.base import Bias, homes, Sum
from pallas_attn.normalizers.entmax import Entmax
from pallas_attn.normalizers.softmax import Softmax


@dataclass(frozen=True)
class Sample:
    """The part of a case that is checked: batch entries, query heads and key heads."""

    batch: tuple[int, ...]
    heads: tuple[int, ...]
    key_heads: tuple[int, ...]

    def query(self, x: Float[Array, "B T N H"]) -> Array:
        """Of the query, the output and the cotangent."""
        return _take(_take(x, 0, self.batch), 2, self.heads)

    def key(self, x: Float[Array, "B S K H"]) -> Array:
        """Of the key and the value."""
        return _take(_take(x, 0, self.batch), 2, self.key_heads)

    def bias(self, bias: Bias | None) -> Bias | None:
        """Of a bias value, or of its gradient."""
        if bias is None:
            return None
        if isinstance(bias, Sum):
            return Sum(tuple(map(self._term, bias.terms)))
        return self._term(bias)

    def inputs(self, inputs: Inputs) -> Inputs:
        """Of all arrays of a case."""
        return Inputs(
            self.query(inputs.query),
            self.key(inputs.key),
            self.key(inputs.value),
            self.bias(inputs.bias),
            self.normalizer(inputs.normalizer),
            self.query(inputs.cotangent),
            inputs.mask,
        )

    def results(self, results: dict[str, Any]) -> dict[str, Any]:
        """Of the output and all gradients."""
        return {
            "output": self.query(results["output"]),
            "query": self.query(results["query"]),
            "key": self.key(results["key"]),
            "value": self.key(results["value"]),
            "bias": self.bias(results["bias"]),
            "normalizer": self.normalizer(results["normalizer"]),
        }

    def normalizer(self, x: Softmax | Entmax) -> Softmax | Entmax:
        """Of a normalizer, or of its gradient: one number per head, if any."""
        return jax.tree.map(lambda y: _take(y, 0, self.heads), x)

    def _term(self, term: Bias) -> Bias:
        def part(home: str, x: Array) -> Array:
            if x.ndim == 1:  # slopes [N]
                return _take(x, 0, self.heads)
            heads = 1 if home in ("head", "pair", "distance") else 2
            return _take(_take(x, 0, self.batch), heads, self.heads)

        fields = homes(term).items()
        parts = {name: part(home, getattr(term, name)) for name, home in fields}
        return dataclasses.replace(term, **parts)


def sample_of(case: Case) -> Sample:
    """The first and the last key head, and their query heads."""
    whole = ("alibi", "co_alibi", "relative")  # of all batch entries
    summed = any(t.shared or t.kind in whole for t in case.bias) or case.sink
    shared = case.B > 1 and summed
    key_heads = tuple(sorted({0, case.key_heads - 1}))
    group = case.N // case.key_heads
    return Sample(
        batch=tuple(range(case.B if shared else 1)),
        heads=tuple(k * group + g for k in key_heads for g in range(group)),
        key_heads=key_heads,
    )


def truth_dtype(case: Case) -> str:
    """In which the truth is computed."""
    return "float64" if case.dtype == "float32" else "float32"


def relative_errors(
    case: Case, inputs: Inputs, results: dict[str, Any]
) -> dict[str, Array]:
    """norm(result - truth) / norm(truth) of the output and of each gradient.

    Args:
        case: What was computed.
        inputs: Its arrays; `bias` None for attention without the case's bias.
        results: "output", and the gradients "query", "key", "value", "bias" and
            "normalizer".

    Returns:
        A number by leaf: "output", "query", "key", "value", and the bias's fields, and
        the normalizer's.
    """
    sample, dtype = sample_of(case), jnp.dtype(truth_dtype(case))
    taken = sample.inputs(inputs)
    exact = jax.tree.map(lambda x: x.astype(dtype), taken._replace(mask=None))

    def attend(*operands: Any) -> Array:
        *others, normalizer = operands
        return dot_product_attention(
            *others,
            mask=taken.mask,
            is_causal=case.causal,
            normalizer=normalizer,
            precision=jax.lax.Precision.HIGHEST,
            implementation="xla",
        )

    output, pullback = jax.vjp(attend, *exact[:5])
    gradients = zip(Inputs._fields[:5], pullback(exact.cotangent), strict=True)
    truth = {"output": output, **dict(gradients)}
    measured = jax.tree.leaves(sample.results(results))
    leaves = jax.tree_util.tree_leaves_with_path(truth)
    return {
        _name(path): _norm(x.astype(dtype) - y) / _norm(y)
        for (path, y), x in zip(leaves, measured, strict=True)
    }


def _take(x: Array, axis: int, indices: tuple[int, ...]) -> Array:
    """Of an axis of size 1, all."""
    if x.shape[axis] in (1, len(indices)):
        return x
    return jnp.take(x, np.asarray(indices, np.int32), axis=axis)


def _norm(x: Array) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(x)))


def _name(path: tuple[Any, ...]) -> str:
    """The last key or field of a path: a dictionary's or a dataclass's."""
    last = path[-1]
    return str(getattr(last, "key", None) or last.name)
