"""The function p(t) of a call's alpha, in a kernel's instructions."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp

from pallas_attn.normalizers.entmax import Functions, Learned, Power, takes_power
from pallas_attn.triton.entmax.call import SparseCall
from pallas_attn.triton.ptx import exp2, log2, relu
from pallas_attn.triton.tile import load_number


i32 = jnp.int32


def power_of(call: SparseCall, alpha: Any, b: Any, h: Any) -> Power | Learned:
    """Of query head h of batch entry b; alpha: a ref [#B, #N], None if it is static."""
    functions = Functions(*(functools.partial(f, call) for f in (exp2, log2, relu)))
    if call.alpha is None:
        at = (b * i32(alpha.shape[0] > 1), h * i32(alpha.shape[1] > 1))
        return Learned(load_number(alpha, at) - 1, functions)
    a = call.alpha - 1
    if takes_power(call.alpha):
        return Power(a, functions, fused=call.dtype != "float32")
    return Learned(a, functions)
