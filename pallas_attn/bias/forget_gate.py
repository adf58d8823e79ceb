"""The bias of forgetting attention: gates that fade what lies before them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_attn.bias.base import Bias, key_home, Place, query_home


class ForgetGate(Bias):
    """b_ij = the sum of log_gate over the positions after j up to i; 0 where j >= i.

    With F(p) the sum over all keys at positions up to p,

        b_ij = F(position of query i) - F(position of key j)    where j < i

    so that a key fades by the gates of the positions after it. F is kept in two float32
    numbers: the error of b does not grow with the length. Keys past
    `key_value_seq_lengths` have no gate, and a gate that is not finite spoils every
    later query.

    Args:
        log_gate: [#B, S, #N], the logarithm of each key's gate, <= 0 (where traced
            numbers are above 0 they act as 0); float32 whatever dtype the query has.

    Example:
        >>> import jax, pallas_attn
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 97, 8, 64))
        >>> gates = jax.random.normal(jax.random.key(1), (2, 97, 8))
        >>> bias = pallas_attn.ForgetGate(jax.nn.log_sigmoid(gates))
        >>> pallas_attn.dot_product_attention(q, k, v, bias, is_causal=True).shape
        (2, 97, 8, 64)

    Source: Lin et al., Forgetting Transformer (arXiv 2503.02130).
    """

    log_gate: Float[Array, "*#B S #N"] = key_home()

    def at(self, place: Place) -> Bias:
        """Sums up to every query and every key."""
        log_gate = jnp.swapaxes(self.log_gate, -1, -2).astype(place.dtype)
        log_gate = jnp.where(log_gate > 0, 0, log_gate)
        if place.key_lengths is not None:
            there = _counted(log_gate.shape) < place.key_lengths[..., None, None]
            log_gate = jnp.where(there, log_gate, 0)
        of_queries, of_keys = _sums_at(log_gate, place)
        fields = (
            jnp.swapaxes(x, -1, -2) for x in (*of_queries, *(-part for part in of_keys))
        )
        return CausalGates(*fields) if place.causal else Gates(*fields)


class CausalGates(Bias):
    """The difference of two sums, each a number and what it lacks: no key is later.

    Args:
        query: [#B, T, #N], F of every query; has the gradient.
        query_rest: What it lacks.
        key: [#B, S, #N], -F of every key; has the gradient.
        key_rest: What it lacks.
    """

    query: Array = query_home()
    query_rest: Array = query_home()
    key: Array = key_home()
    key_rest: Array = key_home()

    identity = ("query", "query_rest", "key", "key_rest")
    running = True
    steep = False

    def tile(self, t: Any) -> Any:
        """Large numbers first: their difference is exact where it is small."""
        return self.query + self.key, self.query_rest, self.key_rest

    def bound(self, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        """At the first query and the last key, and no larger than 0."""
        return _below(_most(self))


class Gates(Bias):
    """`CausalGates`, and 0 where a key is not before the query."""

    query: Array = query_home()
    query_rest: Array = query_home()
    key: Array = key_home()
    key_rest: Array = key_home()

    running = True
    steep = False

    def tile(self, t: Any) -> Any:
        """Not a minimum with 0, which shares its gradient where both are 0."""
        faded = (self.query + self.key) + (self.query_rest + self.key_rest)
        return jnp.where(t.distance > 0, faded, 0.0)

    def bound(self, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        """At the first query and the last key; 0 where a key is not before a query."""
        most = _most(self)
        return _below(jnp.where(k1 < q0, most, jnp.maximum(most, 0.0)))


def _below(most: Any) -> Any:
    """No sum of log gates is above 0, but for its rounding; NaN may be anything.

    (Extremes are those of 64 queries and keys: of fewer the difference may be large.)
    """
    return jnp.where(most < jnp.inf, jnp.minimum(most, 1e-3), jnp.inf)


def _most(gates: Any) -> Any:
    query = gates.query.most + gates.query_rest.most
    return query + gates.key.most + gates.key_rest.most


# Bits of a piece, at most: products of such pieces with 1 are exact on any hardware.
MOST_BITS = 8
# Bits of the largest log gate that are kept of all: 32768 gates lose 2^-32 of it.
KEPT_BITS = 48
# Of the largest log gate; from there on no unit of a piece is subnormal.
LEAST_EXPONENT = -64
# Keys whose sums are one product.
RUN = 128

# A sum as a number, and what it lacks: its rounding error.
Pair = tuple[Array, Array]


def _sums_at(log_gate: Float[Array, "*#B #N S"], place: Place) -> tuple[Pair, Pair]:
    """F of queries [*#B, #N, T], and of keys [*#B, #N, S]."""
    queries, keys = place.query_positions, place.key_positions
    if place.offset is None:
        return _by_position(log_gate, queries, keys)
    high, low = _sums(log_gate)
    at = functools.partial(_from, offset=place.offset, count=queries.shape[-1])
    return (at(high), at(low)), (high, low)


def _from(
    sums: Float[Array, "*#B #N S"], offset: int | Int[Array, "*#B"], count: int
) -> Float[Array, "*#B #N T"]:
    """Sums at `count` positions from an offset; what has no gate adds nothing."""
    keys = sums.shape[-1]
    if isinstance(offset, int) and (offset, count) == (0, keys):
        return sums
    nothing = jnp.zeros_like(sums, shape=(*sums.shape[:-1], count))
    everything = jnp.broadcast_to(sums[..., -1:], nothing.shape)
    padded = jnp.concatenate([nothing, sums, everything], -1)
    if isinstance(offset, int):
        first = min(max(offset, -count), keys) + count
        return padded[..., first : first + count]
    first = jnp.clip(offset, -count, keys) + count
    leading = jnp.broadcast_shapes(padded.shape[:-1], (*first.shape, 1))
    index = first[..., None, None] + _counted((*leading, count))
    return _taken(jnp.broadcast_to(padded, (*leading, padded.shape[-1])), index)


def _by_position(
    log_gate: Float[Array, "*#B #N S"],
    queries: Int[Array, "*#B #N T"],
    keys: Int[Array, "*#B #N S"],
) -> tuple[Pair, Pair]:
    """Sums in the order of positions: of one position, all its gates come first."""
    arrays = (log_gate, keys, queries)
    leading = jnp.broadcast_shapes(*(x.shape[:-1] for x in arrays))
    log_gate, keys, queries = (
        jnp.broadcast_to(x, (*leading, x.shape[-1])) for x in arrays
    )
    order = jnp.argsort(jnp.concatenate([keys, keys, queries], -1), axis=-1)
    rest = (*leading, order.shape[-1] - keys.shape[-1])
    gates = jnp.concatenate([log_gate, jnp.zeros(rest, log_gate.dtype)], -1)
    back = jnp.argsort(order, axis=-1)
    _, *at = zip(
        *(
            jnp.split(_taken(x, back), [keys.shape[-1], 2 * keys.shape[-1]], -1)
            for x in _sums(_taken(gates, order))
        ),
        strict=True,
    )
    at_keys, at_queries = at
    return at_queries, at_keys


def _counted(shape: tuple[int, ...]) -> Int[Array, "*axes"]:
    """0, 1, ... along the last axis."""
    return lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)


def _taken(x: Array, index: Array) -> Array:
    """Entries along the last axis; no two alike, so that a gradient adds nothing up."""
    return jnp.take_along_axis(x, index, axis=-1, mode="promise_in_bounds")


def _sums(x: Float[Array, "*axes S"]) -> Pair:
    """Running sums along the last axis; what they lack is constant."""
    high, low = _running(x)
    return high, lax.stop_gradient(low)


@jax.custom_jvp
def _running(x: Float[Array, "*axes S"]) -> Pair:
    """Running sums in two numbers, without error but for what 48 bits do not hold.

    x is cut into pieces of a few bits, multiples of one power of two each, whose sums
    of any length fit the mantissa: no order of adding them up rounds.
    """
    room = jnp.finfo(x.dtype).nmant + 1 - max(x.shape[-1], 2).bit_length()
    bits = min(room, MOST_BITS)
    odd = ~jnp.isfinite(x)  # and so are all sums from there on, but none before
    rest = jnp.where(odd, 0, x)
    top = jnp.abs(rest).max(-1, keepdims=True, initial=0)
    exponent = jnp.maximum(jnp.frexp(top)[1], LEAST_EXPONENT)
    pieces = [odd.astype(x.dtype)]
    for n in range(-(-KEPT_BITS // bits)):
        unit = jnp.ldexp(jnp.ones_like(top), exponent - (n + 1) * bits)
        piece = jnp.round(rest / unit) * unit
        pieces.append(piece)
        rest = rest - piece
    count, high, *others = jnp.unstack(_prefix(jnp.stack(pieces)))
    high = jnp.where(count > 0, jnp.nan, high)
    low = jnp.zeros_like(high)
    for piece in others:
        high, lost = _added(high, piece)
        low = low + lost
    return _added(high, low)


@_running.defjvp
def _running_jvp(primals: Any, tangents: Any) -> tuple[Pair, Pair]:
    sums = _prefix(tangents[0])
    return _running(*primals), (sums, jnp.zeros_like(sums))


def _added(a: Array, b: Array) -> Pair:
    """The sum and what rounding took from it (Knuth)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def _prefix(x: Float[Array, "*axes S"]) -> Float[Array, "*axes S"]:
    """Running sums by two products with a triangle of ones, in few launches."""
    size = x.shape[-1]
    pad = -size % RUN
    runs = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, pad)])
    runs = runs.reshape(*x.shape[:-1], -1, RUN)
    within = _times_triangle(runs, 0)
    before = _times_triangle(within[..., -1], 1)
    return (within + before[..., None]).reshape(*x.shape[:-1], -1)[..., :size]


def _times_triangle(x: Float[Array, "*axes n"], skipped: int) -> Array:
    """The sums of entries up to each; up to `skipped` before it."""
    n = x.shape[-1]
    ones = jnp.triu(jnp.ones((n, n), x.dtype), skipped)
    return jnp.matmul(x, ones, precision=lax.Precision.HIGHEST)
