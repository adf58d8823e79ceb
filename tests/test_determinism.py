"""The same inputs give the same bits, twice and fifty times."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import ClosedJaxpr, Literal

from pallas_attn import dot_product_attention, Entmax, ForgetGate, RelativeBias
from pallas_attn.layers.tables import at_positions, of_pairs
from pallas_attn.testing.cases import Case, KINDS
from pallas_attn.testing.evaluate import implementations, small, with_gradients
from pallas_attn.testing.numerics import assert_same_bits


@pytest.mark.at_most(3)
@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize("bias", KINDS)
def test_twice(bias, implementation):
    sample = Case(bias, "causal GQA").at(dtype="bfloat16").sample()
    evaluate = jax.jit(
        with_gradients(
            sample.settings, implementation=implementation, config=small(bias)
        )
    )
    arguments = sample.operands, sample.conditions, sample.cotangents
    assert_same_bits(evaluate(*arguments), evaluate(*arguments))


@pytest.mark.gpu
@pytest.mark.parametrize("bias", KINDS)
@pytest.mark.parametrize("H", [32, 64, 128])
def test_fifty_times_at_full_size(bias, H):
    """A race that shows in a few of many repeats passes every tolerance."""
    sizes = {"B": 4, "N": 8, "K": 4, "T": 2048, "S": 2048, "H": H, "h": H}
    sample = Case(bias, "causal").at(**sizes, dtype="bfloat16").sample()
    evaluate = jax.jit(with_gradients(sample.settings, implementation="triton"))
    arguments = sample.operands, sample.conditions, sample.cotangents
    first = jax.device_get(evaluate(*arguments))
    for _ in range(49):
        assert_same_bits(evaluate(*arguments), first)


def most_added_up(f: Callable[..., Any], *operands: jax.Array) -> list[float]:
    """Of each sum by a scatter in f: the most numbers that it adds up at one place.

    The order in which a GPU does so is another in each run.
    """
    found: list[float] = []

    def run(jaxpr: Any, constants: Any, *values: Any) -> list[Any]:
        known = dict(zip(jaxpr.constvars, constants, strict=True))
        known |= dict(zip(jaxpr.invars, values, strict=True))
        for equation in jaxpr.eqns:
            inputs = [x.val if isinstance(x, Literal) else known[x]
                      for x in equation.invars]  # fmt: skip
            bind = functools.partial(equation.primitive.bind, **equation.params)
            if equation.primitive.name == "scatter-add":
                into, places, updates = inputs
                count = bind(jnp.zeros_like(into), places, jnp.ones_like(updates))
                found.append(float(jnp.max(count)))
            inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
            if isinstance(inner, ClosedJaxpr) and equation.primitive.name != "scan":
                outputs = run(inner.jaxpr, inner.consts, *inputs)
            else:
                outputs = bind(*inputs)
                outputs = outputs if equation.primitive.multiple_results else [outputs]
            known |= dict(zip(equation.outvars, outputs, strict=True))
        return [x.val if isinstance(x, Literal) else known[x] for x in jaxpr.outvars]

    closed = jax.make_jaxpr(f)(*operands)
    run(closed.jaxpr, closed.consts, *operands)
    return found


@pytest.mark.at_most(6)
@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize("bias", KINDS)
def test_no_gradient_adds_up_as_it_comes(bias, implementation):
    """Twice the same bits on a CPU, whose scatters have an order, say less."""
    sample = Case(bias, "causal GQA").at().sample()
    evaluate = with_gradients(
        sample.settings, implementation=implementation, config=small(bias)
    )
    leaves, tree = jax.tree.flatten(
        (sample.operands, sample.conditions, sample.cotangents)
    )
    counts = most_added_up(lambda *x: evaluate(*tree.unflatten(x)), *leaves)
    assert max(counts, default=0) <= 1


@pytest.mark.parametrize("way", ["causal", "positions", "entmax", "offsets", "mapped"])
def test_no_number_of_a_distance_adds_up_as_it_comes(way, getkey):
    """Wherever pairs look up the table of distances, written out or not."""
    q, k, v = jax.random.normal(getkey(), (3, 2, 23, 2, 8))
    table = jax.random.normal(getkey(), (2, 9))
    order, two = jnp.arange(23, dtype=jnp.int32), jnp.asarray([2, 5], jnp.int32)
    settings: dict[str, Any] = {
        "causal": {},
        "positions": {"query_positions": order, "key_positions": order[::-1]},
        "entmax": {"normalizer": Entmax(1.5, 8)},
        "offsets": {"query_offset": two},
        "mapped": {},
    }[way]

    def loss(table: jax.Array) -> jax.Array:
        def one(**more: Any) -> jax.Array:
            return dot_product_attention(
                q, k, v, RelativeBias(table, -2), is_causal=True,
                implementation="xla", **settings, **more,
            )  # fmt: skip

        if way != "mapped":
            return jnp.sum(one() ** 2)
        starts = jnp.stack([two, two + 1])
        return jnp.sum(jax.vmap(lambda x: one(query_offset=x))(starts) ** 2)

    assert max(most_added_up(jax.grad(loss), table), default=0) <= 1


@pytest.mark.parametrize("heads", ["together", "apart"])
def test_no_row_of_a_table_adds_up_as_it_comes(heads, getkey):
    """Tokens of two batch entries stand in the same places; heads do or do not."""
    table = jax.random.normal(getkey(), (9, 2, 3))
    shape = (2, 1 if heads == "together" else 2, 7)
    places = jax.random.randint(getkey(), shape, 0, 9)

    def loss(table: jax.Array) -> jax.Array:
        rows = at_positions(table, places)
        pairs = of_pairs(table[..., 0], places[..., None, :])
        return jnp.sum(rows**2) + jnp.sum(pairs**2)

    assert max(most_added_up(jax.grad(loss), table), default=0) <= 1


@pytest.mark.parametrize("given", ["query_offset", "key_positions"])
def test_gates_that_elements_of_a_map_share_have_one_gradient(given, getkey):
    """Each element looks up the same sums elsewhere; their gradients are added up."""
    q, k, v = jax.random.normal(getkey(), (3, 1, 23, 2, 8))
    gate = jax.nn.log_sigmoid(jax.random.normal(getkey(), (1, 23, 2)))
    order = jnp.arange(23, dtype=jnp.int32)
    mapped = {
        "query_offset": jnp.asarray([[2], [5]], jnp.int32),
        "key_positions": jnp.stack([order, order[::-1]]),
    }[given]

    def loss(gate: jax.Array) -> jax.Array:
        def one(x: jax.Array) -> jax.Array:
            more: dict[str, Any] = {given: x}
            more |= {"query_positions": order} if "key" in given else {}
            bias = ForgetGate(gate)
            return dot_product_attention(
                q, k, v, bias, is_causal=True, implementation="xla", **more
            )

        return jnp.sum(jax.vmap(one)(mapped) ** 2)

    counts = most_added_up(jax.grad(loss), gate)
    assert counts
    assert max(counts) == 1
