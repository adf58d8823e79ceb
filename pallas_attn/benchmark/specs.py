"""What a case of the benchmark is: a shape with its origin, a peer, and a target."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pallas_attn.config import Config
from pallas_attn.normalizers.entmax import Entmax
from pallas_attn.normalizers.softmax import Softmax


@dataclass(frozen=True)
class Term:
    """One term of a bias.

    Args:
        kind: "alibi", "co_alibi", "dense", "factored", "relative" (a number for each
            distance of a key before), "forget" (gates evenly spaced) or "forget slowly"
            (memories, 1 / (1 - gate), in equal ratios).
        shared: Whether a dense bias is one array for the whole batch, [1, N, T, S].
        rank: R of a factored bias.
        dtype: Of its arrays; None: that of the query.
    """

    kind: Literal[
        "alibi",
        "co_alibi",
        "dense",
        "factored",
        "relative",
        "forget",
        "forget slowly",
    ]
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
    """One line of the table, in the letters of GUIDE.md; S = T and h = H.

    Args:
        name: By which `bench` selects it.
        origin: The paper or system that the shape is from.
        normalizer: How scores become weights; the peer's is softmax.
        sink: Whether ours is softmax with a sink, a score of each head, which no peer
            has.
        mask: "bigbird": blocks of 64 x 64, of which a tenth is shown: those around the
            diagonal, two rows and two columns of them, others at random.
        query_factor: By which queries are multiplied: larger scores.
        config: Of our kernels; None: the shipped choice.
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
    normalizer: Softmax | Entmax = Softmax()
    sink: bool = False
    mask: Literal["bigbird"] | None = None
    dtype: str = "bfloat16"
    query_factor: float = 1.0
    config: Config | None = None
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
        sizes = [f"B{self.B}", heads, f"T{self.T}", f"H{self.H}"]
        sizes += [self.dtype] if self.dtype != "bfloat16" else []
        sizes += ["causal"] if self.causal else []
        bias = " + ".join(map(self._said, self.bias)) or "no bias"
        return ", ".join([" ".join(sizes), bias, *self._unusual()])

    def _said(self, term: Term) -> str:
        dtype = f" {term.dtype}" if term.dtype else ""
        match term.kind:
            case "alibi":
                return f"ALiBi{dtype}"
            case "co_alibi":
                return f"Co-ALiBi{dtype}"
            case "dense":
                batch = 1 if term.shared else self.B
                return f"dense [{batch},{self.N},{self.T},{self.T}]{dtype}"
            case "factored":
                return f"factored R{term.rank}{dtype}"
            case "relative":
                return f"table [1,{self.N},{self.T}]{dtype}"
            case "forget":
                return "gates 0.5 to 0.999"
            case "forget slowly":
                return "gates 0.5 to 0.999, memories in equal ratios"

    def _unusual(self) -> Iterator[str]:
        if self.sink:
            yield "a sink"
        if self.mask:
            yield "a mask of 10 % of blocks"
        if isinstance(self.normalizer, Entmax):
            top_k = self.normalizer.top_k
            yield f"entmax {self.normalizer.alpha}" + (f" top {top_k}" if top_k else "")
        if self.query_factor != 1:
            yield f"query x {self.query_factor:g}"
        if self.config is not None and not self.config.prune:
            yield "nothing pruned"
        if self.config is not None and self.config.carry_mib != Config().carry_mib:
            yield f"carries of {self.config.carry_mib} MiB"


ALIBI = Term("alibi")
CO_ALIBI = Term("co_alibi")
DENSE = Term("dense")
FORGET = Term("forget")
RELATIVE = Term("relative", dtype="float32")
FORGET_SLOWLY = Term("forget slowly")
