"""What can be wrong about the static options of a call."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax import lax

from pallas_attn.config import Block, Config
from pallas_attn.implementations import Choice, NAMES
from pallas_attn.normalizers.entmax import Entmax
from pallas_attn.normalizers.softmax import Softmax
from pallas_attn.positions import UNBOUNDED
from pallas_attn.rules import kind, static_int


# The least soft cap; one over it is the largest.
LEAST_CAP = 1e-20

POWER_OF_TWO = "a power of two, at least 16"
BLOCK_RULES = {
    "block_q": (POWER_OF_TWO, lambda n: n >= 16 and n & (n - 1) == 0),
    "block_k": (POWER_OF_TWO, lambda n: n >= 16 and n & (n - 1) == 0),
    "num_warps": ("1, 2, 4, 8 or 16", lambda n: n in (1, 2, 4, 8, 16)),
    "num_stages": ("at least 1", lambda n: n >= 1),
}


def flag(name: str, x: Any) -> bool:
    """A Python bool."""
    if not isinstance(x, bool | np.bool_):
        raise TypeError(
            f"`{name}` must be True or False; got {kind(x)}. It is static: under jit, "
            "close over it or list it in static_argnames."
        )
    return bool(x)


def window(x: Any) -> tuple[int, int] | None:
    """Left and right reach, inclusive."""
    if x is None:
        return None
    pair = tuple(x) if isinstance(x, list | tuple) else (x, x)
    if len(pair) != 2:
        raise ValueError(
            f"`local_window_size` must be an int or (left, right); got {len(pair)} "
            "numbers. Give how far a query sees to the left and to the right."
        )
    for n in pair:
        static_int("local_window_size", n, "an int or (left, right)")
        if n < 0:
            raise ValueError(
                f"`local_window_size` must not be negative; got {x}. 0 keeps a query's "
                "own position; use `mask` or positions for windows beside it."
            )
    left, right = (min(int(n), UNBOUNDED) for n in pair)
    return left, right


def normalizer(x: Any) -> Softmax | Entmax:
    """Softmax or Entmax, whose top_k is there when the call is traced."""
    if not isinstance(x, Softmax | Entmax):
        raise TypeError(
            f"`normalizer` must be Softmax() or Entmax(alpha, top_k); got {kind(x)}. "
            "Leave it out for softmax, or write `normalizer=Entmax(1.5)`."
        )
    if isinstance(x, Entmax) and x.top_k is not None:
        rule = "an int, at least 1, or None"
        static_int("normalizer.top_k", x.top_k, rule)
        if x.top_k < 1:
            raise ValueError(
                f"`normalizer.top_k` must be {rule}; got {x.top_k}. None keeps every "
                "visible key."
            )
    return x


def no_contextual_entmax() -> None:
    """Co-ALiBi has no weights but those of softmax."""
    raise NotImplementedError(
        "`normalizer`: Co-ALiBi with entmax or top-k is not implemented; got an Entmax "
        "beside a CoALiBi at `bias`. Use Softmax(), or another bias."
    )


def soft_cap(x: Any) -> float | None:
    """A number whose quotients with scores are float32 numbers, or None."""
    if x is None:
        return None
    rule = f"None or a Python number > 0, within {LEAST_CAP:g}..{1 / LEAST_CAP:g}"
    _static_number("logits_soft_cap", x, rule)
    if not LEAST_CAP <= x <= 1 / LEAST_CAP:
        raise ValueError(
            f"`logits_soft_cap` must be {rule}; got {x}. None caps nothing."
        )
    return float(x)


def dropout_rate(rate: Any) -> float:
    """The share of weights that dropout leaves out."""
    rule = "a Python number, 0 <= rate < 1"
    _static_number("dropout_rate", rate, rule)
    if not 0 <= rate < 1:
        raise ValueError(
            f"`dropout_rate` must be {rule}; got {rate}. 0.0 drops nothing."
        )
    return float(rate)


def precision(x: Any) -> lax.Precision | None:
    """A precision; None is resolved to `jax.default_matmul_precision` now."""
    default: Any = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    x = default if x is None else x
    if x is None or isinstance(x, lax.Precision):
        return x
    try:
        return lax.Precision(x)
    except ValueError:
        pass
    if isinstance(x, str) and x in lax.DotAlgorithmPreset.__members__:
        # several passes, or full width: the nearest precision that is no less
        exact = x.startswith(("F32", "F64")) or "_X" in x
        return lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT
    raise ValueError(
        "`precision` must be None, a jax.lax.Precision or its name ('default', 'high', "
        f"'highest'); got {x!r}. Both products of attention share one precision."
    )


def config(x: Any) -> Config:
    """A Config whose blocks can be compiled."""
    if x is None:
        return Config()
    if not isinstance(x, Config):
        raise TypeError(
            f"`config` must be a Config; got {kind(x)}. Write "
            "`Config(forward=Block(64, 64))`."
        )
    for name in ("forward", "rows", "cols", "tiles", "tangent"):
        block = getattr(x, name)
        if block is None:
            continue
        if not isinstance(block, Block):
            raise TypeError(
                f"`config.{name}` must be a Block or None; got {kind(block)}. Write "
                "`Block(block_q, block_k, num_warps, num_stages)`."
            )
        for field, (rule, obeys) in BLOCK_RULES.items():
            n = getattr(block, field)
            static_int(f"config.{name}.{field}", n, rule)
            if not obeys(n):
                raise ValueError(
                    f"`config.{name}.{field}` must be {rule}; got {n}. None is the "
                    "shipped choice."
                )
    flag("config.prune", x.prune)
    rule = "a number of MiB, at least 0"
    static_int("config.carry_mib", x.carry_mib, rule)
    if x.carry_mib < 0:
        raise ValueError(
            f"`config.carry_mib` must be {rule}; got {x.carry_mib}. With 0 the "
            "backward passes of Co-ALiBi take one key head at a time."
        )
    return x


def scanning(x: Config) -> Config:
    """A Config for Co-ALiBi, whose passes hand each other what key blocks leave."""
    given = (x.forward, x.rows, x.cols)
    blocks = [block for block in given if block is not None]
    alike = len({block.block_k for block in blocks}) <= 1
    parts = all(blocks[0].block_q % block.block_q == 0 for block in blocks)
    if len(blocks) not in (0, 3) or not (alike and parts):
        raise ValueError(
            "`config` must, for Co-ALiBi, give all of forward, rows and cols or none, "
            "with one block_k and a forward.block_q that those of rows and cols "
            f"divide; got {', '.join(map(str, given))}. None is the shipped choice."
        )
    return x


def sparse(x: Config) -> Config:
    """A Config for Entmax, whose passes share what is known of each block."""
    given = (x.forward, x.rows, x.cols)
    blocks = {(b.block_q, b.block_k) for b in given if b is not None}
    if None in given and blocks or len(blocks) > 1:
        raise ValueError(
            "`config` must, for Entmax, give all of forward, rows and cols or none, "
            f"with one block_q and one block_k; got {', '.join(map(str, given))}. None "
            "is the shipped choice."
        )
    return x


def implementation(x: Any) -> str | tuple[str, ...] | None:
    """A known name, or several."""
    if x is None:
        return None
    if not isinstance(x, str | list | tuple):
        raise TypeError(
            f"`implementation` must be one of {NAMES}, several of them, or None; got "
            f"{kind(x)}. None chooses by the device."
        )
    names = (x,) if isinstance(x, str) else tuple(x)
    for name in names or (names,):
        if name not in NAMES:
            raise ValueError(
                f"`implementation` must be one of {NAMES}, several of them, or None; "
                f"got {name!r}. None chooses by the device."
            )
    return x if isinstance(x, str) else names


def runnable(choice: Choice) -> str:
    """The name of an implementation that can run."""
    if choice.name is None:
        raise NotImplementedError(
            f"`implementation`: {choice.reason}. A named implementation never falls "
            "back; None, or a sequence with 'xla', does."
        )
    return choice.name


def _static_number(name: str, x: Any, rule: str) -> None:
    if isinstance(x, bool) or not isinstance(x, int | float | np.number):
        raise TypeError(
            f"`{name}` must be {rule}; got {kind(x)}. It is static: under jit, close "
            "over it or list it in static_argnames."
        )
