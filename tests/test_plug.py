"""One line for flax's own layers, linen and nnx, unmodified."""

import functools
import inspect
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx

import pallas_attn
from pallas_attn import Bias, Entmax, head_home
from pallas_attn.linen import ALiBi, as_flax_attention_fn
from pallas_attn.testing.evaluate import SMALL, widened
from pallas_attn.testing.numerics import assert_formula, assert_same_bits


EXACT: dict[str, Any] = {"precision": jax.lax.Precision.HIGHEST}
B, T, S, N, F = 2, 37, 53, 4, 32
plug = functools.partial(as_flax_attention_fn, implementation="xla")
kernels = functools.partial(
    as_flax_attention_fn, implementation="triton_interpret", config=SMALL
)
alibi = pallas_attn.ALiBi(pallas_attn.alibi_slopes(N))


def _plugged(attention_fn) -> dict[str, Any]:
    return {} if attention_fn is None else {"attention_fn": attention_fn}


def linen(attention_fn=None, **fields) -> Any:
    given = _plugged(attention_fn)
    return nn.MultiHeadDotProductAttention(N, **EXACT, **given, **fields)


def linen_apply(layer, params, *inputs, **conditions):
    return layer.apply({"params": params}, *inputs, **conditions)


def nnx_layer(attention_fn=None, **fields) -> Any:
    given = _plugged(attention_fn)
    given |= {"decode": False} | fields
    return nnx.MultiHeadAttention(N, F, rngs=nnx.Rngs(0), **EXACT, **given)


def nnx_apply(layer, params, *inputs, **conditions):
    return nnx.merge(nnx.graphdef(layer), params)(*inputs, **conditions)


def losses(apply, layer, params, *inputs, **conditions):
    """The output, and the gradients with respect to parameters and inputs."""

    def loss(params, inputs):
        output = apply(layer, params, *inputs, **conditions)
        return jnp.sum(jnp.sin(output)), output

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    found, output = gradient(params, inputs)
    return output, found


def inputs(getkey, batch=(B,)):
    return tuple(jax.random.normal(getkey(), (*batch, length, F)) for length in (T, S))


def float_mask(batch=(B,)):
    """As `flax.linen.make_attention_mask` makes them: 0.0 and 1.0."""
    mask = nn.make_attention_mask(jnp.ones((*batch, T)), jnp.ones((*batch, S)))
    return mask * jnp.where(jnp.arange(S) % 3 == 1, 0.0, 1.0).reshape(
        (1,) * (mask.ndim - 1) + (S,)
    )


@pytest.mark.parametrize(
    ("batch", "made"),
    [
        pytest.param((), plug, id="unbatched"),
        pytest.param((B,), kernels, id="kernels", marks=pytest.mark.whole),
        pytest.param((B, 1, 3), plug, id="batches"),
    ],
)
def test_linen_gives_the_numbers_of_its_own_function(batch, made, getkey):
    x, y = inputs(getkey, batch)
    params = jax.jit(linen().init)(getkey(), x, y)["params"]
    mask = float_mask(batch)
    got = losses(linen_apply, linen(made()), params, x, y, mask=mask)
    with jax.enable_x64(True):
        wide = widened((params, x, y))
        want = losses(linen_apply, linen(), *wide, mask=mask.astype(bool))
    assert_formula(got, want)


@pytest.mark.parametrize("num_kv_heads", [N, 2])
@pytest.mark.parametrize("is_causal", [False, True])
def test_nnx_gives_the_numbers_of_its_own_function(is_causal, num_kv_heads, getkey):
    x = jax.random.normal(getkey(), (B, 3, T, F))
    fields = {"num_kv_heads": num_kv_heads, "use_bias": False}
    layer = nnx_layer(**fields)
    params = nnx.state(layer)
    keys = jnp.broadcast_to(jnp.arange(T) < 30, (B, 3, T)).astype(jnp.float32)
    mask = nnx.make_attention_mask(jnp.ones((B, 3, T)), keys)
    plugged = nnx_layer(plug(), **fields)
    conditions = {"mask": mask, "is_causal": is_causal}
    got = losses(nnx_apply, plugged, params, x, **conditions)
    # jax.nn, which nnx calls, mixes float32 with float64
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        want = losses(nnx_apply, layer, *widened((params, x)), **conditions)
    assert_formula(got, want)


def test_what_flax_passes_is_named():
    """linen filters by signature: what has no name would be dropped in silence."""
    found = inspect.signature(as_flax_attention_fn()).parameters
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in found.values())
    for theirs in (nn.dot_product_attention, nnx.dot_product_attention):
        named = inspect.signature(theirs).parameters
        assert set(named) <= set(found)
        for name, parameter in named.items():
            if name != "promote_dtype":
                assert found[name].default == parameter.default, name
    assert "input_positions" in found


def test_every_option_of_the_function_can_be_given():
    ours = set(inspect.signature(as_flax_attention_fn).parameters)
    core = set(inspect.signature(pallas_attn.dot_product_attention).parameters)
    # the layer's own
    per_call = {"query", "key", "value", "mask", "precision"}
    per_call |= {"dropout_rate", "dropout_rng", "return_residual"}
    assert ours == core - per_call


PLUGS: dict[str, Any] = {
    "alibi": {"bias": alibi, "is_causal": True},
    "co_alibi": {
        "bias": pallas_attn.CoALiBi(pallas_attn.co_alibi_slopes(N)),
        "is_causal": True,
    },
    "entmax": {"bias": alibi, "normalizer": Entmax(1.5)},
    "window": {"local_window_size": (5, 2), "logits_soft_cap": 2.0, "scale": 0.3},
    "lengths": {
        "key_value_seq_lengths": jnp.array([30, 9], jnp.int32),
        "query_segment_ids": jnp.arange(B * T).reshape(B, T).astype(jnp.int32) % 2,
        "key_segment_ids": jnp.arange(B * T).reshape(B, T).astype(jnp.int32) % 2,
    },
    "dense": {"bias": jnp.cos(jnp.arange(N * T * T * 1.0)).reshape(1, N, T, T) + alibi},
}


@pytest.mark.parametrize("options", PLUGS)
def test_options_reach_the_function(options, getkey):
    """A layer without projections to speak of: the function itself, as linen calls."""
    q, k, v = jax.random.normal(getkey(), (3, B, T, N, 8))
    mask = jnp.ones((1, 1, T, T)).at[..., 7].set(0.0)
    plugged = functools.partial(plug(**PLUGS[options]), mask=mask, dtype=None, **EXACT)
    got = jax.jit(plugged)(q, k, v)
    reference = functools.partial(
        pallas_attn.dot_product_attention, **PLUGS[options], **EXACT
    )
    reference = functools.partial(reference, implementation="reference")
    want = jax.jit(reference)(q, k, v, mask=mask != 0)
    assert_formula(got, want)


def test_a_bias_of_the_call_is_added(getkey):
    q, k, v = jax.random.normal(getkey(), (3, B, T, N, 8))
    dense = jax.random.normal(getkey(), (N, T, T))
    got = plug(alibi)(q, k, v, dense, **EXACT)
    want = plug(alibi + dense[None])(q, k, v, **EXACT)
    assert_formula(got, want)
    assert_same_bits(plug()(q, k, v, dense, **EXACT), plug(dense)(q, k, v, **EXACT))


# Transforms: the plug inside flax's lifted ones.


class Layer(nn.Module):
    """A block of linen, to be scanned over."""

    @nn.compact
    def __call__(self, x, _=None):
        attention_fn = plug(alibi, is_causal=True)
        # (the true gradient of a key's bias is 0: a row's scores move together)
        return x + linen(attention_fn, use_bias=False, name="attention")(x), None


def test_linen_scans_and_rematerialises_over_layers(getkey):
    x = jax.random.normal(getkey(), (B, T, F))
    stack = nn.scan(
        nn.remat(Layer, prevent_cse=False),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=2,
    )()
    params = jax.jit(stack.init)(getkey(), x)["params"]

    def scanned(params):
        return jnp.sum(stack.apply({"params": params}, x)[0] ** 2)

    def one_by_one(params):
        y = x
        for layer in range(2):
            layer_params = jax.tree.map(functools.partial(_entry, layer), params)
            y, _ = Layer().apply({"params": layer_params}, y)
        return jnp.sum(y**2)

    got, want = (jax.jit(jax.value_and_grad(f))(params) for f in (scanned, one_by_one))
    assert_formula(got, want)


def test_nnx_scans_and_rematerialises_over_layers(getkey):
    x = jax.random.normal(getkey(), (B, T, F))

    @nnx.split_rngs(splits=2)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs):
        attention_fn = plug(alibi, is_causal=True)
        return nnx.MultiHeadAttention(
            N,
            F,
            rngs=rngs,
            decode=False,
            use_bias=False,
            attention_fn=attention_fn,
            **EXACT,
        )

    layers = make(nnx.Rngs(0))
    graph, params = nnx.split(layers)

    def scanned(params):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def forward(y, layer):
            return y + layer(y)

        return jnp.sum(forward(x, nnx.merge(graph, params)) ** 2)

    def one_by_one(params):
        y = x
        for layer in range(2):
            entry = jax.tree.map(functools.partial(_entry, layer), params)
            y = y + nnx.merge(graph, entry)(y)
        return jnp.sum(y**2)

    got, want = (jax.jit(jax.value_and_grad(f))(params) for f in (scanned, one_by_one))
    assert_formula(got, want)


def _entry(layer, leaf):
    return leaf[layer]


# Dropout.


def test_linen_and_nnx_drop_as_they_are_told(getkey):
    x = jnp.repeat(jax.random.normal(getkey(), (1, T, F)), 2, axis=0)
    rngs = {"params": getkey(), "dropout": getkey()}
    for broadcast in (True, False):
        fields = {"dropout_rate": 0.5, "broadcast_dropout": broadcast}
        layer = linen(plug(), **fields)
        init = jax.jit(functools.partial(layer.init_with_output, deterministic=False))
        output, variables = init(rngs, x)
        assert np.array_equal(output[0], output[1]) == broadcast
        quiet = layer.apply(variables, x, deterministic=True)
        assert_formula(quiet, linen().apply(variables, x))
        assert not np.allclose(quiet, output)
        ours = nnx_layer(plug(), **fields)
        output = ours(x, deterministic=False, rngs=nnx.Rngs(dropout=1))
        assert np.array_equal(output[0], output[1]) == broadcast
        again = ours(x, deterministic=False, rngs=nnx.Rngs(dropout=1))
        assert_same_bits(output, again)


# Decoding, by flax's caches.


def test_a_decode_step_of_linen_stands_where_the_function_is_told(getkey):
    x = jax.random.normal(getkey(), (B, 9, F))
    layer = linen(plug(alibi), decode=True)
    variables = jax.jit(layer.init)(getkey(), x)
    whole = linen(plug(alibi, is_causal=True)).apply({"params": variables["params"]}, x)

    @jax.jit
    def step(variables, token, index):
        layer = linen(plug(alibi, query_offset=index), decode=True)
        return layer.apply(variables, token, mutable=["cache"])

    for i in range(9):
        output, cache = step(variables, x[:, i : i + 1], jnp.int32(i))
        variables = variables | cache
        assert_formula(output[:, 0], whole[:, i])


def test_a_decode_step_of_nnx_stands_where_the_function_is_told(getkey):
    x = jax.random.normal(getkey(), (B, 5, F))
    whole = nnx_layer(plug(alibi, is_causal=True))(x)
    layer = nnx_layer(plug(), decode=True)
    layer.init_cache(x.shape)
    for i in range(5):
        layer.attention_fn = plug(alibi, query_offset=i)
        assert_formula(layer(x[:, i : i + 1])[:, 0], whole[:, i])


def test_positions_of_a_layer_are_those_of_queries_and_keys(getkey):
    q, k, v = jax.random.normal(getkey(), (3, B, T, N, 8))
    places = jnp.flip(jnp.arange(B * T, dtype=jnp.int32)).reshape(B, T)
    got = plug(alibi, is_causal=True)(q, k, v, input_positions=places, **EXACT)
    want = pallas_attn.dot_product_attention(
        q, k, v, alibi, is_causal=True, query_positions=places, key_positions=places,
        implementation="reference", **EXACT,
    )  # fmt: skip
    assert_formula(got, want)
    keys = jnp.arange(T, dtype=jnp.int32)
    got = plug(alibi, key_positions=keys)(
        q[:, :1], k, v, input_positions=jnp.full((B, 1), 5, jnp.int32), **EXACT
    )
    want = plug(alibi, query_offset=5)(q[:, :1], k, v, **EXACT)
    assert_formula(got, want)


NNX_CALL = inspect.signature(nnx.MultiHeadAttention.__call__).parameters


@pytest.mark.skipif(
    "input_positions" not in NNX_CALL,
    reason="this flax.nnx.MultiHeadAttention has no input_positions",
)
def test_nnx_hands_its_positions_on(getkey):
    x = jax.random.normal(getkey(), (B, T, F))
    layer = nnx_layer(plug(alibi, is_causal=True))
    places = jnp.flip(jnp.arange(T, dtype=jnp.int32))
    got = layer(x, input_positions=jnp.broadcast_to(places, (B, T)))
    want = jnp.flip(layer(jnp.flip(x, axis=1)), axis=1)
    assert_formula(got, want)


# Refusals.


class Near(Bias):
    """Reads positions, in its own way."""

    weight: jax.Array = head_home()

    def tile(self, t):
        return self.weight / (1 + jnp.abs(t.distance))


class Level(Bias):
    """Reads none."""

    weight: jax.Array = head_home()

    def tile(self, t):
        return 2 * self.weight


class Both(Bias):
    """A sum of simpler terms."""

    weight: jax.Array = head_home()

    def expand(self):
        return Level(self.weight), Near(self.weight)


UNPLACED: dict[str, Any] = {
    "alibi": {"bias": alibi},
    "sum": {"bias": alibi + jnp.zeros((1, 1, 1, S))},
    "co_alibi": {"bias": pallas_attn.CoALiBi(jnp.ones(N))},
    "forget_gate": {"bias": pallas_attn.ForgetGate(jnp.zeros((1, S, N)))},
    "own": {"bias": Near(jnp.ones(N))},
    "expanded": {"bias": Both(jnp.ones(N))},
    "is_causal": {"is_causal": True},
    "window": {"local_window_size": 3},
}
PLACED: dict[str, Any] = {
    "dense": {"bias": jnp.zeros((1, N, 1, S))},
    "level": {"bias": Level(jnp.ones(N))},
    "factored": {
        "bias": pallas_attn.FactoredBias(jnp.ones((1, 1, N, 2)), jnp.ones((1, S, N, 2)))
    },
    "offset": {"bias": alibi, "query_offset": 0, "is_causal": True},
    "positions": {"bias": alibi, "query_positions": jnp.array([3], jnp.int32)},
    "keys": {"is_causal": True, "key_positions": jnp.arange(S, dtype=jnp.int32)},
}


@pytest.mark.parametrize("options", UNPLACED)
def test_positions_that_nobody_gave_raise(options):
    q, k = jnp.ones((B, 1, N, 8)), jnp.ones((B, S, N, 8))
    name = "bias" if "bias" in UNPLACED[options] else next(iter(UNPLACED[options]))
    with pytest.raises(ValueError, match=f"`query_offset` must be given.*{name}"):
        plug(**UNPLACED[options])(q, k, k)


@pytest.mark.parametrize("options", PLACED)
def test_steps_that_need_none_or_have_some_run(options):
    q, k = jnp.ones((B, 1, N, 8)), jnp.ones((B, S, N, 8))
    assert plug(**PLACED[options])(q, k, k).shape == q.shape


REFUSED: dict[str, Any] = {
    "dot_general": (
        {}, {"einsum_dot_general": jax.lax.dot_general},
        NotImplementedError, "`einsum_dot_general` cannot",
    ),
    "weights": (
        {}, {"qk_attn_weights_einsum": jnp.einsum},
        NotImplementedError, "`qk_attn_weights_einsum` cannot",
    ),
    "values": (
        {}, {"attn_weights_value_einsum": jnp.einsum},
        NotImplementedError, "`attn_weights_value_einsum` cannot",
    ),
    "two_positions": (
        {"query_offset": 3}, {"input_positions": jnp.zeros((B, T), jnp.int32)},
        ValueError, "`input_positions` and the `query_offset`",
    ),
    "two_query_positions": (
        {"query_positions": jnp.arange(T)}, {"input_positions": jnp.arange(T)},
        ValueError, "`input_positions` and the `query_positions`",
    ),
    "heads": (
        {"bias": pallas_attn.ALiBi(jnp.ones(3))}, {}, ValueError, "`bias.slopes`"
    ),
    "rate": ({}, {"dropout_rate": 2.0}, ValueError, "`dropout_rate`"),
    "rng": ({}, {"dropout_rate": 0.5}, ValueError, "`dropout_rng`"),
}  # fmt: skip


@pytest.mark.parametrize("refused", REFUSED)
def test_refusals_name_the_argument(refused):
    options, given, error, match = REFUSED[refused]
    q = jnp.ones((B, T, N, 8))
    with pytest.raises(error, match=match):
        plug(**options)(q, q, q, **given)


def test_layers_keep_the_weights_that_flax_keeps(getkey):
    """In the same place, of linen and nnx, before dropout; outputs stay as they are."""
    x = jax.random.normal(getkey(), (B, T, F))
    variables = linen().init(getkey(), x)
    (output, kept), (_, want) = (
        linen(fn).apply(variables, x, sow_weights=True, mutable=["intermediates"])
        for fn in (plug(), None)
    )
    assert_formula(kept["intermediates"], want["intermediates"])
    assert_same_bits(output, linen(plug()).apply(variables, x))
    ours, theirs = nnx_layer(plug()), nnx_layer(None)
    with warnings.catch_warnings():  # newer releases of flax would have `nnx.capture`
        warnings.simplefilter("ignore", DeprecationWarning)
        for layer in (ours, theirs):
            layer(x, sow_weights=True)
    (got,), (want,) = (
        jax.tree.leaves(nnx.state(layer, nnx.Intermediate)) for layer in (ours, theirs)
    )
    assert_formula(got, want)


def test_layers_that_ask_for_einsums_are_refused(getkey):
    x = jnp.ones((B, T, F))
    variables = linen().init(getkey(), x)
    einsum = {"qk_attn_weights_einsum_cls": lambda: jnp.einsum,
              "attn_weights_value_einsum_cls": lambda: jnp.einsum}  # fmt: skip
    with pytest.raises(NotImplementedError, match="einsum` cannot be honoured"):
        linen(plug(), **einsum).apply(variables, x)


def test_a_step_with_positions_needs_those_of_the_keys():
    q, k = jnp.ones((B, 1, N, 8)), jnp.ones((B, S, N, 8))
    with pytest.raises(ValueError, match="`input_positions` are those of the T = 1"):
        plug(alibi)(q, k, k, input_positions=jnp.zeros((B, 1), jnp.int32))


def test_a_bias_module_is_refused():
    with pytest.raises(TypeError, match="`bias` must be a value"):
        as_flax_attention_fn(ALiBi())
