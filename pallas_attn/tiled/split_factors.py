"""Products as columns beside q and k, accurate to float32 on 16-bit tensor cores.

Factors that 16 bits do not hold become bfloat16 pieces x1 + x2 + x3, and a product
    a b = a1 b1 + (a1 b2 + a2 b1 + a1 b3 + a2 b2 + a3 b1) + O(2^-24)
a dot of more columns, [a1 a1 a2 ..].[b1 b2 b1 ..]. Its gradients are those of its
columns, added up: da = dS (b1 + b2 + ..) over the columns in which a1 stands.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_attn.bias.base import Added
from pallas_attn.call import Call
from pallas_attn.types import outline


f32 = jnp.float32
bf16 = jnp.bfloat16

# Which piece of a meets which piece of b.
Pattern = tuple[tuple[int, int], ...]

ONE: Pattern = ((0, 0),)
TWO: Pattern = ((0, 0), (1, 0))
SIX: Pattern = ((0, 0), (0, 1), (1, 0), (0, 2), (1, 1), (2, 0))

# Up to this many columns are one dot, whatever carries the gradient.
NARROW = 64


def with_columns(added: Added, call: Call) -> tuple[Added, tuple[int, ...]]:
    """Products as columns in units of q.k, and where each one's gradient comes from.

    The second value is, for each product, the place of the columns with its gradient.
    """
    products: list[tuple[Array, Array]] = []
    places = []
    for a, b in added.products:
        places.append(len(products))
        products += columns(a, b, call)
    return Added(added.terms, tuple(products)), tuple(places)


def columns(
    a: Float[Array, "#B T #N R"], b: Float[Array, "#B S #N R"], call: Call
) -> list[tuple[Array, Array]]:
    """Columns whose products sum to A.B / scale; the first pair has the gradient."""
    main, rest = _patterns(a, b, call)
    a, b = a.astype(f32) / call.scale, b.astype(f32)
    if main == ONE and not rest:
        dtype = f32 if call.exact else bf16
        return [(a.astype(dtype), b.astype(dtype))]
    count = 1 + max(max(pair) for pair in main + rest)
    left, right = pieces(a, count), pieces(b, count)

    def beside(pattern: Pattern) -> tuple[Array, Array]:
        return (
            jnp.concatenate([left[i] for i, _ in pattern], -1),
            jnp.concatenate([right[j] for _, j in pattern], -1),
        )

    return [beside(main), *(_chunks(*beside(rest)) if rest else ())]


def factor_gradient(
    g: Float[Array, "B L N columns"], a: Array, b: Array, side: int, call: Call
) -> Float[Array, "B L N R"]:
    """The gradient of a (side 0) or of b (side 1) from that of its columns, float32."""
    main, _ = _patterns(a, b, call)
    rank = a.shape[-1]
    parts = [
        g[..., n * rank : (n + 1) * rank]
        for n, pair in enumerate(main)
        if pair[side] == 0
    ]
    total = sum(parts[1:], parts[0])
    return total / call.scale if side == 0 else total


def columns_of(x: Array, length: int, call: Call) -> Array:
    """The gradient of columns before it is summed over shared axes."""
    return outline((call.B, length, call.N, x.shape[-1]), f32)


def pieces(x: Float[Array, "*axes"], n: int) -> list[Array]:
    """Some n bfloat16 arrays that sum to x up to 2^-8n of it.

    Not by casting and subtracting: XLA may keep excess precision, and the rest is 0.
    """
    out = []
    for _ in range(n):
        y = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        out.append(y.astype(bf16))
        x = x - y
    return out


def _patterns(a: Array, b: Array, call: Call) -> tuple[Pattern, Pattern]:
    """The pattern of the columns that carry the gradient, and that of the others."""
    rank = a.shape[-1]
    if call.exact:
        return ONE, ()
    if a.dtype == b.dtype == bf16:  # only the division by the scale may round
        if math.log2(call.scale) % 1 == 0:
            return ONE, ()
        return (TWO, ()) if len(TWO) * rank <= NARROW // 4 else (TWO[:1], TWO[1:])
    if len(SIX) * rank <= NARROW:
        return SIX, ()
    n = 3 if call.dtype == "float16" else 1  # float16 gradients need more of b than b1
    return SIX[:n], SIX[n:]


def _chunks(a: jax.Array, b: jax.Array) -> tuple[tuple[jax.Array, jax.Array], ...]:
    """Columns in powers of two, the widest first: a dot pads its columns to one."""
    n = a.shape[-1]
    width = min(NARROW, pl.next_power_of_2(n + 1) // 2)
    if n <= 16 or n == width:
        return ((a, b),)
    head = (a[..., :width], b[..., :width])
    return (head, *_chunks(a[..., width:], b[..., width:]))
