"""A bias is a value: a pytree with leaves by field name, an algebra, an identity."""

import functools
import pickle
import subprocess
import sys

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_attn import (
    ALiBi,
    Bias,
    Block,
    CoALiBi,
    Config,
    DenseBias,
    dot_product_attention,
    Entmax,
    FactoredBias,
)
from pallas_attn.bias.base import Sum
from pallas_attn.testing.numerics import assert_formula, assert_same_bits


T, S, N, H, R = 5, 7, 4, 8, 3

BIASES = {
    "dense": lambda: DenseBias(jnp.ones((N, T, S))),
    "factored": lambda: FactoredBias(jnp.ones((T, N, R)), jnp.ones((S, 1, R))),
    "alibi": lambda: ALiBi(jnp.ones(N)),
    "co_alibi": lambda: CoALiBi(jnp.ones(N)),
    "sum": lambda: ALiBi(jnp.ones(N)) + DenseBias(jnp.ones((T, S))),
}
FIELDS = {
    "dense": [".bias"],
    "factored": [".q_factor", ".k_factor"],
    "alibi": [".slopes"],
    "co_alibi": [".slopes"],
    "sum": [".terms[0].slopes", ".terms[1].bias"],
}
SHOWN = {
    "dense": "DenseBias(bias=f32[4,5,7])",
    "factored": "FactoredBias(q_factor=f32[5,4,3], k_factor=f32[7,1,3])",
    "alibi": "ALiBi(slopes=f32[4])",
    "co_alibi": "CoALiBi(slopes=f32[4])",
    "sum": "Sum(ALiBi(slopes=f32[4]) + DenseBias(bias=f32[5,7]))",
}
every_bias = pytest.mark.parametrize("name", BIASES)


def attend(qkv, bias):
    query, key, value = qkv
    return dot_product_attention(query, key, value, bias)


def loss(bias, qkv):
    return jnp.sum(attend(qkv, bias) ** 2)


@pytest.fixture
def qkv(getkey):
    sizes = (T, N, H), (S, N, H), (S, N, H)
    return tuple(jax.random.normal(getkey(), size) for size in sizes)


@every_bias
def test_leaves_go_by_field_name(name):
    paths, _ = zip(*jax.tree_util.tree_leaves_with_path(BIASES[name]()), strict=True)
    assert [jax.tree_util.keystr(path) for path in paths] == FIELDS[name]


@every_bias
def test_a_gradient_is_a_value_of_the_same_class(name, qkv):
    bias = BIASES[name]()
    gradient = jax.grad(loss)(bias, qkv)
    assert type(gradient) is type(bias)
    chex.assert_trees_all_equal_structs(gradient, bias)
    chex.assert_trees_all_equal_shapes_and_dtypes(gradient, bias)


@every_bias
def test_jax_may_rebuild_it_with_anything(name):
    bias = BIASES[name]()
    leaves, structure = jax.tree.flatten(bias)
    for filler in (None, 0, "spec", jax.ShapeDtypeStruct((1,), jnp.float32)):
        rebuilt = structure.unflatten([filler] * len(leaves))
        assert type(rebuilt) is type(bias)
    stacked = jax.vmap(lambda _: bias)(jnp.arange(2))
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(stacked))


@every_bias
@pytest.mark.parametrize("filler", [None, 0, "spec"])
def test_its_text_is_short_whatever_it_holds(name, filler):
    bias = BIASES[name]()
    assert repr(bias) == SHOWN[name]
    leaves, structure = jax.tree.flatten(bias)
    assert repr(filler) in repr(structure.unflatten([filler] * len(leaves)))
    jax.eval_shape(lambda x: repr(x) == SHOWN[name] or 1 / 0, bias)


@every_bias
def test_what_is_written_is_read_back(name):
    params = {"bias": BIASES[name](), "layers": [BIASES[name]()]}
    blank = jax.tree.map(jnp.zeros_like, params)
    data = flax.serialization.to_bytes(params)
    for back in (
        flax.serialization.from_bytes(blank, data),
        pickle.loads(pickle.dumps(params)),
    ):
        chex.assert_trees_all_equal_structs(back, params)
        assert_same_bits(jax.tree.leaves(back), jax.tree.leaves(params))
    names = flax.serialization.to_state_dict(params["bias"])
    assert list(names) == list(params["bias"].__dataclass_fields__)


def test_a_state_of_another_class_is_refused():
    state = flax.serialization.to_state_dict({"bias": BIASES["dense"]()})
    with pytest.raises(ValueError, match=r"\['slopes'\]; got \['bias'\] at ./bias"):
        flax.serialization.from_state_dict({"bias": BIASES["alibi"]()}, state)


def test_flax_is_told_of_every_class_whoever_comes_first():
    """Values and classes made before flax is imported, and after."""
    program = """
import sys
import jax
import jax.numpy as jnp
import pallas_attn
def subclass(name):
    fields = {"x": pallas_attn.head_home(), "__annotations__": {"x": jax.Array}}
    return type(name, (pallas_attn.Bias,), fields)
before = [pallas_attn.ALiBi(jnp.ones(2)) + jnp.ones((3, 3)), subclass("A")(jnp.ones(2))]
assert "flax" not in sys.modules
import flax
from flax.serialization import from_bytes, to_bytes
assert flax.serialization.__spec__.loader.get_source("flax.serialization")
params = [*before, subclass("B")(jnp.ones(2))]
blank = jax.tree.map(jnp.zeros_like, params)
assert repr(from_bytes(blank, to_bytes(params))) == repr(params)
assert not [x for x in sys.meta_path if "pallas_attn" in type(x).__module__]
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@every_bias
def test_it_is_equal_to_itself_alone(name):
    bias = BIASES[name]()
    assert bias == bias
    assert bias != BIASES[name]()
    assert len({bias, bias}) == 1


def test_sums_flatten_in_order():
    a, b, c = (BIASES[name]() for name in ("dense", "factored", "alibi"))
    for total in (a + b + c, a + (b + c), sum([a, b, c])):
        assert isinstance(total, Sum)
        assert total.terms == (a, b, c)


@pytest.mark.parametrize("array", [np.ones, jnp.ones], ids=["numpy", "jax"])
def test_an_array_in_a_sum_is_a_dense_bias(array):
    alibi, pair = BIASES["alibi"](), array((T, S), "float32")
    left, right = pair + alibi, alibi + pair
    assert [type(x) for x in left.terms] == [DenseBias, ALiBi]
    assert [type(x) for x in right.terms] == [ALiBi, DenseBias]


@pytest.mark.parametrize("name", sorted({*BIASES} - {"co_alibi"}))
def test_a_sum_adds_the_terms(name, qkv):
    bias, pair = BIASES[name](), jnp.full((T, S), 0.5)
    first = attend(qkv, bias + pair)
    assert_same_bits(attend(qkv, bias + DenseBias(pair)), first)
    assert_same_bits(attend(qkv, sum([bias, DenseBias(pair)])), first)


def test_an_array_is_a_dense_bias(qkv):
    pair = jnp.ones((N, T, S)) * jnp.arange(S, dtype=jnp.float32)[None, None]
    assert_same_bits(
        attend(qkv, pair),
        attend(qkv, DenseBias(pair)),
    )
    gradient = jax.grad(loss)(pair, qkv)
    assert_same_bits(gradient, jax.grad(loss)(DenseBias(pair), qkv).bias)


@every_bias
def test_equal_shapes_are_traced_once(name, qkv):
    chex.clear_trace_counter()
    traced = jax.jit(chex.assert_max_traces(loss, n=1))
    for scale in (1.0, 2.0, 3.0):
        traced(jax.tree.map(lambda x, s=scale: x * s, BIASES[name]()), qkv)


def test_a_learned_alpha_is_a_leaf_and_a_static_one_is_none(qkv):
    query, key, value = qkv

    def loss(normalizer):
        output = dot_product_attention(query, key, value, normalizer=normalizer)
        return jnp.sum(output**2)

    learned = Entmax(jnp.full(N, 1.5), top_k=3)
    assert [x.shape for x in jax.tree.leaves(learned)] == [(N,)]
    gradient = jax.grad(loss)(learned)
    chex.assert_trees_all_equal_structs(gradient, learned)
    assert gradient.top_k == 3
    assert jnp.isfinite(gradient.alpha).all()
    assert jax.tree.leaves(Entmax(1.5)) == []
    assert jax.grad(loss)(Entmax(1.5)) == Entmax(1.5)


@pytest.mark.parametrize("label", [0, 1, True, False, 1.5, 0.1, "a", None], ids=repr)
def test_trees_of_labels_have_the_structure_of_a_learned_alpha(label):
    """Of axes, masks of optax, filters, learning rates: None is no leaf to JAX."""
    learned = {"n": Entmax(jnp.full(N, 1.5), top_k=3)}
    labels = jax.tree.map(lambda _: label, learned)
    assert labels["n"] == Entmax(label, top_k=3)
    assert jax.tree.leaves(labels) == [label] * (label is not None)
    if label is None:
        labels = jax.tree.map(lambda x: x, labels, is_leaf=lambda x: x is None)
    is_leaf = lambda x: x is None
    same = jax.tree.structure(learned), jax.tree.structure(labels, is_leaf=is_leaf)
    assert same[0] == same[1]
    both = jax.tree.map(lambda x, _: x, learned, labels, is_leaf=is_leaf)
    assert both == learned


def test_axes_are_written_as_a_normalizer(qkv):
    query, key, value = qkv
    attend = lambda n: dot_product_attention(query, key, value, normalizer=n)
    alphas = jnp.linspace(1.2, 1.8, 2 * N).reshape(2, N)
    want = jnp.stack([attend(Entmax(alpha)) for alpha in alphas])
    for axis in (0, 1, -1):
        given = Entmax(jnp.moveaxis(alphas, 0, axis))
        assert_formula(jax.vmap(attend, in_axes=(Entmax(axis),))(given), want)


def test_an_int_alpha_is_one_for_all_heads_in_a_transformation(qkv):
    query, key, value = qkv
    attend = lambda n: dot_product_attention(query, key, value, normalizer=n)
    for alpha in (1, 2):
        found = jax.jit(attend)(Entmax(alpha))
        assert_formula(found, attend(Entmax(float(alpha))))


@pytest.mark.parametrize("alpha", [1.5, np.full(N, 1.5, np.float32)], ids=["one", "N"])
def test_flax_writes_and_restores_a_normalizer(alpha):
    written = flax.serialization.to_bytes({"n": Entmax(alpha, top_k=3)})
    blank = {"n": Entmax(jax.tree.map(lambda x: x * 0, alpha), top_k=3)}
    restored = flax.serialization.from_bytes(blank, written)["n"]
    assert restored.top_k == 3
    np.testing.assert_array_equal(restored.alpha, alpha)


def test_a_normalizer_is_traced_once_for_equal_shapes(qkv):
    query, key, value = qkv
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=2)
    def attend(normalizer):
        return dot_product_attention(query, key, value, normalizer=normalizer)

    for alpha in (1.2, 1.3):
        attend(Entmax(jnp.full(N, alpha)))
        attend(Entmax(1.5))


def test_a_config_is_a_static_argument(qkv):
    chex.clear_trace_counter()

    @functools.partial(jax.jit, static_argnames="config")
    @chex.assert_max_traces(n=1)
    def attend(config):
        return dot_product_attention(*qkv, config=config)

    assert_same_bits(attend(Config(Block(32, 32))), attend(Config(Block(32, 32))))


def test_a_class_is_registered_by_subclassing():
    class Shift(Bias):
        shift: jax.Array

    assert jax.tree.leaves(Shift(jnp.ones(2)))[0].shape == (2,)
