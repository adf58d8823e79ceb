"""The layer of nnx: numbers and gradients of the linen one, its cache, transforms."""

import copy
import functools
import inspect
import warnings
from types import FunctionType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx

import pallas_attn
from pallas_attn import linen, nnx as native
from pallas_attn.testing.layers import B, BIASES, F, K, LENGTH, N, points
from pallas_attn.testing.numerics import assert_formula, assert_same_bits


pytestmark = pytest.mark.usefixtures("full_precision")

OURS: dict[str, Any] = {
    "precision": jax.lax.Precision.HIGHEST,
    "implementation": "xla",
}


def layer_of(bias=None, rngs=None, **fields) -> Any:
    """A layer; a function makes its bias."""
    rngs = rngs or nnx.Rngs(0)
    made = bias(rngs) if isinstance(bias, FunctionType) else bias
    return native.MultiHeadAttention(N, F, **OURS, rngs=rngs, bias=made, **fields)


def params_of(layer):
    return nnx.to_pure_dict(nnx.state(layer, nnx.Param))


def with_params(layer, params):
    """The layer with the parameters of a linen one."""
    state = nnx.state(layer, nnx.Param)
    nnx.replace_by_pure_dict(state, params)
    nnx.update(layer, state)
    return layer


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def both_ways(theirs, ours, params, *inputs, **extra):
    """Outputs and gradients of the parameters, of linen and of nnx."""

    @jax.jit
    def of_linen(params):
        def loss(params):
            output = theirs.apply({"params": params}, *inputs, **extra)
            return jnp.sum(jnp.sin(output)), output

        return jax.grad(loss, has_aux=True)(params)

    @nnx.jit
    def of_nnx(ours):
        def loss(ours):
            output = ours(*inputs, **extra)
            return jnp.sum(jnp.sin(output)), output

        return nnx.grad(loss, has_aux=True)(ours)

    want, (gradient, output) = of_linen(params), of_nnx(with_params(ours, params))
    return (nnx.to_pure_dict(gradient), output), want


@functools.cache
def twins(bias):
    """A layer in both, parameters of linen's, inputs, what goes with them."""
    row = BIASES[bias]
    first, second, third = jax.random.split(jax.random.key(11), 3)
    x = jax.random.normal(first, (B, LENGTH, F))
    extra = row.inputs(second)
    fields: Any = {"num_kv_heads": K, "is_causal": True}
    theirs: Any = linen.MultiHeadAttention(N, bias=row.linen, **fields, **OURS)
    params = jax.jit(theirs.init)(third, x, **extra)["params"]
    ours = layer_of(row.nnx, **fields)
    assert shapes(params_of(ours)) == shapes(params)
    return theirs, ours, params, x, extra


@functools.cache
def compared(bias):
    """Gradients and the output, of nnx and of linen."""
    theirs, ours, params, x, extra = twins(bias)
    return both_ways(theirs, ours, params, x, **extra)


@pytest.mark.parametrize("bias", BIASES)
def test_parameters_outputs_and_gradients_are_those_of_linen(bias):
    """From one checkpoint; what a bias learns has a gradient."""
    got, want = compared(bias)
    assert_formula(got, want)
    learned = jax.tree.leaves(got[0].get("bias", {}))
    assert all(np.abs(leaf).max() > 0 for leaf in learned)


def turned(query, key, query_positions, key_positions):
    """A hook without parameters, of positions."""
    turn = lambda x, at: x * jnp.cos(at.swapaxes(-1, -2).astype(jnp.float32))[..., None]
    return turn(query, query_positions), turn(key, key_positions)


# name -> fields of both, of linen alone, of nnx alone; features of keys
FIELDS: dict[str, Any] = {
    "projections": (
        {
            "qkv_features": 16,
            "out_features": 9,
            "num_kv_heads": K,
            "value_dim": 3,
            "scale": 0.3,
            "use_bias": ("query", "out"),
            "out_bias_init": nn.initializers.ones_init(),
        },
        {},
        {"in_kv_features": 7},
        7,
    ),
    "norms": (
        {
            "normalize_qk": True,
            "sink": True,
            "logits_soft_cap": 3.0,
            "local_window_size": [5, 2],
            "query_key_hook": turned,
        },
        {"output_hook": linen.OutputGate()},
        {"output_hook": lambda rngs: native.OutputGate(N, F, F // N, rngs=rngs)},
        F,
    ),
    "entmax": (
        {"normalize_qk": "rms", "normalizer": pallas_attn.Entmax(1.5, top_k=4)},
        {"output_hook": linen.OutputGate(per_head=True, use_bias=False)},
        {
            "output_hook": lambda rngs: native.OutputGate(
                N, F, per_head=True, use_bias=False, rngs=rngs
            )
        },
        F,
    ),
    "norm_of_ones_own": (
        {},
        {"normalize_qk": nn.LayerNorm(epsilon=1e-3)},
        {"normalize_qk": lambda rngs: nnx.LayerNorm(F // N, epsilon=1e-3, rngs=rngs)},
        F,
    ),
}


@pytest.mark.parametrize("fields", FIELDS)
def test_fields_are_those_of_linen(fields, getkey):
    shared, of_linen, of_nnx, features = FIELDS[fields]
    x = jax.random.normal(getkey(), (B, 7, F))
    y = jax.random.normal(getkey(), (B, 11, features))
    theirs: Any = linen.MultiHeadAttention(N, **shared, **of_linen, **OURS)
    params = jax.jit(theirs.init)(getkey(), x, y)["params"]
    rngs = nnx.Rngs(0)
    made = {name: field(rngs) if callable(field) else field
            for name, field in of_nnx.items()}  # fmt: skip
    ours = layer_of(rngs=rngs, **shared, **made)
    assert shapes(params_of(ours)) == shapes(params)
    assert_formula(*both_ways(theirs, ours, params, x, y))


def test_constructor_and_parameters_are_those_of_flax(getkey):
    """A layer of `flax.nnx` gives its state to ours, and the same output."""
    theirs_take = inspect.signature(nnx.MultiHeadAttention.__init__).parameters
    ours_take = inspect.signature(native.MultiHeadAttention.__init__).parameters
    without = {"attention_fn", "qkv_dot_general", "out_dot_general", "decode"}
    for name, parameter in theirs_take.items():
        if name not in without and "promote_dtype" not in name:
            assert ours_take[name].kind == parameter.kind, name
    fields: Any = {
        "num_kv_heads": K,
        "normalize_qk": True,
        "kernel_metadata": {"axes": ("features", "heads", None)},
        "bias_init": nnx.initializers.normal(1.0),
    }
    theirs = nnx.MultiHeadAttention(N, F, decode=False, rngs=nnx.Rngs(1), **fields)
    ours = layer_of(**fields)
    assert ours.key.kernel.get_metadata("axes") == ("features", "heads", None)
    nnx.update(ours, nnx.state(theirs, nnx.Param))
    x = jax.random.normal(getkey(), (B, 7, F))
    assert_formula(ours(x), theirs(x))


@pytest.mark.parametrize("name", ["dtype", "param_dtype"])
def test_dtypes_are_those_of_linen(name):
    """Of parameters, outputs and cached keys."""
    fields: Any = {name: jnp.bfloat16, "sink": True}
    theirs: Any = linen.MultiHeadAttention(
        N, bias=linen.ALiBi(learned=True), decode=True, **fields, **OURS
    )
    ours = layer_of(native.ALiBi(N, learned=True), decode=True, **fields)
    x = jnp.ones((B, 6, F), jnp.bfloat16)
    ours.init_cache(x.shape)
    variables = jax.eval_shape(theirs.init, jax.random.key(0), x)
    assert shapes(params_of(ours)) == shapes(variables["params"])
    found = nnx.to_pure_dict(nnx.state(ours, nnx.Cache))
    assert shapes(found) == shapes(variables["cache"])
    step = functools.partial(theirs.apply, mutable=["cache"])
    want, _ = jax.eval_shape(step, variables, x)
    assert nnx.eval_shape(lambda layer: layer(x), ours).dtype == want.dtype


# Learned values.


def learned(x) -> Any:
    """A parameter, as a field of a value."""
    return nnx.Param(x)


SLOPES = jnp.linspace(0.1, 0.8, N)
PAIRS = jnp.sin(jnp.arange(N * 36, dtype=jnp.float32)).reshape(1, N, 6, 6)
VALUES: dict[str, Any] = {
    "field": (pallas_attn.ALiBi, SLOPES, lambda x: pallas_attn.ALiBi(learned(x))),
    "whole": (pallas_attn.ALiBi, SLOPES, lambda x: nnx.Param(pallas_attn.ALiBi(x))),
    "array": (pallas_attn.DenseBias, PAIRS, nnx.Param),
    "values": (
        lambda x: pallas_attn.ALiBi(SLOPES) + x,
        PAIRS,
        lambda x: nnx.Param(x) + pallas_attn.ALiBi(SLOPES),
    ),
    "sum": (
        lambda x: linen.ALiBi((0.5, 0.4, 0.3, 0.2)) + x,
        PAIRS,
        lambda x: nnx.Param(x) + native.ALiBi(N, np.array([0.5, 0.4, 0.3, 0.2])),
    ),
    "slopes": (pallas_attn.ALiBi, SLOPES, lambda x: native.ALiBi(N, nnx.Param(x))),
}


@pytest.mark.parametrize("value", VALUES)
def test_variables_in_a_value_are_learned(value, getkey):
    """Eager and jitted, against the gradient of a linen layer with the value."""
    make, leaf, own = VALUES[value]
    x = jax.random.normal(getkey(), (B, 6, F))
    ours = layer_of(own(leaf))

    def loss(ours):
        return jnp.sum(jnp.sin(ours(x)))

    gradients = [nnx.grad(loss)(ours), nnx.jit(nnx.grad(loss))(ours)]
    params = params_of(ours)
    del params["bias"]

    @jax.jit
    @jax.grad
    def of_linen(leaf):
        theirs: Any = linen.MultiHeadAttention(N, bias=make(leaf), **OURS)
        return jnp.sum(jnp.sin(theirs.apply({"params": params}, x)))

    for gradient in gradients:
        (got,) = jax.tree.leaves(gradient["bias"])
        assert np.abs(got).max() > 0
        assert_formula(got, of_linen(leaf))


def test_arrays_in_a_value_are_constants(getkey):
    """In the state, where they are no parameter, and read from there."""
    x = jax.random.normal(getkey(), (B, 6, F))
    layer = layer_of(native.ALiBi(N) + (pallas_attn.ALiBi(SLOPES) + PAIRS))
    assert "bias" not in params_of(layer)
    gradient = nnx.grad(lambda layer: jnp.sum(layer(x)))(layer)
    assert "bias" not in nnx.to_pure_dict(gradient)
    graph, params, constants = nnx.split(layer, nnx.Param, ...)
    assert_same_bits(constants["bias"]["terms_1"]["slopes"], SLOPES)
    wider = jax.tree.map(lambda x: 2 * x, constants)
    want = layer_of(native.ALiBi(N) + (pallas_attn.ALiBi(2 * SLOPES) + 2 * PAIRS))
    assert_same_bits(nnx.merge(graph, params, wider)(x), want(x))


def test_an_alpha_of_entmax_is_learned(getkey):
    x = jax.random.normal(getkey(), (B, 6, F))
    alpha = jnp.linspace(1.2, 1.8, N)
    layer = layer_of(normalizer=pallas_attn.Entmax(learned(alpha), top_k=3))
    loss = lambda layer: jnp.sum(jnp.sin(layer(x)))
    got = nnx.jit(nnx.grad(loss))(layer)["normalizer"]["alpha"].get_value()
    params = params_of(layer)
    del params["normalizer"]

    @jax.jit
    @jax.grad
    def of_linen(alpha):
        sparse = pallas_attn.Entmax(alpha, top_k=3)
        theirs: Any = linen.MultiHeadAttention(N, normalizer=sparse, **OURS)
        return jnp.sum(jnp.sin(theirs.apply({"params": params}, x)))

    assert np.abs(got).max() > 0
    assert_formula(got, of_linen(alpha))


# The cache.


@nnx.jit
def step(layer, *inputs, **extra):
    return layer(*inputs, **extra)


def decoding(bias):
    """A layer with an empty cache, inputs, what goes with them, the full forward."""
    _, ours, _, x, extra = twins(bias)
    ((_, full), _) = compared(bias)
    layer: Any = nnx.view(nnx.clone(ours), decode=True)
    layer.init_cache(x.shape, **extra)
    return layer, x, extra, full


def decoded(layer, x, extra, cuts):
    """The outputs of steps that end at the cuts."""
    outputs, first = [], 0
    for last in cuts:
        rows = {name: field[:, first:last] for name, field in extra.items()}
        outputs.append(step(layer, x[:, first:last], **rows))
        first = last
    return jnp.concatenate(outputs, axis=1)


@pytest.mark.parametrize("bias", BIASES)
def test_token_by_token_is_the_full_forward(bias):
    layer, x, extra, full = decoding(bias)
    assert_formula(decoded(layer, x, extra, range(1, LENGTH + 1)), full)
    assert layer.cache_index.get_value().tolist() == [LENGTH] * B


@pytest.mark.parametrize("bias", ["sum", "neural", "values"])
def test_a_cache_is_that_of_linen(bias):
    """Names, shapes and dtypes; a prompt of several tokens first."""
    layer, x, extra, full = decoding(bias)
    assert_formula(decoded(layer, x, extra, [7, 12]), full)
    theirs: Any = linen.MultiHeadAttention(
        N, num_kv_heads=K, bias=BIASES[bias].linen, decode=True, **OURS
    )
    cache = jax.eval_shape(theirs.init, jax.random.key(0), x, **extra)["cache"]
    found = nnx.to_pure_dict(nnx.state(layer, nnx.Cache))
    assert shapes(found) == shapes(cache)


def test_prompts_of_different_lengths_go_on_each_from_its_own():
    """Entry b is its own sequence, and what padding holds has no part in it."""
    layer, x, _, full = decoding("forget")
    lengths, entry = jnp.array([5, 8], jnp.int32), jnp.arange(B)
    prompt = x[:, :8].at[0, 5:].set(1e4)
    output = step(layer, prompt, query_seq_lengths=lengths)
    assert_formula(output[0, :5], full[0, :5])
    assert_formula(output[1], full[1, :8])
    for at in (lengths, lengths + 1):
        output = step(layer, x[entry, at][:, None])
        assert_formula(output[:, 0], full[entry, at])
    assert layer.cache_index.get_value().tolist() == [7, 10]


def test_copies_of_a_layer_have_caches_of_their_own():
    layer, x, extra, full = decoding("alibi")
    step(layer, x[:, :1])
    for other in (nnx.clone(layer), copy.deepcopy(layer)):
        assert_formula(decoded(other, x[:, 1:2], extra, [1]), full[:, 1:2])
    assert layer.cache_index.get_value().tolist() == [1] * B
    assert_formula(step(nnx.view(layer, decode=False), x), full)
    layer.init_cache(x.shape, dtype=jnp.bfloat16)
    assert layer.cached_key.get_value().dtype == jnp.bfloat16
    assert layer.cache_index.get_value().tolist() == [0] * B


def test_tokens_beyond_the_cache_raise_or_are_nan():
    layer, x, _, _ = decoding("alibi")
    step(layer, x[:, :11])
    other = nnx.clone(layer)
    output = step(other, x[:, :2])
    assert np.isfinite(output[:, 0]).all()
    assert np.isnan(output[:, 1]).all()
    with pytest.raises(ValueError, match="`decode`: the cache has 12 places; got"):
        layer(x[:, :2])


class Importance(native.BiasModule):
    """A bias of a user: what each key makes of its input."""

    def __init__(self, *, rngs):
        self.of_key = nnx.Linear(F, N, rngs=rngs)

    def __call__(self, context):
        of_key = context.kept(self, "importance", self.of_key(context.inputs_kv))
        return pallas_attn.DenseBias(jnp.swapaxes(of_key, -1, -2)[..., None, :])


class Layers(nnx.Module):
    """Two layers that share a bias module."""

    def __init__(self, *, rngs):
        self.bias = native.ForgetGate(N, F, rngs=rngs) + Importance(rngs=rngs)
        self.first = layer_of(self.bias, rngs, is_causal=True)
        self.second = layer_of(self.bias, rngs, is_causal=True)

    def __call__(self, x):
        x = x + self.first(x)
        return x + self.second(x)


def test_layers_that_share_a_module_have_caches_of_their_own(getkey):
    """And one set of its parameters, which both layers' gradients reach."""
    x = jax.random.normal(getkey(), (B, 6, F))
    model = Layers(rngs=nnx.Rngs(0))
    assert set(params_of(model)) == {"bias", "first", "second"}
    assert "bias" not in params_of(model)["first"]
    full = step(model, x)
    decoder: Any = nnx.view(model, decode=True)
    decoder.first.init_cache(x.shape)
    decoder.second.init_cache(x.shape)
    kept = set(nnx.to_pure_dict(nnx.state(decoder, nnx.Cache))["second"])
    own = {"bias_terms_0_cached_log_gate", "bias_terms_1_importance"}
    assert kept == own | {"cache_index", "cached_key", "cached_value"}
    assert_formula(decoded(decoder, x, {}, [3, 4, 5, 6]), full)


# Transforms.


@nnx.split_rngs(splits=2)
@nnx.vmap(in_axes=0, out_axes=0)
def stack_of(rngs):
    bias = (
        native.ALiBi(N, learned=True)
        + native.ForgetGate(N, F, rngs=rngs)
        + native.RelativePositionBias(N, 8, 10, rngs=rngs)
        + pallas_attn.ALiBi(SLOPES)
    )
    return layer_of(bias, rngs, is_causal=True)


@nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
@nnx.remat
def through(x, layer):
    return x + layer(x)


def test_scanned_and_rematerialised_layers_are_those_of_linen_one_by_one(getkey):
    """Outputs, gradients of learned biases among others, and steps of decoding."""
    x = jax.random.normal(getkey(), (B, 6, F))
    stack: Any = stack_of(nnx.Rngs(0))
    params = params_of(stack)
    bias = linen.ALiBi(learned=True) + linen.ForgetGate()
    bias = bias + linen.RelativePositionBias(8, 10) + pallas_attn.ALiBi(SLOPES)
    theirs: Any = linen.MultiHeadAttention(N, bias=bias, is_causal=True, **OURS)

    @jax.jit
    def one_by_one(params):
        def loss(params):
            y = x
            for i in range(2):
                own = jax.tree.map(lambda leaf, i=i: leaf[i], params)
                y = y + theirs.apply({"params": own}, y)
            return jnp.sum(jnp.sin(y)), y

        return jax.grad(loss, has_aux=True)(params)

    @nnx.jit
    def scanned(stack):
        def loss(stack):
            y = through(x, stack)
            return jnp.sum(jnp.sin(y)), y

        return nnx.grad(loss, has_aux=True)(stack)

    gradient, output = scanned(stack)
    assert_formula((nnx.to_pure_dict(gradient), output), one_by_one(params))
    learned = jax.tree.leaves(gradient["bias"])
    assert len(learned) == 4
    assert all(
        (np.abs(leaf).max(tuple(range(1, leaf.ndim))) > 0).all() for leaf in learned
    )

    decoder: Any = nnx.view(stack, decode=True)
    nnx.vmap(lambda layer: layer.init_cache(x.shape), in_axes=0)(decoder)
    tokens = nnx.jit(lambda decoder, token: through(token, decoder))
    steps = [tokens(decoder, x[:, i : i + 1]) for i in range(6)]
    assert_formula(jnp.concatenate(steps, 1), output)


# Flags.


def test_dropout_asks_for_the_flag_and_the_stream_of_flax(getkey):
    x = jax.random.normal(getkey(), (B, 6, F))
    plain = layer_of()(x)
    layer = layer_of(dropout_rate=0.5)
    with pytest.raises(ValueError, match="`deterministic` must be given"):
        layer(x)
    assert_same_bits(layer(x, deterministic=True), plain)
    layer.eval()
    assert_same_bits(layer(x), plain)
    layer.train()
    assert not np.allclose(layer(x), plain)
    assert not np.array_equal(layer(x), layer(x)), "each call draws anew"
    of_call = functools.partial(layer, x)
    again = [of_call(rngs=nnx.Rngs(dropout=1)) for _ in range(2)]
    assert_same_bits(*again)
    bare = layer_of(dropout_rate=0.5, keep_rngs=False, deterministic=False)
    with pytest.raises(ValueError, match="`rngs` must be given to the call"):
        bare(x)
    assert bare(x, rngs=nnx.Rngs(1)).shape == x.shape


def test_weights_are_kept_where_flax_keeps_them(getkey):
    x = jax.random.normal(getkey(), (B, 6, F))
    layer = layer_of(native.ALiBi(N))
    with warnings.catch_warnings():  # newer releases of flax would have `nnx.capture`
        warnings.simplefilter("ignore", DeprecationWarning)
        layer(x, sow_weights=True)
    kept = nnx.to_pure_dict(nnx.state(layer, nnx.Intermediate))["attention_weights"]
    assert kept[0].shape == (B, N, 6, 6)
    assert_formula(kept[0].sum(-1), jnp.ones((B, N, 6)))


# Refusals.


class Three(native.BiasModule):
    """What a module may not return."""

    def __call__(self, context):
        return 3


def bound():
    return layer_of().__call__


def holding():
    speeds = {"query": nnx.Param(jnp.ones(()))}
    return lambda query, key, *at: (query * speeds["query"], key)


REFUSED: dict[str, Any] = {
    "heads": ({"qkv_features": 6}, {}, ValueError, "`num_heads` must divide"),
    "kv_heads": ({"num_kv_heads": 3}, {}, ValueError, "`num_kv_heads` must divide"),
    "value_dim": ({"value_dim": 0}, {}, ValueError, "`value_dim` must be at least 1"),
    "hooked": ({"output_hook": lambda x, lse, y: x[..., :1]}, {}, ValueError,
               "`output_hook` must be the output it was given"),
    "features": ({}, {"inputs_k": jnp.ones((B, 5, 3))}, ValueError,
                 "`inputs_k` must have the in_kv_features of its layer, 32; got 3"),
    "bias_heads": ({"bias": native.ALiBi(3)}, {}, ValueError,
                   "`bias`, an ALiBi, must have the num_heads of its layer, 4; got 3"),
    "term_heads": ({"bias": native.ALiBi(N) + native.ALiBi(2)}, {}, ValueError,
                   r"`bias.terms\[1\]`, an ALiBi, must have the num_heads"),
    "bias_class": ({"bias": Three}, {}, TypeError, "`bias` must be a bias; got the"),
    "bias_list": ({"bias": [Three()]}, {}, TypeError, "sum of them, `a . b`"),
    "bias_module": ({"bias": layer_of()}, {}, TypeError, "`bias` must be a bias"),
    "bias_of_linen": ({"bias": linen.ALiBi()}, {}, TypeError,
                      "must be a bias of pallas_attn.nnx; got an ALiBi of flax.linen"),
    "returned": ({"bias": Three()}, {}, TypeError, "`bias`, a Three, must return"),
    "fading": ({"bias": native.ForgetGate(N, F, rngs=nnx.Rngs(0))}, {}, ValueError,
               "is_causal=True"),
    "unread": ({"bias": native.ALiBi(N)}, points(jax.random.key(0)), ValueError,
               "`query_coordinates` must be read by the layer's `bias`"),
    "use_bias": ({"use_bias": ("keys",)}, {}, ValueError, "`use_bias` must be"),
    "sink": ({"sink": True, "normalizer": pallas_attn.Entmax()}, {}, ValueError,
             "`sink=True` is a learned sink"),
    "norm": ({"normalize_qk": "layer"}, {}, TypeError, "`normalize_qk` must be"),
    "bound_hook": ({"output_hook": bound()}, {}, TypeError,
                   "`output_hook` must be a module, or a function that holds none"),
    "closed_hook": ({"query_key_hook": holding()}, {}, TypeError,
                    "got a function with a Param"),
    "partial_hook": ({"output_hook": functools.partial(bound())}, {}, TypeError,
                     "got a function with a MultiHeadAttention"),
    "cache": ({"decode": True}, {}, ValueError,
              "`decode` needs a cache; .* `layer.init_cache"),
    "slopes": ({"bias": lambda rngs: native.ALiBi(N, (1.0,))}, {}, ValueError,
               r"`slopes` must be \[num_heads\] = \[4\]"),
    "slope": ({"bias": lambda rngs: native.CoALiBi(2, (1.0, 0.0), True)}, {},
              ValueError, "`slopes` must be positive"),
    "buckets": ({"bias": lambda rngs: native.RelativePositionBias(N, 7, rngs=rngs)},
                {}, ValueError, "`num_buckets` must be at least 2"),
    "gate": ({"output_hook": None,
              "bias": lambda rngs: native.OutputGate(N, F, rngs=rngs)},
             {}, ValueError, "`value_dim` must be given"),
    "unknown": ({}, {"bias_": 3}, TypeError, "unexpected keyword argument 'bias_'"),
}  # fmt: skip


@pytest.mark.parametrize("refused", REFUSED)
def test_refusals_name_the_argument(refused):
    fields, inputs, error, match = REFUSED[refused]
    x = jnp.ones((B, LENGTH, F))
    with pytest.raises(error, match=match):
        layer_of(**fields)(x, **inputs)


def test_a_cache_without_what_the_bias_reads_is_refused():
    layer = layer_of(native.SquaredDistanceBias(N), decode=True)
    with pytest.raises(ValueError, match="`query_coordinates` must be given"):
        layer.init_cache((B, LENGTH, F))


@pytest.mark.parametrize(
    ("library", "other"), [("nnx", native.ALiBi(N)), ("linen", linen.ALiBi())]
)
def test_modules_are_no_values(library, other):
    q = jnp.ones((B, 6, N, 8))
    match = f"modules are the bias of pallas_attn.{library}.MultiHeadAttention"
    with pytest.raises(TypeError, match=match):
        pallas_attn.dot_product_attention(q, q, q, other)
    theirs: Any = linen.MultiHeadAttention(N, bias=native.ALiBi(N))
    with pytest.raises(TypeError, match="must be a bias of pallas_attn.linen; got an"):
        theirs.init(jax.random.key(0), jnp.ones((B, 6, F)))
