"""Queries far beyond all keys: what all keys of a row share costs no digit."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_attn
from pallas_attn import ALiBi, Bias, Entmax, head_home, Softmax
from pallas_attn.testing.cases import Sample
from pallas_attn.testing.evaluate import (
    EXACT,
    gradients,
    implementations,
    small,
    truth,
)
from pallas_attn.testing.numerics import assert_rounded_once, BESIDE_REFERENCE


T, S, H = 21, 53, 16
FAR = 2**20
NORMALIZERS = {
    "softmax": Softmax(),
    "entmax 1.5": Entmax(1.5),
    "entmax learned": Entmax(jnp.array([1.3])),
    "entmax top 8": Entmax(1.5, top_k=8),
}


class Away(Bias):
    """ALiBi as a user writes it."""

    slopes: jax.Array = head_home()

    def tile(self, t: Any) -> Any:
        """Part by part."""
        return tuple(-self.slopes * part for part in t.away)


def results(offset, options, implementation, dtype, normalizer, traced=False):
    """Of a bias: the output, the residual, the gradients of q, k, v and the bias."""
    rng = np.random.default_rng(5)
    shapes = (1, T, 1, H), (1, S, 1, H), (1, S, 1, H), (1, T, 1, H)
    *operands, do = (jnp.asarray(rng.standard_normal(x), dtype) for x in shapes)

    def both(bias, traced_offset):
        def attend(query, key, value, bias):
            return pallas_attn.dot_product_attention(
                query, key, value, bias, normalizer=normalizer, return_residual=True,
                query_offset=traced_offset if traced else offset,
                implementation=implementation, **options,
            )  # fmt: skip

        (output, residual), back = jax.vjp(attend, *operands, bias)
        return output, residual, *jax.tree.leaves(back((do, 0 * residual)))

    run = jax.jit(both)
    return lambda bias: run(bias, jnp.int32(offset))


@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("dtype", BESIDE_REFERENCE)
@pytest.mark.parametrize("where", ["after", "after causal traced", "before"])
@pytest.mark.at_most(12)
def test_a_shift_of_all_queries_changes_no_weight(
    where, dtype, normalizer, implementation
):
    """Slopes of 600 and of 1/2, 2^20 beyond all keys, beside the reference there."""
    call = settings(dtype, is_causal="causal" in where)
    near, far = (-T - 1, -FAR) if where == "before" else (S, FAR)
    config = small("alibi", normalizer)
    got = results(far, call | {"config": config}, implementation, dtype,
                  NORMALIZERS[normalizer], "traced" in where)  # fmt: skip
    want = results(near, call, "reference", dtype, NORMALIZERS[normalizer])
    for slope in (600.0, 0.5):
        bias = ALiBi(jnp.array([slope]))
        close(got(bias), want(bias), dtype)


@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("dtype", BESIDE_REFERENCE)
@pytest.mark.at_most(8)
def test_nor_does_it_round_a_term_of_ones_own_by_tiles(
    dtype, normalizer, implementation
):
    """Of a term that says `away` each row's nearest key has all weight."""
    call, slopes = settings(dtype), jnp.array([600.0])
    config = small("alibi", normalizer)
    got = results(FAR, call | {"config": config}, implementation, dtype,
                  NORMALIZERS[normalizer])  # fmt: skip
    want = results(S, call, "reference", dtype, NORMALIZERS[normalizer])
    # 2^20 times what rounding left of a row of dS is a slope's: not compared
    close(got(Away(slopes))[:-1], want(ALiBi(slopes))[:-1], dtype)


@pytest.mark.parametrize("implementation", implementations())
def test_a_narrow_slope_has_its_gradient_rounded_once(implementation):
    """Scores and what is left out of them both have one for it."""
    rng, N = np.random.default_rng(3), 16
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    q, k, v = draw(1, T, N, H), draw(1, S, N, H), draw(1, S, N, H)
    slopes = jnp.asarray(abs(rng.standard_normal(N)), jnp.bfloat16)
    sample = Sample(
        {"query": q, "key": k, "value": v, "bias": ALiBi(slopes)},
        {}, {"query_offset": S - T // 2}, (draw(1, T, N, H), draw(1, T, N)),
    )  # fmt: skip
    options = {"implementation": implementation, "config": small("alibi"), **EXACT}
    _, got = gradients(sample, **options)
    assert_rounded_once(got["bias"], truth(sample)[1]["bias"])


def settings(dtype, **more) -> dict[str, Any]:
    exact = jax.lax.Precision.HIGHEST if dtype == "float32" else None
    return {"precision": exact, **more}


def close(got, want, dtype):
    """But for the residuals, which a shift shifts."""
    assert np.isfinite(np.asarray(got[1])).all()
    for n, (x, y) in enumerate(zip(got, want, strict=True)):
        if n != 1:
            x, y = (np.asarray(z, np.float64) for z in (x, y))
            atol = BESIDE_REFERENCE[dtype] * max(1, np.abs(y).max())
            np.testing.assert_allclose(x, y, rtol=0, atol=atol)
