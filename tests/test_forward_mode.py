"""Forward mode and second derivatives: kernels beside autodiff of the reference."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from pallas_attn import ALiBi, dot_product_attention
from pallas_attn.lowering.lower import lower, SHARED_LIMIT, shared_memory, unavailable
from pallas_attn.testing.cases import Case, cases
from pallas_attn.testing.evaluate import (
    attention,
    called,
    EXACT,
    in_float64,
    kernel_implementation,
    SMALL,
    small,
)
from pallas_attn.testing.jaxprs import largest_array
from pallas_attn.testing.numerics import assert_formula
from pallas_attn.testing.poison import poisoned, poisoned_bias
from pallas_attn.testing.shipped import SIZES
from pallas_attn.tracing.names import NAME
from pallas_attn.visibility import allowed


KERNELS = kernel_implementation()


def moved(operands, seed=2):
    """A tangent of every operand."""
    leaves, tree = jax.tree.flatten(operands)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    draw = lambda key, x: (0.5 * jax.random.normal(key, x.shape)).astype(x.dtype)
    return tree.unflatten(map(draw, keys, leaves))


def loss(f, cotangents):
    """A number that is not linear in the results; empty rows are left out."""

    def of(operands):
        o, lse = f(operands)
        do, dlse = (x.astype(o.dtype) for x in cotangents)
        alive = jnp.isfinite(lse)
        lse = jnp.where(alive, lse, 0).astype(o.dtype)
        return (jnp.sin(o) * do).sum() + (lse * jnp.where(alive, dlse, 0)).sum()

    return of


def along(f, x, t):
    return jax.jvp(f, (x,), (t,))[1]


# (f, operands, tangents, cotangents) -> what is compared
MODES = {
    "jvp": lambda f, x, t, ct: jax.jvp(f, (x,), (t,)),
    "linearize": lambda f, x, t, ct: jax.linearize(f, x)[1](t),
    "jvp of grad": lambda f, x, t, ct: along(jax.grad(loss(f, ct)), x, t),
    "grad of jvp": lambda f, x, t, ct: jax.grad(lambda x: along(loss(f, ct), x, t))(x),
    "grad of grad": lambda f, x, t, ct: jax.grad(
        lambda x: dot(jax.grad(loss(f, ct))(x), t)
    )(x),
    "jvp of grad of query": lambda f, x, t, ct: along(
        lambda x: jax.grad(lambda q: loss(f, ct)({**x, "query": q}))(x["query"]), x, t
    ),
    "vmap of jvp": lambda f, x, t, ct: jax.vmap(lambda t: along(f, x, t))(both(t)),
    "jvp of vmap": lambda f, x, t, ct: jax.vmap(
        lambda q, dq: jax.jvp(lambda q: f({**x, "query": q}), (q,), (dq,))
    )(both(x["query"]), both(t["query"])),
    "vmap of jvp of grad": lambda f, x, t, ct: jax.vmap(
        lambda t: along(jax.grad(loss(f, ct)), x, t)
    )(both(t)),
}


def both(tree):
    return jax.tree.map(lambda x: jnp.stack([x, 0.5 * jnp.flip(x, 0)]), tree)


def dot(x, y):
    pairs = zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
    return sum((a * b.astype(a.dtype)).sum() for a, b in pairs)


def compared(mode, case):
    """A mode by kernels is that of the reference in float64."""
    sample = case.sample()
    given = (sample.operands, moved(sample.operands), sample.cotangents)

    def of(**options):
        f = attention(sample.settings, **options)
        attend = lambda conditions: lambda x: f(x, conditions)
        return lambda conditions, x, t, ct: MODES[mode](attend(conditions), x, t, ct)

    config = small(case.bias, case.normalizer)
    got = jax.jit(of(implementation=KERNELS, config=config, **EXACT))
    want = in_float64(of(implementation="reference"), sample.conditions, *given)
    assert_formula(got(sample.conditions, *given), want)


# at resets a gate is -inf, or so large that no tangent moves it
TABLE = [case for case in cases() if case.bias != "forget gate-resets"]
NORMALIZED = [
    Case(bias, situation, (), normalizer)
    for bias, situation, normalizer in [
        ("alibi", "causal", "sink"),
        ("dense", "empty rows", "sink"),
        ("sum", "causal GQA", "sink"),
        ("co_alibi", "causal", "sink"),
        ("factored", "lengths", "entmax 1.5"),
        ("alibi", "causal", "entmax learned"),
        ("dense", "causal", "entmax 1.5 top 8"),
    ]
]
# a second derivative by the scale is a number whose terms nearly cancel: in float32
# "xla" is as far from it as kernels
ROWS = [
    ("linearize" if case.situation == "scale array" else mode, case)
    for mode, case in zip(itertools.cycle(MODES), TABLE + NORMALIZED)
]


@pytest.mark.at_most(6)
@pytest.mark.parametrize(("mode", "case"), ROWS, ids=str)
def test_every_mode_is_that_of_the_reference(mode, case):
    compared(mode, case)


@pytest.mark.at_most(1)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bias", ["sum", "co_alibi"])
def test_every_mode_of_one_call(bias, mode):
    compared(mode, Case(bias, "causal").at(B=1, N=2, K=1))


@pytest.mark.at_most(1)
@pytest.mark.parametrize("bias", ["alibi", "sum", "co_alibi"])
def test_jacobians_agree(bias):
    """Forward, reverse, and each of the other."""
    sizes = {"B": 1, "N": 1, "K": 1, "T": 3, "S": 4, "H": 4, "h": 2}
    operands = Case(bias, "full").at(**sizes).sample().operands
    f = lambda x: dot_product_attention(**x, implementation=KERNELS, **EXACT)
    run = lambda of: jax.jit(of)(operands)
    assert_formula(run(jax.jacfwd(f)), run(jax.jacrev(f)))
    total = lambda x: (f(x) ** 2).sum()
    twice = run(jax.jacfwd(jax.jacrev(total)))["query"]
    assert_formula(twice, run(jax.jacrev(jax.jacfwd(total)))["query"])


def scanned(x, slopes, wrap=lambda f: f):
    """Layers, one after another."""

    def layer(x, slope):
        f = wrap(
            lambda x: dot_product_attention(
                x, x, x, ALiBi(slope), is_causal=True, implementation=KERNELS,
                config=SMALL, **EXACT,
            )
        )  # fmt: skip
        return x + f(x), None

    return jax.lax.scan(layer, x, slopes)[0]


def test_a_product_with_the_hessian_through_scan_and_remat():
    x = Case("none").at(B=1, T=19, S=19).sample().operands["query"]
    slopes = jnp.array([[0.5, 0.1], [0.3, 1.0]])
    policy = jax.checkpoint_policies.save_only_these_names(NAME)

    def looped(x, slopes):
        for slope in slopes:
            x = scanned(x, slope[None])
        return x

    def product(f):
        total = lambda x, slopes: (jnp.sin(f(x, slopes)) ** 2).sum()
        at, to = (x, slopes), (x[:, ::-1], slopes[::-1])
        return jax.jit(lambda: jax.jvp(jax.grad(total, (0, 1)), at, to)[1])()

    want = product(looped)
    assert_formula(product(scanned), want)
    remat = lambda x, slopes: scanned(
        x, slopes, lambda f: jax.checkpoint(f, policy=policy)
    )
    assert_formula(product(remat), want)


@pytest.mark.at_most(1)
@pytest.mark.parametrize("bias", ["alibi", "sum", "co_alibi"])
def test_inside_shard_map_as_it_is_by_default(bias):
    sample = Case(bias, "causal").at(B=1, N=1, K=1, T=9, S=9).sample()
    operands, cotangents = sample.operands, sample.cotangents
    f = attention(sample.settings, implementation=KERNELS, config=small(bias), **EXACT)
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))
    sharded = PartitionSpec("x")
    specs = {**dict.fromkeys(operands, sharded), "bias": PartitionSpec()}
    run = jax.shard_map(
        lambda x: f(x, {}), mesh=mesh, in_specs=(specs,), out_specs=(sharded, sharded)
    )
    for mode in ("jvp", "jvp of grad", "grad of grad"):
        of = lambda f, mode=mode: jax.jit(lambda *x: MODES[mode](f, *x))(
            operands, moved(operands), cotangents
        )
        assert_formula(of(run), of(lambda x: f(x, {})))


def names(f, *arguments):
    """The kernels that a function launches on a GPU, in order."""
    return [kernel.name.removesuffix("_kernel") for kernel in lower(f, *arguments)]


def test_first_derivatives_are_one_kernel_each():
    sample = Case("alibi", "causal").at(T=300, S=300, dtype=jnp.bfloat16).specs()
    x, t = sample.operands, sample.operands
    f = lambda x: dot_product_attention(**x, is_causal=True, implementation="triton")
    total = lambda x: f(x).astype(jnp.float32).sum()
    forward = ["norms", "forward"]
    backward = ["delta", "rows", "cols"]
    assert names(f, x) == forward
    assert names(lambda x, t: jax.jvp(f, (x,), (t,)), x, t) == [*forward, "tangent"]
    assert names(jax.grad(total), x) == [*forward, *backward]
    # a product with the Hessian: these once more, of the new cotangent
    square = lambda x: (f(x).astype(jnp.float32) ** 2).sum()
    product = names(lambda x, t: along(jax.grad(square), x, t), x, t)
    assert product == [*forward, "tangent", *backward]
    policy = jax.checkpoint_policies.save_only_these_names(NAME)
    kept = jax.grad(jax.checkpoint(total, policy=policy))
    assert names(kept, x) == [*forward, *backward]


def test_a_tangent_of_a_value_alone_needs_no_product_of_scores():
    """What does not move is no operand of the pass."""
    sample = Case("alibi", "causal").sample()
    x, t = sample.operands, moved(sample.operands)
    f = attention(sample.settings, implementation=KERNELS, config=SMALL, **EXACT)
    of = lambda v: f({**x, "value": v}, {})
    o, lse = jax.jit(lambda v, t: along(of, v, t))(x["value"], t["value"])
    assert not np.any(lse)
    assert_formula(o, jax.jit(of)(t["value"])[0])


@pytest.mark.at_most(2)
@pytest.mark.parametrize("mode", ["jvp", "jvp of grad"])
@pytest.mark.parametrize(
    ("bias", "situation", "normalizer"),
    [
        ("sum", "lengths", "sink"),
        ("saturating", "segments", "softmax"),
        ("dense", "mask BNTS", "softmax"),
        ("alibi", "empty rows", "softmax"),
        ("co_alibi", "lengths", "softmax"),
        ("factored", "segments", "entmax 1.5"),
    ],
)
def test_poison_reaches_no_tangent(bias, situation, normalizer, mode):
    """NaN and inf in all that no place reads, of operands and of their tangents."""
    case = Case(bias, situation, (), normalizer)
    sample = case.sample()
    problem = called(**sample.operands, **sample.conditions, **sample.settings).problem
    sizes = case.sizes
    places = np.broadcast_to(
        allowed(problem.call, problem.visibility), sizes.sizes("BNTS")
    )
    assert not places.all()

    def spoiled(tree):
        bad = {name: poisoned(places, name, x) for name, x in tree.items()}
        return bad | {"bias": poisoned_bias(places, tree["bias"])}

    config = small(bias, normalizer)
    f = attention(sample.settings, implementation=KERNELS, config=config, **EXACT)
    x, t = sample.operands, moved(sample.operands)
    run = jax.jit(
        lambda x, t: MODES[mode](
            lambda x: f(x, sample.conditions), x, t, sample.cotangents
        )
    )
    got, want = run(spoiled(x), spoiled(t)), run(x, t)
    assert_formula(got, want)


@pytest.mark.parametrize("mode", ["jvp", "jvp of grad", "grad of grad"])
@pytest.mark.parametrize("bias", ["dense-11TS", "sum-alibi factored", "co_alibi"])
def test_memory_is_linear(bias, mode):
    sizes = {"B": 4, "N": 4, "K": 4, "T": 1500, "S": 1700}
    sample = Case(bias, "causal").at(**sizes).specs()
    f = attention(sample.settings, implementation=KERNELS)
    run = lambda *x: MODES[mode](lambda x: f(x, {}), *x)
    shape = largest_array(run, sample.operands, sample.operands, sample.cotangents)
    found = jax.ShapeDtypeStruct(shape, jnp.float32).size
    assert found < 4 * 4 * 1500 * 1700 // 2, f"an array of shape {shape}"


@pytest.mark.machine_code
@pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
@pytest.mark.parametrize("arch", [80, 86, 90])
@pytest.mark.parametrize(
    ("bias", "H", "dtype"),
    [
        ("alibi", 64, "bfloat16"),
        ("dense-float32", 128, "bfloat16"),
        ("dense", 256, "bfloat16"),
        ("sum", 128, "float32"),
    ],
)
def test_the_tangent_pass_fits_a_card(bias, H, dtype, arch):
    sample = Case(bias, "full").at(**SIZES, H=H, h=H, dtype=dtype).specs()
    f = attention(sample.settings, implementation="triton")
    push = lambda x, t: along(lambda x: f(x, {}), x, t)
    made = lower(push, sample.operands, sample.operands, arch=arch)
    (kernel,) = [x for x in made if x.name == "tangent_kernel"]
    assert shared_memory(kernel, arch) <= SHARED_LIMIT[arch]
