"""Alpha-entmax: weights that are exactly 0 away from the largest scores.

With a = alpha - 1, t the scores of a row (natural units) and m the largest of them,

    p_j = max(0, a (t_j - m) + gap)^(1/a)    where gap is such that sum p = 1

so that tau = a m - gap is the threshold of x = a t, and gap^(1/a) the largest weight.
With u = p^(2 - alpha) on the support and delta = <u, dP> / sum u,

    dT = u (dP - delta)

F(L) = sum p falls and is convex as all of x - tau is lowered by a L. Everything here
moves the threshold in that L, in which alpha = 1 (softmax) is the limit and no edge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from pallas_attn.flax_state import serializable
from pallas_attn.normalizers.softmax import LN2, LOG2E
from pallas_attn.shown import with_fields


f32 = jnp.float32

# Further below the largest score than any that has weight.
FAR = 1e9

# Sums of a row that holds no weight yet, in quotients.
TINY = 1e-30

# Below this alpha - 1 the power 1 / (alpha - 1) takes too many digits of its base,
# 2^-24 / (alpha - 1) of a weight: functions smooth in alpha are taken, as of an array.
LEAST_POWER = 0.1

# Of z = 1 - c no float32 number between 0 and 1 is smaller; rounded, it may be 0.
LEAST_Z = 2.0**-24

Function = Callable[[jax.Array], jax.Array]


@dataclass(frozen=True)
class Entmax:
    """P = alpha-entmax of the scores, of the `top_k` largest only if that is given.

    p_j = max(0, (alpha - 1) t_j - tau)^(1 / (alpha - 1)), tau such that sum p = 1.

    Args:
        alpha: 1 <= alpha <= 2: 1 is softmax, 2 sparsemax. A Python float, static
            under `jit`; or float32 [N], one per head, a leaf with a gradient.
        top_k: Keep the top_k >= 1 largest visible scores of each query (bias included;
            of equal ones those of the lower key index). None: all of them.

    The residual of a call is tau, float32 [B, T, N], +inf where a query sees nothing;
    where alpha is 1, the log-sum-exp.

    Example:
        >>> import jax.numpy as jnp
        >>> from pallas_attn import dot_product_attention, Entmax
        >>> query, key = jnp.ones((1, 1, 1)), jnp.array([1.0, 0.2, 0.9, -1.5, 0.4])
        >>> operands = query, key[:, None, None], jnp.eye(5)[:, None]  # output: weights
        >>> sparse = Entmax(alpha=2.0)
        >>> weights = dot_product_attention(*operands, scale=1.0, normalizer=sparse)
        >>> [round(float(p), 2) for p in weights[0, 0]]
        [0.55, 0.0, 0.45, 0.0, 0.0]

    Sources: Peters et al. (arXiv 1905.05702); Correia et al., alpha learned (arXiv
    1909.00015); Goncalves et al., AdaSplash (arXiv 2502.12082).
    """

    family: ClassVar[str] = "entmax"

    alpha: float | Float[Array, " N"] = 1.5
    top_k: int | None = None

    @property
    def residual_is_lse(self) -> bool | Bool[Array, " N"]:
        """Whether a residual is the log-sum-exp: where alpha is 1."""
        return self.alpha == 1

    def __repr__(self) -> str:
        return with_fields(self)

    # Whether a tree with alpha as a leaf was unflattened into this.
    _mapped: ClassVar[bool] = False


# A pytree has one leaf, alpha, unless that is a Python float, which is static: `jit`
# compiles for its value. An int is a leaf, so that trees of axes, bools and labels
# have the structure of what they are mapped over, and so is whatever came to stand
# where an array alpha stood, a float among them.


def _flatten(x: Entmax) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    if isinstance(x.alpha, float) and not x._mapped:
        return (), (x.alpha, x.top_k)
    return (x.alpha,), (None, x.top_k)


def _unflatten(static: tuple[Any, ...], data: Iterable[Any]) -> Entmax:
    alpha, top_k = static
    if alpha is not None:
        return Entmax(alpha, top_k)
    (leaf,) = data
    mapped = Entmax(leaf, top_k)
    object.__setattr__(mapped, "_mapped", True)
    return mapped


def _flatten_with_keys(x: Entmax) -> tuple[Any, tuple[Any, ...]]:
    data, static = _flatten(x)
    key = jax.tree_util.GetAttrKey("alpha")
    return tuple((key, leaf) for leaf in data), static


jax.tree_util.register_pytree_with_keys(
    Entmax, _flatten_with_keys, _unflatten, _flatten
)
serializable(Entmax, ["alpha"])


class Functions(NamedTuple):
    """The functions that a kernel has as single instructions; relu keeps NaN."""

    exp2: Function = jnp.exp2
    log2: Function = jnp.log2
    relu: Function = lambda x: jnp.where(x <= 0, 0.0, x)


@dataclass(frozen=True)
class Power:
    """The function p(t) of a static alpha >= 1.1; a row's `level` is its gap.

    Whole powers are products: 1/a of alpha = 2, 3/2, 4/3, 5/4.
    """

    a: float
    functions: Functions = Functions()
    fused: bool = False  # one multiply-add a score; its error grows with the scores'

    @property
    def linear(self) -> bool:
        """Whether F has corners, and no curvature between them."""
        return self.a == 1

    def level_of(self, weight: float) -> float:
        """The level at which the largest weight of a row is this."""
        return weight**self.a

    def lowered(self, level: jax.Array, step: jax.Array) -> jax.Array:
        """The level after all of x - tau has moved down by a step."""
        return level - self.a * step

    def reach(self, level: jax.Array) -> jax.Array:
        """How far below the largest score a weight may be above 0."""
        return level / self.a

    def threshold(self, m: jax.Array, level: jax.Array) -> jax.Array:
        """The threshold tau, of the largest score and the level."""
        return self.a * m - level

    def weights(
        self, x: jax.Array, m: jax.Array, level: jax.Array, scale: float
    ) -> tuple[jax.Array, jax.Array]:
        """(p, u) of scores x, the largest of a row m, both in units of 1 / scale."""
        z = self._z(x, m, level, scale)
        u = self._power(z, 1 / self.a - 1)
        return z * u, u

    def bends(
        self, x: jax.Array, m: jax.Array, level: jax.Array, scale: float
    ) -> jax.Array:
        """The quotient w = u^2 / p of the same scores; 0 where p is."""
        z = self._z(x, m, level, scale)
        e = 1 / self.a - 2
        if e > -1e-9:
            return self._power(z, e)
        return jnp.where(z == 0, 0.0, self._power(z, e + 1) / jnp.where(z == 0, 1.0, z))

    def _z(
        self, x: jax.Array, m: jax.Array, level: jax.Array, scale: float
    ) -> jax.Array:
        mul = self.a * scale
        above = x * mul - (m * mul - level) if self.fused else (x - m) * mul + level
        return self.functions.relu(above)

    def _power(self, z: jax.Array, e: float) -> jax.Array:
        """Power z^e; 0 at 0, also where e is 0."""
        if abs(e) < 1e-9:
            return jnp.where(z == 0, 0.0, jnp.where(z == z, 1.0, z))
        if abs(e - round(e)) < 1e-9 and e <= 16:
            return lax.integer_pow(z, round(e))
        return self.functions.exp2(e * self.functions.log2(z))


@dataclass(frozen=True)
class Learned:
    """The same of any alpha in [1, 2]; `level` is log gap^(1/a) <= 0.

    With g = gap and w = a (t - m) / g: log p = level + (t - m) / g * log1p(w) / w,
    which has no edge at a = 0.
    """

    a: jax.Array | float
    functions: Functions = Functions()
    linear = False

    def level_of(self, weight: float) -> float:
        """The level at which the largest weight of a row is this."""
        return math.log(weight)

    def lowered(self, level: jax.Array, step: jax.Array) -> jax.Array:
        """The level after all of x - tau has moved down by a step."""
        y = step / self._gap(level)
        w = -self.a * y
        return level - y * self._log1p_over(jnp.where(w > -0.99, w, -0.99))

    def reach(self, level: jax.Array) -> jax.Array:
        """How far below the largest score a weight may be above 0."""
        return self._gap(level) / self.a

    def threshold(self, m: jax.Array, level: jax.Array) -> jax.Array:
        """The threshold tau, of the largest score and the level; lse where a is 0."""
        return jnp.where(self.a == 0, m - level, self.a * m - self._gap(level))

    def weights(
        self, x: jax.Array, m: jax.Array, level: jax.Array, scale: float
    ) -> tuple[jax.Array, jax.Array]:
        """(p, u) of scores x, the largest of a row m, both in units of 1 / scale."""
        y = (x - m) * scale / self._gap(level)
        y = jnp.where(y < -FAR, -FAR, y)  # 0 * inf where a is 0
        w = self.a * y
        inside = w > -1
        log_p = level + y * self._log1p_over(jnp.where(w <= -1, 0.0, w))
        log_p = log_p * LOG2E
        p, u = self.functions.exp2(log_p), self.functions.exp2(log_p * (1 - self.a))
        hidden = ~inside & (w == w)  # NaN stays
        return jnp.where(hidden, 0.0, p), jnp.where(hidden, 0.0, u)

    def bends(
        self, x: jax.Array, m: jax.Array, level: jax.Array, scale: float
    ) -> jax.Array:
        """The quotient w = u^2 / p of the same scores; 0 where p is."""
        p, u = self.weights(x, m, level, scale)
        return jnp.where(p == 0, 0.0, u * u / p)

    def by_alpha(
        self, x: jax.Array, m: jax.Array, level: jax.Array, scale: float
    ) -> jax.Array:
        """The derivative p h of the weights by alpha, where m + L stays, h = dlog p.

        With z = p^a, y = (1 - z) / a and c = a y: h = -y / (a z) - log(z) / a^2, which
        is -y^2 (1/2 + 2c/3 + 3c^2/4 + ...) near c = 0.
        """
        p, u = self.weights(x, m, level, scale)
        y = self.lift(level) - jnp.where(p == 0, 0.0, (x - m) * scale)
        c = self.a * y
        series = 1 / 2 + c * (
            2 / 3 + c * (3 / 4 + c * (4 / 5 + c * (5 / 6 + c * (6 / 7))))
        )
        near = c < 0.05
        a = jnp.where(near, 1.0, self.a)
        # p is above 0 and so is its z; a maximum may drop NaN, which u and p still have
        z = jnp.maximum(jnp.where(near | (p == 0), 1.0, 1 - c), LEAST_Z)
        log_z = self.functions.log2(z) * LN2
        h = jnp.where(near, -p * y * y * series, -u * y / a - p * log_z / (a * a))
        return jnp.where(p == 0, 0.0, h)

    def lift(self, level: jax.Array) -> jax.Array:
        """How far L is above the largest score, (1 - gap) / a."""
        return -level * _expm1_over(self.a * level)

    def _gap(self, level: jax.Array) -> jax.Array:
        return self.functions.exp2(level * (self.a * LOG2E))

    def _log1p_over(self, w: jax.Array) -> jax.Array:
        """The quotient log(1 + w) / w for w > -1."""
        series = 1 - w * (
            1 / 2 - w * (1 / 3 - w * (1 / 4 - w * (1 / 5 - w * (1 / 6 - w / 7))))
        )
        near = jnp.abs(w) < 0.05
        far = jnp.where(near, 1.0, w)
        return jnp.where(near, series, self.functions.log2(1 + far) * LN2 / far)


def takes_power(alpha: float | None) -> TypeGuard[float]:
    """Whether `Power` has the digits of this alpha; None: it is an array."""
    return alpha is not None and alpha - 1 >= LEAST_POWER


def steps(
    power: Power | Learned, p: jax.Array, u: jax.Array, r: jax.Array
) -> jax.Array:
    """How far to lower L, by the sums of p and u over a row and r = F F'' / F'^2.

    By the power law that F, F' and F'' fit; from below, where that may overshoot,
    Newton's step.
    """
    safe = newton(power.a, p, u)
    if power.linear:
        return safe
    p, u = jnp.maximum(p, TINY), jnp.maximum(u, TINY)
    fitted = p / (u * (1 - r)) * (1 - jnp.exp((r - 1) * jnp.log(p)))
    return jnp.where(p < 1, safe, fitted)


def left_by(
    power: Power | Learned, p: jax.Array, u: jax.Array, r: jax.Array
) -> jax.Array:
    """What Newton's step on F leaves of it, F'' step^2 / 2.

    At corners, where a step may end beyond some, at most all that it takes.
    """
    if power.linear:
        return jnp.abs(p - 1)
    step = (p - 1) / jnp.maximum(u, TINY)
    half = 0.5 * r * u * u / jnp.maximum(p, TINY)
    if isinstance(power, Learned):  # alpha may be 2
        half = jnp.where(power.a > 0.9, jnp.maximum(half, u), half)
    return half * step * step


def newton(a: Any, p: jax.Array, u: jax.Array) -> jax.Array:
    """How far to lower L, by the sums of p and u over a row.

    Newton's step on F^a, which is convex and nearly linear: from a sum above 1 it never
    passes the root, from below it lands above it.
    """
    p, u = jnp.maximum(p, TINY), jnp.maximum(u, TINY)
    log_p = jnp.log(p)
    return p / u * _expm1_over(-a * log_p) * log_p


def _expm1_over(w: jax.Array) -> jax.Array:
    """The quotient (exp(w) - 1) / w."""
    series = 1 + w * (1 / 2 + w * (1 / 6 + w * (1 / 24 + w / 120)))
    near = jnp.abs(w) < 0.05
    far = jnp.where(near, 1.0, w)
    return jnp.where(near, series, (jnp.exp(far) - 1) / far)


def curvature(a: Any, p: jax.Array, u: jax.Array, w: jax.Array) -> jax.Array:
    """R = F F'' / F'^2 by the sums of p, u and w = u^2 / p; at least 1 - a."""
    p, u = jnp.maximum(p, TINY), jnp.maximum(u, TINY)
    return jnp.clip((1 - a) * (p / u) * (w / u), 1 - a, 0.95)
