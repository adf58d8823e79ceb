"""Attention layers of models, said by the layer's fields, against their formulas.

Each formula is dense, in float64, of the layer's own parameters.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from pallas_attn import DenseBias
from pallas_attn.linen import (
    ALiBi,
    BiasModule,
    ForgetGate,
    MultiHeadAttention,
    OutputGate,
    PairBias,
    RelativePositionBias,
)
from pallas_attn.testing.evaluate import SMALL, widened
from pallas_attn.testing.numerics import assert_formula


HIGHEST = jax.lax.Precision.HIGHEST
OURS: dict[str, Any] = {"precision": HIGHEST, "implementation": "xla"}
B, T, N, K, F, H = 2, 21, 4, 2, 24, 6
SIDE = 3, 7  # of an image, T = 21

normal = nn.initializers.normal(1.0)


def product(spec: str, *operands: Any) -> Any:
    """An einsum, exact."""
    return jnp.einsum(spec, *operands, precision=HIGHEST)


def projected(params: Any, name: str, x: Any) -> Any:
    """[B, L, N, H] by a layer's own product."""
    made = product("BLF,FNH->BLNH", x, params[name]["kernel"])
    return made + params[name]["bias"][None, None] if "bias" in params[name] else made


def heads(params: Any, x: Any) -> tuple[Any, Any, Any]:
    """Query, key and value of N heads each."""
    made = (projected(params, name, x) for name in ("query", "key", "value"))
    q, k, v = (jnp.repeat(y, N // y.shape[2], axis=2) for y in made)
    return q, k, v


def attended(
    q, k, v, bias: Any = 0.0, *, scale=H**-0.5, cap=None, visible=None, sink=None
):
    """[B, T, N, h], of logits with a bias [B, N, T, S] or of its last axes."""
    logits = scale * product("BTNH,BSNH->BNTS", q, k)
    logits = logits if cap is None else cap * jnp.tanh(logits / cap)
    logits = logits + jnp.broadcast_to(bias, logits.shape)
    if visible is not None:
        logits = jnp.where(jnp.broadcast_to(visible, logits.shape), logits, -jnp.inf)
    if sink is not None:
        of_sink = jnp.broadcast_to(sink[None, :, None, None], (*logits.shape[:3], 1))
        logits = jnp.concatenate([logits, of_sink], 3)
    weights = jax.nn.softmax(logits, 3)[..., : k.shape[1]]
    return product("BNTS,BSNH->BTNH", weights, v)


def out(params, x):
    """The layer's output, [B, T, F]."""
    made = product("BTNH,NHF->BTF", x, params["out"]["kernel"])
    bias = params["out"].get("bias")
    return made if bias is None else made + bias[None, None]


def away():
    """Key place minus query place, [T, S]."""
    return np.arange(T)[None] - np.arange(T)[:, None]


def causal(window=T):
    return (away() <= 0) & (away() >= -window)


def turned(x, positions):
    """Rotary embeddings of [B, L, N, H], halves together."""
    angle = jnp.moveaxis(positions, -1, -2).astype(x.dtype)[..., None]
    powers = 10.0 ** -jnp.arange(H // 2, dtype=x.dtype)
    angle = angle * powers.reshape(1, 1, 1, H // 2)
    a, b = x[..., : H // 2], x[..., H // 2 :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def rope(query, key, query_positions, key_positions):
    return turned(query, query_positions), turned(key, key_positions)


def standing(x):
    """`rope` of tokens from 0 on."""
    return turned(x, jnp.arange(x.shape[1], dtype=jnp.int32).reshape(1, 1, -1))


def rms(x, scale):
    size = jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)
    return x / size * scale.reshape(1, 1, 1, H)


def gate(params, x):
    """[B, T, N, h or 1]."""
    return jax.nn.sigmoid(projected(params["output_hook"], "gate", x))


def t5(params, x):
    """T5's buckets as transformers 4 writes them: of both directions."""
    there = away()
    far = np.maximum(np.abs(there), 1)
    large = 2 + (np.log(far / 2) / np.log(20 / 2) * 2).astype(int)
    bucket = np.where(np.abs(there) < 2, np.abs(there), np.minimum(large, 3))
    bias = params["bias"]["rel_embedding"][:, bucket + 4 * (there > 0)]
    return out(params, attended(*heads(params, x), bias, scale=1.0))


def gpt_oss(params, x):
    q, k, v = heads(params, x)
    sink = params["sink"]
    made = attended(standing(q), standing(k), v, visible=causal(5), sink=sink)
    return out(params, made)


def gemma(params, x):
    """Gemma 2: `query_pre_attn_scalar`, a cap, a window, rotations."""
    q, k, v = heads(params, x)
    made = attended(
        standing(q), standing(k), v, scale=9**-0.5, cap=2.0, visible=causal(5)
    )
    return out(params, made)


def qwen(params, x):
    """Qwen3 with Qwen3-Next's gate, one for each head."""
    q, k, v = heads(params, x)
    q = standing(rms(q, params["query_ln"]["scale"]))
    k = standing(rms(k, params["key_ln"]["scale"]))
    return out(params, gate(params, x) * attended(q, k, v, visible=causal()))


def openfold(params, x, pair):
    """AlphaFold's algorithm 7: a pair bias, and gates that start open."""
    norm, linear = params["bias"]["layer_norm"], params["bias"]["linear"]
    mean = pair.mean(-1, keepdims=True)
    size = jnp.sqrt(((pair - mean) ** 2).mean(-1, keepdims=True) + 1e-5)
    vector = lambda y: y.reshape(1, 1, 1, -1)
    pair = (pair - mean) / size * vector(norm["scale"]) + vector(norm["bias"])
    bias = product("BTSC,CN->BNTS", pair, linear["kernel"])
    return out(params, gate(params, x) * attended(*heads(params, x), bias))


def forgetting(params, x):
    """FoX Pro without its shift: forget gates, norms of queries and keys, a gate."""
    q, k, v = heads(params, x)
    q, k = (rms(y, params[f"{n}_ln"]["scale"]) for y, n in ((q, "query"), (k, "key")))
    of_gate = params["bias"]["gate"]
    logits = product("BSF,FN->BSN", x, of_gate["kernel"]) + of_gate["bias"][None, None]
    sums = jnp.moveaxis(jnp.cumsum(jax.nn.log_sigmoid(logits), 1), 1, 2)
    bias = sums[..., :, None] - sums[..., None, :]
    return out(params, gate(params, x) * attended(q, k, v, bias, visible=causal()))


def mla(params, x):
    """Values of another width than queries: 16 of DeepSeek's latent heads, small."""
    made = attended(*heads(params, x), alibi(), visible=causal())
    return out(params, made)


def alibi():
    slopes = 2.0 ** (-8 * np.arange(1, N + 1) / N)
    return -slopes[:, None, None] * np.abs(away())


class TransformerXL(BiasModule):
    """(q_i + v).(W r_{i-j}) + u.k_j, whose q_i.k_j the layer adds, all by sqrt(H)."""

    @nn.compact
    def __call__(self, context: Any) -> DenseBias:
        query, key = context.query, context.key
        *_, N, H = query.shape
        u, v = (self.param(name, normal, (N, H)) for name in ("u", "v"))
        last = context.S + T
        table = waves(jnp.arange(-last, last + 1, dtype=jnp.float32))
        r = nn.DenseGeneral((N, H), use_bias=False, name="r", precision=HIGHEST)(table)
        moved = query + v[None, None]
        every = product("BTNH,DNH->BNTD", moved, r)
        away = context.query_positions[..., None] - context.key_positions[..., None, :]
        at = jnp.broadcast_to(away + last, (*every.shape[:3], context.S))
        here = jnp.take_along_axis(every, at, 3)
        of_key = product("NH,BSNH->BNS", u, key)[:, :, None]
        return DenseBias((here + of_key) / H**0.5)


def waves(distance):
    """Sines and cosines of a distance, [D, 8]."""
    angle = distance[:, None] / 10.0 ** jnp.arange(4, dtype=distance.dtype)[None]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], 1)


def transformer_xl(params, x):
    """The paper's four terms, and each row's shift by a loop over keys."""
    q, k, v = heads(params, x)
    own = params["bias"]
    bias = []
    for j in range(T):
        r = waves(jnp.arange(T, dtype=x.dtype) - j)
        r = product("TC,CNH->TNH", r, own["r"]["kernel"])
        bias.append(product("BTNH,TNH->BNT", q + own["v"][None, None], r))
    bias = jnp.stack(bias, 3) + product("NH,BSNH->BNS", own["u"], k)[:, :, None]
    return out(params, attended(q, k, v, bias / H**0.5, visible=causal()))


class DeBERTa(BiasModule):
    """q_i.(K r_{d(i,j)}) + k_j.(Q r_{d(j,i)}), distances clipped to 3 either way."""

    @nn.compact
    def __call__(self, context: Any) -> DenseBias:
        table = self.param("table", normal, (7, 5))
        product_of = functools.partial(
            nn.DenseGeneral, (N, H), use_bias=False, precision=HIGHEST
        )
        of_key, of_query = (
            product_of(name="key")(table), product_of(name="query")(table)
        )  # fmt: skip
        away = context.query_positions[..., None] - context.key_positions[..., None, :]
        here = jnp.clip(away + 3, 0, 6)
        spread = lambda x, at: jnp.take_along_axis(x, at, 3)
        shape = (context.query.shape[0], N, context.T, context.S)
        c2p = product("BTNH,DNH->BNTD", context.query, of_key)
        p2c = product("BSNH,DNH->BNSD", context.key, of_query)
        there = jnp.broadcast_to(6 - here, shape)
        p2c = jnp.swapaxes(spread(p2c, jnp.swapaxes(there, 2, 3)), 2, 3)
        return DenseBias((spread(c2p, jnp.broadcast_to(here, shape)) + p2c) / 18**0.5)


def deberta(params, x):
    q, k, v = heads(params, x)
    own = params["bias"]
    clipped = np.clip(-away(), -3, 3)
    r = own["table"]
    keys, queries = (
        product("DC,CNH->DNH", r, own[n]["kernel"]) for n in ("key", "query")
    )
    c2p = product("BTNH,TSNH->BNTS", q, keys[clipped + 3])
    p2c = product("BSNH,TSNH->BNTS", k, queries[-clipped + 3])
    return out(params, attended(q, k, v, (c2p + p2c) / 18**0.5, scale=18**-0.5))


class Shaw(BiasModule):
    """q_i.a_{j-i}, clipped to 4 either way (arXiv 1803.02155)."""

    @nn.compact
    def __call__(self, context: Any) -> DenseBias:
        table = self.param("table", normal, (9, H))
        away = context.key_positions[..., None, :] - context.query_positions[..., None]
        rows = table[jnp.clip(away[0, 0], -4, 4) + 4]
        return DenseBias(product("BTNH,TSH->BNTS", context.query, rows) / H**0.5)


def shaw(params, x):
    q, k, v = heads(params, x)
    rows = params["bias"]["table"][np.clip(away(), -4, 4) + 4]
    return out(params, attended(q, k, v, product("BTNH,TSH->BNTS", q, rows) / H**0.5))


class Decomposed(BiasModule):
    """SAM's q.R_row + q.R_column of an image's places (arXiv 2304.02643)."""

    @nn.compact
    def __call__(self, context: Any) -> DenseBias:
        bias: Any = 0.0
        for axis, size in enumerate(SIDE):
            table = self.param(f"axis_{axis}", normal, (2 * size - 1, H))
            at = np.stack(np.unravel_index(np.arange(T), SIDE))[axis]
            rows = table[at[:, None] - at[None] + size - 1]
            bias = bias + product("BTNH,TSH->BNTS", context.query, rows)
        return DenseBias(bias)


def decomposed(params, x):
    q, k, v = heads(params, x)
    (row, column), own = np.unravel_index(np.arange(T), SIDE), params["bias"]
    rows = own["axis_0"][row[:, None] - row[None] + SIDE[0] - 1]
    columns = own["axis_1"][column[:, None] - column[None] + SIDE[1] - 1]
    bias = product("BTNH,TSH->BNTS", q, rows) + product("BTNH,TSH->BNTS", q, columns)
    return out(params, attended(q, k, v, bias))


@dataclass(frozen=True)
class Model:
    """A layer's fields, its formula, and how many channels its pairs have, if any."""

    fields: dict[str, Any]
    formula: Any
    pair: int = 0


GATE = OutputGate(precision=HIGHEST)
WIDE = {"qkv_features": N * H, "num_kv_heads": K}
BARE = {**WIDE, "use_bias": False}
MODELS = {
    "t5": Model(
        {"use_bias": False, "scale": 1.0, "bias": RelativePositionBias(8, 20)}, t5
    ),
    "gpt-oss": Model(
        WIDE | {"sink": True, "is_causal": True, "local_window_size": (5, 0)}
        | {"query_key_hook": rope}, gpt_oss,
    ),
    "gemma": Model(
        BARE | {"scale": 9**-0.5, "logits_soft_cap": 2.0, "is_causal": True}
        | {"local_window_size": (5, 0), "query_key_hook": rope}, gemma,
    ),
    "qwen": Model(
        BARE | {"normalize_qk": nn.RMSNorm(epsilon=1e-6), "is_causal": True}
        | {"query_key_hook": rope, "output_hook": GATE.clone(per_head=True)}, qwen,
    ),
    "openfold": Model(
        {"use_bias": ("out",), "bias": PairBias(), "output_hook": GATE}, openfold, 5
    ),
    "fox": Model(
        BARE | {"normalize_qk": "rms", "is_causal": True, "output_hook": GATE}
        | {"bias": ForgetGate(kernel_init=normal)}, forgetting,
    ),
    "mla": Model(
        WIDE | {"value_dim": 5, "use_bias": ("query", "value"), "is_causal": True}
        | {"bias": ALiBi(tuple(2.0 ** (-8 * np.arange(1, N + 1) / N)))}, mla,
    ),
    "transformer-xl": Model(
        {"is_causal": True, "bias": TransformerXL()}, transformer_xl
    ),
    "deberta": Model({"scale": 18**-0.5, "bias": DeBERTa()}, deberta),
    "shaw": Model({"bias": Shaw()}, shaw),
    "sam": Model({"bias": Decomposed()}, decomposed),
}  # fmt: skip


def drawn(params, key):
    """Every parameter random: those that start at 0 or 1 too."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    random = [
        x + 0.3 * jax.random.normal(k, x.shape)
        for k, x in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, random)


def inputs_of(model, getkey):
    x = jax.random.normal(getkey(), (B, T, F))
    pair = jax.random.normal(getkey(), (B, T, T, model.pair)) if model.pair else None
    return x, ({} if pair is None else {"pair": pair})


def results(f, params, x, more):
    """The output, and the gradients of parameters and inputs."""

    def loss(params, x, more):
        made = f(params, x, **more)
        return jnp.sum(jnp.sin(made)), made

    gradients, made = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(params, x, more)
    return made, gradients


@pytest.mark.parametrize("name", MODELS)
def test_a_layer_is_that_of_its_model(name, getkey):
    """Output and all gradients."""
    model = MODELS[name]
    x, more = inputs_of(model, getkey)
    layer: Any = MultiHeadAttention(N, **model.fields, **OURS)
    params = drawn(layer.init(getkey(), x, **more)["params"], getkey())
    apply = lambda params, x, **more: layer.apply({"params": params}, x, **more)
    got = results(apply, params, x, more)
    with jax.enable_x64(True):
        wide = [widened(y) for y in (params, x, more)]
        want = results(model.formula, *wide)
    assert_formula(got, want)


@pytest.mark.parametrize("name", ["gpt-oss", "qwen", "fox", "transformer-xl"])
def test_token_by_token_is_the_full_forward(name, getkey):
    """What is made of cached keys, queries, gates and residuals is that of all."""
    model = MODELS[name]
    x, _ = inputs_of(model, getkey)
    layer: Any = MultiHeadAttention(N, decode=True, **model.fields, **OURS)
    variables = jax.jit(layer.init)(getkey(), x)
    params = {"params": drawn(variables["params"], getkey())}
    full = layer.clone(decode=False).apply(params, x)
    step = jax.jit(functools.partial(layer.apply, mutable=["cache"]))
    cache, made = {"cache": variables["cache"]}, []
    for first, last in [(0, 9), *((i, i + 1) for i in range(9, T))]:
        output, cache = step(params | cache, x[:, first:last])
        made.append(output)
    assert_formula(jnp.concatenate(made, 1), full)


def test_a_layer_of_kernels_is_that_of_its_model(getkey):
    """A sink, rotations, a window and a gate, by kernels."""
    fields: dict[str, Any] = MODELS["gpt-oss"].fields | {"output_hook": GATE}
    x, more = inputs_of(MODELS["gpt-oss"], getkey)
    layer: Any = MultiHeadAttention(
        N, **fields, precision=HIGHEST, implementation="triton_interpret", config=SMALL
    )
    params = drawn(layer.init(getkey(), x)["params"], getkey())
    ours, plain = (
        results(lambda p, x, at=at: at.apply({"params": p}, x), params, x, more)
        for at in (layer, layer.clone(implementation="reference"))
    )
    assert_formula(ours, plain)


def test_a_hook_has_the_lse_and_the_input(getkey):
    """A gate sigmoid(lse - c) is a sink c."""
    x, _ = inputs_of(MODELS["t5"], getkey)
    seen = {}

    def hook(output, lse, inputs):
        seen["shapes"] = [y.shape for y in (output, lse, inputs)]
        return output * jax.nn.sigmoid(lse - 0.7)[..., None]

    hooked: Any = MultiHeadAttention(N, output_hook=hook, value_dim=5, **OURS)
    sunk: Any = MultiHeadAttention(N, sink=True, value_dim=5, **OURS)
    params = hooked.init(getkey(), x)["params"]
    assert seen["shapes"] == [(B, T, N, 5), (B, T, N), (B, T, F)]
    sink = jnp.full((N,), 0.7)
    want = sunk.apply({"params": params | {"sink": sink}}, x)
    assert_formula(hooked.apply({"params": params}, x), want)


@pytest.mark.parametrize(
    ("use_bias", "biased"),
    [
        (True, ["key", "out", "query", "value"]),
        (False, []),
        (("query", "out"), ["out", "query"]),
        ([], []),
    ],
)
def test_projections_have_biases_one_by_one(use_bias, biased):
    layer: Any = MultiHeadAttention(N, use_bias=use_bias, **OURS)
    params = jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((B, T, F)))
    assert sorted(n for n, x in params["params"].items() if "bias" in x) == biased


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"use_bias": "out"}, ValueError, "`use_bias` must be a bool, or some of"),
        ({"use_bias": ("q",)}, ValueError, "`use_bias` must be a bool, or some of"),
        ({"normalize_qk": "layer"}, TypeError, '`normalize_qk` must be a bool, "rms"'),
        ({"normalize_qk": nn.RMSNorm}, TypeError, "`normalize_qk` must be"),
        ({"value_dim": 0}, ValueError, "`value_dim` must be"),
        ({"scale": float("nan")}, ValueError, "`scale` must be finite"),
        ({"output_hook": lambda *x: x[0][..., :2]}, ValueError, "`output_hook` must"),
    ],
)
def test_what_is_no_field_is_refused(fields, error, match):
    layer: Any = MultiHeadAttention(N, **fields, **OURS)
    with pytest.raises(error, match=match):
        jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((B, T, F)))
