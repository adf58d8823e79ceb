"""What the fields of a layer must be, and what follows from them."""

from __future__ import annotations

from typing import Any

from pallas_attn.normalizers.entmax import Entmax
from pallas_attn.normalizers.softmax import Softmax


PROJECTIONS = ("query", "key", "value", "out")


def head_dim(num_heads: int, features: int) -> int:
    """H of N heads that share features.

    Raises:
        ValueError: if they cannot.
    """
    if features % num_heads:
        raise ValueError(
            "`num_heads` must divide `qkv_features` (by default the features of "
            f"inputs_q); got {num_heads} heads and {features} features. Give "
            "`qkv_features`."
        )
    return features // num_heads


def check_heads(
    num_heads: int, num_kv_heads: int | None, value_dim: int | None
) -> None:
    """Heads of keys divide those of queries, and values have numbers.

    Raises:
        ValueError: if they do not.
    """
    K = num_kv_heads
    if K is not None and (K < 1 or num_heads % K):
        raise ValueError(
            f"`num_kv_heads` must divide num_heads = {num_heads}; got {K}. "
            "Query head n reads key head n // (num_heads // num_kv_heads)."
        )
    if value_dim is not None and value_dim < 1:
        raise ValueError(
            f"`value_dim` must be at least 1; got {value_dim}. Leave it out "
            "for the head dim of queries."
        )


def with_bias(use_bias: Any) -> frozenset[str]:
    """The projections that have a bias, of a bool or some of their names.

    Raises:
        ValueError: if a name is none of theirs.
    """
    if isinstance(use_bias, bool):
        return frozenset(PROJECTIONS if use_bias else ())
    if isinstance(use_bias, str) or not set(use_bias) <= set(PROJECTIONS):
        raise ValueError(
            f"`use_bias` must be a bool, or some of {PROJECTIONS}; got {use_bias!r}. "
            "`use_bias=('out',)` gives the output alone a bias."
        )
    return frozenset(use_bias)


def check_sink(normalizer: Softmax | Entmax) -> None:
    """A learned sink is of softmax, and the only one.

    Raises:
        ValueError: if it cannot be.
    """
    if not isinstance(normalizer, Softmax) or normalizer.sink is not None:
        raise ValueError(
            "`sink=True` is a learned sink of `Softmax()`; got `normalizer` "
            f"{normalizer!r}. Leave one of them out."
        )
