"""The cases of the benchmark."""

from __future__ import annotations

import dataclasses

from pallas_attn.benchmark.specs import (
    ALIBI,
    Case,
    CO_ALIBI,
    DENSE,
    FORGET,
    FORGET_SLOWLY,
    RELATIVE,
    Target,
    Term,
)
from pallas_attn.config import Config
from pallas_attn.normalizers.entmax import Entmax


FROM_CO_ALIBI = (
    "github.com/Nathancgy/Co-ALIBI, benchmark_flops.py: B1 H16 S4096 D128, causal"
)
FROM_MATRIX_BIAS = (
    "github.com/pengzhangzhi/Flash-Attention-with-Bias-Triton, benckmark/main.py: "
    "B2 H4 d32"
)
FROM_FLASH_BIAS = "github.com/thuml/FlashBias, flash_bias/benchmark.py: B2 H4 d32 R8"
FROM_ADASPLASH = (
    "github.com/deep-spin/adasplash: B2 H8 S4096 D64, causal, alpha 1.5; on an H100 "
    "its second version takes 0.494 ms forward and 0.419 ms backward"
)
FROM_FORGETTING = (
    "the gates of forgetting attention (arXiv 2503.02130) on the shape of "
    "github.com/Nathancgy/Co-ALIBI, benchmark_flops.py"
)
FROM_TOKAMAX = (
    "github.com/openxla/tokamax, its shipped H100 records: B128 N4 T4096 H32 with a "
    "bias [1, 4, 4096, 4096], the triangle attention of AlphaFold 3"
)

CO_ALIBI_TARGETS = {  # by length in units of 1024
    1: None,
    2: None,
    4: Target(0.90, 0.95, temporaries_mib=40.0),
    8: None,
    16: Target(0.45, 0.50, temporaries_mib=530.0),
    32: Target(0.26, 0.30, temporaries_mib=800.0),
}
CO_ALIBI_LENGTHS = {
    length: Case(
        name=f"co-alibi-{length}k",
        origin=FROM_CO_ALIBI if length == 4 else f"{FROM_CO_ALIBI}; at another length",
        B=1,
        N=16,
        T=1024 * length,
        H=128,
        causal=True,
        bias=(CO_ALIBI,),
        peer="cudnn",
        target=target,
    )
    for length, target in CO_ALIBI_TARGETS.items()
}
CO_ALIBI_CASES = (
    *CO_ALIBI_LENGTHS.values(),
    dataclasses.replace(
        CO_ALIBI_LENGTHS[4],
        name="co-alibi-4k-float16",
        dtype="float16",
        target=Target(0.92, 0.95, temporaries_mib=40.0),
    ),
    dataclasses.replace(
        CO_ALIBI_LENGTHS[4],
        name="co-alibi-4k-unpruned",
        config=Config(prune=False),
        target=Target(1.50, 1.70, temporaries_mib=40.0),
    ),
    dataclasses.replace(
        CO_ALIBI_LENGTHS[16],
        name="co-alibi-16k-q4",
        query_factor=4.0,
        target=Target(0.75, 0.82, temporaries_mib=530.0),
    ),
    dataclasses.replace(
        CO_ALIBI_LENGTHS[16],
        name="co-alibi-16k-300mib",
        config=Config(carry_mib=300),
        target=Target(0.45, 0.54, temporaries_mib=318.0),
    ),
    dataclasses.replace(
        CO_ALIBI_LENGTHS[16],
        name="co-alibi-16k-q4-300mib",
        query_factor=4.0,
        config=Config(carry_mib=300),
        target=Target(0.75, 0.86, temporaries_mib=318.0),
    ),
    dataclasses.replace(
        CO_ALIBI_LENGTHS[4],
        name="co-alibi-h64",
        origin=f"{FROM_CO_ALIBI}; half its head dim, two sequences of 8 heads",
        B=2,
        N=8,
        H=64,
        target=Target(1.00, 1.05, temporaries_mib=40.0),
    ),
)

ENTMAX = Entmax(1.5)
ENTMAX_SHORT = Case(
    name="entmax-4k",
    origin=FROM_ADASPLASH,
    B=2,
    N=8,
    T=4096,
    H=64,
    causal=True,
    normalizer=ENTMAX,
    peer="cudnn",
    target=Target(2.45, 1.40),
)
ENTMAX_LONG = dataclasses.replace(
    ENTMAX_SHORT,
    name="entmax-16k",
    origin=f"{FROM_ADASPLASH}; one sequence of 16 heads, four times its length",
    B=1,
    N=16,
    T=16384,
    target=Target(2.70, 1.20),
)
ENTMAX_CASES = (
    ENTMAX_SHORT,
    ENTMAX_LONG,
    dataclasses.replace(
        ENTMAX_LONG,
        name="entmax-16k-q9",
        query_factor=9.0,
        target=Target(2.10, 0.80),
    ),
    dataclasses.replace(
        ENTMAX_SHORT,
        name="entmax-alibi-4k",
        bias=(ALIBI,),
        target=Target(1.30, 0.58),
    ),
    dataclasses.replace(
        ENTMAX_LONG,
        name="entmax-alibi-16k",
        bias=(ALIBI,),
        target=Target(0.52, 0.23),
    ),
    dataclasses.replace(
        ENTMAX_LONG,
        name="entmax-top32-16k",
        normalizer=Entmax(1.5, top_k=32),
        target=Target(2.50, 1.07),
    ),
    dataclasses.replace(
        ENTMAX_LONG,
        name="entmax-top8-16k",
        normalizer=Entmax(1.5, top_k=8),
        target=Target(2.00, 0.70),
    ),
    dataclasses.replace(
        ENTMAX_LONG,
        name="entmax-top32-32k",
        T=32768,
        normalizer=Entmax(1.5, top_k=32),
        target=None,
    ),
    dataclasses.replace(
        ENTMAX_SHORT,
        name="sparsemax-4k",
        normalizer=Entmax(2.0),
        target=Target(2.90, 1.60),
    ),
    dataclasses.replace(
        ENTMAX_SHORT,
        name="entmax-dense-4k",
        bias=(Term("dense", shared=True),),
        target=Target(4.50, 3.70),
    ),
    dataclasses.replace(
        ENTMAX_LONG,
        name="entmax-64k",
        T=65536,
        target=None,
        on_request=True,
    ),
)

FORGET_LONG = Case(
    name="forget-16k",
    origin=f"{FROM_FORGETTING}; four times its length",
    B=1,
    N=16,
    T=16384,
    H=128,
    causal=True,
    bias=(FORGET,),
    peer="cudnn",
    target=Target(0.45, 0.45),
)
FORGET_CASES = (
    dataclasses.replace(
        FORGET_LONG, name="forget-4k", origin=FROM_FORGETTING, T=4096, target=None
    ),
    FORGET_LONG,
    dataclasses.replace(
        FORGET_LONG, name="forget-16k-slow", bias=(FORGET_SLOWLY,), target=None
    ),
)

SINK = Case(
    name="sink-4k",
    origin=f"{FROM_CO_ALIBI}; the sinks of gpt-oss (arXiv 2508.10925)",
    B=1,
    N=16,
    T=4096,
    H=128,
    causal=True,
    sink=True,
    peer="no-sink",
    target=Target(1.02, 1.02),
)
SINK_CASES = (
    SINK,
    dataclasses.replace(
        SINK,
        name="sink-16k",
        origin=f"{SINK.origin}; four times its length",
        T=16384,
    ),
)

MASKED = dataclasses.replace(
    SINK,
    name="bigbird-8k",
    origin="the pattern of BigBird (arXiv 2007.14062)",
    T=8192,
    causal=False,
    sink=False,
    mask="bigbird",
    peer="no-mask",
    target=Target(0.25, 0.25),
)

RELATIVE_CASES = tuple(
    dataclasses.replace(
        SINK,
        name=f"relative-{length // 1024}k",
        origin=f"{FROM_CO_ALIBI}; a learned number for each distance",
        T=length,
        sink=False,
        bias=(RELATIVE,),
        peer="cudnn",
        target=Target(1.3, 1.5, temporaries_mib=mib),
    )
    for length, mib in ((4096, 8.0), (16384, None))
)

CASES = (
    Case(
        name="none-4k",
        origin=FROM_CO_ALIBI,
        B=1,
        N=16,
        T=4096,
        H=128,
        causal=True,
        peer="cudnn",
        target=Target(1.10, 1.15),
    ),
    Case(
        name="alibi-4k",
        origin=FROM_CO_ALIBI,
        B=1,
        N=16,
        T=4096,
        H=128,
        causal=True,
        bias=(ALIBI,),
        peer="cudnn",
        target=Target(0.70, 0.64),
    ),
    Case(
        name="alibi-16k",
        origin=f"{FROM_CO_ALIBI}; four times its length",
        B=1,
        N=16,
        T=16384,
        H=128,
        causal=True,
        bias=(ALIBI,),
        peer="cudnn",
        target=Target(0.37, 0.34),
    ),
    Case(
        name="alibi-factored-4k",
        origin=f"{FROM_CO_ALIBI}; with the rank of FlashBias' benchmark",
        B=1,
        N=16,
        T=4096,
        H=128,
        causal=True,
        bias=(ALIBI, Term("factored", rank=8)),
        peer="cudnn",
        target=Target(1.05, 0.84),
    ),
    Case(
        name="alibi-gqa-8k",
        origin="no benchmark's: heads and length as in Llama 3 8B (arXiv 2407.21783)",
        B=1,
        N=32,
        K=8,
        T=8192,
        H=128,
        causal=True,
        bias=(ALIBI,),
        peer="cudnn",
        target=Target(0.60, 0.60),
    ),
    *SINK_CASES,
    MASKED,
    *RELATIVE_CASES,
    *CO_ALIBI_CASES,
    *FORGET_CASES,
    *ENTMAX_CASES,
    Case(
        name="dense-h128",
        origin=f"{FROM_CO_ALIBI}; not causal, with a matrix bias",
        B=1,
        N=16,
        T=4096,
        H=128,
        bias=(DENSE,),
        peer="cudnn-bias",
        target=Target(0.90, 0.62),
    ),
    Case(
        name="dense-h64",
        origin=f"{FROM_MATRIX_BIAS}; twice its heads and head dim",
        B=2,
        N=8,
        T=4096,
        H=64,
        bias=(DENSE,),
        peer="cudnn-bias",
        target=Target(0.92, 0.52),
    ),
    Case(
        name="dense-h32",
        origin=FROM_MATRIX_BIAS,
        B=2,
        N=4,
        T=4096,
        H=32,
        bias=(DENSE,),
        peer="cudnn-bias",
        target=Target(0.75, 0.48),
    ),
    Case(
        name="pairformer",
        origin="AlphaFold 3's pairformer: triangle attention along rows, 384 tokens",
        B=384,
        N=4,
        T=384,
        H=32,
        bias=(Term("dense", shared=True),),
        peer="cudnn-bias",
        target=Target(0.65, 0.46),
    ),
    Case(
        name="factored-h32",
        origin=FROM_FLASH_BIAS,
        B=2,
        N=4,
        T=4096,
        H=32,
        bias=(Term("factored", rank=8),),
        peer="cudnn-concatenation",
        target=Target(0.95, 0.95),
    ),
    Case(
        name="factored-h64",
        origin=f"{FROM_FLASH_BIAS}; twice its heads, head dim and rank",
        B=2,
        N=8,
        T=8192,
        H=64,
        bias=(Term("factored", rank=16),),
        peer="cudnn-concatenation",
        target=Target(1.0, 1.0),
    ),
    Case(
        name="factored-h32-float32",
        origin=f"{FROM_FLASH_BIAS}; with float32 factors",
        B=2,
        N=4,
        T=4096,
        H=32,
        bias=(Term("factored", rank=8, dtype="float32"),),
        peer="cudnn-concatenation",
        target=Target(1.6, 1.5),
    ),
    Case(
        name="factored-h64-float32",
        origin=(
            f"{FROM_FLASH_BIAS}; twice its heads, head dim and rank, float32 factors"
        ),
        B=2,
        N=8,
        T=8192,
        H=64,
        bias=(Term("factored", rank=16, dtype="float32"),),
        peer="cudnn-concatenation",
        target=Target(1.9, 1.5),
    ),
    Case(
        name="af3",
        origin=FROM_TOKAMAX,
        B=128,
        N=4,
        T=4096,
        H=32,
        bias=(Term("dense", shared=True),),
        peer="cudnn-bias",
        target=Target(0.75, 0.55, temporaries_mib=64.0),
    ),
    Case(
        name="cpu-alibi",
        origin="no system's: what two CPU threads do in about a second",
        B=1,
        N=8,
        T=2048,
        H=64,
        causal=True,
        bias=(ALIBI,),
        dtype="float32",
        peer="xla",
        target=Target(0.9, 0.6, temporaries_share=1 / 8),
        platform="cpu",
    ),
    Case(
        name="cpu-dense",
        origin="no system's: what two CPU threads do in about a second",
        B=1,
        N=8,
        T=2048,
        H=64,
        causal=True,
        bias=(DENSE,),
        dtype="float32",
        peer="xla",
        target=Target(0.9, 0.6, temporaries_share=1 / 8),
        platform="cpu",
    ),
    Case(
        name="cpu-alibi-32k",
        origin="the length at which jax.nn would need a score array of 34 GB",
        B=1,
        N=8,
        T=32768,
        H=64,
        causal=True,
        bias=(ALIBI,),
        dtype="float32",
        platform="cpu",
        on_request=True,
    ),
)
