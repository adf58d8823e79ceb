"""Every kernel lowers for CUDA and compiles within a card's means, without a card.

What machine code uses is kept (`pallas_attn.testing.machine_code`); a kernel that has
changed is compiled here.
"""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from pallas_attn import dot_product_attention, Entmax, Softmax
from pallas_attn.config import Block, Config
from pallas_attn.inspect import main
from pallas_attn.lowering.lower import (
    compile_kernel,
    DEVICES,
    lower,
    SHARED_LIMIT,
    shared_memory,
    triton_ir,
    triton_version,
    unavailable,
)
from pallas_attn.lowering.triton_ir import offset_bits, turned_choices
from pallas_attn.testing.cases import Case, cases
from pallas_attn.testing.evaluate import kernels, small
from pallas_attn.testing.machine_code import (
    compiled,
    lowered,
    shared,
)
from pallas_attn.testing.numerics import SPILLS
from pallas_attn.testing.shipped import LENGTH, LOADED, named, SHARED, SHIPPED, SIZES


SMALL = 99 * 1024

# Choices that spill more than SPILLS and are shipped all the same: bytes seen, by case
# and (architecture, kernel). On an H200 (sm_90) bfloat16 blocks were chosen by the
# clock; on the other architectures the same blocks are not tuned.
SPILLING = {
    # a near tile's distance is one number per pair, so that no digits cancel
    "alibi, causal, T1024 H256 bfloat16": {(80, "rows"): 68},
    "alibi, causal, T1024 H128 bfloat16": {
        (80, "forward"): 114,
        (80, "rows"): 472,
        (80, "cols"): 76,
    },
    "alibi, causal, T8192 H128 bfloat16": {
        (80, "forward"): 208,
        (80, "rows"): 676,
        (80, "cols"): 88,
    },
    "alibi, causal GQA, T1024 H128 bfloat16": {
        (90, "cols"): 400,  # the fastest of those timed
        (80, "forward"): 150,
        (80, "rows"): 476,
        (80, "cols"): 328,
        (100, "cols"): 624,
    },
    "sum-alibi factored, causal, T1024 H128 bfloat16": {
        (90, "cols"): 88,  # the fastest of those timed
        (80, "forward"): 636,
        (80, "rows"): 620,
        (80, "cols"): 1032,
    },
    "factored, full, T1024 H32 bfloat16": {
        (90, "cols"): 200,  # the fastest of those timed
        (80, "cols"): 232,
    },
    "factored-float32, full, T1024 H64 bfloat16": {(80, "cols"): 164},
    "dense, full, T1024 H64 bfloat16": {(80, "cols"): 300},
    "dense-1NTS, causal, T1024 H64 bfloat16": {(100, "forward"): 108},
    # two more loops: over blocks of which a mask shows some, or all
    "none, all at once, T1024 H64 bfloat16": {
        (90, "cols"): 120,
        (80, "forward"): 144,
        (100, "cols"): 76,
    },
    "none, mask TS GQA, T1024 H128 bfloat16": {
        (90, "cols"): 616,  # the fastest of those timed
        (80, "cols"): 200,
        (100, "cols"): 368,
    },
    "relative, causal, T1024 H64 bfloat16": {(80, "diagonals"): 96},
    "relative, causal, T1024 H128 bfloat16": {
        (90, "cols"): 400,  # the fastest of those timed
        (80, "forward"): 250,
        (80, "cols"): 92,
        (100, "diagonals"): 288,
    },
    "co_alibi, causal, T1024 H64 bfloat16": {
        (90, "cols"): 268,
        (80, "rows"): 960,
        (80, "cols"): 28444,
        (100, "cols"): 68,
    },
    "sink, co_alibi, causal, T1024 H64 bfloat16": {  # as without a sink
        (90, "cols"): 268,
        (80, "rows"): 960,
        (80, "cols"): 28444,
        (100, "cols"): 68,
    },
    "co_alibi, causal, T1024 H128 bfloat16": {
        (80, "forward"): 188,
        (80, "rows"): 2396,
        (100, "forward"): 96,
    },
    "entmax 1.5, none, causal, T1024 H64 bfloat16": {(80, "output"): 136},
    "entmax 1.5, none, causal, T1024 H128 bfloat16": {
        (90, "output"): 1104,  # the fastest of those timed
        (80, "output"): 1792,
        (100, "output"): 1056,
        (100, "cols"): 320,
    },
    "entmax 1.5, alibi, causal, T1024 H64 bfloat16": {
        (80, "rows"): 96,
        (80, "cols"): 92,
    },
    "entmax 1.5, dense-1NTS, causal, T1024 H64 bfloat16": {
        (90, "output"): 136,  # 88 without its flag, in 0.98 of the time
        (80, "output"): 488,
        (100, "output"): 728,
    },
    # sum u^2/p beside four sums, for an alpha near 2 costs digits without; not timed
    "entmax learned, none, causal, T1024 H64 bfloat16": {
        (80, "output"): 296,
        (90, "output"): 72,
        (100, "output"): 408,
    },
    # 0 on sm_90; not timed
    "entmax 1.5 top 33, sum, causal, T1024 H64 bfloat16": {
        (100, "list_candidates"): 336,
    },
    "none, dropout, T1024 H128 bfloat16": {(90, "cols"): 72},  # not timed
}

# Kernels in which ptxas waits for each product before it issues the next, shipped all
# the same: the fastest of those timed, and one that was not.
SERIALISED = {
    ("entmax 1.5, dense-1NTS, causal, T1024 H64 bfloat16", 90, "rows"),
    ("none, soft cap, T1024 H64 bfloat16", 90, "cols"),
    ("sink, none, causal, T1024 H64 bfloat16", 90, "cols"),  # so it is without a sink
}


def compiles(test):
    """A test that makes machine code with the `triton` wheel."""
    missing = unavailable()
    skip = pytest.mark.skipif(missing is not None, reason=str(missing))
    return pytest.mark.machine_code(skip(test))


@pytest.mark.at_most(14)
@pytest.mark.parametrize("case", cases(), ids=str)
def test_every_case_lowers(case):
    """In float32 and ragged; the other dtypes below."""
    names = {kernel.name for kernel in kernels(case, config=small(case.bias))}
    assert "forward_kernel" in names
    assert {"rows_kernel", "cols_kernel"} & names


@pytest.mark.parametrize("normalizer", ["entmax 1.5", "entmax learned top 8"])
@pytest.mark.parametrize(
    ("bias", "situation"),
    [
        ("none", "full"),
        ("sum", "all at once"),
        ("saturating", "positions shuffled"),
        ("dense", "causal lengths GQA"),
        ("alibi", "empty rows"),
    ],
)
def test_entmax_lowers(bias, situation, normalizer):
    case = Case(bias, situation, (), normalizer)
    names = {kernel.name for kernel in kernels(case, config=small(bias, normalizer))}
    if "top" in normalizer:
        assert {"list_candidates_kernel", "list_cols_kernel"} <= names
    else:
        assert {"slots_kernel", "output_kernel", "rows_kernel", "cols_kernel"} <= names


@pytest.mark.parametrize("normalizer", ["softmax", "entmax 1.5", "entmax learned"])
@pytest.mark.parametrize("situation", ["all at once", "causal lengths GQA"])
def test_no_product_takes_a_choice_of_rows_turned(situation, normalizer):
    """Not every compiler of Triton has a way to lay out the bits of the choice."""
    case = Case("dense", situation, (), normalizer).at(dtype="bfloat16")
    found = kernels(case, config=small("dense", normalizer))
    turned = {k.name: turned_choices(triton_ir(k)) for k in found}
    assert {"rows_kernel", "cols_kernel"} & {*turned}
    assert not any(turned.values())


def test_both_ways_of_long_entmax_lower():
    sizes = {"B": 1, "T": 8192, "S": 8192, "dtype": "bfloat16"}
    names = {
        k.name for k in kernels(Case("none", "causal", (), "entmax 1.5").at(**sizes))
    }
    assert {"list_candidates_kernel", "list_cols_kernel"} <= names
    assert {"slots_kernel", "output_kernel", "rows_kernel", "cols_kernel"} <= names


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("H", [8, 40, 97, 192, 256])
def test_dtypes_and_odd_heads_lower(H, dtype):
    assert kernels(Case("sum", "all at once").at(H=H, h=H, dtype=dtype))


@pytest.mark.parametrize(
    ("bias", "normalizer"),
    [
        ("co_alibi", "softmax"),
        ("sum", "softmax"),
        ("alibi", "softmax"),
        ("dense", "entmax 1.5"),
        ("sum", "entmax learned top 8"),
    ],
)
def test_exact_calls_lower_in_a_process_with_x64(bias, normalizer):
    """No index, count or number of a kernel becomes one of 64 bits."""
    case = Case(bias, "all at once", normalizer=normalizer).at(dtype="float32")
    with jax.enable_x64(True):
        assert kernels(case, precision=jax.lax.Precision.HIGHEST)


@pytest.mark.parametrize("normalizer", ["softmax", "entmax 1.5", "entmax learned"])
def test_every_pass_rounds_a_bias_alike(normalizer):
    """In scores of IEEE float32: a multiply-add in one pass would be another score."""
    case = Case("alibi", "full", (), normalizer).at(dtype="float32")
    how = {"config": small("alibi", normalizer), "precision": jax.lax.Precision.HIGHEST}
    rounded = {k.name: "mul.rn.f32" in triton_ir(k) for k in kernels(case, **how)}
    assert {"rows_kernel", "cols_kernel"} <= {*rounded}
    without_scores = {"delta_kernel", "norms_kernel"}
    assert {name for name, x in rounded.items() if not x} <= without_scores


@compiles
@pytest.mark.parametrize("arch", [n for n in DEVICES if SHARED_LIMIT[n] > SMALL])
@pytest.mark.parametrize("case", SHIPPED, ids=named)
def test_a_shipped_choice_fits(case, arch):
    excess = []
    known = SPILLING.get(named(case), {})
    for kernel in lowered(case, arch):
        record = compiled(kernel, arch)
        name = record.name.replace("_kernel", "")
        found = f"{record.name}, {record.num_warps} warps, {record.num_stages} stages"
        seen = known.get((arch, name), 0)
        if record.shared > SHARED_LIMIT[arch]:
            excess.append(f"{found}: {record.shared} bytes of shared memory")
        if name.endswith("_again"):  # rarely runs, and need not be fast
            continue
        if record.spills > max(SPILLS, seen):
            excess.append(f"{found}: spills {record.spills} bytes")
        if record.serialised and (named(case), arch, name) not in SERIALISED:
            excess.append(f"{found}: serialised wgmma")
    assert not excess, "\n".join([f"sm_{arch}, {triton_version()}:", *excess])


@compiles
@pytest.mark.parametrize("case", SHIPPED + SHARED, ids=named)
def test_a_shipped_choice_fits_99_kib(case):
    """Of capability 8.6, 8.9 and 12.0; Triton makes the same for the first two."""
    excess = []
    for kernel in lowered(case, 86):
        for arch in (86, 120):
            used = shared(kernel, arch)
            if used > SHARED_LIMIT[arch]:
                excess.append(f"sm_{arch}, {kernel.name}: {used / 1024:.1f} KiB")
    assert not excess, "\n".join(excess)


@compiles
@pytest.mark.parametrize("arch", DEVICES)
def test_figures_kept_are_those_found(arch):
    """And shared memory is known before there is machine code."""
    for kernel in lowered(SHIPPED[1], arch):
        found = compile_kernel(kernel, arch)
        assert shared_memory(kernel, arch) == found.shared == shared(kernel, arch)
        if SHARED_LIMIT[arch] > SMALL:
            assert compiled(kernel, arch) == found


def test_cards_with_99_kib_lower_alike():
    case = Case("dense", "full").at(**SIZES, H=128, h=128, dtype="bfloat16")
    small = [n for n in DEVICES if SHARED_LIMIT[n] == SMALL]
    assert small == [86, 89, 120]

    def text(arch):  # without the places in sources that bytecode has
        return [(replace(x, ir=b""), triton_ir(x)) for x in lowered(case, arch)]

    assert text(86) == text(89) == text(120)
    assert text(86) != text(80)
    assert text(80) == text(90) == text(100)


@compiles
@pytest.mark.parametrize("case", LOADED, ids=named)
def test_a_bias_tile_is_loaded_asynchronously(case):
    """And no product starts from it: Triton would then wait for its load."""
    read = False
    for kernel in lowered(case):
        if kernel.name.endswith("_again"):  # it has a single stage
            continue
        record = compiled(kernel, 90)
        for place, (shape, _) in enumerate(kernel.arguments):
            if shape[-2:] != (LENGTH, LENGTH):
                continue
            read |= place in record.copied
            assert place not in record.loaded, f"{kernel.name} waits for {shape}"
            assert place not in record.accumulated, f"{kernel.name} starts from {shape}"
    assert read


@compiles
def test_half_precision_uses_the_tensor_cores_of_hopper():
    case = Case("alibi", "causal").at(**SIZES, H=128, h=128, dtype="bfloat16")
    used = {k.name: compiled(k, 90).wgmma for k in lowered(case)}
    for name in ("forward_kernel", "rows_kernel", "cols_kernel"):
        assert used[name] > 0, name


# An array [1, N, T, S] of a dtype: a mask, a bias, or None and heads of size 1.
LARGE = {
    "a mask of 2^31 bytes": ((8, 16384, 16384), jnp.bool_),
    "more": ((1, 2**16, 2**15 + 1), jnp.bool_),
    "a mask of 2^32 bytes": ((16, 16384, 16384), jnp.bool_),
    "still more": ((17, 16384, 16384), jnp.bool_),
    "a bias of 2^31 numbers": ((8, 16384, 16384), jnp.bfloat16),
    "one more": ((1, 2**16, 2**15 + 1), jnp.bfloat16),
    "queries of 2^31 numbers": ((2**14, 2**17, 1), None),
    "queries of more": ((2**14 + 8, 2**17, 1), None),
}


@pytest.mark.parametrize(
    ("name", "normalizer"),
    [(x, Softmax()) for x in LARGE] + [("a mask of 2^32 bytes", Entmax(1.5))],
    ids=str,
)
def test_offsets_have_the_bits_that_they_need(name, normalizer):
    """Signed ones of 32 bits end at 2^31 entries, whatever an entry's bytes are."""
    (heads, queries, keys), dtype = LARGE[name]
    given = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    q, k = (given(1, n, heads, 1) for n in (queries, keys))
    pairs = None if dtype is None else given(1, heads, queries, keys, dtype=dtype)
    mask, bias = (pairs, None) if dtype == jnp.bool_ else (None, pairs)

    def gradients(q, k, bias, mask):
        options = {"normalizer": normalizer, "implementation": "triton"}
        attend = lambda q, k, v, bias: dot_product_attention(
            q, k, v, bias, mask, **options
        )
        return jax.vjp(attend, q, k, k, bias)[1](q)

    sizes = []
    for kernel in lower(gradients, q, k, bias, mask):
        for place, bits in offset_bits(triton_ir(kernel)).items():
            shape, _ = kernel.arguments[place]
            sizes.append(math.prod(shape))
            assert sizes[-1] <= 2 ** (bits - 1), f"{kernel.name}: {shape}"
    assert max(sizes) >= 2**31


def test_a_block_that_was_given_is_the_block_that_is_launched():
    block = Block(32, 64, 2, 1)
    given = Config(block, block, block, block)
    case = Case("dense-1NTS", "full").at(dtype="bfloat16")
    passes = {"forward_kernel", "rows_kernel", "cols_kernel", "tiles_kernel"}
    found = {k.name: k for k in kernels(case, config=given) if k.name in passes}
    assert set(found) == passes
    assert {(k.num_warps, k.num_stages) for k in found.values()} == {(2, 1)}


@compiles
def test_inspect_prints_a_table(capsys):
    assert main(["--case", "alibi", "--head-dim", "64", "--length", "256"]) == 0
    printed = capsys.readouterr().out
    assert triton_version() in printed
    assert all(word in printed for word in ("registers", "spills", "forward_kernel"))
