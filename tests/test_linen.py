"""The attention layer: flax's parameters and numbers, its cache, its refusals."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import pallas_attn
from pallas_attn import DenseBias, Entmax
from pallas_attn.linen import (
    ALiBi,
    BiasModule,
    CoALiBi,
    ForgetGate,
    MultiHeadAttention,
    RelativePositionBias,
    SquaredDistanceBias,
)
from pallas_attn.testing.evaluate import SMALL, widened
from pallas_attn.testing.layers import B, BIASES, both, F, K, LENGTH, N, nothing
from pallas_attn.testing.numerics import assert_formula, assert_same_bits


HIGHEST = jax.lax.Precision.HIGHEST
EXACT: dict[str, Any] = {"precision": HIGHEST}
OURS: dict[str, Any] = {**EXACT, "implementation": "xla"}
T, S = 37, 53


def losses(layer, params, *inputs, **conditions):
    """The output, and the gradients of a loss with respect to parameters and inputs."""

    def loss(params, inputs):
        output = layer.apply({"params": params}, *inputs, **conditions)
        return jnp.sum(jnp.sin(output)), output

    found, output = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(
        params, inputs
    )
    return output, found


def initialised(layer, key, *inputs, **conditions):
    return jax.jit(functools.partial(layer.init, **conditions))(key, *inputs)


def cross(getkey, dtype=jnp.float32):
    return (
        jax.random.normal(getkey(), (B, T, F), dtype),
        jax.random.normal(getkey(), (B, S, F), dtype),
    )


FIELDS: dict[str, Any] = {
    "plain": {},
    "features": {
        "qkv_features": 16,
        "out_features": 9,
        "use_bias": False,
        "qkv_dot_general": jax.lax.dot_general,
    },
    "normalized": {
        "normalize_qk": True,
        "bias_init": nn.initializers.normal(0.1),
        "out_kernel_init": nn.initializers.normal(0.3),
        "out_bias_init": nn.initializers.ones_init(),
    },
}


@pytest.mark.parametrize("fields", FIELDS)
def test_parameters_outputs_and_gradients_are_those_of_flax(fields, getkey):
    """Against flax's own layer in float64, from one set of parameters."""
    theirs: Any = nn.MultiHeadDotProductAttention(N, **FIELDS[fields], **EXACT)
    ours: Any = MultiHeadAttention(N, **FIELDS[fields], **OURS)
    x, y = cross(getkey)
    key = getkey()
    params = initialised(theirs, key, x, y)["params"]
    assert_same_bits(initialised(ours, key, x, y)["params"], params)
    there = jnp.broadcast_to(jnp.arange(S) < 50, (B, S))
    mask = nn.make_attention_mask(jnp.ones((B, T), bool), there)
    got = losses(ours, params, x, y, mask=mask)
    # flax's layer norm adds a Python float's float32 to float64
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        want = losses(theirs, *widened((params, x, y)), mask=mask)
    assert_formula(got, want)


def test_self_attention_with_a_causal_mask_is_that_of_flax(getkey):
    x = jax.random.normal(getkey(), (3, B, T, F))
    theirs: Any = nn.MultiHeadDotProductAttention(N, **EXACT)
    params = initialised(theirs, getkey(), x)["params"]
    mask = nn.make_causal_mask(jnp.ones((3, B, T)))
    with jax.enable_x64(True):
        want = losses(theirs, *widened((params, x)), mask=mask)
    assert_formula(losses(MultiHeadAttention(N, **OURS), params, x, mask=mask), want)
    causal: Any = MultiHeadAttention(N, is_causal=True, **OURS)
    assert_formula(losses(causal, params, x), want)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dtypes_of_computation_and_parameters_are_those_of_flax(dtype, getkey):
    x = jax.random.normal(getkey(), (B, T, F))
    fields = {"dtype": dtype, "param_dtype": dtype}
    theirs: Any = nn.MultiHeadDotProductAttention(N, **fields)
    ours: Any = MultiHeadAttention(N, **fields, implementation="xla")
    params = initialised(ours, getkey(), x)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    assert ours.apply({"params": params}, x).dtype == dtype
    assert theirs.apply({"params": params}, x).dtype == dtype


def test_inputs_of_keys_and_values_default_as_in_flax(getkey):
    x, y = cross(getkey)
    layer: Any = MultiHeadAttention(N, **OURS)
    variables = initialised(layer, getkey(), x, y)
    apply = functools.partial(layer.apply, variables)
    assert_same_bits(apply(x, y), apply(x, y, y))
    assert_same_bits(apply(x, inputs_kv=y), apply(x, y))
    assert_same_bits(apply(x), apply(x, x, x))


def test_grouped_heads_share_keys(getkey):
    """K heads repeated are N heads."""
    x, y = cross(getkey)
    grouped: Any = MultiHeadAttention(N, num_kv_heads=K, **OURS)
    params = initialised(grouped, getkey(), x, y)["params"]
    assert params["key"]["kernel"].shape == (F, K, F // N)
    repeat = lambda leaf: jnp.repeat(leaf, N // K, axis=-2)
    sides = {name: jax.tree.map(repeat, params[name]) for name in ("key", "value")}
    whole = MultiHeadAttention(N, **OURS).apply({"params": params | sides}, x, y)
    assert_formula(grouped.apply({"params": params}, x, y), whole)


CONDITIONS: dict[str, Any] = {
    "lengths": {
        "query_seq_lengths": jnp.array([30, 37], jnp.int32),
        "key_value_seq_lengths": jnp.array([53, 9], jnp.int32),
    },
    "segments": {
        "query_segment_ids": jnp.arange(B * T, dtype=jnp.int32).reshape(B, T) // 9,
        "key_segment_ids": jnp.arange(B * S, dtype=jnp.int32).reshape(B, S) // 9,
    },
    "positions": {
        "query_positions": 3 * jnp.arange(T, dtype=jnp.int32)[::-1],
        "key_positions": jnp.arange(B * S, dtype=jnp.int32).reshape(B, S),
    },
    "offset": {"query_offset": S - T},
    "offsets": {"query_offset": jnp.array([3, 16], jnp.int32)},
}


@pytest.mark.parametrize(
    ("condition", "implementation"),
    [
        ("lengths", "triton_interpret"),
        ("segments", "xla"),
        ("positions", "xla"),
        ("offset", "xla"),
        ("offsets", "triton_interpret"),
    ],
)
def test_conditions_and_fields_reach_the_kernels(condition, implementation, getkey):
    """The layer is its projections around `dot_product_attention`."""
    x, y = cross(getkey)
    fields = {
        "is_causal": condition != "segments",
        "local_window_size": (40, 5),
        "logits_soft_cap": 3.0,
        "config": SMALL,
        "precision": HIGHEST,
    }
    alibi = pallas_attn.ALiBi(pallas_attn.alibi_slopes(N))
    layer: Any = MultiHeadAttention(
        N, num_kv_heads=K, bias=alibi, implementation=implementation, **fields
    )
    params = initialised(layer, getkey(), x, y)["params"]
    got = layer.apply({"params": params}, x, y, **CONDITIONS[condition])

    def projected(name, x):
        kernel, bias = params[name]["kernel"], params[name]["bias"]
        product = jnp.einsum("BTF,FNH->BTNH", x, kernel, precision=HIGHEST)
        return product + bias[None, None]

    attended = pallas_attn.dot_product_attention(
        projected("query", x), projected("key", y), projected("value", y), alibi,
        implementation="reference", **fields, **CONDITIONS[condition],
    )  # fmt: skip
    out = params["out"]
    want = jnp.einsum("BTNH,NHF->BTF", attended, out["kernel"], precision=HIGHEST)
    assert_formula(got, want + out["bias"][None, None])


def test_a_normalizer_is_honoured(getkey):
    x = jax.random.normal(getkey(), (1, 9, F))
    dense: Any = MultiHeadAttention(N, normalizer=Entmax(alpha=1.0), **OURS)
    sparse: Any = dense.clone(normalizer=Entmax(alpha=2.0, top_k=1))
    variables = initialised(dense, getkey(), x)
    plain: Any = MultiHeadAttention(N, **OURS).apply(variables, x)
    assert_formula(dense.apply(variables, x), plain)
    assert not np.allclose(sparse.apply(variables, x), plain)


def test_dropout_asks_for_the_flag_and_the_stream_of_flax(getkey):
    x = jax.random.normal(getkey(), (B, T, F))
    layer: Any = MultiHeadAttention(N, dropout_rate=0.5, **OURS)
    with pytest.raises(ValueError, match="deterministic"):
        initialised(layer, getkey(), x)
    variables = initialised(layer, getkey(), x, deterministic=True)
    plain: Any = MultiHeadAttention(N, **OURS).apply(variables, x)
    assert_same_bits(layer.apply(variables, x, deterministic=True), plain)
    key = getkey()
    apply = functools.partial(layer.apply, variables, x, deterministic=False)
    from_stream = apply(rngs={"dropout": key})
    assert not np.allclose(from_stream, plain)
    assert_same_bits(from_stream, apply(rngs={"dropout": key}))
    given = apply(dropout_rng=key)
    assert_same_bits(given, apply(dropout_rng=key, rngs={"dropout": getkey()}))
    with pytest.raises(Exception, match="dropout"):
        apply()


@pytest.mark.parametrize("broadcast", [True, False])
def test_broadcast_dropout_drops_the_same_everywhere(broadcast, getkey):
    """Two equal entries of the batch differ only where each has its own dropout."""
    x = jnp.repeat(jax.random.normal(getkey(), (1, T, F)), 2, axis=0)
    layer: Any = MultiHeadAttention(
        N, dropout_rate=0.5, deterministic=False, broadcast_dropout=broadcast, **OURS
    )
    rngs = {"params": getkey(), "dropout": getkey()}
    output, _ = layer.init_with_output(rngs, x)
    assert np.array_equal(output[0], output[1]) == broadcast


class Rotary(nn.Module):
    """A hook with a parameter: turns pairs of features by position."""

    @nn.compact
    def __call__(self, query, key, query_positions, key_positions):
        first = lambda rng: jnp.ones(())
        speed = self.param("speed", first)

        def turned(x, positions):
            angle = jnp.moveaxis(positions, -1, -2).astype(jnp.float32)[..., None]
            half = x.shape[-1] // 2
            powers = speed / 10 ** jnp.arange(half, dtype=jnp.float32)
            angle = angle * powers.reshape((1,) * (x.ndim - 1) + (half,))
            a, b = x[..., :half], x[..., half:]
            cos, sin = jnp.cos(angle), jnp.sin(angle)
            return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)

        return turned(query, query_positions), turned(key, key_positions)


def test_a_rotary_hook_sees_positions_and_has_parameters(getkey):
    """Rotations see differences of positions only."""
    x = jax.random.normal(getkey(), (B, T, F))
    layer: Any = MultiHeadAttention(N, query_key_hook=Rotary(), **OURS)
    variables = initialised(layer, getkey(), x)
    assert variables["params"]["query_key_hook"]["speed"] == 1
    here = layer.apply(variables, x)
    places = jnp.arange(T, dtype=jnp.int32) + 7
    there = layer.apply(variables, x, query_positions=places, key_positions=places)
    assert_formula(there, here)
    assert not np.allclose(here, layer.clone(query_key_hook=None).apply(variables, x))


# The cache.


class Importance(BiasModule):
    """A bias of a user: what each key makes of its input."""

    @nn.compact
    def __call__(self, context):
        of_key = nn.Dense(context.num_heads)(context.inputs_kv)
        of_key = context.kept(self, "importance", of_key)
        return DenseBias(jnp.swapaxes(of_key, -1, -2)[..., None, :])


DECODED: dict[str, Any] = {
    name: (twins.linen, twins.inputs) for name, twins in BIASES.items()
} | {"own": (Importance(), nothing)}


# Modules that make something of the layer's keys, or could.
SHARED = [
    name for name, (module, _) in DECODED.items() if isinstance(module, nn.Module)
]


@functools.cache
def decoding(bias):
    """A layer's step, inputs, what goes with them, an empty cache, the full forward."""
    module, more = DECODED[bias]
    first, second, third = jax.random.split(jax.random.key(11), 3)
    x = jax.random.normal(first, (B, LENGTH, F))
    extra = more(second)
    layer: Any = MultiHeadAttention(N, num_kv_heads=K, bias=module, **OURS)
    stepping = layer.clone(decode=True)
    variables = initialised(stepping, third, x, **extra)
    params = {"params": variables["params"]}
    full = jax.jit(layer.clone(is_causal=True).apply)(params, x, **extra)
    step = jax.jit(functools.partial(stepping.apply, mutable=["cache"]))
    return step, x, extra, variables, full


def decoded(bias, cuts):
    """The outputs of steps that end at the cuts, and the last cache."""
    step, x, extra, variables, _ = decoding(bias)
    outputs, first = [], 0
    for last in cuts:
        rows = {name: field[:, first:last] for name, field in extra.items()}
        output, cache = step(variables, x[:, first:last], **rows)
        variables = variables | cache
        outputs.append(output)
        first = last
    return jnp.concatenate(outputs, axis=1), variables["cache"]


def few(*names):
    """Every row, these always."""
    rows = [pytest.param(x, marks=[pytest.mark.light] * (x in names)) for x in DECODED]
    return lambda test: pytest.mark.whole(pytest.mark.parametrize("bias", rows)(test))


@few("co_alibi", "swin", "forget_heads", "sum")
def test_token_by_token_is_the_full_forward(bias):
    *_, full = decoding(bias)
    got, cache = decoded(bias, range(1, LENGTH + 1))
    assert_formula(got, full)
    assert cache["cache_index"].tolist() == [LENGTH] * B


@pytest.mark.parametrize("bias", ["co_alibi", "sum", "t5"])
def test_several_tokens_at_once_are_the_full_forward(bias):
    *_, full = decoding(bias)
    assert_formula(decoded(bias, [7, 8, 12])[0], full)


@few("alibi", "factored", "values")
def test_prompts_of_different_lengths_go_on_each_from_its_own(bias):
    """Entry b is its own sequence, and what padding holds has no part in it."""
    step, x, extra, variables, full = decoding(bias)
    lengths, longest, entry = jnp.array([5, 8], jnp.int32), 8, jnp.arange(B)
    rows = {name: field[:, :longest] for name, field in extra.items()}
    prompt = x[:, :longest].at[0, 5:].set(1e4)
    output, cache = step(variables, prompt, query_seq_lengths=lengths, **rows)
    assert_formula(output[0, :5], full[0, :5])
    assert_formula(output[1], full[1, :8])
    for at in (lengths, lengths + 1, lengths + 2):
        variables = variables | cache
        rows = {name: field[entry, at][:, None] for name, field in extra.items()}
        output, cache = step(variables, x[entry, at][:, None], **rows)
        assert_formula(output[:, 0], full[entry, at])
    assert cache["cache"]["cache_index"].tolist() == [8, 11]


def test_a_scalar_index_of_flax_is_understood():
    """A cache as `flax.linen.MultiHeadDotProductAttention` makes it."""
    step, x, _, variables, full = decoding("alibi")
    cache = variables["cache"] | {"cache_index": jnp.int32(0)}
    variables = variables | {"cache": cache}
    first, cache = step(variables, x[:, :5])
    assert cache["cache"]["cache_index"].shape == ()
    second, _ = step(variables | cache, x[:, 5:])
    assert_formula(jnp.concatenate([first, second], 1), full)
    with pytest.raises(ValueError, match="`query_seq_lengths` needs a `cache_index`"):
        step(variables, x, query_seq_lengths=jnp.array([3, 2], jnp.int32))


def test_tokens_beyond_the_cache_raise_or_are_nan():
    step, x, _, variables, _ = decoding("alibi")
    _, cache = step(variables, x[:, :10])
    full = variables | cache
    output, after = step(full, x[:, :3])
    assert np.isfinite(output[:, :2]).all()
    assert np.isnan(output[:, 2]).all()
    kept = after["cache"]["cached_key"][:, :10]
    assert_same_bits(kept, cache["cache"]["cached_key"][:, :10])
    layer: Any = MultiHeadAttention(
        N, num_kv_heads=K, bias=ALiBi(learned=True), decode=True, **OURS
    )
    with pytest.raises(ValueError, match="`decode`: the cache has 12 places; got"):
        layer.apply(full, x[:, :3], mutable=["cache"])


def test_decoding_without_a_batch(getkey):
    x = jax.random.normal(getkey(), (5, F))
    layer: Any = MultiHeadAttention(N, bias=ForgetGate(), decode=True, **OURS)
    variables = initialised(layer, getkey(), x)
    full = layer.clone(decode=False, is_causal=True).apply(
        {"params": variables["params"]}, x
    )
    output, _ = layer.apply(variables, x, mutable=["cache"])
    assert_formula(output, full)


class Layers(nn.Module):
    """Two layers that share a bias module."""

    bias: Any
    decode: bool = False

    @nn.compact
    def __call__(self, x, **extra):
        for _ in range(2):
            x = x + MultiHeadAttention(
                N, bias=self.bias, is_causal=True, decode=self.decode, **OURS
            )(x, **extra)
        return x


def test_layers_that_share_modules_decode_each_with_its_own_keys(getkey):
    """All modules at once but Co-ALiBi, which is no sum's term."""
    biases = [bias for name, (bias, _) in DECODED.items() if name != "co_alibi"]
    module = sum(bias for bias in biases if isinstance(bias, BiasModule))
    x, extra = jax.random.normal(getkey(), (B, LENGTH, F)), both(getkey())
    layers = Layers(module, decode=True)
    variables = initialised(layers, getkey(), x, **extra)
    full = jax.jit(Layers(module).apply)
    want = full({"params": variables["params"]}, x, **extra)
    step = jax.jit(functools.partial(layers.apply, mutable=["cache"]))
    half = LENGTH // 2
    first = {name: field[:, :half] for name, field in extra.items()}
    output, cache = step(variables, x[:, :half], **first)
    assert_formula(output, want[:, :half])
    last = {name: field[:, half:] for name, field in extra.items()}
    output, _ = step(variables | cache, x[:, half:], **last)
    assert_formula(output, want[:, half:])


@pytest.mark.parametrize("mask", ["traced", "traced NTS"])
def test_a_traced_mask_to_be_added_makes_nan(mask, getkey):
    """Read as flax reads masks it would say the opposite."""
    x = jax.random.normal(getkey(), (B, T, F))
    layer: Any = MultiHeadAttention(N, **OURS)
    variables = initialised(layer, getkey(), x)
    apply = jax.jit(lambda mask: layer.apply(variables, x, mask=mask))
    seen = jnp.tril(jnp.ones((B, 1, T, T), jnp.float32))
    if mask == "traced NTS":
        seen = seen[0]
    assert_formula(apply(seen), layer.apply(variables, x, mask=seen != 0))
    output = apply(jnp.where(seen != 0, 0.0, -jnp.inf))
    assert np.isnan(output).all()


# Transforms.


class Block(nn.Module):
    """A residual block, to be scanned over."""

    bias: str = "sum"

    @nn.compact
    def __call__(self, x, _=None):
        biases = {
            "sum": lambda: ALiBi(learned=True) + RelativePositionBias(8, 10),
            "forget": lambda: ForgetGate(),
        }
        layer = MultiHeadAttention(
            N, bias=biases[self.bias](), is_causal=True, name="attention", **OURS
        )
        return x + layer(x), None


@pytest.mark.parametrize("bias", ["sum", "forget"])
def test_jit_grad_remat_and_scan_over_layers_are_one_function(bias, getkey):
    """A scanned, rematerialised stack against its layers one by one."""
    x = jax.random.normal(getkey(), (B, T, F))
    stack = nn.scan(
        nn.remat(Block, prevent_cse=False),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=2,
    )(bias)
    params = initialised(stack, getkey(), x)["params"]

    def scanned(params):
        output, _ = stack.apply({"params": params}, x)
        return jnp.sum(output**2)

    def one_by_one(params):
        first, second = (
            jax.tree.map(lambda leaf, i=i: leaf[i], params) for i in (0, 1)
        )
        output, _ = Block(bias).apply({"params": first}, x)
        output, _ = Block(bias).apply({"params": second}, output)
        return jnp.sum(output**2)

    got = jax.jit(jax.value_and_grad(scanned))(params)
    assert_formula(got, jax.jit(jax.value_and_grad(one_by_one))(params))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(got[1])
               if leaf.ndim > 2)  # fmt: skip


def test_modules_from_outside_are_adopted_under_the_name_of_the_field(getkey):
    x = jax.random.normal(getkey(), (B, T, F))
    layer: Any = MultiHeadAttention(
        N, bias=ALiBi(learned=True) + RelativePositionBias(8, 10), **OURS
    )
    params = initialised(layer, getkey(), x)["params"]
    assert params["bias"]["terms_0"]["log_slopes"].shape == (N,)
    assert params["bias"]["terms_1"]["rel_embedding"].shape == (N, 8)
    remat = nn.remat(MultiHeadAttention)(N, bias=layer.bias, **OURS)
    assert_formula(
        remat.apply({"params": params}, x), layer.apply({"params": params}, x)
    )


# Refusals.


class Three(BiasModule):
    """What a module may not return."""

    def __call__(self, context: Any) -> Any:
        return 3


REFUSED: dict[str, Any] = {
    "heads": ({"num_heads": 5}, {}, ValueError, "`num_heads` must divide"),
    "kv_heads": ({"num_kv_heads": 3}, {}, ValueError, "`num_kv_heads` must divide"),
    "slopes": (
        {"bias": ALiBi(slopes=(1.0, 2.0))}, {},
        ValueError, r"`slopes` must be \[num_heads\] = \[4\]",
    ),
    "value_heads": (
        {"bias": pallas_attn.ALiBi(jnp.ones(3))}, {},
        ValueError, r"`bias.slopes` must be \[1 or B, 1 or N\]",
    ),
    "bias_class": ({"bias": ALiBi}, {}, TypeError, "`bias` must be a bias; got the"),
    "bias_module": ({"bias": nn.Dense(3)}, {}, TypeError, "`bias` must be a bias"),
    "bias_list": ({"bias": [ALiBi(), ALiBi()]}, {}, TypeError, "sum of them, `a . b`"),
    "bias_function": ({"bias": lambda t: t}, {}, TypeError, "`bias` must be a bias"),
    "contextual_sum": (
        {"bias": CoALiBi() + ALiBi()}, {}, NotImplementedError, "Co-ALiBi",
    ),
    "einsum": (
        {"qk_attn_weights_einsum_cls": lambda: jnp.einsum}, {},
        NotImplementedError, "`qk_attn_weights_einsum_cls` cannot be honoured",
    ),
    "returned": ({"bias": Three()}, {}, TypeError, "`bias`, a Three, must return"),
    "returned_term": (
        {"bias": ALiBi() + Three()}, {},
        TypeError, r"`bias.terms\[1\]`, a Three, must return a bias value .* got 3",
    ),
    "fading_both_ways": (
        {"bias": ALiBi() + ForgetGate()}, {}, ValueError, "is_causal=True",
    ),
    "fading_both_ways_value": (
        {"bias": pallas_attn.ForgetGate(jnp.zeros((1, T, N)))}, {},
        ValueError, "a ForgetGate fades what comes before",
    ),
    "mask_by_place": (
        {}, {"inputs_k": jnp.ones((B, T, F)), "inputs_v": jnp.ones((B, T, T), bool)},
        ValueError, "`inputs_v` must be floating .* `mask=...`",
    ),
    "mask_of_flax_by_place": (
        {}, {"inputs_k": jnp.ones((B, T, F)), "inputs_v": jnp.ones((B, 1, T, T))},
        ValueError, "`inputs_v` must be floating .* `mask=...`",
    ),
    "mask_as_keys": (
        {}, {"inputs_k": jnp.ones((B, 1, T, T))},
        ValueError, "`inputs_k` must be floating .* `mask=...`",
    ),
    "added_mask": (
        {}, {"mask": jnp.full((1, 1, T, T), -100.0).at[..., 0].set(0)},
        ValueError, "`mask` must be bool, .* from -100.0 on",
    ),
    "both_inputs": (
        {}, {"inputs_k": jnp.ones((B, S, F)), "inputs_kv": jnp.ones((B, S, F))},
        ValueError, "`inputs_kv` excludes",
    ),
    "values_alone": (
        {}, {"inputs_v": jnp.ones((B, S, F))}, ValueError, "`inputs_k` must be given",
    ),
    "unread_pair": (
        {"bias": ALiBi()}, {"pair": jnp.ones((B, T, T, 3))},
        ValueError, "`pair` must be read by the layer's `bias`",
    ),
    "unread_coordinates": (
        {"bias": SquaredDistanceBias(position_unit=1.0)},
        {"query_coordinates": jnp.ones((B, T, 2))},
        ValueError, "`query_coordinates` must be read",
    ),
    "offset_and_positions": (
        {}, {"query_offset": 3, "query_positions": jnp.arange(T)},
        ValueError, "exclude each other",
    ),
    "dropout_rate": (
        {"dropout_rate": 1.5, "deterministic": False}, {"dropout_rng": None},
        ValueError, "`dropout_rate` must be",
    ),
}  # fmt: skip


@pytest.mark.parametrize("refused", REFUSED)
def test_refusals_name_the_field(refused):
    fields, inputs, error, match = REFUSED[refused]
    layer: Any = MultiHeadAttention(**({"num_heads": N} | OURS | fields))
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    with pytest.raises(error, match=match):
        jax.eval_shape(
            functools.partial(layer.init, **inputs), rngs, jnp.ones((B, T, F))
        )


REFUSED_STEPS: dict[str, Any] = {
    "cache": ({"params": None}, {}, "`decode` needs a cache"),
    "batch": ({}, {"inputs_q": jnp.ones((3, 1, F))}, "`decode`: the cache must have"),
    "keys": ({}, {"inputs_k": jnp.ones((B, 2, F))}, "`inputs_k` must have the length"),
    "offset": ({}, {"query_offset": 3}, "`query_offset` must be left out"),
    "positions": (
        {}, {"query_positions": jnp.zeros(1, jnp.int32)},
        "`query_positions` must be left out",
    ),
    "lengths": (
        {}, {"key_value_seq_lengths": jnp.ones(B, jnp.int32)},
        "`key_value_seq_lengths` must be left out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("refused", REFUSED_STEPS)
def test_refusals_of_a_step_name_the_field(refused):
    chosen, inputs, match = REFUSED_STEPS[refused]
    *_, variables, _ = decoding("none")
    layer: Any = MultiHeadAttention(N, num_kv_heads=K, decode=True, **OURS)
    if chosen:
        variables = {name: variables[name] for name in chosen}
    inputs = {"inputs_q": jnp.ones((B, 1, F))} | inputs
    with pytest.raises(ValueError, match=match):
        layer.apply(variables, **inputs, mutable=["cache"])
