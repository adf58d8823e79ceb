"""Strict JAX, fresh keys, and which tests this machine can run."""

import itertools
import os

import jax
import jaxlib.version
import pytest

from pallas_attn.implementations import current_device, refusal
from pallas_attn.placement.run import compiled
from pallas_attn.xla import chunks


# A test runs its programs once: what XLA's optimiser and newer emitters take in
# compiling is more than they save in running. jaxlib 0.11 has no other emitters. They
# contract products and sums where a program lets them, which AVX cannot: bits are equal
# where operations are.
if jaxlib.version.__version_info__ < (0, 11):
    fast = "--xla_cpu_use_fusion_emitters=false --xla_cpu_max_isa=AVX"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {fast}".strip()

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


def pytest_collection_modifyitems(items):
    """Skips tests marked `gpu` where the compiled kernels cannot run, and says why."""
    reason = refusal("triton", current_device(), dtype="float32", H=64, h=64)
    if reason is None:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))
