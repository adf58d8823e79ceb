"""Arrays past 2^31 elements, against the same call on a few of their rows and heads.

Only those rows have a cotangent, so that the gradients of those heads' keys and values,
too, are those of a small call, whose truth float64 can hold.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_attn.api import dot_product_attention
from pallas_attn.fuzz.elements import Elements
from pallas_attn.fuzz.plan import Form, plain
from pallas_attn.fuzz.run import compared
from pallas_attn.verify.check import Verified


# Free memory of a device from which on these run.
LEAST_BYTES = 24 * 2**30


@dataclass(frozen=True)
class Large:
    """A call with one array [1, N, T, T]: a bool mask, or a bfloat16 bias."""

    what: str
    N: int
    T: int = 16384
    H: int = 64

    @property
    def name(self) -> str:
        """With its shape."""
        return f"{self.what} [1,{self.N},{self.T},{self.T}]"

    @property
    def rows(self) -> np.ndarray:
        """At the start, in the middle, across a block's edge, and at the end."""
        T = self.T
        some = [*range(4), *range(T // 2 - 8, T // 2 + 8), *range(T - 4, T)]
        return np.asarray(sorted(set(some)))

    @property
    def heads(self) -> np.ndarray:
        """The first, the middle and the last."""
        return np.asarray(sorted({0, self.N // 2, self.N - 1}))


# 2^32 bytes; and offsets past 2^31 elements, 2^32 bytes, in the array and its gradient.
LARGE = (Large("mask", 16), Large("bias", 10))


def free_bytes() -> int:
    """Of the default device; 0 where it does not say."""
    device = jnp.zeros(()).devices().pop()
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)


def pairs(large: Large, heads: Array, rows: Array) -> Array:
    """Entries of the large array, from their indices alone."""
    n, i = heads[:, None, None], rows[None, :, None]
    j = jnp.arange(large.T, dtype=jnp.int32)[None, None, :]
    mixed = (n * 40503 + i * 2654 + j * 7919 + i * j % 8191) % 1009
    if large.what == "mask":
        return (mixed > 300)[None]
    return (mixed.astype(jnp.float32) / 250 - 2).astype(jnp.bfloat16)[None]


def verify_large(large: Large, implementation: str) -> Verified:
    """Output and gradients at its rows and heads, and equal bits twice."""
    start = time.perf_counter()
    names = (large.name, implementation, "bfloat16")
    try:
        got, again, elements = _evaluated(large, implementation)
        with np.errstate(all="ignore"):
            found = compared(elements, got)
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        wrong = f"{type(error).__name__}: {text}"
        return Verified(*names, seconds=time.perf_counter() - start, wrong=wrong)
    off = [x.name for x in found if not x.error <= x.allowed]
    relative = {x.name: x.error / x.size for x in found}
    return Verified(
        *names,
        relative.pop("output"),
        max(relative.values()),
        max(x.error / x.allowed for x in found),
        all(x.tobytes() == again[name].tobytes() for name, x in got.items()),
        time.perf_counter() - start,
        f"{', '.join(off)} too far from float64" if off else "",
    )


def _evaluated(large: Large, implementation: str) -> tuple[Any, Any, Elements]:
    """What the chosen rows and heads are, twice, and the small call that they make."""
    heads, rows = jnp.asarray(large.heads), jnp.asarray(large.rows)
    run = jax.jit(_program(large, implementation))
    query, key, value = _projected(large)
    do = (
        jnp.zeros_like(query)
        .at[:, rows[:, None], heads]
        .set(query[:, rows[:, None], heads] * 0.5 + 0.25)
    )
    whole = jax.jit(
        lambda: pairs(
            large,
            jnp.arange(large.N, dtype=jnp.int32),
            jnp.arange(large.T, dtype=jnp.int32),
        )
    )()

    def chosen() -> dict[str, np.ndarray]:
        found = run(query, key, value, whole, do)
        cut: dict[str, Callable[[Array], Array]] = {
            "output": lambda x: x[:, rows[:, None], heads],
            "query": lambda x: x[:, rows[:, None], heads],
            "key": lambda x: x[:, :, heads],
            "value": lambda x: x[:, :, heads],
            "bias0.bias": lambda x: x[:, heads[:, None], rows],
        }
        return {name: np.asarray(cut[name](x)) for name, x in found.items()}

    got, again = chosen(), chosen()
    part = np.asarray(pairs(large, heads, rows))
    operands = {
        "query": np.asarray(query[:, rows[:, None], heads]),
        "key": np.asarray(key[:, :, heads]),
        "value": np.asarray(value[:, :, heads]),
    }
    is_mask = large.what == "mask"
    conditions = {"mask": part} if is_mask else {}
    operands |= {} if is_mask else {"bias0.bias": part}
    plan = plain(
        L=(1,),
        T=len(large.rows),
        S=large.T,
        N=len(large.heads),
        K=len(large.heads),
        H=large.H,
        h=large.H,
        dtype="bfloat16",
        mask=part.shape if is_mask else None,
        bias=() if is_mask else ("dense",),
        forms={} if is_mask else {"bias0.bias": Form(part.shape, "bfloat16", "pair")},
    )
    output = np.asarray(do[:, rows[:, None], heads])
    given = (operands, conditions, {"output": output})
    return got, again, Elements(plan, "normal", 0, given)


def _projected(large: Large) -> tuple[Array, Array, Array]:
    shape = (3, 1, large.T, large.N, large.H)
    x = jax.random.normal(jax.random.key(0), shape).astype(jnp.bfloat16)
    query, key, value = x
    return query, key, value


def _program(large: Large, implementation: Any) -> Callable[..., dict[str, Array]]:
    def run(
        query: Array, key: Array, value: Array, whole: Array, do: Array
    ) -> dict[str, Array]:
        is_mask = large.what == "mask"

        def attend(query: Array, key: Array, value: Array, bias: Array | None) -> Array:
            mask = whole if is_mask else None
            return dot_product_attention(
                query, key, value, bias, mask, implementation=implementation
            )

        given = (query, key, value, None if is_mask else whole)
        output, back = jax.vjp(attend, *given)
        names = ("query", "key", "value", "bias0.bias")
        found = dict(zip(names, back(do), strict=True))
        if is_mask:
            del found["bias0.bias"]
        return {"output": output, **found}

    return run
