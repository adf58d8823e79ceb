"""Calls that between them take every shipped choice of blocks."""

from __future__ import annotations

from pallas_attn.testing.cases import Case


LENGTH = 1024
SIZES = {"B": 2, "N": 8, "K": 8, "T": LENGTH, "S": LENGTH}

# Calls that between them take every shipped choice of blocks: the classes of head dims,
# wide and narrow dtypes, dense or not, free or causal, pruned, long, factored.
SHIPPED = [
    Case(bias, situation).at(**SIZES, H=H, h=H, dtype=dtype)
    for bias, situation, dtype, heads in [
        ("none", "full", "bfloat16", (32, 64, 128)),
        ("alibi", "causal", "bfloat16", (64, 128, 256)),
        ("dense", "full", "bfloat16", (32, 64, 128, 256)),
        ("dense-1NTS", "causal", "bfloat16", (64, 128)),
        ("relative", "causal", "bfloat16", (64, 128, 256)),
        ("relative", "full", "float32", (64,)),
        ("factored", "full", "bfloat16", (32,)),
        ("factored-float32", "full", "bfloat16", (64,)),
        ("sum-alibi factored", "causal", "bfloat16", (128,)),
        ("saturating", "causal", "bfloat16", (64,)),
        ("co_alibi", "causal", "bfloat16", (64, 128, 256)),
        ("co_alibi", "causal", "float32", (64, 128)),
        ("none", "all at once", "bfloat16", (64,)),
        ("none", "mask TS GQA", "bfloat16", (64, 128)),
        ("none", "soft cap", "bfloat16", (64,)),
        ("none", "dropout", "bfloat16", (64, 128)),
        ("alibi", "causal", "float32", (64, 128, 256)),
        ("dense", "full", "float32", (64, 128, 256)),
    ]
    for H in heads
] + [
    Case("alibi", "causal").at(
        B=1, N=8, K=8, T=8192, S=8192, H=128, h=128, dtype="bfloat16"
    ),
    Case("alibi", "causal GQA").at(
        B=2, N=8, K=2, T=LENGTH, S=LENGTH, H=128, h=128, dtype="bfloat16"
    ),
]

SHIPPED += [
    Case(bias, "causal", (), normalizer).at(**SIZES, H=H, h=H, dtype=dtype)
    for normalizer, bias, dtype, heads in [
        ("sink", "none", "bfloat16", (64, 128)),
        ("sink", "co_alibi", "bfloat16", (64,)),
        ("entmax 1.5", "none", "bfloat16", (64, 128, 256)),
        ("entmax 1.5", "alibi", "bfloat16", (64,)),
        ("entmax 1.5", "dense-1NTS", "bfloat16", (64,)),
        ("entmax 1.1", "none", "float32", (64,)),
        ("entmax learned", "none", "bfloat16", (64,)),
        ("entmax 1.5 top 33", "none", "bfloat16", (64, 128)),
        ("entmax 1.5 top 33", "sum", "bfloat16", (64,)),
    ]
    for H in heads
]

# More that take much shared memory: a float32 bias beside 16 bits, and many columns.
SHARED = [
    Case(bias, "full", (), normalizer).at(**SIZES, H=H, h=H, dtype=dtype)
    for bias, normalizer, H, dtype in [
        ("dense-float32", "softmax", 64, "bfloat16"),
        ("dense-float32", "softmax", 128, "bfloat16"),
        ("sum", "softmax", 128, "float32"),
        ("factored-float32 R20", "softmax", 256, "bfloat16"),
        ("factored-float32 R20", "entmax learned", 64, "bfloat16"),
        ("sum", "entmax 1.5", 128, "float32"),
    ]
]

# Biases whose tiles are loaded beside the products.
LOADED = [
    Case(bias, "full").at(**SIZES, H=H, h=H, dtype="bfloat16")
    for bias in ("dense", "dense-1NTS", "sum-factored dense")
    for H in (32, 64, 128)
]


def named(case: Case) -> str:
    """A shipped call in words, shorter than `str` and no less clear among these."""
    sizes = case.sizes
    sparse = "" if case.normalizer == "softmax" else f"{case.normalizer}, "
    name = f"{case.bias}, {case.situation}, T{sizes.T} H{sizes.H} {sizes.dtype}"
    return sparse + name
