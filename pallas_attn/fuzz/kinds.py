"""The kinds of bias: a class, the library's or a user's, and homes of its fields."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from pallas_attn.bias.alibi import ALiBi
from pallas_attn.bias.base import Bias
from pallas_attn.bias.co_alibi import CoALiBi
from pallas_attn.bias.dense import DenseBias
from pallas_attn.bias.factored import FactoredBias
from pallas_attn.bias.forget_gate import ForgetGate
from pallas_attn.bias.relative import RelativeBias
from pallas_attn.fuzz import biases
from pallas_attn.fuzz.plan import FIRST


@dataclass(frozen=True)
class Kind:
    """A bias: its class, where its fields lie, and what may be unreadable.

    Args:
        cls: Built from its fields by name.
        homes: "head", "query", "key", "pair" or "distance" by field; "+": a vector for
            each.
        guarded: Whether entries that no pair reads may be NaN. Not so where the user's
            own code runs on whole arrays, or sums run over keys that nobody sees.
        own: Whether it is a user's.
        apart: Whether it is drawn by itself, so that a seed's call is else what it was.
    """

    cls: Callable[..., Bias]
    homes: dict[str, str]
    guarded: bool = True
    own: bool = True
    apart: bool = False


_HEAD_QUERY_KEY = {"weight": "head", "a": "query", "c": "key"}

# In the order in which they are drawn.
KINDS: dict[str, Kind] = {
    "dense": Kind(DenseBias, {"bias": "pair"}, own=False),
    "factored": Kind(
        FactoredBias, {"q_factor": "query+", "k_factor": "key+"}, own=False
    ),
    "alibi": Kind(ALiBi, {"slopes": "head"}, own=False),
    "forget": Kind(ForgetGate, {"log_gate": "key"}, guarded=False, own=False),
    "logdist": Kind(biases.LogDistance, {"weight": "head"}),
    "keyslope": Kind(biases.KeySlope, {"rate": "key"}),
    "queryreach": Kind(biases.QueryReach, {"weight": "head", "reach": "query"}),
    "bent": Kind(biases.Bent, _HEAD_QUERY_KEY),
    "bentbounded": Kind(biases.BentBounded, _HEAD_QUERY_KEY),
    "pairsin": Kind(biases.PairSine, {"pair": "pair", "weight": "head"}),
    "parts": Kind(biases.Parts, {"a": "query", "c": "key", "weight": "head"}),
    "mixed": Kind(biases.Mixed, {"a": "query", "c": "key"}, guarded=False),
    "outer": Kind(biases.Outer, {"x": "query+", "y": "key+"}, guarded=False),
    "periodic": Kind(biases.Periodic, {"weight": "head"}),
    "expander": Kind(
        biases.Expander, {"slopes": "head", "pair": "pair"}, guarded=False
    ),
    "relative": Kind(
        functools.partial(RelativeBias, first=FIRST),
        {"table": "distance"},
        guarded=False,
        own=False,
        apart=True,
    ),
    "table": Kind(
        biases.Table,
        {"numbers": "distance", "weight": "key"},
        guarded=False,
        apart=True,
    ),
}
APART = [name for name, kind in KINDS.items() if kind.apart]
OFTEN = [name for name in KINDS if name not in APART]
OWN = [name for name in OFTEN if KINDS[name].own]
# Never in a sum.
CONTEXTUAL = Kind(CoALiBi, {"slopes": "head"}, own=False)


def kind_of(name: str) -> Kind:
    """The kind of a term's name."""
    return CONTEXTUAL if name == "co_alibi" else KINDS[name]
