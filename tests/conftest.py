"""Strict JAX, fresh keys, and which tests this machine can run."""

import itertools

import jax
import pytest

from pallas_attn.implementations import current_device, refusal


jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def getkey():
    """A function that returns a new key at each call, the same ones in each run."""
    seeds = itertools.count()
    return lambda: jax.random.key(next(seeds))


def pytest_collection_modifyitems(items):
    """Skips tests marked `gpu` where the compiled kernels cannot run, and says why."""
    reason = refusal("triton", current_device(), dtype="float32", H=64, h=64)
    if reason is None:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))
