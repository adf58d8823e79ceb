"""Attention with linear biases, and its slopes."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_attn.bias.base import Bias, head_home
from pallas_attn.bias.region import nearest, Positions
from pallas_attn.rules import known


class ALiBi(Bias):
    """b_ij = -slope * |query position i - key position j|.

    Args:
        slopes: float32 [N] or [#B, N]; > 0 is a penalty. A table given with negative
            signs (some code writes slope * distance with slope < 0) is converted by the
            caller: `ALiBi(-slopes)`.

    Example:
        >>> import jax.numpy as jnp
        >>> from pallas_attn import ALiBi
        >>> positions = jnp.arange(3)
        >>> print(ALiBi(jnp.array([0.5])).materialise(positions, positions)[0, 0])
        [[ 0.  -0.5 -1. ]
         [-0.5  0.  -0.5]
         [-1.  -0.5  0. ]]

    Source: Press et al., Train Short, Test Long (arXiv 2108.12409).
    """

    slopes: Float[Array, "*#B N"] = head_home()

    sided = True
    hides = False

    def check(self, name: str) -> None:
        """Refuses infinite slopes.

        Raises:
            ValueError: if a slope is known and infinite.
        """
        given = isinstance(self.slopes, np.ndarray | jax.Array)
        values = known(self.slopes) if given else None
        if values is not None and np.isinf(np.asarray(values, np.float64)).any():
            raise ValueError(
                f"`{name}.slopes` must be finite; got inf, and inf times a distance of "
                "0 is NaN. Use `local_window_size=0` to see one position alone."
            )

    def tile(self, t: Positions) -> Any:
        """-slope |distance|, part by part."""
        return tuple(-self.slopes * part for part in t.away)

    def bound(self, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        """At the nearest pair for a penalty, at the farthest for a reward."""
        nearest = jnp.maximum(jnp.maximum(q0 - k1, k0 - q1), 0).astype(jnp.float32)
        farthest = jnp.maximum(jnp.abs(q1 - k0), jnp.abs(k1 - q0)).astype(jnp.float32)
        return jnp.maximum(-self.slopes * nearest, -self.slopes * farthest)


class NearALiBi(ALiBi):
    """b_ij = -slope |n_i - key position j|, n_i the query's position within 0..last.

    `ALiBi` less what all keys of a query share, its distance from the nearest of them.

    last: the position of the last key, a whole number.
    """

    last: Float[Array, "#B #N"] = head_home()

    steep = False

    def tile(self, t: Positions) -> Any:
        """-slope |n - key position|, part by part."""
        return tuple(-self.slopes * part for part in t.from_nearest(self.last))

    def bound(self, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        """That of `ALiBi` where the nearest positions are."""
        q0, q1 = (nearest(jnp.asarray(x), self.last) for x in (q0, q1))
        return super().bound(q0, q1, k0, k1)


def alibi_slopes(num_heads: int, bias_max: float = 8.0) -> Float[Array, " N"]:
    """The geometric slopes of the ALiBi paper, for any number of heads.

    With p = 2^floor(log2 num_heads): 2^(-bias_max i / p) for i = 1..p, then
    2^(-bias_max (2i - 1) / (2p)) for the rest.

    Args:
        num_heads: N >= 1.
        bias_max: The exponent of the least slope, 2^-bias_max.

    Returns:
        Slopes, float32 [N], positive.

    Raises:
        ValueError: if num_heads < 1.
        TypeError: if it is no int.

    >>> [float(x) for x in alibi_slopes(6)]
    [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]

    Source: Press et al., Train Short, Test Long (arXiv 2108.12409).
    """
    _check_heads(num_heads)
    p = 2 ** int(math.log2(num_heads))
    first = [2 ** (-bias_max * i / p) for i in range(1, p + 1)]
    rest = range(1, num_heads - p + 1)
    return jnp.asarray(
        first + [2 ** (-bias_max * (2 * i - 1) / (2 * p)) for i in rest], jnp.float32
    )


def linear_alibi_slopes(
    num_heads: int, first: float = 0.05, last: float = 0.5
) -> Float[Array, " N"]:
    """Evenly spaced slopes, from `first` to `last`.

    Args:
        num_heads: N >= 1.
        first: The slope of head 0.
        last: The slope of head N - 1.

    Returns:
        Slopes, float32 [N].

    Raises:
        ValueError: if num_heads < 1.
        TypeError: if it is no int.

    >>> [round(float(x), 3) for x in linear_alibi_slopes(4)]
    [0.05, 0.2, 0.35, 0.5]
    """
    _check_heads(num_heads)
    return jnp.asarray(np.linspace(first, last, num_heads), jnp.float32)


def _check_heads(num_heads: int) -> None:
    if isinstance(num_heads, bool) or not isinstance(num_heads, int | np.integer):
        raise TypeError(
            f"`num_heads` must be an int, the N of query; got {num_heads!r}. It is "
            "static: `query.shape[-2]`."
        )
    if num_heads < 1:
        raise ValueError(
            f"`num_heads` must be at least 1; got {num_heads}. Give the N of query."
        )
