"""Names of what has no type in JAX: refs, indices, numbers, the state of a loop.

An operand of a kernel is an array outside it and a ref of that array inside. It is
annotated as the array, with the letters of its shape; what loads from it takes a `Ref`,
which both are. So a dataclass of operands says once what it holds; and one of what a
kernel makes too, which before that holds an `outline` of each array.
"""

from __future__ import annotations

from typing import Any, cast, Protocol, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


# An int32 position, count or index of a block: static or traced.
Index: TypeAlias = int | jax.Array
# lo, hi of lo <= x < hi
Range: TypeAlias = tuple[Index, Index]
# A float32 number, or one for each of some entries: static or traced.
Scalar: TypeAlias = float | jax.Array

# What one step of a loop hands to the next, a pytree.
State = TypeVar("State")

# Any: JAX does not type what it maps, launches or traces as a whole.
Tree: TypeAlias = Any
# Any: the classes of what `ref.at[...]` gives differ by backend, and are JAX's own.
View: TypeAlias = Any


class At(Protocol):
    """What `ref.at` is."""

    def __getitem__(self, index: Tree, /) -> View:
        """The view of some entries, to load or to store."""
        ...


class Ref(Protocol):
    """A kernel's view of an array; the array itself is one too."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's."""
        ...

    @property
    def dtype(self) -> jnp.dtype:
        """The array's."""
        ...

    @property
    def at(self) -> At:
        """What makes views of its entries, by indexing."""
        ...


def outline(shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """Shape and dtype of an array that a kernel will make, annotated as that array."""
    return cast(jax.Array, jax.ShapeDtypeStruct(shape, dtype))
