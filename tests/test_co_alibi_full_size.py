"""Co-ALiBi at the size at which the system it reimplements validates itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_attn import co_alibi_slopes, CoALiBi
from pallas_attn.testing.cases import normal, Sample
from pallas_attn.testing.evaluate import EXACT, gradients
from pallas_attn.testing.numerics import SIMILAR


def sample(dtype, slopes, T, S, N, H, **settings):
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v, do = (
        normal(key, 1, n, N, H).astype(dtype)
        for key, n in zip(keys, (T, S, S, T), strict=False)
    )
    return Sample(
        {"query": q, "key": k, "value": v, "bias": CoALiBi(slopes)},
        {},
        {"is_causal": True, "query_offset": S - T, **settings},
        (do, normal(keys[4], 1, T, N)),
    )


def in_float32(drawn):
    """The same numbers, wider."""
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), drawn.operands)
    output, lse = drawn.cotangents
    return Sample(wide, {}, drawn.settings, (output.astype(jnp.float32), lse))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", SIMILAR)
def test_the_validation_of_the_existing_implementation(dtype):
    """1 - 2<x,y> / (|x|^2 + |y|^2) at B1 N16 T4096 H128 of o, dq, dk and dv."""
    drawn = sample(dtype, co_alibi_slopes(16), T=4096, S=4096, N=16, H=128)
    got, grads = gradients(drawn, implementation="triton")
    want, true = gradients(in_float32(drawn), implementation="xla", **EXACT)
    pairs = {"output": (got[0], want[0])}
    pairs |= {name: (grads[name], true[name]) for name in ("query", "key", "value")}
    for name, (x, y) in pairs.items():
        x, y = (np.asarray(a.astype(jnp.float32), np.float64) for a in (x, y))
        difference = ((x - y) ** 2).sum() / ((x**2).sum() + (y**2).sum())
        assert difference <= SIMILAR[dtype], f"{name}: {difference:.1e}"
