"""Calls over many devices, and calls that are exported, repeated or looked at."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax import export

from pallas_attn import ALiBi, dot_product_attention, Entmax
from pallas_attn.api import attended
from pallas_attn.linen import MultiHeadAttention
from pallas_attn.placement.explicit import layout_of
from pallas_attn.testing.cases import Case
from pallas_attn.testing.evaluate import called, small, with_gradients
from pallas_attn.testing.jaxprs import kernel_names
from pallas_attn.testing.numerics import assert_formula


@pytest.mark.parametrize("devices", [2, 4])
def test_sharded_is_unsharded_without_moving_what_is_sharded(devices):
    """Every way and split of the table: values, gradients, bits, the compiled text."""
    count = f"--xla_force_host_platform_device_count={devices}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {count}"
    done = subprocess.run(
        [sys.executable, "-m", "pallas_attn.testing.sharding"],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("bias", ["none", "co_alibi"])
def test_kernels_run_inside_shard_map_as_it_is_by_default(bias):
    """Their types say over which mesh axes they vary, on one device too."""
    sample = Case(bias, "causal").at(B=1, N=1, K=1, T=9, S=9).sample()
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    f = with_gradients(
        sample.settings, implementation="triton_interpret", config=small(bias)
    )
    spec = jax.sharding.PartitionSpec
    arguments = (sample.operands, sample.cotangents)
    shared = {**dict.fromkeys(sample.operands, spec("x")), "bias": spec()}
    run = jax.shard_map(
        lambda operands, cotangents: f(operands, {}, cotangents),
        mesh=mesh,
        in_specs=(shared, spec("x")),
        out_specs=(spec("x"), shared),
    )
    want = jax.jit(f)(sample.operands, {}, sample.cotangents)
    assert_formula(jax.jit(run)(*arguments), want)


@pytest.mark.parametrize(
    ("name", "axis", "says"),
    [
        ("query", 1, ("`query`", "T over ('x',)", "jax.reshard", "`query_offset`")),
        ("key", 1, ("`key`", "S over ('x',)", "jax.reshard")),
        ("query", 3, ("`query`", "H over ('x',)", "[BTNH]")),
    ],
)
def test_what_cannot_be_sharded_says_what_to_do(name, axis, says):
    mesh = jax.sharding.AbstractMesh(
        (2,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,)
    )
    spec = jax.sharding.PartitionSpec(*(None,) * axis, "x")
    operands = Case("none").at(T=8, S=8).specs().operands

    def placed(key, x):
        if key != name:
            return x
        sharding = jax.sharding.NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    query, key, value = (placed(n, operands[n]) for n in ("query", "key", "value"))

    def f(query, key, value):
        given = called(query=query, key=key, value=value, implementation="xla")
        layout_of(given.problem)

    with pytest.raises(ValueError, match=f"`{name}`") as raised:
        jax.eval_shape(f, query, key, value)
    missing = [part for part in says if part not in str(raised.value)]
    assert not missing, str(raised.value)


@pytest.fixture
def compiled():
    """The names of what compiles while a test runs."""
    events = []

    def listen(event, duration_secs, **kwargs):
        if "backend_compile" in event:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


def test_an_eager_call_of_equal_shapes_compiles_nothing(compiled):
    x = jnp.ones((2, 5, 2, 4))
    layer = MultiHeadAttention(num_heads=2, decode=True)
    tokens = x.reshape(2, 5, 8)
    variables = layer.init(jax.random.key(0), tokens)
    loss = lambda x: dot_product_attention(x, x, x, ALiBi(jnp.ones(2))).sum()
    calls = [
        lambda: dot_product_attention(x, x, x, is_causal=True),
        lambda: dot_product_attention(x, x, x, normalizer=Entmax(1.5)),
        lambda: jax.grad(loss)(x),
        lambda: layer.apply(variables, tokens[:, :1], mutable=["cache"])[0],
    ]
    for call in calls:
        call()
        call()
        compiled.clear()
        call()
        assert not compiled


@pytest.mark.parametrize("implementation", ["xla", "triton_interpret"])
def test_an_exported_call_takes_any_batch(implementation):
    case = Case("sum-alibi factored", "causal lengths GQA").at(T=6, S=7, B=3)
    sample = case.sample()
    (b,) = export.symbolic_shape("b")

    def f(operands, conditions):
        return dot_product_attention(
            **operands,
            **conditions,
            **sample.settings,
            implementation=implementation,
            config=small(case.bias),
        )

    def any_batch(x):
        shape = (b if x.ndim and x.shape[0] == 3 else n for n in x.shape[:1])
        return jax.ShapeDtypeStruct((*shape, *x.shape[1:]), x.dtype)

    arguments = (sample.operands, sample.conditions)
    specs = jax.tree.map(any_batch, arguments)
    got = jax.jit(export.export(jax.jit(f))(*specs).call)(*arguments)
    assert_formula(got, jax.jit(f)(*arguments))


@pytest.mark.parametrize("bias", ["alibi", "sum", "dense-1NTS"])
@pytest.mark.parametrize("normalizer", ["softmax", "sink", "entmax 1.5"])
@pytest.mark.parametrize("lengths", ["t t", "t s", "11 s", "t 13"])
def test_an_exported_call_of_xla_takes_any_lengths(lengths, normalizer, bias):
    sizes = {"T": 11, "S": 11 if lengths == "t t" else 13, "B": 1}
    sample = Case(bias, "full", (), normalizer).at(**sizes).sample()
    some = dict(zip("TS", lengths.split(), strict=True))
    scope = export.SymbolicScope([f"{x} >= 2" for x in some.values() if x.isalpha()])
    names = {
        sizes[axis]: export.symbolic_shape(name, scope=scope)[0]
        for axis, name in some.items()
        if name.isalpha()
    }
    run = jax.jit(
        lambda operands: dot_product_attention(
            **operands, **sample.settings, implementation="xla"
        )
    )
    any_length = lambda x: jax.ShapeDtypeStruct(
        tuple(names.get(n, n) for n in x.shape), x.dtype
    )
    specs = jax.tree.map(any_length, sample.operands)
    got = jax.jit(export.export(run)(specs).call)(sample.operands)
    assert_formula(got, run(sample.operands))


def test_kernels_of_any_length_say_what_to_do():
    (t,) = export.symbolic_shape("t")
    x = jax.ShapeDtypeStruct((2, t, 2, 8), jnp.float32)
    f = lambda x: dot_product_attention(x, x, x, implementation="triton_interpret")
    with pytest.raises(NotImplementedError, match='static lengths; .* use|Use .*"xla"'):
        export.export(jax.jit(f))(x)


@pytest.mark.parametrize("implementation", ["reference", "xla", "triton_interpret"])
def test_no_alarm_where_nothing_is_infinite_or_nan(implementation):
    x = Case("none").at(B=1, T=5, S=5).sample().operands["query"]
    f = lambda x: dot_product_attention(
        x, x, x, ALiBi(jnp.ones(2)), is_causal=True, implementation=implementation
    )
    with jax.debug_nans(True), jax.debug_infs(True), jax.enable_checks(True):
        out = jax.grad(lambda x: f(x).sum())(x)
    assert jnp.isfinite(out).all()
    if implementation == "triton_interpret":  # a kernel of its own is one operation
        return
    with jax.debug_nans(True), jax.disable_jit():
        assert jnp.isfinite(f(x)).all()


@pytest.mark.parametrize(
    ("bias", "normalizer"),
    [
        ("alibi", "softmax"),
        ("alibi", "sink"),
        ("co_alibi", "softmax"),
        ("none", "entmax 1.5"),
    ],
)
def test_a_policy_that_saves_by_name_runs_no_forward_kernel_again(bias, normalizer):
    sample = Case(bias, "causal", (), normalizer).sample()
    given = lambda x: called(
        **x,
        **sample.settings,
        implementation="triton_interpret",
        config=small(bias, normalizer),
    )
    f = lambda x: sum(y.sum() for y in attended(given(x), return_residual=True))
    policy = jax.checkpoint_policies.save_only_these_names("attention")
    plain = kernel_names(jax.grad(f), sample.operands)
    saved = kernel_names(jax.grad(jax.checkpoint(f, policy=policy)), sample.operands)
    assert sorted(saved) == sorted(plain)
