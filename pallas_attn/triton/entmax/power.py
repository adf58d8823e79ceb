"""The function p(t) of a call's alpha, in a kernel's instructions."""

from __future__ import annotations

import functools

import jax.numpy as jnp

from pallas_attn.bias.base import homes
from pallas_attn.normalizers.entmax import Functions, Learned, Power, takes_power
from pallas_attn.tiled.operands import Operands
from pallas_attn.triton.entmax.call import SparseCall
from pallas_attn.triton.memory import load_number
from pallas_attn.triton.ptx import exp2, log2, relu
from pallas_attn.types import Index, Ref


i32 = jnp.int32


def power_of(
    call: SparseCall, alpha: Ref | None, b: Index, h: Index, *, fused: bool = False
) -> Power | Learned:
    """Of query head h of batch entry b; alpha: a ref [#B, #N], None if it is static.

    fused: as `fuses` has it, wherever scores are looked at.
    """
    functions = Functions(*(functools.partial(f, call) for f in (exp2, log2, relu)))
    if call.alpha is None:
        assert alpha is not None
        at = (b * i32(alpha.shape[0] > 1), h * i32(alpha.shape[1] > 1))
        return Learned(load_number(alpha, at) - 1, functions)
    a = call.alpha - 1
    if takes_power(call.alpha):
        return Power(a, functions, fused=fused)
    return Learned(a, functions)


def fuses(call: SparseCall, ops: Operands) -> bool:
    """Whether a score may be one multiply-add, whose error grows with the scores'.

    Products of 16-bit numbers are no more exact. But an array's number, or a distance
    of given positions or from beyond all keys, may be -1e9 in all of a row, which would
    lose its threshold.
    """
    steep = [term for term in ops.added.terms if term.steep]
    arrays = any(home != "head" for term in steep for home in homes(term).values())
    far = ops.sight.arrays.placed or (call.passes_keys and bool(steep))
    return call.dtype != "float32" and not (arrays or far)
