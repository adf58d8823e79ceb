"""The keywords of a public call, which `canonical` takes: written once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypedDict, TypeVar

from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array

from pallas_attn.canonical import canonical
from pallas_attn.config import Config
from pallas_attn.implementations import Implementation
from pallas_attn.normalizers.entmax import Entmax
from pallas_attn.normalizers.softmax import Softmax


P = ParamSpec("P")
R = TypeVar("R")

# Of `canonical` alone: for layers.
INTERNAL = ("broadcast_dropout",)


class Options(TypedDict, total=False):
    """The keywords of a call, but for `return_residual`: for type checkers alone."""

    scale: ArrayLike | None
    is_causal: bool
    query_seq_lengths: ArrayLike | None
    key_value_seq_lengths: ArrayLike | None
    local_window_size: int | tuple[int, int] | None
    query_offset: ArrayLike
    query_positions: ArrayLike | None
    key_positions: ArrayLike | None
    query_segment_ids: ArrayLike | None
    key_segment_ids: ArrayLike | None
    normalizer: Softmax | Entmax
    logits_soft_cap: float | None
    dropout_rate: float
    dropout_rng: Array | None
    precision: lax.PrecisionLike
    implementation: Implementation | Sequence[Implementation] | None
    config: Config | None


def takes_options(function: Callable[P, R]) -> Callable[P, R]:
    """Spells a public function's `**options` out: its signature, its TypeError."""
    shown = inspect.signature(function)
    own = [x for x in shown.parameters.values() if x.kind is not x.VAR_KEYWORD]
    options = [
        x
        for x in inspect.signature(canonical).parameters.values()
        if x.kind is x.KEYWORD_ONLY and x.name not in INTERNAL
    ]
    first = [x for x in own if x.kind is not x.KEYWORD_ONLY]
    last = [x for x in own if x.kind is x.KEYWORD_ONLY]
    known = {x.name for x in (*own, *options)}

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in known:
                raise TypeError(
                    f"{function.__name__}() got an unexpected keyword argument {name!r}"
                )
        return function(*args, **kwargs)

    checked.__signature__ = shown.replace(  # pyright: ignore[reportAttributeAccessIssue]
        parameters=[*first, *options, *last]
    )
    return checked
