"""What the package exports, what it says of itself, and what importing it costs."""

import inspect
import json
import pydoc
import re
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jax
import pytest
from flax import nnx

import pallas_attn
import pallas_attn.linen
import pallas_attn.nnx
from pallas_attn import Bias, dot_product_attention, Softmax, sparsity, visited
from pallas_attn.api import Options
from pallas_attn.testing.evaluate import kernel_implementation


ROOT = Path(__file__).parent.parent
PUBLIC = [
    "ALiBi",
    "Bias",
    "Block",
    "CoALiBi",
    "Config",
    "DenseBias",
    "Entmax",
    "FactoredBias",
    "ForgetGate",
    "RelativeBias",
    "Softmax",
    "Sparsity",
    "Sum",
    "Truncation",
    "Visited",
    "alibi_factors",
    "alibi_slopes",
    "attention_weights",
    "co_alibi_slopes",
    "distance_home",
    "dot_product_attention",
    "head_home",
    "key_home",
    "linear_alibi_slopes",
    "pair_home",
    "query_home",
    "sparsity",
    "squared_distance_factors",
    "svd_factors",
    "visited",
]
LINEN = [
    "ALiBi",
    "BiasContext",
    "BiasModule",
    "CoALiBi",
    "ForgetGate",
    "LearnedFactoredBias",
    "MultiHeadAttention",
    "NeuralFactoredBias",
    "NeuralFactors",
    "OutputGate",
    "PairBias",
    "RelativePositionBias",
    "SquaredDistanceBias",
    "WindowRelativePositionBias",
    "as_flax_attention_fn",
]
# The same modules; `NeuralFactors.fit` and flax's own layers need linen alone.
NNX = [x for x in LINEN if x not in ("NeuralFactors", "as_flax_attention_fn")]
# Whose arguments are those of `dot_product_attention`.
TAKERS = ("attention_weights", "sparsity", "visited")
FUNCTIONS = [
    "alibi_factors",
    "alibi_slopes",
    "attention_weights",
    "co_alibi_slopes",
    "dot_product_attention",
    "linear_alibi_slopes",
    "sparsity",
    "squared_distance_factors",
    "svd_factors",
    "visited",
]
PACKAGES = [
    (pallas_attn, PUBLIC),
    (pallas_attn.linen, LINEN),
    (pallas_attn.nnx, NNX),
]
DOCUMENTED = [(package, x) for package, public in PACKAGES for x in public]
# what has no paper: settings, results, and what others are made of
UNSOURCED = {
    "attention_weights",
    "BiasContext",
    "BiasModule",
    "Block",
    "Config",
    "Sparsity",
    "Sum",
    "Truncation",
    "Visited",
    "co_alibi_slopes",
    "distance_home",
    "head_home",
    "key_home",
    "linear_alibi_slopes",
    "pair_home",
    "query_home",
    "sparsity",
    "visited",
}
# what takes or holds no array, so that it has no shapes to tell
SHAPELESS = {"Block", "Config"}

SIGNATURE = """
    query, key, value, bias=None, mask=None, *,
    scale=None, is_causal=False,
    query_seq_lengths=None, key_value_seq_lengths=None, local_window_size=None,
    query_offset=0, query_positions=None, key_positions=None,
    query_segment_ids=None, key_segment_ids=None,
    normalizer=Softmax(), logits_soft_cap=None, dropout_rate=0.0, dropout_rng=None,
    precision=None, implementation=None, config=None, return_residual=False
"""

# Runs in a fresh interpreter: CPU seconds of `import pallas_attn` after `import jax`,
# and which of the packages that it must do without it has loaded.
IMPORT = """
import json, sys, time
import jax
start = time.process_time()
import pallas_attn
seconds = time.process_time() - start
heavy = {"chex", "flax", "jax_triton", "matplotlib", "optax", "triton"}
heavy |= {"jax._src.pallas.core"}
print(json.dumps([seconds, sorted(heavy & set(sys.modules))]))
"""


@pytest.mark.parametrize(("package", "public"), PACKAGES)
def test_exports_are_the_public_names(package, public):
    modules = {name for name, x in vars(package).items() if inspect.ismodule(x)}
    found = {name for name in vars(package) if not name.startswith("_")}
    assert sorted(found - modules) == sorted(package.__all__) == public
    namespace: dict[str, object] = {}
    exec(f"from {package.__name__} import *", namespace)
    assert sorted(set(namespace) - {"__builtins__"}) == public
    said = pydoc.plain(pydoc.render_doc(package))  # help()
    for name in public:
        assert re.search(rf"^    (class )?{name}\(", said, re.M), name


def test_the_version_is_said_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    (path,) = project["tool"]["hatch"]["version"].values()
    assert f'__version__ = "{pallas_attn.__version__}"' in (ROOT / path).read_text()


def test_the_signature_is_the_contract():
    found = inspect.signature(dot_product_attention).parameters.values()
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in found]
    assert str(inspect.Signature(bare))[1:-1].split() == SIGNATURE.split()


def test_type_checkers_know_every_keyword():
    keywords = dict(inspect.signature(dot_product_attention).parameters)
    keywords = {k: p for k, p in keywords.items() if p.kind == p.KEYWORD_ONLY}
    del keywords["return_residual"]
    assert Options.__annotations__.keys() == keywords.keys()
    for name, annotation in Options.__annotations__.items():
        assert annotation.__forward_arg__ == keywords[name].annotation


@pytest.mark.parametrize("function", [visited, sparsity])
def test_what_describes_a_call_takes_its_arguments(function):
    theirs = dict(inspect.signature(dot_product_attention).parameters)
    del theirs["return_residual"]
    assert dict(inspect.signature(function).parameters) == theirs


def test_arguments_are_a_superset_of_those_of_jax_nn():
    ours = inspect.signature(dot_product_attention).parameters
    theirs = inspect.signature(jax.nn.dot_product_attention).parameters
    for name, parameter in theirs.items():
        assert ours[name].kind == parameter.kind, name
        assert ours[name].default == parameter.default, name
    leading = [name for name, p in theirs.items() if p.kind != p.KEYWORD_ONLY]
    assert list(ours)[: len(leading)] == leading


@pytest.mark.parametrize(
    ("package", "name"),
    DOCUMENTED,
    ids=lambda x: getattr(x, "__name__", x).removeprefix("pallas_attn."),
)
def test_every_public_name_is_documented(package, name):
    """What it is, arguments with shapes, an example that runs, and the paper."""
    said = inspect.getdoc(getattr(package, name)) or ""
    assert said.splitlines()[0].endswith((".", ":"))
    assert ">>> " in said, "a doctest"
    taken = inspect.signature(constructor(getattr(package, name))).parameters
    # what every flax module has
    arguments = set(taken) - {"parent", "name", "self", "args", "kwargs"}
    if name in TAKERS:
        assert "dot_product_attention" in said, "whose arguments they take"
    elif arguments:
        assert "Args:" in said
        for argument in arguments:
            assert re.search(rf"^ +{argument}: ", said, re.MULTILINE), argument
    assert ("[" in said.split(">>>")[0]) == (name not in SHAPELESS)
    assert bool(re.search(r"^Sources?: \S", said, re.MULTILINE)) == (
        name not in UNSOURCED
    )


def constructor(x: Any) -> Any:
    """What tells the arguments: of a module of nnx its `__init__`."""
    return x.__init__ if isinstance(x, type) and issubclass(x, nnx.Module) else x


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_say_shapes_errors_and_an_example(name):
    said = getattr(pallas_attn, name).__doc__
    assert "Returns:" in said
    assert ">>> " in said
    assert "Raises:" in said or "raises what it raises" in said
    for parameter in inspect.signature(getattr(pallas_attn, name)).parameters:
        described = name in TAKERS
        assert described or f" {parameter}: " in said, parameter


@pytest.mark.parametrize(
    "name", ["ALiBi", "CoALiBi", "DenseBias", "FactoredBias", "ForgetGate"]
)
def test_biases_say_their_formula_and_the_shapes_of_their_fields(name):
    said = getattr(pallas_attn, name).__doc__
    assert said.startswith("b_ij = ")
    for field in getattr(pallas_attn, name).__dataclass_fields__:
        line = next(x for x in said.splitlines() if x.strip().startswith(f"{field}:"))
        assert "[" in line


def test_importing_is_cheap_and_needs_neither_flax_nor_triton():
    runs = [
        json.loads(
            subprocess.run(
                [sys.executable, "-c", IMPORT],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for _ in range(3)
    ]
    assert [loaded for _, loaded in runs] == [[]] * 3
    assert statistics.median(seconds for seconds, _ in runs) < 0.3


def test_a_call_without_kernels_imports_no_kernel():
    program = """
import sys
import jax.numpy as jnp
import pallas_attn
x = jnp.ones((3, 2, 4))
pallas_attn.dot_product_attention(x, x, x, implementation="xla")
assert not [name for name in sys.modules if "pallas.triton" in name], sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_names_of_this_machine_are_known():
    assert kernel_implementation() in ("triton", "triton_interpret")
    assert Softmax() == Softmax()
    assert issubclass(pallas_attn.ALiBi, Bias)
