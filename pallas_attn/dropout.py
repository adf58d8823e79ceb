"""Which weights dropout keeps: a hash of the seed, the head, the query and the key.

A weight P_ij becomes keep_ij P_ij / (1 - rate) once its row has been normalized. For
batch entry b, query head n, query i and key j (indices into storage, not positions),
in int32 arithmetic that wraps, with logical shifts and

    f(x) = (y ^ (y >> 15)) M2    where y = x M1

a head, a query and a key have the words

    (u, v) = f(f(s0 + b) + n), f(f(s1 ^ b) ^ n)
    (q, r) = f(u ^ G i), v + G i
    k      = f(j)

and keep_ij is f(q ^ k) + r >= rate 2^32, compared as unsigned numbers. It is the same
in every implementation, however it cuts the scores; a score costs seven instructions.

The seed (s0, s1) comes from the words w0, w1, .. of a key. Those at even places fold
into s0 and those at odd ones into s1, each by s = f(f(s ^ w) + 1) from s0 = 0, s1 = 1;
then s0 ^= f(f(s1)), s1 ^= f(f(s0)). (A mere xor would make 0 of the keys of "rbg",
whose halves are equal.)

`f` is half of lowbias32 (Wellons, Hash Prospector), which ends where the tops of its
results are uniform: only they are compared.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, UInt

from pallas_attn.call import Call
from pallas_attn.types import Index


# Odd, as int32: the multipliers of lowbias32, and 2^32 over the golden ratio.
M1 = 0x7FEB352D
M2 = 0x846CA68B - 2**32
G = 0x9E3779B9 - 2**32

# Two int32 numbers or arrays: of a head, or queries.
Words = tuple[Array, Array]
# Those of a seed, two; where a call is part of a larger one, the batch entry and the
# head of that one at which it starts, too: four.
Seed = tuple[Array, ...]


def seed_of(words: UInt[Array, " words"]) -> Int[Array, 2]:
    """The seed of a key, from its data."""
    every = lax.bitcast_convert_type(words, jnp.int32)
    seed = [jnp.int32(0), jnp.int32(1)]
    for place in range(every.shape[0]):
        s = seed[place % 2]
        seed[place % 2] = _mixed(_mixed(s ^ every[place]) + 1)
    first = seed[0] ^ _mixed(_mixed(seed[1]))
    return jnp.stack([first, seed[1] ^ _mixed(_mixed(first))])


def seed_of_all(seed: Int[Array, 2], call: Call) -> Int[Array, "B N 4"]:
    """The `Seed` of a part of the call that starts at each batch entry and head.

    Cut along these two axes, its first one is that of the part.
    """
    shape = (call.B, call.N)
    words = (jnp.broadcast_to(seed[i], shape) for i in range(2))
    counts = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(2))
    return jnp.stack([*words, *counts], -1)


def head_words(call: Call, seed: Seed, b: Array, n: Array) -> Words:
    """The words of query head n of batch entry b; of all, where the mask is shared."""
    if call.dropout_shared:
        b, n = jnp.int32(0), jnp.int32(0)
    elif len(seed) == 4:
        b, n = b + seed[2], n + seed[3]
    return _mixed(_mixed(seed[0] + b) + n), _mixed(_mixed(seed[1] ^ b) ^ n)


def query_words(head: Words, i: Int[Array, "*queries"]) -> Words:
    """The words of queries i of a head."""
    step = i * G
    return _mixed(head[0] ^ step), head[1] + step


def key_word(j: Int[Array, "*keys"]) -> Int[Array, "*keys"]:
    """The word of keys j."""
    return _mixed(j)


def kept(call: Call, queries: Words, key: Int[Array, "*keys"]) -> Bool[Array, "*pairs"]:
    """Which pairs of queries and keys keep their weight, by words that broadcast."""
    least = min(round(call.dropout * 2**32), 2**32 - 1)
    # Signed numbers compare as unsigned ones do, 2^31 lower.
    return (_mixed(queries[0] ^ key) + (queries[1] ^ -(2**31))) >= least - 2**31


def kept_on(
    call: Call,
    seed: Int[Array, "*BN words"] | None,
    first: tuple[Index, ...] = (0, 0, 0),
) -> Bool[Array, "#B #N T S"] | None:
    """Which weights of all heads, queries and keys are kept; None: every one is.

    Args:
        call: Its B, N, T and S, from which the mask takes its shape.
        seed: None where nothing is dropped.
        first: Where batch entries, queries and keys start; or all of these.
    """
    if seed is None:
        return None
    b, i, j = (
        jnp.asarray(start)
        if jnp.ndim(start)
        else start + jnp.arange(n, dtype=jnp.int32)
        for start, n in zip(first, (call.B, call.T, call.S), strict=True)
    )
    n = jnp.arange(call.N, dtype=jnp.int32)[None, :, None, None]
    words = seed if seed.ndim == 1 else seed[0, 0]
    every = tuple(words[i] for i in range(words.shape[0]))
    head = head_words(call, every, b[:, None, None, None], n)
    queries = query_words(head, i[None, None, :, None])
    return kept(call, queries, key_word(j)[None, None, None, :])


def dropped(call: Call, keep: Bool[Array, "*pairs"] | None, x: Array) -> Array:
    """Weights, or their cotangents: 1 / (1 - rate) of what is kept, 0 for the rest."""
    if keep is None:
        return x
    return jnp.where(keep, x * (1 / (1 - call.dropout)), 0.0)


def _mixed(x: Int[Array, "*axes"]) -> Int[Array, "*axes"]:
    x = x * M1
    x = x ^ ((x >> 15) & 0x1FFFF)  # a logical shift
    return x * M2
