"""What is timed: shapes with their origin, the peer, and the ratio to reach."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


CO_ALIBI = (
    "github.com/Nathancgy/Co-ALIBI, benchmark_flops.py: B1 H16 S4096 D128, causal"
)
MATRIX_BIAS = (
    "github.com/pengzhangzhi/Flash-Attention-with-Bias-Triton, benckmark/main.py: "
    "B2 H4 d32"
)
FLASH_BIAS = "github.com/thuml/FlashBias, flash_bias/benchmark.py: B2 H4 d32 R8"
TOKAMAX = (
    "github.com/openxla/tokamax, its shipped H100 records: B128 N4 T4096 H32 with a "
    "bias [1, 4, 4096, 4096], the triangle attention of AlphaFold 3"
)


@dataclass(frozen=True)
class Term:
    """One term of a bias.

    Args:
        kind: "alibi", "dense" or "factored".
        shared: Whether a dense bias is one array for the whole batch, [1, N, T, S].
        rank: R of a factored bias.
        dtype: Of its arrays; None: that of the query.
    """

    kind: Literal["alibi", "dense", "factored"]
    shared: bool = False
    rank: int = 0
    dtype: str | None = None


@dataclass(frozen=True)
class Target:
    """What a case is to reach; ratios are our time over the peer's.

    Args:
        forward: Of the forward pass.
        both: Of forward and backward with every gradient.
        temporaries_mib: The most temporary memory of forward and backward, in MiB.
        temporaries_share: The same, as a share of the peer's.
    """

    forward: float
    both: float
    temporaries_mib: float | None = None
    temporaries_share: float | None = None


@dataclass(frozen=True)
class Case:
    """One line of the table, in the letters of the README's legend; S = T and h = H.

    Args:
        name: By which `bench` selects it.
        origin: The paper or system that the shape is from.
        peer: A name in `peers.PEERS`, or None where no peer can run.
        target: What to reach, or None.
        on_request: Run only where it is named: it takes minutes.
    """

    name: str
    origin: str
    B: int
    N: int
    T: int
    H: int
    K: int | None = None
    causal: bool = False
    bias: tuple[Term, ...] = ()
    dtype: str = "bfloat16"
    peer: str | None = None
    target: Target | None = None
    platform: Literal["gpu", "cpu"] = "gpu"
    on_request: bool = False

    @property
    def key_heads(self) -> int:
        """K, written out."""
        return self.N if self.K is None else self.K

    @property
    def shape(self) -> str:
        """The problem in one line, as in `B1 N16 T4096 H128 causal, ALiBi`."""
        heads = f"N{self.N}" if self.K is None else f"N{self.N} K{self.K}"
        text = f"B{self.B} {heads} T{self.T} H{self.H}"
        words = {
            "alibi": lambda term: "ALiBi",
            "dense": lambda term: (
                f"dense [{1 if term.shared else self.B},{self.N},{self.T},{self.T}]"
            ),
            "factored": lambda term: f"factored R{term.rank}",
        }
        terms = [
            words[term.kind](term) + (f" {term.dtype}" if term.dtype else "")
            for term in self.bias
        ]
        causal = " causal" if self.causal else ""
        return f"{text}{causal}, {' + '.join(terms) or 'no bias'}"


ALIBI = Term("alibi")
DENSE = Term("dense")

CASES = (
    Case(
        name="none-4k",
        origin=CO_ALIBI,
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
        origin=CO_ALIBI,
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
        origin=f"{CO_ALIBI}; four times its length",
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
        origin=f"{CO_ALIBI}; with the rank of FlashBias' benchmark",
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
    Case(
        name="dense-h128",
        origin=f"{CO_ALIBI}; not causal, with a matrix bias",
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
        origin=f"{MATRIX_BIAS}; twice its heads and head dim",
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
        origin=MATRIX_BIAS,
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
        origin=FLASH_BIAS,
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
        origin=f"{FLASH_BIAS}; twice its heads, head dim and rank",
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
        origin=f"{FLASH_BIAS}; with float32 factors",
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
        origin=f"{FLASH_BIAS}; twice its heads, head dim and rank, float32 factors",
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
        origin=TOKAMAX,
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
