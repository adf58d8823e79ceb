"""What the scans along keys share: gates, sums along a tile, compensated carries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_attn.bias.running_sums import two_sum
from pallas_attn.call import Call
from pallas_attn.normalizers.softmax import LOG2E
from pallas_attn.triton.ptx import product, sigmoid
from pallas_attn.triton.tile import load_all, load_number, plain_dot, Tile


f32 = jnp.float32
i32 = jnp.int32


def exact(call: Call) -> bool:
    """Whether sums along keys are float32 sums, not products on tensor cores."""
    return call.precision == lax.Precision.HIGHEST


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Triangles:
    """Ones that sum along the keys of a tile in a product; None where sums are exact.

    Arrays of their own, loaded before a loop as they are used: what is transposed or
    computed in the kernel would be written to shared memory in every iteration.
    """

    suffix: Any = None  # float16: gates lie in [0, 1]
    prefix: Any = None  # in the operands' dtype: dT has any scale


def triangles(call: Call, block_k: int, flip: bool) -> Triangles:
    """Triangles for tiles [queries, keys], or [keys, queries] if flip."""
    if exact(call):
        return Triangles()
    low = np.tril(np.ones((block_k, block_k), np.float32))
    suffix, prefix = (low.T, low) if flip else (low, low.T)
    return Triangles(jnp.asarray(suffix, jnp.float16), jnp.asarray(prefix, call.dtype))


# A sum and its rounding error: what one pass takes off block by block is what another
# has put on, however large the sum was. None: of what was summed, nothing is known.
Exactly = tuple[jax.Array, Any]


def add(z: Exactly, x: Exactly) -> Exactly:
    """The sum of both; what rounding takes from it is kept beside it."""
    total, lost = two_sum(z[0], x[0])
    low = z[1] + lost
    return total, low if x[1] is None else low + x[1]


def negative(x: Exactly) -> Exactly:
    """Minus a sum."""
    return jax.tree.map(jnp.negative, x)


def less(a: Exactly, b: Exactly) -> jax.Array:
    """The difference of two sums."""
    return (a[0] - b[0]) + (a[1] - b[1])


@dataclass(frozen=True)
class Sums:
    """Inclusive sums along the keys of a tile."""

    call: Call
    ones: Triangles  # loaded
    flip: bool

    @classmethod
    def of(cls, call: Call, ones: Triangles, flip: bool) -> Sums:
        """From refs of triangles."""
        return cls(call, jax.tree.map(load_all, ones), flip)

    def suffix(self, g: jax.Array) -> jax.Array:
        """The sum of gates over this and later keys."""
        if self.ones.suffix is None:
            coarse, fine = (self._from_right(x) for x in self._pieces(g))
            return coarse + fine
        return self._product(g, self.ones.suffix)

    def total(self, g: jax.Array) -> Exactly:
        """The sum of a row's gates."""
        if self.ones.suffix is None:
            coarse, fine = self._pieces(g)
            return jnp.sum(coarse, self._axis), jnp.sum(fine, self._axis)
        return jnp.sum(g, self._axis), None

    def prefix(self, x: jax.Array) -> jax.Array:
        """The sum over this and earlier keys."""
        if self.ones.prefix is None:
            return jnp.cumsum(x, self._axis)
        return self._product(x, self.ones.prefix)

    @property
    def _axis(self) -> int:
        return 0 if self.flip else 1

    def _from_right(self, x: jax.Array) -> jax.Array:
        total = jnp.sum(x, self._axis, keepdims=True)
        return total - jnp.cumsum(x, self._axis) + x

    def _pieces(self, g: jax.Array) -> Exactly:
        """What adds up to gates, but for 2^-32 or so.

        Sums of either piece fit the mantissa: no order of adding them up rounds, so
        that every pass finds the same, whichever way its tiles lie.
        """
        one = 2.0 ** (24 - (g.shape[self._axis] - 1).bit_length())
        coarse = jnp.floor(g * one) * (1 / one)
        return coarse, jnp.floor((g - coarse) * one**2) * (1 / one**2)

    def _product(self, x: jax.Array, ones: jax.Array) -> jax.Array:
        x = x.astype(ones.dtype)
        return plain_dot(ones, x) if self.flip else plain_dot(x, ones)


def gates(t: Tile, s: jax.Array, visible: jax.Array | None) -> jax.Array:
    """The sigmoid of the scaled scores, 0 where a key may not be seen."""
    g = sigmoid(t.call, s, t.call.scale, precise=exact(t.call))
    return g if visible is None else jnp.where(visible, g, 0.0)


def products(
    call: Call, s: jax.Array, mul: float, m: jax.Array, z: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(scores s mul, what m takes from them by sums of gates z).

    Rounded alike in every pass, where sums are exact.
    """
    if exact(call):
        return product(call, s, mul), product(call, z, m)
    return s * mul, m * z


@dataclass(frozen=True)
class Slope:
    """The slope of a head, and what the sum of gates does to an exponent, in log2.

    A sum of gates z grows from the right to the left, up to S. Where weights fall with
    it (slope >= 0), what matters lies at the right and z is counted from there; where
    they grow with it, what matters lies at the left and z is counted from there: either
    way the numbers that decide are small, and not differences of large ones.
    """

    m: jax.Array
    falls: jax.Array  # max(m, 0) log2 e
    grows: jax.Array  # min(m, 0) log2 e

    @classmethod
    def of(cls, ref: Any, b: Any, h: Any) -> Slope:
        """From slopes [#B, #N]."""
        shared_b, shared_h = (i32(n > 1) for n in ref.shape)
        m = load_number(ref, (b * shared_b, h * shared_h)).astype(f32)
        return cls(m, jnp.maximum(m, 0.0) * LOG2E, jnp.minimum(m, 0.0) * LOG2E)

    @property
    def log2(self) -> jax.Array:
        """The slope in log2 units."""
        return self.falls + self.grows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Reference:
    """What a row's weights count from, log2, as it moves through the forward pass.

    right: None, or (sums exact) the gates at the right of the tile that the exponent
        was found in, as whose scores it counts. There its distance to a score is
        exact, however large both are. Else the exponent counts as if z were 0, and is
        rounded as it is brought there.
    """

    exponent: jax.Array
    right: Exactly | None

    @classmethod
    def at_start(cls, call: Call, exponent: jax.Array) -> Reference:
        """Below all scores."""
        zero = jnp.zeros_like(exponent)
        return cls(exponent, (zero, zero) if exact(call) else None)

    def on_tile(self, slope: Slope, z: Exactly) -> jax.Array:
        """The exponent among the scores of a tile with gates z at its right."""
        if self.right is None:
            return self.exponent + slope.falls * z[0]
        return self.exponent + slope.log2 * less(z, self.right)

    def raised(
        self, slope: Slope, z: Exactly, old: jax.Array, new: jax.Array
    ) -> Reference:
        """At `new` where that is above `old`, both among the scores of a tile."""
        if self.right is None:
            moved = jnp.where(new > old, new - slope.falls * z[0], self.exponent)
            return Reference(moved, None)
        moved = (new, z), (self.exponent, self.right)
        return Reference(*jax.tree.map(lambda a, b: jnp.where(new > old, a, b), *moved))

    def past(self, slope: Slope, total: Exactly) -> Reference:
        """After a tile whose gates sum to this."""
        if self.right is None:
            return Reference(self.exponent + slope.grows * total[0], None)
        return self

    def lifted(self, lift: jax.Array) -> tuple[Reference, jax.Array]:
        """(higher by about `lift`, by exactly how much)."""
        higher = self.exponent + lift
        if self.right is not None:
            lift = higher - self.exponent
        return Reference(higher, self.right), lift

    def from_zero(self, slope: Slope) -> jax.Array:
        """The exponent as it counts where no gates lie at the right (slope >= 0)."""
        if self.right is None:
            return self.exponent
        return self.exponent - slope.falls * (self.right[0] + self.right[1])
