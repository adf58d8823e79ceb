"""Strict JAX, fresh keys, what this machine can run, and which rows are asked."""

import gc
import itertools
import os

import jax
import jaxlib.version
import pytest

from pallas_attn.implementations import current_device, refusal
from pallas_attn.placement.run import compiled
from pallas_attn.testing.covering import outside
from pallas_attn.xla import chunks


# A test runs its programs once: what XLA's optimiser and newer emitters take in
# compiling is more than they save in running. jaxlib 0.11 has no other emitters. They
# contract products and sums where a program lets them, which AVX cannot: bits are equal
# where operations are.
if jaxlib.version.__version_info__ < (0, 11):
    fast = "--xla_cpu_use_fusion_emitters=false --xla_cpu_max_isa=AVX"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {fast}".strip()

# Tracing makes objects by the million that hold one another and live on.
gc.set_threshold(200_000, 20, 100)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
if current_device().platform == "cpu":
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def getkey():
    """A function that returns a new key at each call, the same ones in each run."""
    seeds = itertools.count()
    return lambda: jax.random.key(next(seeds))


@pytest.fixture
def full_precision():
    """Of modules' own products too: the default of a GPU is TF32."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture
def retraced():
    """Calls whose tracing reads constants that the test changes: none was traced."""
    compiled.clear_cache()
    yield
    compiled.clear_cache()


@pytest.fixture
def small_chunks(monkeypatch, retraced):
    """One sequence and at most 8 rows a chunk: several chunks in a ragged case."""
    for name, value in {"BYTES": 1, "MOST_ROWS": 8, "LEAST_ROWS": 8}.items():
        monkeypatch.setattr(chunks, name, value)


def pytest_addoption(parser):
    """Adds `--rows`."""
    parser.addoption(
        "--rows",
        choices=("covering", "rest", "all"),
        help="of every law the rows that cover its table (without a path or -k the "
        "default), the others, or all",
    )


def pytest_configure(config):
    """Decides `--rows` where nobody did, here once: workers are told."""
    if config.option.rows is None:
        named = config.args_source == config.ArgsSource.ARGS or config.option.keyword
        config.option.rows = "all" if named else "covering"


def pytest_collection_modifyitems(config, items):
    """Keeps the rows that are asked; skips `gpu` where compiled kernels cannot run."""
    if config.option.rows != "all":
        of_covering = covering_run(items)
        rest = config.option.rows == "rest"
        gone = [item for item in items if (item in of_covering) == rest]
        items[:] = [item for item in items if (item in of_covering) != rest]
        config.hook.pytest_deselected(items=gone)
    reason = refusal("triton", current_device(), dtype="float32", H=64, h=64)
    if reason is None:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


def covering_run(items):
    """The tests that run where nobody asks for all: minutes of work, of every kind."""

    def marked(item, *names):
        return any(item.get_closest_marker(name) for name in names)

    own = {item for item in items if marked(item, "light")}
    table = [x for x in items if not marked(x, "light", "whole", "machine_code")]
    marks = ((x.nodeid, x.get_closest_marker("at_most")) for x in table)
    most = {name.partition("[")[0]: mark.args[0] for name, mark in marks if mark}
    left = outside((item.nodeid for item in table), most)
    return own | {item for item in table if item.nodeid not in left}
