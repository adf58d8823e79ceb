"""The letters of a call, the shapes they spell, and many leading axes as one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped


@dataclass(frozen=True)
class Sizes:
    """What the letters stand for; `leading` are the batch axes before flattening."""

    leading: tuple[int, ...]
    T: int
    S: int
    N: int
    K: int
    H: int
    h: int

    @property
    def B(self) -> int:
        """The product of the leading axes; 1 if there are none."""
        return math.prod(self.leading)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to compute."""
        return 0 in (self.B, self.T, self.S)


@dataclass(frozen=True)
class Axis:
    """One axis of a rule: a letter, its size (None: any but 0), whether 1 will do."""

    letter: str
    size: int | None
    shared: bool

    def allows(self, n: int) -> bool:
        """Whether an axis of size n obeys."""
        if self.size is None:
            return n >= 1
        return n == self.size or (self.shared and n == 1)

    @property
    def in_letters(self) -> str:
        """B, or 1 or B."""
        return f"1 or {self.letter}" if self.shared else self.letter

    @property
    def in_numbers(self) -> str:
        """2, or 1|2."""
        size = self.letter if self.size is None else str(self.size)
        return f"1|{size}" if self.shared and self.size != 1 else size


def axes(rule: str, sizes: Sizes, **more: int) -> list[Axis]:
    """The axes of a rule such as "#B T #N R": B is every leading axis, # is "1 or".

    Args:
        rule: Letters, separated by blanks.
        sizes: The letters of the call.
        **more: Sizes of letters that a call does not have (R); without one, any size.
    """
    return [axis for word in rule.split() for axis in _axes_of(word, sizes, more)]


def _axes_of(word: str, sizes: Sizes, more: dict[str, int]) -> Iterator[Axis]:
    letter, shared = word.lstrip("#"), word.startswith("#")
    if letter == "B":
        several = len(sizes.leading) > 1
        for i, n in enumerate(sizes.leading, start=1):
            yield Axis(f"B{i}" if several else "B", n, shared)
    else:
        yield Axis(letter, more.get(letter, getattr(sizes, letter, None)), shared)


def fits(shape: tuple[int, ...], rule: list[Axis]) -> bool:
    """Whether a shape obeys, axis by axis."""
    return len(shape) == len(rule) and all(
        axis.allows(n) for axis, n in zip(rule, shape, strict=True)
    )


def fits_from_the_right(shape: tuple[int, ...], rule: list[Axis]) -> bool:
    """Whether a shape obeys when axes that are left out, or 1 in excess, count as 1."""
    excess = max(len(shape) - len(rule), 0)
    shape = shape[excess:] if set(shape[:excess]) <= {1} else shape
    return fits(shape, rule[len(rule) - len(shape) :])


def spelled(rule: list[Axis]) -> str:
    """[1 or B, S, 1 or N, R] = [1|2, 161, 1|8, 16]."""
    letters = ", ".join(axis.in_letters for axis in rule)
    numbers = ", ".join(axis.in_numbers for axis in rule)
    return f"[{letters}] = [{numbers}]" if letters != numbers else f"[{letters}]"


def flattened(
    x: Shaped[Array, "*#leading_and_rest"],
    leading: tuple[int, ...],
    rank: int,
    wide: Any = None,
) -> Shaped[Array, "#B *rest"]:
    """An array of `rank` axes behind its leading ones, these as one.

    Leading axes may be 1 or full each, or left out from the left. If none is full the
    result has a leading 1; a partly shared set is written out.

    wide: the dtype to write it out in, where its gradients add up; None: its own.
    """
    full = len(leading) + rank
    shape = (1,) * (full - x.ndim) + x.shape[max(x.ndim - full, 0) :]
    front, rest = shape[: len(leading)], shape[len(leading) :]
    if all(n == 1 for n in front):
        return x.reshape((1, *rest))
    if front != leading:
        x = x if wide is None else x.astype(wide)
        x = jnp.broadcast_to(x.reshape(shape), (*leading, *rest))
    if len(leading) > 1:
        _front_alone(x, len(leading))
    return x.reshape((math.prod(leading), *rest))


def _front_alone(x: Shaped[Array, "*axes"], leading: int) -> None:
    """Refuses an explicit mesh over other leading axes than the first: they merge."""
    spec: Any = jax.typeof(x).sharding.spec
    over = [n for n in spec[1:leading] if n is not None]
    if over:
        raise ValueError(
            "Of several leading axes only the first may lie over a mesh with explicit "
            f"axes, for they become one; got {tuple(spec[:leading])} of an array "
            f"{x.shape}. Bring the sharded axis to the front with jnp.moveaxis, or "
            "gather it with jax.reshard."
        )
