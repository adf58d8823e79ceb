"""The device decides what a call runs on; a named implementation never falls back."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_attn import api, dot_product_attention
from pallas_attn.implementations import (
    current_device,
    Device,
    Functions,
    NAMES,
    resolve,
)


SMALL = {"dtype": "float32", "H": 64, "h": 64}
CPU = Device("cpu", "cpu", "jax.default_backend()")
TPU = Device("tpu", "TPU v5e", "jax.default_backend()")
HOPPER = Device("gpu", "NVIDIA H100", "jax.default_backend()", "9.0")
VOLTA = Device("gpu", "Tesla V100", "jax.default_device", "7.0")
ROCM = Device("gpu", "AMD Instinct MI300X", "jax.default_backend()", "gfx942")
ABSTRACT = Device("gpu", "NVIDIA A100", "the mesh", abstract=True)

# implementation, device, what differs from SMALL; the name and a part of the reason
CHOICES = {
    "cpu": (None, CPU, {}, "xla", '"triton" needs a CUDA GPU'),
    "tpu": (None, TPU, {}, "xla", "jax.default_backend() is tpu"),
    "hopper": (None, HOPPER, {}, "triton", "compute capability 9.0"),
    "volta": (None, VOLTA, {}, "xla", "Tesla V100 has 7.0"),
    "rocm": (None, ROCM, {}, "xla", "not a CUDA device"),
    "abstract": (None, ABSTRACT, {}, "triton", "lowered for NVIDIA A100"),
    "float64": (None, HOPPER, {"dtype": "float64"}, "xla", "query is float64"),
    "wide query": (None, HOPPER, {"H": 257}, "xla", "at most 256, and H = 257"),
    "wide value": (None, HOPPER, {"h": 320}, "xla", "h = 320"),
    "widest": (None, HOPPER, {"H": 256, "h": 256}, "triton", "NVIDIA H100"),
    "named": ("triton", HOPPER, {}, "triton", "NVIDIA H100"),
    "named on cpu": (
        "triton",
        CPU,
        {},
        None,
        ">= 8.0, and jax.default_backend() is cpu",
    ),
    "named on volta": ("triton", VOLTA, {}, None, ">= 8.0, and Tesla V100 has 7.0"),
    "interpreted": ("triton_interpret", CPU, {}, "triton_interpret", "cpu"),
    "interpreted float64": (
        "triton_interpret",
        CPU,
        {"dtype": "float64"},
        None,
        "query is float64",
    ),
    "dense": ("reference", HOPPER, {"dtype": "float64"}, "reference", "gpu"),
    "in order": (("triton", "reference"), CPU, {}, "reference", "is cpu; "),
    "first": (["xla", "triton"], HOPPER, {}, "xla", "runs on gpu"),
    "none can": (
        ("triton", "triton_interpret"),
        CPU,
        {"H": 300},
        None,
        '"triton_interpret" has heads of at most 256',
    ),
}


@pytest.mark.parametrize("case", CHOICES.values(), ids=list(CHOICES))
def test_the_device_and_the_call_decide(case):
    implementation, device, change, name, reason = case
    choice = resolve(implementation, device, **{**SMALL, **change})
    assert choice.name == name
    assert reason in choice.reason


@pytest.fixture
def reached(monkeypatch):
    """The names of the implementations that calls reach."""
    names = []

    def functions_of(name, family):
        names.append(name)
        return Functions(
            lambda problem: (
                problem.value[:, : problem.call.T],
                problem.value[:, : problem.call.T, :, 0],
            )
        )

    monkeypatch.setattr(api, "functions_of", functions_of)
    return names


def attend(**options):
    x = jnp.ones((2, 5, 3, 8))
    return dot_product_attention(x, x, x, **options)


def test_an_abstract_gpu_is_the_device_on_any_host(reached):
    device = AbstractDevice("NVIDIA H100 80GB HBM3", None, platform="gpu")
    mesh = AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert current_device().abstract
        jax.eval_shape(attend)
        jax.eval_shape(lambda: attend(implementation="triton"))
    assert reached == ["triton", "triton"]


def test_an_abstract_tpu_is_no_gpu(reached):
    mesh = AbstractMesh(
        (), (), abstract_device=AbstractDevice("TPU v5e", 1, platform="tpu")
    )
    with jax.sharding.use_abstract_mesh(mesh):
        jax.eval_shape(attend)
        with pytest.raises(NotImplementedError, match="abstract device .* is tpu"):
            attend(implementation="triton")
    assert reached == ["xla"]


@pytest.mark.parametrize("default", ["cpu", "device"])
def test_the_default_device_comes_before_the_backend(default, reached):
    cpu = jax.local_devices(backend="cpu")[0]
    with jax.default_device("cpu" if default == "cpu" else cpu):
        attend()
        with pytest.raises(NotImplementedError, match=r"jax\.default_device is cpu"):
            attend(implementation="triton")
    assert reached == ["xla"]


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"triton"}))
def test_a_named_implementation_is_the_one_that_runs(name, reached):
    attend(implementation=name)
    assert reached == [name]


def test_a_sequence_goes_on_to_what_can_run(reached):
    cpu = jax.local_devices(backend="cpu")[0]
    with jax.default_device(cpu):
        attend(implementation=("triton", "reference"))
    assert reached == ["reference"]


def test_a_refusal_names_the_condition_and_the_way_out():
    cpu = jax.local_devices(backend="cpu")[0]
    with jax.default_device(cpu), pytest.raises(NotImplementedError) as raised:
        attend(implementation="triton")
    said = str(raised.value)
    for part in ("`implementation`", "compute capability >= 8.0", "is cpu", "'xla'"):
        assert part in said
