"""Single PTX instructions where XLA's or Triton's own sequence is longer or other."""

from __future__ import annotations

from typing import overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from pallas_attn.call import Call
from pallas_attn.types import Scalar


f32 = jnp.float32
i32 = jnp.int32


def exp2(call: Call, x: jax.Array) -> jax.Array:
    """2^x in one ex2 instruction; XLA's own is four, for denormal results."""
    if call.interpret:
        return jnp.exp2(x)
    return _inline("ex2.approx.ftz.f32 $0, $1;", x, f32)


def log2(call: Call, x: jax.Array) -> jax.Array:
    """The base-2 logarithm in one lg2 instruction, to 2^-22; libdevice's is twenty."""
    if call.interpret:
        return jnp.log2(x)
    return _inline("lg2.approx.ftz.f32 $0, $1;", x, f32)


@overload
def product(
    call: Call, x: jax.Array, factor: float, *, always: bool = False
) -> jax.Array: ...
@overload
def product(
    call: Call, x: Scalar, factor: float, *, always: bool = False
) -> Scalar: ...
def product(call: Call, x: Scalar, factor: float, *, always: bool = False) -> Scalar:
    """A multiple of x, rounded where a call asks for it, or always.

    Else a compiler makes one multiply-add of it and a sum wherever it likes, and the
    same score is rounded otherwise in another pass.
    """
    # a single number is multiplied once, at the start
    if isinstance(x, int | float) or not x.ndim:
        return x * factor
    if not (call.rounds_alike or always):
        return x * factor
    if call.interpret:  # a choice is no product, here between equal numbers
        y = x * factor
        return jnp.where(y <= -3e38, y - 1, y)
    bits = int(np.float32(factor).view(np.uint32))
    return _inline(f"mul.rn.f32 $0, $1, 0f{bits:08X};", x, f32)


def apart(call: Call, x: jax.Array) -> jax.Array:
    """A dot's result, which no compiler makes the start of another's, if exact.

    Which of two that are added up starts the other is for Triton to say, kernel by
    kernel; and a sum that starts large is rounded at every step.
    """
    if call.interpret or not call.exact:
        return x
    return _inline("mov.b32 $0, $1;", x, f32)


def relu(call: Call, x: jax.Array) -> jax.Array:
    """The larger of x and 0, and NaN for NaN; Triton's own maximum drops it."""
    if call.interpret:
        return jnp.where(x <= 0, 0.0, x)
    return _inline("max.NaN.f32 $0, $1, 0f00000000;", x, f32)


def sigmoid(call: Call, x: jax.Array, scale: float, *, precise: bool) -> jax.Array:
    """1 / (1 + exp(-scale x)); by the approximate tanh, to 2^-11, unless precise."""
    if precise:
        return jax.nn.sigmoid(x * scale)
    tanh = jnp.tanh if call.interpret else plgpu.approx_tanh
    return 0.5 * tanh(0.5 * scale * x) + 0.5


def larger(call: Call, x: jax.Array, y: jax.Array) -> jax.Array:
    """The larger of two, and NaN if one is; Triton's own maximum drops it."""
    if call.interpret:
        return jnp.maximum(x, y)
    return _inline("max.NaN.f32 $0, $1, $2;", x, f32, y)


def uniform(call: Call, x: jax.Array) -> jax.Array:
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


def _inline(asm: str, x: jax.Array, dtype: DTypeLike, *more: jax.Array) -> jax.Array:
    register = "f" if dtype == f32 else "r"
    kind = ",".join([f"={register}", *[register] * (1 + len(more))])
    out = jax.ShapeDtypeStruct(x.shape, dtype)
    return plgpu.elementwise_inline_asm(
        asm, args=[x, *more], constraints=kind, pack=1, result_shape_dtypes=[out]
    )[0]
