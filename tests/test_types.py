"""What type checkers know of the public functions; pyright reads this file in lint."""

from typing import assert_type

import jax.numpy as jnp
from jaxtyping import Array

from pallas_attn import ALiBi, Bias, DenseBias, dot_product_attention, Sum, visited
from pallas_attn.api import Visited


def test_results_have_their_types():
    x, bias = jnp.ones((1, 2, 1, 4)), ALiBi(jnp.ones(1))
    assert_type(dot_product_attention(x, x, x, bias, implementation="xla"), Array)
    both = dot_product_attention(x, x, x, scale=1.0, return_residual=True)
    assert_type(both, tuple[Array, Array])
    output, residual = both
    assert (output.shape, residual.shape) == ((1, 2, 1, 4), (1, 2, 1))
    either = dot_product_attention(x, x, x, return_residual=bool(residual.ndim))
    assert_type(either, Array | tuple[Array, Array])
    assert_type(visited(x, x, x, implementation=("triton", "xla")), Visited)


def test_a_sum_has_terms():
    both = ALiBi(jnp.ones(1)) + DenseBias(jnp.ones((2, 2)))
    assert_type(both, Sum)
    assert_type((both + jnp.ones((2, 2))).terms, tuple[Bias, ...])
    assert len(both.terms) == 2


def test_wrong_names_are_refused():
    """Each line has an error that pyright must find: it reports an idle `ignore`."""
    x = jnp.ones((1, 2, 1, 4))
    for wrong in (
        lambda: dot_product_attention(x, x, x, implementation="cuda"),  # pyright: ignore[reportArgumentType]
        lambda: dot_product_attention(x, x, x, casual=True),  # pyright: ignore[reportCallIssue]
        lambda: dot_product_attention(x, x, x).terms,  # pyright: ignore[reportAttributeAccessIssue]
        lambda: 2 * ALiBi(jnp.ones(1)),  # pyright: ignore[reportOperatorIssue]
    ):
        try:
            wrong()
        except (AttributeError, TypeError, ValueError):
            continue
        raise AssertionError
