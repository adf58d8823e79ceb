"""What the scans along keys share: gates, sums along a tile, compensated carries."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from pallas_attn.bias.running_sums import two_sum
from pallas_attn.call import Call
from pallas_attn.normalizers.softmax import LOG2E
from pallas_attn.triton.memory import load_all, load_number
from pallas_attn.triton.ptx import sigmoid
from pallas_attn.triton.tile import plain_dot, Tile
from pallas_attn.types import Index, Ref


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

    # float16: gates lie in [0, 1]
    suffix: Float[Array, "block_k block_k"] | None = None
    # in the operands' dtype: dT has any scale
    prefix: Float[Array, "block_k block_k"] | None = None


def triangles(call: Call, block_k: int, flip: bool) -> Triangles:
    """Triangles for tiles [queries, keys], or [keys, queries] if flip."""
    if exact(call):
        return Triangles()
    low = np.tril(np.ones((block_k, block_k), np.float32))
    suffix, prefix = (low.T, low) if flip else (low, low.T)
    return Triangles(jnp.asarray(suffix, jnp.float16), jnp.asarray(prefix, call.dtype))


# A sum and its rounding error: what one pass takes off block by block is what another
# has put on, however large the sum was.
Exactly = tuple[jax.Array, jax.Array]
# The same; None: of what was summed, nothing is known.
Summed = tuple[jax.Array, jax.Array | None]


def add(z: Exactly, x: Summed) -> Exactly:
    """The sum of both; what rounding takes from it is kept beside it."""
    total, lost = two_sum(z[0], x[0])
    low = z[1] + lost
    return total, low if x[1] is None else low + x[1]


def negative(x: Summed) -> Summed:
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

    def total(self, g: jax.Array) -> Summed:
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
    def of(cls, ref: Ref, b: Index, h: Index) -> Slope:
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
    """The key that the weights of each row count from, where sums are exact.

    Not an exponent: of scores of thousands the last digit is a factor of many units,
    and where it is rounded (in a sum, in a product that becomes a multiply-add) is each
    pass's own. Differences to a key are small where weights are not, and those of a key
    to itself are 0: a row's only weight is 1 in every pass.

    score: q.k of the key.
    inside: gates of the key's tile, from the key on.
    right: gates at the right of that tile.
    """

    score: jax.Array
    inside: jax.Array
    right: Exactly

    def ahead(self, z: Exactly) -> jax.Array:
        """Gates from the key on, but for z of them."""
        return self.inside + less(self.right, z)

    def exponent(self, slope: Slope, mul: float) -> jax.Array:
        """The key's own exponent, log2: rounded, as large as it is."""
        z = self.inside + (self.right[0] + self.right[1])
        return self.score * mul - slope.log2 * z

    def exponents(
        self, t: Tile, slope: Slope, s: jax.Array, inside: jax.Array, z: Exactly
    ) -> jax.Array:
        """Of a tile with gates z at its right, log2, as they count from the key."""
        return from_reference(t, slope, s, inside, self.score, self.ahead(z))

    def moved(
        self,
        t: Tile,
        slope: Slope,
        s: jax.Array,
        inside: jax.Array,
        z: Exactly,
        visible: jax.Array | None,
    ) -> tuple[Reference, jax.Array]:
        """(the key of the largest exponent so far, by how much it is above this one).

        Of rounded exponents the largest may not be the largest; it is, but for 2^-24 of
        its distance, as distances to it say.
        """
        keys = jnp.arange(t.bk, dtype=i32)[None, :]

        def largest(x: jax.Array) -> tuple[Reference, jax.Array]:
            x = x if visible is None else jnp.where(visible, x, -jnp.inf)
            at = keys == lax.argmax(x, 1, i32)[:, None]
            of_key = lambda x: jnp.sum(jnp.where(at, x, 0.0), 1)
            return Reference(of_key(s), of_key(inside), z), jnp.max(x, 1)

        near, top = largest(s * (t.call.scale * LOG2E) - slope.log2 * inside)
        new, _ = largest(near.exponents(t, slope, s, inside, z))
        apart = (new.score - self.score) * (t.call.scale * LOG2E)
        gain = apart - slope.log2 * (new.inside - self.ahead(z))
        gain = jnp.where(top > -jnp.inf, jnp.maximum(gain, 0.0), 0.0)
        return jax.tree.map(lambda a, b: jnp.where(gain > 0, a, b), new, self), gain


def from_reference(
    t: Tile,
    slope: Slope,
    s: jax.Array,
    inside: jax.Array,
    score: jax.Array,
    ahead: jax.Array,
) -> jax.Array:
    """Exponents of a tile, log2; score, ahead: of each row's reference, [queries]."""
    apart = (s - t.along_q(score)) * (t.call.scale * LOG2E)
    return apart - slope.log2 * (inside - t.along_q(ahead))
