"""Single PTX instructions where XLA's or Triton's own sequence is longer or other."""

from __future__ import annotations

import struct
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu

from pallas_attn.call import Call


f32 = jnp.float32
i32 = jnp.int32


def exp2(call: Call, x: jax.Array) -> jax.Array:
    """2^x in one ex2 instruction; XLA's own is four, for denormal results."""
    if call.interpret:
        return jnp.exp2(x)
    return _inline("ex2.approx.ftz.f32 $0, $1;", x, f32)


def rounded(call: Call, x: Any, by: float) -> Any:
    """The product x by, rounded by itself: no sum takes it into a multiply-add."""
    if jnp.ndim(x) == 0:
        return x * by
    if call.interpret:  # XLA would contract a product, but not what it rounds by hand
        return lax.reduce_precision(x * by, 8, 22)
    return _inline(f"mul.rn.f32 $0, $1, 0f{_bits(by)};", x, f32)


def uniform(call: Call, x: Any) -> Any:
    """The same integer in a uniform register.

    A trip count that comes from a reduction looks different in every thread to ptxas,
    which then moves every wgmma descriptor by hand, and spills.
    """
    if call.interpret:
        return x
    same = _inline(
        "redux.sync.max.s32 $0, $1, 0xffffffff;", jnp.full((1,), x, i32), i32
    )
    return jnp.max(same)


def _inline(asm: str, x: jax.Array, dtype: Any) -> jax.Array:
    kind = "=f,f" if dtype == f32 else "=r,r"
    out = jax.ShapeDtypeStruct(x.shape, dtype)
    return plgpu.elementwise_inline_asm(
        asm, args=[x], constraints=kind, pack=1, result_shape_dtypes=[out]
    )[0]


def _bits(x: float) -> str:
    """A float32 as PTX writes it."""
    return struct.pack(">f", x).hex().upper()
