"""The bias of forgetting attention: gates that fade what lies before them."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_attn.bias.base import Bias, key_home, query_home
from pallas_attn.bias.lookup import taken
from pallas_attn.bias.region import Place, Positions
from pallas_attn.bias.running_sums import running_sums, Sums
from pallas_attn.rules import known


class ForgetGate(Bias):
    """b_ij = the sum of log_gate over the positions after j up to i; 0 where j >= i.

    With F(p) the sum over all keys of the query's segment at positions up to p,

        b_ij = F(position of query i) - F(position of key j)    where j < i

    so that a key fades by the gates of the positions after it. It is meant for causal
    attention: what comes after a query does not fade. F is kept in several float32
    numbers, so that the error of b does not grow with the length and a gate that resets
    everything (-1e4, -1e9, -inf) costs what comes after it no digits. At -1e30 or below
    all that came before has weight 0.

    Keys past `key_value_seq_lengths` have no gate, and a gate that is NaN spoils every
    later query of its segment.

    Args:
        log_gate: [#B, S, #N], the logarithm of each key's gate, <= 0, -inf included
            (where traced numbers are above 0 they act as 0); float32 whatever dtype the
            query has.

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

    fades = True

    def check(self, name: str) -> None:
        """Refuses gates above 1.

        Raises:
            ValueError: if a log gate is known and positive.
        """
        values = known(self.log_gate)
        if values is not None and (wrong := values[values > 0]).size:
            raise ValueError(
                f"`{name}.log_gate` must be <= 0, the logarithm of a gate; got "
                f"{wrong[0]}. Write `jax.nn.log_sigmoid(x)`."
            )

    def at(self, place: Place) -> Bias:
        """Sums up to every query and every key.

        Resets have numbers of their own where a row may see nothing but what they took
        away, or where another term may be as large. Else each row sees a key that no
        reset has touched, of value 0 (the last that is visible at or before it, or any
        after it), beside which all the others have weight 0 whatever the reset was.
        """
        log_gate = jnp.swapaxes(self.log_gate, -1, -2).astype(place.dtype)
        log_gate = jnp.where(log_gate > 0, 0, log_gate)
        if place.key_lengths is not None:
            there = _counted(log_gate.shape) < place.key_lengths[..., None, None]
            log_gate = jnp.where(there, log_gate, 0)
        of_queries, of_keys = _sums_at(log_gate, place)
        fields = (
            jnp.swapaxes(x, -1, -2) for x in (*of_queries, *(-part for part in of_keys))
        )
        if place.alone:
            return CausalGates(*fields) if place.causal else Gates(*fields)
        return CausalResets(*fields) if place.causal else Resets(*fields)


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

    def tile(self, t: Positions) -> Any:
        """Large numbers first: their difference is exact where it is small."""
        return _of_sums(self), self.query_rest, self.key_rest

    def bound(self, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        """At the first query and the last key, and no larger than 0."""
        return _below(_most(self, _of_sums))


class Gates(Bias):
    """`CausalGates`, and 0 where a key is not before the query."""

    query: Array = query_home()
    query_rest: Array = query_home()
    key: Array = key_home()
    key_rest: Array = key_home()

    running = True
    steep = False

    def tile(self, t: Positions) -> Any:
        """The difference, for keys before the query."""
        return _before(t, _of_sums(self) + self.query_rest + self.key_rest)

    def bound(self, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        """At the first query and the last key; 0 where a key is not before a query."""
        return _below_or_later(_most(self, _of_sums), q0, k1)


class CausalResets(Bias):
    """`CausalGates` whose resets are numbers of their own.

    Args:
        query: [#B, T, #N], F of every query but for the resets; has the gradient.
        query_rest: What it lacks.
        query_resets: The sum of its resets.
        key: [#B, S, #N], -F of every key but for the resets; has the gradient.
        key_rest: What it lacks.
        key_resets: Minus the sum of its resets.
    """

    query: Array = query_home()
    query_rest: Array = query_home()
    query_resets: Array = query_home()
    key: Array = key_home()
    key_rest: Array = key_home()
    key_resets: Array = key_home()

    identity = (
        "query",
        "query_rest",
        "query_resets",
        "key",
        "key_rest",
        "key_resets",
    )
    running = True

    def tile(self, t: Positions) -> Any:
        """Large numbers first: resets that a pair shares cancel without a trace."""
        return _of_resets(self), self.query_rest, self.key_rest

    def bound(self, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        """At the first query and the last key, and no larger than 0."""
        return _below(_most(self, _of_resets))


class Resets(Bias):
    """`CausalResets`, and 0 where a key is not before the query."""

    query: Array = query_home()
    query_rest: Array = query_home()
    query_resets: Array = query_home()
    key: Array = key_home()
    key_rest: Array = key_home()
    key_resets: Array = key_home()

    running = True

    def tile(self, t: Positions) -> Any:
        """The difference, for keys before the query."""
        return _before(t, _of_resets(self) + self.query_rest + self.key_rest)

    def bound(self, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        """At the first query and the last key; 0 where a key is not before a query."""
        return _below_or_later(_most(self, _of_resets), q0, k1)


def _of_sums(gates: Any) -> Any:
    return gates.query + gates.key


def _of_resets(gates: Any) -> Any:
    return (gates.query_resets + gates.key_resets) + (gates.query + gates.key)


def _before(t: Any, faded: Any) -> Any:
    """Not a minimum with 0, which shares its gradient where both are 0."""
    return jnp.where(t.distance > 0, faded, 0.0)


def _most(gates: Any, large: Any) -> Any:
    """What `tile` makes of the largest numbers, added in its order.

    Rounding keeps the order of numbers: no value is above it.
    """
    most = {name: getattr(gates, name).most for name in gates.__dataclass_fields__}
    gates = type(gates)(**most)
    return large(gates) + gates.query_rest + gates.key_rest


def _below(most: Any) -> Any:
    """No sum of log gates is above 0, but for its rounding; NaN may be anything.

    (Extremes are those of 64 queries and keys: of fewer the difference may be large.)
    """
    return jnp.where(most < jnp.inf, jnp.minimum(most, 1e-3), jnp.inf)


def _below_or_later(most: Any, q0: Any, k1: Any) -> Any:
    return _below(jnp.where(k1 < q0, most, jnp.maximum(most, 0.0)))


def _sums_at(log_gate: Float[Array, "*#B #N S"], place: Place) -> tuple[Sums, Sums]:
    """F of queries [*#B, #N, T], and of keys [*#B, #N, S]."""
    if place.offset is None or place.query_segments is not None:
        return _by_position(log_gate, place)
    of_keys = running_sums(log_gate, alone=place.alone)
    count = place.query_positions.shape[-1]
    at = functools.partial(_from, offset=place.offset, count=count)
    return tuple(at(x) for x in of_keys), of_keys


def _from(
    sums: Float[Array, "*#B #N S"], offset: int | Int[Array, "*#B"], count: int
) -> Float[Array, "*#B #N T"]:
    """Sums at `count` positions from an offset; what has no gate adds nothing."""
    keys = sums.shape[-1]
    if isinstance(offset, int) and (offset, count) == (0, keys):
        return sums
    nothing = jnp.zeros_like(sums, shape=(*sums.shape[:-1], count))
    everything = jnp.broadcast_to(sums[..., -1:], nothing.shape) if keys else nothing
    padded = jnp.concatenate([nothing, sums, everything], -1)
    if isinstance(offset, int):
        first = min(max(offset, -count), keys) + count
        return padded[..., first : first + count]
    first = jnp.clip(offset, -count, keys) + count
    leading = jnp.broadcast_shapes(padded.shape[:-1], (*first.shape, 1))
    index = first[..., None, None] + _counted((*leading, count))
    return taken(jnp.broadcast_to(padded, (*leading, padded.shape[-1])), index)


def _by_position(log_gate: Float[Array, "*#B #N S"], place: Place) -> tuple[Sums, Sums]:
    """Sums in the order of segments, and of positions in each.

    Of one position, all gates come first: a stable sort of every key's gate, and of the
    places of keys and of queries, which add nothing.
    """
    S, T = log_gate.shape[-1], place.query_positions.shape[-1]
    by = [_three(place.key_positions, place.query_positions)]
    if place.key_segments is not None and place.query_segments is not None:
        ids = (place.key_segments[..., None, :], place.query_segments[..., None, :])
        by.insert(0, _three(*ids))
    leading = jnp.broadcast_shapes(*(x.shape[:-1] for x in by))
    by = [jnp.broadcast_to(x, (*leading, x.shape[-1])) for x in by]
    index = _counted(by[0].shape)
    *by, order = lax.sort((*by, index), num_keys=len(by), is_stable=True)
    _, back = lax.sort((order, index), num_keys=1)

    leading = jnp.broadcast_shapes(leading, log_gate.shape[:-1])
    order, back = (jnp.broadcast_to(x, (*leading, x.shape[-1])) for x in (order, back))
    gates = jnp.broadcast_to(log_gate, (*leading, S))
    gates = jnp.pad(gates, [(0, 0)] * len(leading) + [(0, S + T)])
    starts = _starts(by[0]) if len(by) == 2 else None
    sums = running_sums(taken(gates, order), starts, alone=place.alone)
    at = [taken(x, back) for x in sums]
    of_keys = tuple(x[..., S : 2 * S] for x in at)
    return tuple(x[..., 2 * S :] for x in at), of_keys


def _three(
    keys: Int[Array, "*#B #N S"], queries: Int[Array, "*#B #N T"]
) -> Int[Array, "*#B #N S+S+T"]:
    """What orders the gates of keys, the places of keys and those of queries."""
    leading = jnp.broadcast_shapes(keys.shape[:-1], queries.shape[:-1])
    keys, queries = (
        jnp.broadcast_to(x, (*leading, x.shape[-1])) for x in (keys, queries)
    )
    return jnp.concatenate([keys, keys, queries], -1)


def _starts(ids: Int[Array, "*axes n"]) -> Bool[Array, "*axes n"]:
    """Where another id begins."""
    first = jnp.ones_like(ids[..., :1], bool)
    return jnp.concatenate([first, ids[..., 1:] != ids[..., :-1]], -1)


def _counted(shape: tuple[int, ...]) -> Int[Array, "*axes"]:
    """0, 1, ... along the last axis."""
    return lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)
