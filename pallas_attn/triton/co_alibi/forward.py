"""The forward pass: one query block, over its keys from the right to the left."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_attn.call import Call
from pallas_attn.normalizers.softmax import LOG2E, lowest
from pallas_attn.tiled.block_ranges import covers, Runs
from pallas_attn.tiled.summaries import GRAIN
from pallas_attn.triton import schedule
from pallas_attn.triton.co_alibi.operands import Forward, Operands
from pallas_attn.triton.co_alibi.plan import Plan, query_tile
from pallas_attn.triton.co_alibi.scan import (
    add,
    exact,
    Exactly,
    gates,
    Reference,
    Slope,
    Sums,
    Triangles,
)
from pallas_attn.triton.dropout import drop_on, rescale
from pallas_attn.triton.launch import Program
from pallas_attn.triton.memory import store_number
from pallas_attn.triton.programs import key_runs
from pallas_attn.triton.ptx import exp2, uniform
from pallas_attn.triton.scores import dots, squared_norm
from pallas_attn.triton.tile import at_keys, Tile, zeros
from pallas_attn.types import Index, Ref


f32 = jnp.float32
i32 = jnp.int32

# Keys left out weigh less than 2^-24 of their row; and what all rows leave out of one
# key is less than 2^-24 of one row's weight.
BITS = 24
# Of the blocks that the bound predicts, the share to go before it is asked again.
EVERY = 0.9
# How far a reference may be lifted at once: it costs so many bits of small weights.
LIFT = 8.0

# Of the keys so far: (acc, u, l, z), see `forward_kernel`.
Past = tuple[jax.Array, jax.Array | Reference, jax.Array, Exactly]
# One more block: (how many there were, state) -> state.
More = Callable[[Index, Past], Past]
# How many blocks are left, how many to go before the bound is asked again; the state.
Chunk = tuple[jax.Array, jax.Array, Past]


def forward_kernel(
    ops: Operands,
    norms: Ref,
    ones: Triangles,
    out: Forward,
    *,
    call: Call,
    program: Program,
    plan: Plan,
    graded: bool,
) -> None:
    """Output, log2-sum, sum of gates and first key block of one query block.

    graded: a backward pass follows, which sums over queries what this one leaves out.
    The state is (acc, u, l, z): z the gates of the keys so far and u a reference, so
    that the exponents of the next tile count from u + falls z; or, where sums are
    exact, a `Reference`.
    """
    assert out.visits is not None
    t0 = query_tile(ops.sight, call, plan, "forward", None, program)
    at, slope = key_runs(t0), Slope.of(ops.slopes, t0.b, t0.h)
    q, sums, mul = t0.rows(ops.q), Sums.of(call, ones, flip=False), call.scale * LOG2E

    def step(t: Tile, state: Past, online: bool) -> Past:
        acc, u, l, z = state
        k, v = t.keys(ops.k), t.keys(ops.v)
        (s, _), visible = dots(t, q, k, [], []), t.visible
        g = gates(t, s, visible)
        log2, inside = slope.log2, sums.suffix(g)
        beside = log2 * inside
        if isinstance(u, Reference):
            u, gain = u.moved(t, slope, s, inside, z, visible)
            old = exp2(call, -gain)
            acc, l = acc * old[:, None], l * old
            x = u.exponents(t, slope, s, inside, z)
            p = exp2(call, x if visible is None else jnp.where(visible, x, -jnp.inf))
        else:
            base = u + slope.falls * z[0]
            x = s * mul - beside if online else (s * mul - base[:, None]) - beside
            x = x if visible is None else jnp.where(visible, x, -jnp.inf)
            if online:
                new = jnp.maximum(base, jnp.max(x, 1))
                old = exp2(call, base - new)
                acc, l = acc * old[:, None], l * old
                u = jnp.where(new > base, new - slope.falls * z[0], u)
                x = x - new[:, None]
            p = exp2(call, x)
        total = sums.total(g)
        drop = drop_on(t)
        kept = p if drop is None else drop(p)
        acc = acc + t.dot(kept.astype(v.dtype), t.seen_keys(visible, v))
        u = u if isinstance(u, Reference) else u + slope.grows * total[0]
        return acc, u, l + jnp.sum(p, 1), add(z, total)

    def leftwards(end: Index, edge: bool, online: bool) -> More:
        return lambda n, state: step(at_keys(t0, end - 1 - n, 0, edge), state, online)

    zero, veiled = jnp.zeros((t0.bq,), f32), ops.sight.veiled
    state = (zeros(t0.bq, ops.v), _low(call, zero), zero, (zero, zero))
    right = i32(at.last) - i32(at.hi)
    state = lax.fori_loop(i32(0), right, leftwards(at.last, True, True), state)
    whole = i32(at.hi) - i32(at.lo)
    limit = Limit(t0, ops, norms, q, slope, at, columns=graded)
    left, state = bounded(limit, whole, veiled, leftwards, state)
    first = i32(at.lo) + left
    if call.window is not None and not veiled:
        low = jnp.where(left == 0, i32(at.lo) - i32(at.first), 0)
        state = lax.fori_loop(i32(0), low, leftwards(at.lo, True, True), state)
        first = first - low
    acc, u, l, z = state
    if not covers(t0.frame.queries, call.T):
        inside = t0.inside_rows()
        acc, l = jnp.where(inside[:, None], acc, 0.0), jnp.where(inside, l, 0.0)
    if call.dropout:
        acc = acc * rescale(call)
    dead = l == 0
    by = u.exponent(slope, mul) if isinstance(u, Reference) else u - slope.grows * z[0]
    lse, more = _with_sink(t0, ops, jnp.where(dead, jnp.inf, by + jnp.log2(l)))
    o = acc / jnp.where(dead, 1.0, l)[:, None]
    log_sum = jnp.log2(l)
    if more is not None:
        o, log_sum = o * exp2(call, -more)[:, None], log_sum + more
    t0.put_rows(out.o, o)
    t0.put_stat(out.lse, lse)
    if isinstance(u, Reference):
        _put_reference(t0, out, u, dead, log_sum)
    else:
        t0.put_stat(out.base, jnp.where(dead, jnp.inf, u + log_sum))
    t0.put_stat(out.gates, z[0])
    t0.put_stat(out.gates_low, z[1])
    i = t0.q0 // i32(t0.bq)
    store_number(out.first, (t0.b, t0.h, i), first)
    store_number(out.visits, (t0.b, t0.h, i, i * 0), i32(at.last) - first)
    count = i32(at.last) - i32(at.first)
    store_number(out.visits, (t0.b, t0.h, i, i * 0 + 1), count)


def _low(call: Call, zero: jax.Array) -> jax.Array | Reference:
    """What weights count from before any key is seen."""
    if exact(call):
        return Reference(zero + lowest(call.scale), zero, (zero, zero))
    return zero + lowest(1.0) * LOG2E


def _with_sink(
    t: Tile, ops: Operands, lse: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """(the log2-sum with the sink of rows that see a key, by how much it is more)."""
    if ops.sink is None:
        return lse, None
    sink = t.field("head", ops.sink) * LOG2E
    above = sink - lse
    both = jnp.log2(1 + exp2(t.call, -jnp.abs(above)))
    return jnp.maximum(lse, sink) + both, jnp.maximum(above, 0.0) + both


def _put_reference(
    t: Tile, out: Forward, u: Reference, dead: jax.Array, log_sum: jax.Array
) -> None:
    """Store each row's reference, and the sum of the weights that count from it."""
    counted = out.counted
    assert counted is not None
    t.put_stat(out.base, jnp.where(dead, jnp.inf, u.score))
    t.put_stat(counted.inside, u.inside)
    t.put_stat(counted.right, u.right[0])
    t.put_stat(counted.right_low, u.right[1])
    t.put_stat(counted.log_sum, jnp.where(dead, 0.0, log_sum))


class Limit:
    """How little the keys that are left can weigh.

    A key not yet visited has a score s <= U = scale |q| max |k|. As exp(s) <= g
    (1 + exp U), and its z is at least the sum z0 so far plus the gates from there on,

        sum exp(s - m z) <= (1 + exp U) sum g exp(-m z) <= (1 + exp U) / m exp(-m z0)

    (a Riemann sum under its integral), and also <= S exp(U - m z0). It holds for any
    input; for a slope below 0, or where a key, value or query is not finite, it says
    nothing.

    Of one key the rows of a block leave out at most the sum of their exp(s - m z) / l.
    It is in its own z, so that s - m z <= U - m z0 - min(m, 4) / (1 + exp -U): the
    derivative of a sigmoid is at most 1/4. A block may leave out its share of what all
    blocks may. Where no gradient is wanted, nobody sums over rows.
    """

    def __init__(
        self,
        t: Tile,
        ops: Operands,
        norms: Ref,
        q: jax.Array,
        slope: Slope,
        at: Runs,
        columns: bool,
    ) -> None:
        """For the queries of t; norms [B, K, grains], NaN where not finite."""
        self.call = call = t.call
        lead = (t.b, t.h // i32(call.G))
        size = -(-call.S // t.bk)
        self.block = jnp.arange(max(2, 1 << (size - 1).bit_length()), dtype=i32)
        ok = (self.block >= at.first) & (self.block < at.last)
        norm = schedule.of_blocks(norms, lead, self.block, ok, t.bk, GRAIN, jnp.maximum)
        self.norm = jnp.where(norm == norm, norm, 3e38)
        self.lo, self.slope, self.bq = i32(at.lo), slope, t.bq
        # Above the rounding of any dot, TF32's too.
        self.reach = jnp.sqrt(squared_norm(q)) * (1 + 2.0**-8) + 1e-6
        self.reach = self.reach * (call.scale * LOG2E)
        self.inside = t.inside_rows()
        self.most = math.log2(call.S)
        self.blocks = math.log2(-(-call.T // t.bq)) if columns else None
        # Exponents that weights may take before they are rounded for the product.
        self.room = 15.0 if call.dtype == "float16" else 100.0

    def bound(self, left: jax.Array, state: Past) -> tuple[jax.Array, jax.Array]:
        """(log2 bound on a weight to come, excess of what is left), [queries]."""
        _, u, l, z = state
        m = self.slope.falls
        norm = jnp.max(jnp.where(self.block < self.lo + left, self.norm, 0.0))
        reach = self.reach * norm
        top = jnp.where(self.slope.m >= 0, reach - m * z[0], jnp.inf)
        tail = jnp.log2(1 + jnp.exp2(-reach)) - jnp.log2(jnp.maximum(m / LOG2E, 1e-30))
        if isinstance(u, Reference):
            u = u.exponent(self.slope, self.call.scale * LOG2E)
        one = jnp.where(self.inside, top + BITS - (u + jnp.log2(l)), -1e30)
        one = jnp.where(one < 1e30, one, 1e30)  # NaN too, which a maximum would drop
        excess = one + jnp.minimum(self.most, tail)
        if self.blocks is not None:
            one = one - jnp.minimum(m, 4 * LOG2E) / (1 + jnp.exp2(-reach))
            largest = jnp.max(one)
            column = largest + jnp.log2(jnp.sum(jnp.exp2(one - largest)))
            excess = jnp.maximum(excess, column + self.blocks)
        return top, excess

    def ahead(self, left: jax.Array, excess: jax.Array, rate: jax.Array) -> jax.Array:
        """How many blocks to go before asking again; 0 where the rest is nothing.

        rate: the gates that a row of a block adds, on average.
        """
        if not self.call.config.prune:
            return left
        excess = jnp.where(excess <= 0, 0.0, jnp.where(excess < 1e30, excess, 1e30))
        worst = jnp.max(excess)  # NaN has become 1e30
        n = EVERY * worst / jnp.maximum(self.slope.falls * rate, 1e-20)
        n = jnp.where(n < left.astype(f32), n, left.astype(f32)).astype(i32)
        return uniform(self.call, jnp.where(worst > 0, jnp.maximum(n, 1), 0))


def bounded(
    limit: Limit,
    whole: jax.Array,
    veiled: bool,
    leftwards: Callable[[Index, bool, bool], More],
    state: Past,
) -> tuple[jax.Array, Past]:
    """The middle blocks in pipelined chunks, the bound asked between them.

    Returns how many blocks at the left were not visited, and the state.
    """

    def chunk(carry: Chunk) -> Chunk:
        left, n, (acc, u, l, z) = carry
        if isinstance(u, Reference):
            end, state = limit.lo + left, carry[2]
            new = lax.fori_loop(i32(0), n, leftwards(end, veiled, True), state)
            return after(left, n, z, new)
        # Any reference that keeps weights in range does. It is raised once where a
        # weight to come could overflow; else the running maximum stays.
        top, _ = limit.bound(left, (acc, u, l, z))
        lift = jnp.maximum(u, top - limit.room) - u
        easy = jnp.max(jnp.where(lift < LIFT, 0.0, 1.0)) == 0
        lift = jnp.where(easy, lift, 0.0)
        old = jnp.exp2(-lift)
        state = (acc * old[:, None], u + lift, l * old, z)
        end, fast = limit.lo + left, uniform(limit.call, jnp.where(easy, n, 0))
        state = lax.fori_loop(i32(0), fast, leftwards(end, veiled, False), state)
        state = lax.fori_loop(fast, n, leftwards(end, veiled, True), state)
        return after(left, n, z, state)

    def after(left: jax.Array, n: jax.Array, z: Exactly, state: Past) -> Chunk:
        rate = jnp.sum(state[3][0] - z[0]) / (limit.bq * n.astype(f32))
        left = left - n
        _, excess = limit.bound(left, state)
        return left, limit.ahead(left, excess, rate), state

    _, excess = limit.bound(whole, state)
    n = limit.ahead(whole, excess, f32(1.0))
    if limit.call.config.prune:  # the rate is not known yet
        n = jnp.minimum(n, 1)
    left, _, state = lax.while_loop(
        lambda c: (c[0] > 0) & (c[1] > 0), chunk, (whole, n, state)
    )
    return left, state
