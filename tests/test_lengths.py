"""Any number of queries and keys, and any head dim."""

import numpy as np
import pytest

from pallas_attn.config import Block, Config
from pallas_attn.testing.cases import Case
from pallas_attn.testing.evaluate import EXACT, gradients, implementations, truth
from pallas_attn.testing.numerics import assert_formula


# one block size, so that every length lies somewhere at its edge
BLOCK = Block(32, 32)
CONFIG = Config(BLOCK, BLOCK, BLOCK, BLOCK)
EDGES = [(31, 33), (32, 32), (33, 31), (64, 65), (1, 63), (65, 1), (1, 1)]
RAGGED = np.random.default_rng(0).integers(1, 141, (5, 2)).tolist()
HEADS = [(8, 8), (1, 3), (24, 40), (40, 72), (65, 16), (96, 97), (160, 8), (256, 256)]

everywhere = pytest.mark.parametrize("implementation", implementations())


@everywhere
@pytest.mark.parametrize("bias", ["sum", "alibi", "co_alibi"])
@pytest.mark.parametrize(("T", "S"), [*EDGES, *RAGGED])
def test_lengths(T, S, bias, implementation):
    situation = "full" if bias == "sum" else "causal"
    check(Case(bias, situation).at(B=1, T=T, S=S), implementation)


@everywhere
@pytest.mark.parametrize("bias", ["dense", "co_alibi"])
@pytest.mark.parametrize(("H", "h"), HEADS)
def test_head_dims(H, h, bias, implementation):
    check(Case(bias, "causal").at(B=1, H=H, h=h), implementation)


@everywhere
@pytest.mark.parametrize("bias", ["sum", "co_alibi"])
def test_one_head_of_one_of_everything(bias, implementation):
    sizes = {"B": 1, "N": 1, "K": 1, "T": 1, "S": 1, "H": 1, "h": 1}
    check(Case(bias, "full").at(**sizes), implementation)


def check(case, implementation):
    sample = case.sample()
    got = gradients(sample, implementation=implementation, config=CONFIG, **EXACT)
    assert_formula(got, truth(sample))
