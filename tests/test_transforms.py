"""JAX's transformations, each against what it means."""

import chex
import jax
import jax.numpy as jnp
import pytest

import pallas_attn
from pallas_attn.testing.cases import Case, KINDS
from pallas_attn.testing.evaluate import (
    attention,
    EXACT,
    implementations,
    kernel_implementation,
    SMALL,
    small,
    SMALL_CONTEXTUAL,
    true_gradients,
    with_gradients,
)
from pallas_attn.testing.jaxprs import kernel_names, largest_array
from pallas_attn.testing.numerics import assert_formula, assert_same_bits


everywhere = pytest.mark.parametrize("implementation", implementations())
KERNELS = kernel_implementation()


def attend(query, key, value, bias=None, mask=None, **options):
    contextual = isinstance(bias, pallas_attn.CoALiBi)
    options["config"] = SMALL_CONTEXTUAL if contextual else SMALL
    return pallas_attn.dot_product_attention(
        query, key, value, bias, mask, is_causal=True, **EXACT, **options
    )


@pytest.mark.at_most(3)
@everywhere
@pytest.mark.parametrize("bias", ["sum", "co_alibi"])
def test_no_retrace_for_equal_shapes(bias, implementation):
    case = Case(bias, "causal lengths GQA")
    first, second = case.sample(0), case.sample(1)
    evaluate = with_gradients(
        first.settings, implementation=implementation, config=small(bias)
    )
    chex.clear_trace_counter()
    once = jax.jit(chex.assert_max_traces(evaluate, 1))
    for sample in (first, second, first):
        once(sample.operands, sample.conditions, sample.cotangents)


@pytest.mark.at_most(2)
@everywhere
@pytest.mark.parametrize(
    ("bias", "mapped"),
    [
        ("dense", "query"),
        ("dense-1NTS", "key value"),
        ("factored", "bias"),
        ("none", "mask"),
        ("alibi", "query mask"),
        ("co_alibi", "query key bias"),
        ("sum", "query key value bias mask"),
    ],
)
def test_vmap_is_a_loop(bias, mapped, implementation):
    """Over any subset of the positional arguments, forward and backward."""
    names = ("query", "key", "value", "bias", "mask")
    axes = tuple(0 if name in mapped.split() else None for name in names)
    draws = [Case(bias, "mask BNTS").at(B=1).sample(seed) for seed in (0, 1)]
    each = [{**x.operands, **x.conditions} for x in draws]
    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
    *operands, mask = (
        stack([x[name] for x in each]) if axis == 0 else each[0][name]
        for name, axis in zip(names, axes, strict=True)
    )
    do = [x.cotangents[0] for x in draws]

    def one(query, key, value, bias, mask):
        return attend(query, key, value, bias, mask, implementation=implementation)

    @jax.jit
    def pull(operands, mask, do):
        out, pullback = jax.vjp(lambda q, k, v, b: one(q, k, v, b, mask), *operands)
        return out, pullback(do)

    @jax.jit
    def pull_mapped(operands, mask, do):
        mapped = jax.vmap(one, axes)
        f = lambda q, k, v, b: mapped(q, k, v, b, mask)
        out, pullback = jax.vjp(f, *operands)
        return out, pullback(do)

    at = lambda i, name: (each[i] if name in mapped.split() else each[0])[name]
    loop = [
        pull([at(i, name) for name in names[:4]], at(i, "mask"), do[i]) for i in (0, 1)
    ]
    out, grads = stack(loop)
    want = [
        grad if axis == 0 else jax.tree.map(lambda x: x.sum(0), grad)
        for grad, axis in zip(grads, axes, strict=False)
    ]
    assert_formula(pull_mapped(operands, mask, jnp.stack(do)), (out, want))


@pytest.mark.at_most(2)
@everywhere
@pytest.mark.parametrize("bias", ["alibi", "dense", "co_alibi"])
def test_checkpoint_changes_nothing(bias, implementation):
    sample = Case(bias, "causal").sample()
    options = {"implementation": implementation, "config": small(bias), **EXACT}
    f = attention(sample.settings, **options)

    def pull(f):
        def run(operands, cotangents):
            return jax.vjp(lambda x: f(x, {}), operands)[1](cotangents)[0]

        return jax.jit(run)(sample.operands, sample.cotangents)

    assert_formula(pull(jax.checkpoint(f)), pull(f))


@pytest.mark.at_most(1)
@everywhere
def test_scan_is_a_loop(implementation):
    """Layers with stacked slopes and a dense bias shared by all."""
    sample = Case("dense-1NTS", "causal").at(B=1, T=37, S=37).sample()
    query, dense = sample.operands["query"], sample.operands["bias"]
    slopes = jnp.array([[0.5, 0.1], [0.3, 1.0], [0.2, 0.7]])

    def layer(x, slopes, dense):
        bias = pallas_attn.ALiBi(slopes) + dense
        return x + attend(x, x, x, bias, implementation=implementation)

    def scanned(x, slopes, dense):
        return jax.lax.scan(lambda x, s: (layer(x, s, dense), None), x, slopes)[0]

    def looped(x, slopes, dense):
        for s in slopes:
            x = layer(x, s, dense)
        return x

    do = sample.cotangents[0]
    pull = lambda f: jax.jit(lambda *x: jax.vjp(f, *x)[1](do))(query, slopes, dense)
    assert_formula(pull(scanned), pull(looped))


@pytest.mark.at_most(2)
@everywhere
@pytest.mark.parametrize("bias", ["sum", "co_alibi"])
def test_jacrev(bias, implementation):
    sizes = {"B": 1, "N": 1, "K": 1, "T": 5, "S": 7, "H": 4, "h": 2}
    operands = Case(bias, "full").at(**sizes).sample().operands

    def jacobian(name):
        f = lambda operands: attend(**operands, implementation=name)
        return jax.jit(jax.jacrev(f))(operands)

    assert_formula(jacobian(implementation), jacobian("reference"))


@everywhere
@pytest.mark.parametrize("bias", ["none", "sum", "co_alibi"])
def test_without_jit(bias, implementation):
    case = Case(bias, "causal").at(B=1, N=1, K=1)
    sample = case.sample()
    evaluate = with_gradients(
        sample.settings, implementation=implementation, config=small(bias), **EXACT
    )
    got = evaluate(sample.operands, sample.conditions, sample.cotangents)
    assert_formula(got, true_gradients(case))


@pytest.mark.at_most(5)
@pytest.mark.parametrize("bias", KINDS)
def test_jvp_and_second_order_of_plain_jax(bias):
    """A Hessian-vector product, forward over reverse and reverse over reverse."""
    sample = Case(bias, "causal").at(B=1).sample()
    tangents = Case(bias, "causal").at(B=1).sample(1).operands

    def products(name):
        loss = lambda x: (attend(**x, implementation=name) ** 2).sum()
        directional = lambda x: jax.jvp(loss, (x,), (tangents,))[1]
        forward = lambda x: jax.jvp(jax.grad(loss), (x,), (tangents,))[1]
        run = jax.jit(lambda x: (forward(x), jax.grad(directional)(x)))
        return run(sample.operands)

    first, second = products("xla")
    assert_formula(first, products("reference")[0])
    assert_formula(second, first)


@pytest.mark.parametrize(
    "bias", ["alibi", "dense", "dense-1NTS", "factored", "sum", "co_alibi"]
)
def test_a_frozen_bias_costs_nothing(bias):
    """No kernel and no array of a gradient that nobody asked for."""
    sizes = {"T": 300, "S": 200}
    sample = Case(bias, "full").at(**sizes).sample()

    def pull(names):
        def run(operands, do):
            wanted = {name: operands[name] for name in names}
            f = lambda wanted: attend(**{**operands, **wanted}, implementation=KERNELS)
            return jax.vjp(f, wanted)[1](do)

        return run

    arguments = sample.operands, sample.cotangents[0]
    frozen = kernel_names(pull(["query", "key", "value"]), *arguments)
    learned = kernel_names(pull(["query", "key", "value", "bias"]), *arguments)
    assert not any("tiles" in name or "thin" in name for name in frozen)
    assert len(frozen) <= len(learned)
    alone = kernel_names(pull(["query"]), *arguments)
    assert set(alone) <= set(frozen)
    pairs = 2 * 2 * 300 * 200
    shape = largest_array(pull(["query", "key", "value"]), *arguments)
    assert jnp.zeros(shape, jnp.int8).size < pairs or bias == "dense"


@everywhere
@pytest.mark.parametrize("form", ["1NTS", "B1TS", "11TS"])
def test_a_shared_bias_makes_no_array_of_all_pairs(form, implementation):
    """Neither forward nor backward, its own gradient included."""
    sizes = {"B": 4, "N": 4, "K": 4, "T": 700, "S": 900}
    sample = Case(f"dense-{form}", "full").at(**sizes).specs()
    evaluate = with_gradients(sample.settings, implementation=implementation)
    shape = largest_array(
        evaluate, sample.operands, sample.conditions, sample.cotangents
    )
    found = jax.ShapeDtypeStruct(shape, jnp.float32).size
    assert found < 4 * 4 * 700 * 900, f"an array of shape {shape}"


def test_equal_bits_with_and_without_an_unused_residual():
    """Of the kernels; XLA may fuse one program unlike another."""
    sample = Case("alibi", "causal").sample()
    f = lambda residual: jax.jit(
        lambda x: attend(**x, implementation=KERNELS, return_residual=residual)
    )(sample.operands)
    assert_same_bits(f(False), f(True)[0])
