"""What can be wrong about the arrays of a call, its bias apart."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_attn.dropout import seed_of
from pallas_attn.rules import (
    array,
    floating,
    int32,
    integers,
    kind,
    known,
    shape,
    shape_from_the_right,
    wrong_shape,
)
from pallas_attn.shapes import axes, fits, Sizes, spelled


# Distances of positions, and their sums with an offset, are int32.
FARTHEST = 2**30


def operands(query: Any, key: Any, value: Any) -> tuple[Array, Array, Array, Sizes]:
    """Query, key and value, and the letters that their shapes spell."""
    given = {"query": query, "key": key, "value": value}
    q, k, v = (array(name, x) for name, x in given.items())
    for (name, letters), x in zip(
        {"query": "T, N, H", "key": "S, K, H", "value": "S, K, h"}.items(),
        (q, k, v),
        strict=True,
    ):
        floating(name, x, "Cast it: `.astype(jnp.float32)`.")
        if x.ndim < 3:
            rule = f"[*B, {letters}], at least 3 axes"
            wrong_shape(name, x, rule, "Give heads an axis of their own.")
        if x.dtype != q.dtype:
            raise ValueError(
                f"`{name}` must have the dtype of query, {q.dtype.name}; got "
                f"{x.dtype.name}. Cast all three to one dtype."
            )
    *leading, T, N, H = q.shape
    S, K = k.shape[-3:-1]
    sizes = Sizes(tuple(leading), T, S, N, K, H, v.shape[-1])
    for letter, n in {"N": N, "K": K, "H": H, "h": sizes.h}.items():
        if n == 0:
            raise ValueError(
                f"{letter} must be at least 1; got 0 in query, key or value of shapes "
                f"{q.shape}, {k.shape}, {v.shape}. Only B, T and S may be 0."
            )
    advice = f"query is {q.shape}: leading axes and head dim must agree."
    shape("key", k, axes("B S K H", sizes), advice)
    advice = f"key is {k.shape}: all but the head dim must agree."
    shape("value", v, axes("B S K h", sizes), advice)
    if N % K:
        raise ValueError(
            f"`query` must have a multiple of the K = {K} heads of key and value; got "
            f"N = {N}. Query head n reads key head n // (N // K)."
        )
    return q, k, v, sizes


def mask(x: Any, sizes: Sizes) -> Bool[Array, ...] | None:
    """A bool mask, True where a query may attend."""
    if x is None:
        return None
    found = array("mask", x)
    if found.dtype != bool:
        added = " If it is to be added to the scores, pass it as a bias: `bias=mask`."
        raise TypeError(
            "`mask` must be bool, True where a query may attend; got "
            f"{found.dtype.name}. If it is 0 where a query may not, write `mask != 0`."
            + (added if jnp.issubdtype(found.dtype, jnp.floating) else "")
        )
    rule = axes("#B #N #T #S", sizes)
    shape_from_the_right("mask", found, rule, "Give a shared axis the size 1.")
    return found


def scale(x: Any) -> float | Float[Array, ""] | None:
    """A finite number, or a scalar array."""
    if x is None:
        return None
    static = isinstance(x, int | float | np.generic | np.ndarray)
    rule, advice = "a number or a scalar array", "Leave it out for 1/sqrt(H)."
    found = np.asarray(x) if static else array("scale", x, rule, advice)
    if found.ndim:
        raise ValueError(
            f"`scale` must be a number or an array of shape (); got {found.shape}. "
            "Multiply the query for a scale per head or query, and give scale=1.0."
        )
    if not any(jnp.issubdtype(found.dtype, x) for x in (jnp.floating, jnp.integer)):
        raise TypeError(
            f"`scale` must be a real number; got {found.dtype.name}. {advice}"
        )
    value = known(found)
    if value is not None and not math.isfinite(value):
        raise ValueError(f"`scale` must be finite; got {value}. See where it is made.")
    return float(found) if isinstance(found, np.ndarray) else found


def alpha(x: Any, sizes: Sizes) -> float | Float[Array, " N"]:
    """Entmax's alpha: a number, or one per head, within 1..2."""
    rule = "a number or a floating array [N]"
    advice = "1 is softmax, 2 sparsemax."
    if isinstance(x, bool | np.bool_):
        raise TypeError(f"`normalizer.alpha` must be {rule}; got {x}. {advice}")
    if isinstance(x, int | float | np.integer | np.floating):
        _within(np.asarray(x, np.float64))
        return float(x)
    found = array("normalizer.alpha", x, rule, advice)
    if found.ndim == 0 and jnp.issubdtype(found.dtype, jnp.integer):
        # A Python int is a leaf of a normalizer, of which a transformation makes this.
        found = jnp.full((sizes.N,), found, jnp.float32)
    floating("normalizer.alpha", found, "Cast it: `.astype(jnp.float32)`.")
    advice = "Give one alpha per head, or a Python float for all."
    shape("normalizer.alpha", found, axes("N", sizes), advice)
    values = known(x)  # the array made of it may be traced
    if values is not None:
        _within(values.astype(np.float64))
    return found


def sink(x: Any, sizes: Sizes) -> Float[Array, "*#B N"]:
    """A score per head, of every leading axis or of none."""
    found = array("normalizer.sink", x, "a floating array [N] or [#B, N]")
    floating("normalizer.sink", found, "Cast it: `.astype(jnp.float32)`.")
    rule, advice = axes("#B N", sizes), "Give one score per head: `jnp.zeros(N)`."
    if not found.ndim:
        shape("normalizer.sink", found, rule, advice)
    shape_from_the_right("normalizer.sink", found, rule, advice)
    values = known(x)
    if values is not None and np.isposinf(np.asarray(values, np.float64)).any():
        raise ValueError(
            "`normalizer.sink` must be below inf; got inf, beside which no key has "
            "weight. -inf is a head without a sink."
        )
    return found


def _within(values: np.ndarray) -> None:
    wrong = values[~((values >= 1) & (values <= 2))]
    if wrong.size:
        raise ValueError(
            f"`normalizer.alpha` must be 1 <= alpha <= 2; got {float(wrong[0])}. 1 "
            "is softmax, 2 sparsemax; clip a learned one: `jnp.clip(alpha, 1, 2)`."
        )


def lengths(name: str, x: Any, sizes: Sizes, most: int) -> Int[Array, "*B"] | None:
    """Lengths, one per batch element, clipped to 0..most."""
    if x is None:
        return None
    found = integers(name, x)
    if sizes.leading or found.shape != (1,):  # jax.nn: [1] for an unbatched query
        advice = "Give one length for each batch element."
        shape(name, found, axes("B", sizes), advice)
    if isinstance(found, np.ndarray):
        return jnp.asarray(found.clip(0, most).astype(np.int32))
    return jnp.clip(found, 0, most).astype(jnp.int32)


def dropout_seed(rng: Any, rate: float) -> Int[Array, 2] | None:
    """The seed that a JAX key folds to; None where nothing is dropped."""
    if rng is None:
        if rate > 0:
            raise ValueError(
                "`dropout_rng` must be a JAX key where `dropout_rate` > 0; got None at "
                f"a rate of {rate}. Give `jax.random.key(seed)`, one for each step."
            )
        return None
    typed = isinstance(rng, jax.Array) and jnp.issubdtype(
        rng.dtype, jax.dtypes.prng_key
    )
    found: Array = rng if typed else array("dropout_rng", rng)
    if not typed and found.dtype != jnp.uint32:
        raise TypeError(
            "`dropout_rng` must be a JAX key, typed or of uint32 words; got "
            f"{kind(found)}. Write `jax.random.key(seed)`."
        )
    if found.ndim != (0 if typed else 1) or not found.size:
        rule = "one JAX key, of shape [] if it is typed and [words] if it is not"
        advice = "One key does for every batch element and head."
        wrong_shape("dropout_rng", found, rule, advice)
    if rate == 0:
        return None
    return seed_of(jax.random.key_data(found) if typed else found)


def segments(
    query_ids: Any, key_ids: Any, sizes: Sizes
) -> tuple[Int[Array, "*B T"], Int[Array, "*B S"]] | None:
    """Segment ids of queries and keys, both or neither."""
    if query_ids is None and key_ids is None:
        return None
    given = {"query_segment_ids": query_ids, "key_segment_ids": key_ids}
    for name, x in given.items():
        if x is None:
            other = next(n for n in given if n != name)
            raise ValueError(
                f"`{name}` must be given with `{other}`; got None. For self-attention "
                "pass the same ids twice."
            )
    q, k = (int32(name, integers(name, x)) for name, x in given.items())
    advice = "Give an id for each position, the batch axes written out."
    shape("query_segment_ids", q, axes("B T", sizes), advice)
    shape("key_segment_ids", k, axes("B S", sizes), advice)
    return q, k


def offset(x: Any, sizes: Sizes) -> int | Int[Array, "*#B"]:
    """The position of query 0: an int, or int32 [] or one per batch element."""
    if isinstance(x, int | np.integer) and not isinstance(x, bool):
        _near("query_offset", np.asarray(x), most=_last(sizes))
        return int(x)
    found = integers("query_offset", x)
    if found.ndim:
        advice = "Give an int, or one for each batch element."
        shape("query_offset", found, axes("#B", sizes), advice)
    _near("query_offset", found, most=_last(sizes))
    return int32("query_offset", found)


def positions(
    query_positions: Any, key_positions: Any, query_offset: int | Array, sizes: Sizes
) -> tuple[Array | None, Array | None]:
    """Explicit positions, which exclude an offset."""
    if query_positions is None and key_positions is None:
        return None, None
    if not isinstance(query_offset, int) or query_offset != 0:
        name = "key_positions" if query_positions is None else "query_positions"
        raise ValueError(
            f"`query_offset` and `{name}` exclude each other; got both. Add the offset "
            "to query_positions, or leave the positions out."
        )
    q, k = (
        None if x is None else _placed(name, x, letter, sizes)
        for name, x, letter in (
            ("query_positions", query_positions, "T"),
            ("key_positions", key_positions, "S"),
        )
    )
    return q, k


def _placed(name: str, x: Any, letter: str, sizes: Sizes) -> Int[Array, "*#B #N L"]:
    found = integers(name, x)
    rules = [axes(rule, sizes) for rule in (letter, f"#B {letter}", f"#B #N {letter}")]
    if not any(fits(found.shape, rule) for rule in rules):
        spellings = " or ".join(dict.fromkeys(spelled(rule) for rule in rules))
        wrong_shape(name, found, spellings, "Give one position for each place.")
    _near(name, found, most=FARTHEST)
    found = int32(name, found)
    if found.ndim == len(rules[1]):
        found = jnp.expand_dims(found, -2)
    return found


def _last(sizes: Sizes) -> int:
    """The largest offset; of any length, if only an exported program knows it."""
    return FARTHEST - sizes.T if isinstance(sizes.T, int) else FARTHEST


def _near(name: str, x: Any, most: int) -> None:
    """Positions within +-2^30, where they are known."""
    values = known(x)
    if values is None or not values.size:
        return
    least, largest = int(values.min()), int(values.max())
    if least < -FARTHEST or largest > most:
        raise ValueError(
            f"`{name}` must keep positions within +-2^30; got {least}..{largest}. "
            "Subtract a common origin: only differences count."
        )
