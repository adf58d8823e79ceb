"""The value that each bias module makes, against the formula of its source."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import pallas_attn
from pallas_attn.bias.diagonals import toeplitz
from pallas_attn.linen import (
    ALiBi,
    BiasContext,
    CoALiBi,
    ForgetGate,
    LearnedFactoredBias,
    MultiHeadAttention,
    NeuralFactoredBias,
    NeuralFactors,
    PairBias,
    RelativePositionBias,
    SquaredDistanceBias,
    WindowRelativePositionBias,
)
from pallas_attn.testing.numerics import assert_formula, assert_same_bits, assert_zero


pytestmark = pytest.mark.usefixtures("full_precision")

B, T, S, N, F = 2, 7, 11, 4, 6
EXACT: dict[str, Any] = {
    "precision": jax.lax.Precision.HIGHEST,
    "implementation": "xla",
}


def context(batch=(B,), T=T, S=S, offset=0, places=None, **more):
    """A call's context; `places` are explicit positions of queries and keys."""
    ones = (1,) * len(batch)
    starts = jnp.asarray(offset, jnp.int32)
    starts = starts.reshape((*(starts.shape or ones), 1, 1))
    queries = starts + jnp.arange(T, dtype=jnp.int32).reshape(*ones, 1, T)
    keys = jnp.arange(S, dtype=jnp.int32).reshape(*ones, 1, S)
    if places is not None:
        queries, keys = (jnp.asarray(x, jnp.int32) for x in places)
        offset = None
    x = jax.random.normal(jax.random.key(3), (*batch, max(T, S), F))
    return BiasContext(
        inputs_q=x[..., :T, :],
        inputs_kv=x[..., :S, :],
        num_heads=N,
        query_positions=queries,
        key_positions=keys,
        offset=offset,
        **more,
    )


def made(module, of, key=0):
    """The value and the parameters of a module."""
    init = jax.jit(lambda key: module.init_with_output(key, of))
    value, variables = init(jax.random.key(key))
    return value, variables.get("params", {})


def written(value, of):
    """A value as an array [*#B, N, T, S]."""
    if isinstance(value, pallas_attn.DenseBias):
        return value.bias
    if isinstance(value, pallas_attn.RelativeBias):
        flat = lambda x: x.reshape(-1, *x.shape[-2:])
        at = flat(of.query_positions), flat(of.key_positions)
        return value.materialise(*at)
    q, k = (jnp.swapaxes(x, -3, -2) for x in (value.q_factor, value.k_factor))
    return jnp.matmul(q, jnp.swapaxes(k, -1, -2), precision="highest")


def t5x_bucket(relative, bidirectional, num_buckets, max_distance):
    """Of key position minus query position, as the paper's code has it."""
    bucket, away = 0, -relative
    if bidirectional:
        num_buckets //= 2
        bucket = bucket + (away < 0) * num_buckets
        away = np.abs(away)
    else:
        away = np.maximum(away, 0)
    exact = num_buckets // 2
    far = np.maximum(away, 1).astype(np.float32) / exact + np.finfo(np.float32).eps
    far = np.log(far) / np.log(max_distance / exact) * (num_buckets - exact)
    far = np.minimum(exact + far.astype(np.int32), num_buckets - 1)
    return bucket + np.where(away < exact, away, far)


PLACES: dict[str, Any] = {
    "counted": {},
    "offset": {"offset": 150},
    "offsets": {"offset": np.array([3, 40], np.int32)},
    "explicit": {"places": (90 * np.arange(T)[None, None], np.arange(S)[None, None])},
    "per_head": {
        "places": (
            17 * np.arange(N * T).reshape(1, N, T),
            np.arange(B * S).reshape(B, 1, S),
        )
    },
}


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_positions_fall_into_the_buckets_of_t5(places, bidirectional):
    of = context(**PLACES[places])
    module = RelativePositionBias(bidirectional=bidirectional)
    value, params = made(module, of)
    queries, keys = np.asarray(of.query_positions), np.asarray(of.key_positions)
    relative = keys[..., None, :] - queries[..., :, None]
    bucket = t5x_bucket(relative, bidirectional, 32, 128)
    bucket = np.broadcast_to(bucket, (*bucket.shape[:-3], N, T, S))
    table = np.asarray(params["rel_embedding"])
    want = table[np.arange(N).reshape(1, N, 1, 1), bucket]
    assert_same_bits(np.asarray(written(value, of)), want)


def test_a_bucket_has_the_sum_of_its_gradients():
    of = context()
    module: Any = RelativePositionBias(8, 6)
    _, params = made(module, of)
    weight = jax.random.normal(jax.random.key(1), (1, N, T, S))

    def loss(params):
        return jnp.sum(written(module.apply({"params": params}, of), of) * weight)

    away = np.arange(S)[None] - np.arange(T)[:, None]
    want = np.zeros((N, 8), np.float32)
    bucket = t5x_bucket(away, True, 8, 6)
    for n in range(8):
        want[:, n] = np.where(bucket == n, weight[0], 0).sum((1, 2))
    assert_formula(jax.grad(loss)(params)["rel_embedding"], want)


@pytest.mark.parametrize(
    ("T", "S"), [(1, 1), (1, 5), (5, 1), (4, 7), (7, 4), (0, 3), (3, 0)]
)
def test_toeplitz_puts_diagonals_in_place(T, S):
    values = np.arange(max(T + S - 1, 0), dtype=np.float32)[None]
    i, j = np.arange(T)[:, None], np.arange(S)[None]
    want = values[:, i - j + S - 1]
    assert_same_bits(np.asarray(toeplitz(jnp.asarray(values), T, S)), want)


def swin_index(height, width):
    """`relative_position_index`, as the paper's code makes it."""
    grid = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    places = np.stack(grid).reshape(2, -1)
    relative = (places[:, :, None] - places[:, None, :]).transpose(1, 2, 0)
    relative = relative + [height - 1, width - 1]
    return relative[..., 0] * (2 * width - 1) + relative[..., 1]


@pytest.mark.parametrize("window", [3, (2, 5), 1])
def test_the_table_is_read_as_swin_reads_it(window):
    height, width = window if isinstance(window, tuple) else (window, window)
    of = context(T=height * width, S=height * width)
    value, params = made(WindowRelativePositionBias(window), of)
    table = np.asarray(params["relative_position_bias_table"])
    assert table.shape == ((2 * height - 1) * (2 * width - 1), N)
    want = table[swin_index(height, width)].transpose(2, 0, 1)[None]
    assert_same_bits(np.asarray(value.bias), want.copy())


def test_positions_choose_places_of_the_window():
    queries, keys = np.array([[[5, 0, 3]]]), np.array([[[1, 1, 4, 2]]])
    of = context(T=3, S=4, places=(queries, keys))
    module: Any = WindowRelativePositionBias((2, 3))
    value, params = made(module, of)
    whole = module.apply({"params": params}, context(T=6, S=6)).bias
    want = np.asarray(whole)[:, :, queries[0, 0][:, None], keys[0, 0][None]]
    assert_same_bits(np.asarray(value.bias), want.copy())


@pytest.mark.parametrize("pretrained", [None, 8])
def test_the_network_is_that_of_swin_v2(pretrained):
    of = context(T=12, S=12)
    module = WindowRelativePositionBias(
        (3, 4), continuous=True, pretrained_window=pretrained, hidden_features=16
    )
    value, params = made(module, of)
    assert params["heads"]["kernel"].shape == (16, N)
    units = (pretrained - 1,) * 2 if pretrained else (2, 3)
    table = np.stack(
        np.meshgrid(np.arange(-2, 3), np.arange(-3, 4), indexing="ij"), axis=-1
    )
    table = 8 * table / np.array(units)
    table = np.sign(table) * np.log2(np.abs(table) + 1) / np.log2(8)
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    hidden = table.reshape(-1, 2) @ wide["hidden"]["kernel"] + wide["hidden"]["bias"]
    rows = np.maximum(hidden, 0) @ wide["heads"]["kernel"]
    want = 16 / (1 + np.exp(-rows[swin_index(3, 4)].transpose(2, 0, 1)))
    assert_formula(value.bias[0], want)


@pytest.mark.parametrize("leading", [(), (1,), (B,), (B, 3), (1, 3)])
def test_a_pair_representation_is_normalised_projected_and_shared(leading):
    """*A are the first of (batch, rows)."""
    pair = jax.random.normal(jax.random.key(1), (*leading, T, S, 5))
    of = context(batch=(B, 3), pair=pair)
    value, params = made(PairBias(), of)
    assert value.bias.shape == (*leading, *(1,) * (2 - len(leading)), N, T, S)
    wide = np.asarray(pair, np.float64)
    mean, spread = wide.mean(-1, keepdims=True), wide.var(-1, keepdims=True)
    normal = (wide - mean) / np.sqrt(spread + 1e-5)
    want = normal @ np.asarray(params["linear"]["kernel"], np.float64)
    assert set(params["linear"]) == {"kernel"}
    assert_formula(value.bias, np.moveaxis(want, -1, -3).reshape(value.bias.shape))


def test_the_gradient_of_a_pair_representation_is_summed_over_rows(getkey):
    """A row at a time gives gradients that add up to the one of all rows."""
    layer: Any = MultiHeadAttention(N, qkv_features=16, bias=PairBias(), **EXACT)
    x = jax.random.normal(getkey(), (B, 3, T, F))
    pair = jax.random.normal(getkey(), (B, T, T, 5))
    variables = jax.jit(layer.init)(getkey(), x, pair=pair)

    @jax.jit
    def gradient(pair, x):
        loss = lambda pair: jnp.sum(jnp.sin(layer.apply(variables, x, pair=pair)))
        return jax.grad(loss)(pair)

    rows = sum(gradient(pair, x[:, i : i + 1]) for i in range(3))
    assert_formula(gradient(pair, x), rows)


@pytest.mark.parametrize("places", ["counted", "offset", "explicit", "per_head"])
@pytest.mark.parametrize("shared", [False, True])
def test_learned_factors_are_read_by_position(places, shared):
    of = context(**PLACES[places])
    length = 700
    init: Any = {"k_factor_init": nn.initializers.normal(1.0)}
    value, params = made(LearnedFactoredBias(3, length, shared, **init), of)
    assert params["q_factor"].shape == (length, 1 if shared else N, 3)
    q, k = (np.asarray(params[x], np.float64) for x in ("q_factor", "k_factor"))
    product = np.einsum("inr,jnr->nij", q, k)
    queries, keys = np.asarray(of.query_positions), np.asarray(of.key_positions)
    head = np.zeros(N, int) if shared else np.arange(N)
    want = product[
        head.reshape(1, N, 1, 1), queries[..., :, None], keys[..., None, :]
    ]  # [#B, N, T, S]
    got = np.broadcast_to(written(value, of), want.shape)
    assert_formula(got, want)


def test_positions_beside_a_table_are_nan_where_they_are_not_known():
    of = context(places=(np.full((1, 1, T), 3), np.full((1, 1, S), 3)))
    module: Any = LearnedFactoredBias(2, 4)
    _, params = made(module, of)

    @jax.jit
    def factors(queries):
        of = context(places=(queries, np.full((1, 1, S), 3)))
        return module.apply({"params": params}, of).q_factor

    places = np.array([[[0, 3, 4, -1, 2, 1, 9]]], np.int32)
    bad = np.isnan(np.asarray(factors(places))).any(axis=(0, 2, 3))
    assert bad.tolist() == [False, False, True, True, False, False, True]


POINTS: dict[str, Any] = {
    "one": ((), T, S),
    "shared": ((1,), T, S),
    "full": ((B,), T, S),
}


@pytest.mark.parametrize("points", POINTS)
def test_squared_distances_are_weighed_per_head(points):
    leading = POINTS[points][0]
    x = jax.random.normal(jax.random.key(1), (*leading, T, 3))
    y = jax.random.normal(jax.random.key(2), (*leading, S, 3))
    of = context(query_coordinates=x, key_coordinates=y)
    weights = (0.5, 1.0, 2.0, 3.0)
    fixed, none = made(SquaredDistanceBias(weights, learned=False), of)
    learned, params = made(SquaredDistanceBias(weights), of)
    assert not none
    distance = np.sum(
        (np.asarray(x, np.float64)[..., :, None, :] - np.asarray(y)[..., None, :, :])
        ** 2,
        axis=-1,
    )
    want = -np.array(weights)[:, None, None] * distance[..., None, :, :]
    want = want.reshape((1,) * (4 - want.ndim) + want.shape)
    assert_formula(written(fixed, of), want)
    assert_formula(written(learned, of), want)
    assert_formula(jnp.exp(params["log_weights"]), np.array(weights))


def test_positions_are_points_on_a_line():
    of = context(offset=5)
    value, _ = made(SquaredDistanceBias(learned=False, position_unit=2.0), of)
    distance = 5 + np.arange(T)[:, None] - np.arange(S)[None]
    want = np.broadcast_to(-((distance / 2) ** 2), (1, N, T, S))
    assert_formula(written(value, of), want)


def test_neural_factors_are_those_of_the_fitted_module(getkey):
    """What `NeuralFactors.fit` gives is the parameter tree of the bias module."""
    x = jax.random.normal(getkey(), (T, 2))
    y = jax.random.normal(getkey(), (S, 2))
    of = context(query_coordinates=x, key_coordinates=y)
    networks = NeuralFactors(num_heads=N, rank=3, hidden=(8,))
    want, variables = networks.init_with_output(getkey(), x, y)
    module = NeuralFactoredBias(3, (8,))
    got = module.apply({"params": {"factors": variables["params"]}}, of)
    assert_same_bits(jax.tree.leaves(got), jax.tree.leaves(want))


def test_gates_are_those_of_the_inputs():
    of = context()
    value, params = made(ForgetGate(kernel_init=nn.initializers.normal(1.0)), of)
    x = np.asarray(of.inputs_kv, np.float64)
    logits = x @ np.asarray(params["gate"]["kernel"], np.float64)
    assert_zero(params["gate"]["bias"])
    assert value.log_gate.shape == (B, S, N)
    assert_formula(value.log_gate, -np.log1p(np.exp(-logits)))
    halves, _ = made(ForgetGate(param_dtype=jnp.bfloat16, dtype=jnp.bfloat16), of)
    assert halves.log_gate.dtype == jnp.float32


@pytest.mark.parametrize("data_dependent", [True, False])
def test_gates_start_with_the_decay_times_of_the_paper(data_dependent):
    """f = exp(-1 / time), times evenly spaced in their logarithm."""
    module = ForgetGate(
        kernel_init=nn.initializers.zeros_init(),
        decay_times=(2, 128),
        data_dependent=data_dependent,
    )
    value, _ = made(module, context())
    times = np.array([2.0, 8.0, 32.0, 128.0])
    assert_formula(value.log_gate, np.broadcast_to(-1 / times, (B, S, N)))


@pytest.mark.parametrize(
    ("module", "slopes", "value"),
    [
        (ALiBi, pallas_attn.alibi_slopes, pallas_attn.ALiBi),
        (CoALiBi, pallas_attn.co_alibi_slopes, pallas_attn.CoALiBi),
    ],
)
def test_slopes_are_fixed_or_exponentials(module, slopes, value):
    of = context()
    fixed, none = made(module(), of)
    assert isinstance(fixed, value)
    assert not none
    assert_same_bits(fixed.slopes, slopes(N))
    own, none = made(module(slopes=(0.0, -1.0, 2.0, 3.0)), of)
    assert own.slopes.tolist() == [0.0, -1.0, 2.0, 3.0]
    learned, params = made(module(learned=True, bias_max=4.0), of)
    assert_formula(learned.slopes, slopes(N, 4.0))
    assert_formula(jnp.exp(params["log_slopes"]), slopes(N, 4.0))


def test_a_sum_has_modules_values_and_arrays(getkey):
    """Against the sum of what its terms are."""
    x = jax.random.normal(getkey(), (B, T, F))
    array = jax.random.normal(getkey(), (1, N, T, T))
    value = pallas_attn.ALiBi(pallas_attn.alibi_slopes(N))
    module = sum([RelativePositionBias(), array + (ALiBi() + value)])
    layer: Any = MultiHeadAttention(N, qkv_features=16, bias=module, **EXACT)
    variables: Any = jax.jit(layer.init)(getkey(), x)
    table = variables["params"]["bias"]["terms_0"]["rel_embedding"]
    relative = np.arange(T)[None] - np.arange(T)[:, None]
    dense = table[:, t5x_bucket(relative, True, 32, 128)][None] + array
    want = layer.clone(bias=value + value + dense).apply(
        {"params": variables["params"]}, x
    )
    assert_formula(layer.apply(variables, x), want)


REFUSED: dict[str, Any] = {
    "buckets": (RelativePositionBias(7), {}, "`num_buckets` must be at least 2"),
    "distance": (RelativePositionBias(32, 8), {}, "`max_distance` must be larger"),
    "window": (WindowRelativePositionBias(3), {}, "`window` must have as many places"),
    "window_queries": (
        WindowRelativePositionBias(3), {"S": 9}, "as many places as there are queries"
    ),
    "window_zero": (WindowRelativePositionBias(0), {}, "`window` must be an int >= 1"),
    "window_place": (
        WindowRelativePositionBias(2),
        {"T": 4, "S": 4, "places": ([[[0, 1, 2, 4]]], [[[0, 1, 2, 3]]])},
        "`query_positions` must be places of the window, 0..3",
    ),
    "pair": (PairBias(), {}, "`pair` must be given"),
    "pair_shape": (
        PairBias(), {"pair": jnp.ones((B, T, T, 3))}, r"`pair` must be \[\*#A, T, S"
    ),
    "pair_batch": (
        PairBias(), {"pair": jnp.ones((3, T, S, 3))}, r"`pair` must be \[\*#A, T, S"
    ),
    "length": (LearnedFactoredBias(2, 10), {}, "`max_length` must be at least the 11"),
    "position": (
        LearnedFactoredBias(2, 11), {"offset": 8}, "`query_offset` must keep"
    ),
    "places": (
        LearnedFactoredBias(2, 11), {"places": ([[[-1] * T]], [[[0] * S]])},
        "`query_positions` must keep positions in 0..max_length - 1 = 10; got -1",
    ),
    "points": (SquaredDistanceBias(), {}, "`query_coordinates` must be given"),
    "keys": (
        NeuralFactoredBias(2), {"query_coordinates": jnp.ones((T, 2))},
        "`key_coordinates` must be given",
    ),
    "points_shape": (
        SquaredDistanceBias(),
        {"query_coordinates": jnp.ones((T, 2)), "key_coordinates": jnp.ones((T, 2))},
        "`key_coordinates` must be",
    ),
    "line_per_head": (
        SquaredDistanceBias(position_unit=1.0), PLACES["per_head"],
        "`position_unit` needs positions that heads share",
    ),
    "weights": (
        SquaredDistanceBias((1.0, 2.0), position_unit=1.0), {},
        r"`weights` must be \[num_heads\]",
    ),
    "weight": (
        SquaredDistanceBias((1.0, 2.0, 0.0, 1.0), position_unit=1.0), {},
        "`weights` must be positive",
    ),
    "slopes": (ALiBi(slopes=(1.0,)), {}, r"`slopes` must be \[num_heads\] = \[4\]"),
    "slope": (
        CoALiBi(slopes=(1.0, 0.0, 1.0, 1.0), learned=True), {},
        "`slopes` must be positive",
    ),
    "decay": (ForgetGate(decay_times=(0, 3)), {}, "`decay_times` must be"),
}  # fmt: skip


@pytest.mark.parametrize("refused", REFUSED)
def test_refusals_name_the_field(refused):
    module, places, match = REFUSED[refused]
    of = context(**places)
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(lambda key: module.init(key, of), jax.random.key(0))
