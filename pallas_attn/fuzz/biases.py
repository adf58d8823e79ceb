"""Terms of our own, as a user writes them: every home, part, product and bound."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_attn.bias.alibi import ALiBi
from pallas_attn.bias.base import (
    Bias,
    distance_home,
    head_home,
    key_home,
    pair_home,
    query_home,
)
from pallas_attn.bias.dense import DenseBias
from pallas_attn.fuzz.plan import FIRST


class LogDistance(Bias):
    """-weight log(1 + |d|), bounded."""

    weight: jax.Array = head_home()

    def tile(self, t: Any) -> Any:
        """One part."""
        return -self.weight * jnp.log(1 + jnp.abs(t.distance))

    def bound(self, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        """Near or far, as the sign of the weight says."""
        near, far = _reach(q0, q1, k0, k1)
        return jnp.maximum(
            -self.weight * jnp.log(1 + near), -self.weight * jnp.log(1 + far)
        )


class KeySlope(Bias):
    """-rate_j |d|, bounded by the least rate."""

    rate: jax.Array = key_home()

    def tile(self, t: Any) -> Any:
        """One part."""
        return -self.rate * jnp.abs(t.distance)

    def bound(self, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        """Near or far, as the sign of the rate says."""
        near, far = _reach(q0, q1, k0, k1)
        least: Any = self.rate
        return jnp.maximum(-least.least * near, -least.least * far)


class QueryReach(Bias):
    """-weight max(|d| - reach_i, 0), bounded."""

    weight: jax.Array = head_home()
    reach: jax.Array = query_home()

    def tile(self, t: Any) -> Any:
        """One part."""
        over = jnp.abs(t.distance) - self.reach
        return -self.weight * jnp.where(over > 0, over, 0.0)

    def bound(self, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        """Near with the most reach, or far with the least."""
        near, far = _reach(q0, q1, k0, k1)
        reach: Any = self.reach
        low = -self.weight * jnp.maximum(near - reach.most, 0.0)
        return jnp.maximum(low, -self.weight * jnp.maximum(far - reach.least, 0.0))


class Bent(Bias):
    """Weight tanh(a_i + c_j), without a bound."""

    weight: jax.Array = head_home()
    a: jax.Array = query_home()
    c: jax.Array = key_home()

    def tile(self, t: Any) -> Any:
        """One part."""
        return self.weight * jnp.tanh(self.a + self.c)


class BentBounded(Bent):
    """`Bent`, bounded by its weight alone."""

    def bound(self, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        """The same everywhere."""
        return jnp.abs(self.weight) + jnp.float32(0) * q0


class PairSine(Bias):
    """Weight sin(pair_ij)."""

    pair: jax.Array = pair_home()
    weight: jax.Array = head_home()

    def tile(self, t: Any) -> Any:
        """One part."""
        return jnp.sin(self.pair) * self.weight


class Parts(Bias):
    """Four parts of different shapes."""

    a: jax.Array = query_home()
    c: jax.Array = key_home()
    weight: jax.Array = head_home()

    def tile(self, t: Any) -> Any:
        """A query's, a key's, a head's and a pair's."""
        return self.a, self.c, self.weight, -0.05 * self.weight * jnp.abs(t.distance)


class Mixed(Bias):
    """A tile and a product of the same fields."""

    a: jax.Array = query_home()
    c: jax.Array = key_home()

    def tile(self, t: Any) -> Any:
        """a_i^2."""
        return self.a * self.a

    def contract(self) -> Any:
        """a_i c_j."""
        return self.a[..., None], self.c[..., None]


class Outer(Bias):
    """A product of vectors, one of them bent."""

    x: jax.Array = query_home()
    y: jax.Array = key_home()

    def contract(self) -> Any:
        """Tanh(x_i) and y_j; the call may be of float64 where x is not."""
        return jnp.tanh(self.x.astype(jnp.result_type(float))), self.y


class Periodic(Bias):
    """Weight where the distance is a multiple of a static period."""

    weight: jax.Array = head_home()
    period: int = dataclasses.field(default=3, metadata={"static": True})

    def tile(self, t: Any) -> Any:
        """One part."""
        hit = (t.query_position - t.key_position) % self.period == 0
        return jnp.where(hit, self.weight, 0.0)


class Expander(Bias):
    """Two of the library's own terms."""

    slopes: jax.Array = head_home()
    pair: jax.Array = pair_home()

    def expand(self) -> tuple[Bias, ...]:
        """Slopes twice, half the array."""
        return ALiBi(self.slopes * 2), DenseBias(self.pair * 0.5)


def _reach(q0: Any, q1: Any, k0: Any, k1: Any) -> tuple[Any, Any]:
    """The smallest and the largest |d| on ranges."""
    near = jnp.maximum(jnp.maximum(q0 - k1, k0 - q1), 0).astype(jnp.float32)
    far = jnp.maximum(jnp.abs(q1 - k0), jnp.abs(k1 - q0)).astype(jnp.float32)
    return near, far


class Table(Bias):
    """weight_j table[i - j], of a table from `FIRST` on."""

    numbers: jax.Array = distance_home(FIRST)
    weight: jax.Array = key_home()

    def tile(self, t: Any) -> Any:
        """Of each pair's distance."""
        return self.weight * self.numbers
