"""A wrong call raises before anything runs, and says what is wrong and what to do."""

import dataclasses
from typing import Any, cast, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_attn import (
    ALiBi,
    alibi_slopes,
    api,
    Bias,
    Block,
    co_alibi_slopes,
    CoALiBi,
    Config,
    DenseBias,
    dot_product_attention,
    Entmax,
    FactoredBias,
    ForgetGate,
    head_home,
    key_home,
    linen,
    query_home,
    Softmax,
    sparsity,
    visited,
)
from pallas_attn.bias.base import Sum
from pallas_attn.checks.tile import elementwise


B, T, S, N, K, H, h = 2, 5, 7, 4, 2, 8, 6


class Wrong(NamedTuple):
    """Arguments that replace those of a right call, and what the error must say."""

    change: dict[str, Any]
    error: type[Exception]
    says: tuple[str, ...]  # argument, rule, found, advice


def floats(*shape, dtype="float32"):
    return jnp.ones(shape, dtype)


def ints(*shape):
    return jnp.zeros(shape, jnp.int32)


def factored(q_shape=(B, T, N, 3), k_shape=(B, S, N, 3), dtype="float32"):
    return FactoredBias(floats(*q_shape), floats(*k_shape, dtype=dtype))


class Nothing(Bias):
    slopes: Any = head_home()


class Homeless(Bias):
    slopes: Any = head_home()
    power: Any = 2.0

    def tile(self, t):
        return self.slopes * t.distance**self.power


class Vectors(Bias):
    x: Any = query_home()

    def tile(self, t):
        return self.x


class OneSide(Bias):
    x: Any = query_home()

    def contract(self):
        return self.x


class Unequal(Bias):
    x: Any = query_home()
    y: Any = key_home()

    def contract(self):
        return self.x * 2, self.y * 2


class Arrays(Bias):
    slopes: Any = head_home()

    def expand(self):
        return (self.slopes,)


class NoTuple(Bias):
    slopes: Any = head_home()

    def expand(self):  # pyright: ignore[reportIncompatibleMethodOverride]
        return ALiBi(self.slopes)


class Hidden(Bias):
    slopes: Any = head_home()

    def expand(self):
        return (CoALiBi(self.slopes),)


class Formula(Bias):
    x: Any = head_home()
    function: Any = dataclasses.field(metadata={"static": True})

    def tile(self, t):
        return self.function(self.x, t)


def formula(tile):
    return Formula(floats(1, N), tile)


GATE, TABLE = jnp.float32(0.3), np.ones((1, 1, 1, 7), np.float32)


@jax.jit
def gated(x):
    return x * GATE


# One row, one line.
# ruff: noqa: E501
# fmt: off
CAPTURED, ENTRIES = "no arrays but its fields", "entry by entry"
TILES = (
    ("of an array from outside", lambda x, t: x * TABLE, ValueError, (CAPTURED, "float32 [1, 1, 1, 7]", "head_home()")),
    ("of a number from outside", lambda x, t: x * GATE, ValueError, (CAPTURED, "float32 []", "head_home()")),
    ("of a function's array", lambda x, t: gated(x), ValueError, (CAPTURED, "float32 []", "head_home()")),
    ("with a maximum", lambda x, t: t.distance / t.distance.max(), ValueError, (ENTRIES, "reduce_max", "as a field")),
    ("with a mean of a field", lambda x, t: x.mean() * t.distance, ValueError, (ENTRIES, "reduce_sum", "as a field")),
    ("with a softmax", lambda x, t: jax.nn.softmax(t.distance), ValueError, (ENTRIES, "reduce_max", "as a field")),
    ("with running sums", lambda x, t: jnp.cumsum(t.distance, -1), ValueError, (ENTRIES, "cumsum", "as a field")),
    ("that sorts", lambda x, t: jnp.sort(t.distance), ValueError, (ENTRIES, "sort", "as a field")),
    ("with an argmax", lambda x, t: jnp.argmax(t.distance, -1, keepdims=True), ValueError, (ENTRIES, "argmax", "as a field")),
    ("with a product", lambda x, t: t.distance @ t.distance.mT, ValueError, (ENTRIES, "transpose", "as a field")),
    ("that turns keys", lambda x, t: t.distance[..., ::-1], ValueError, (ENTRIES, "rev", "as a field")),
    ("that shifts keys", lambda x, t: jnp.roll(t.distance, 1, -1), ValueError, (ENTRIES, "slice", "as a field")),
    ("that takes a head", lambda x, t: x[:1] * t.distance, ValueError, (ENTRIES, "slice", "as a field")),
    ("that drops axes", lambda x, t: x.squeeze(), ValueError, (ENTRIES, "squeeze", "as a field")),
    ("that counts by itself", lambda x, t: x * jnp.arange(7.0)[None, None, None], ValueError, (ENTRIES, "iota", "as a field")),
    ("with a loop over keys", lambda x, t: jax.lax.scan(lambda c, y: (c + 1, c * y), 0.0, t.distance)[1], ValueError, (ENTRIES, "scan", "as a field")),
    ("of nothing there is", lambda x, t: t.distance_squared, AttributeError, ("distance, query_position, key_position, away", "'distance_squared'", "pallas_attn.Bias.tile")),
    ("that returns nothing", lambda x, t: None, TypeError, ("an array", "None", "pallas_attn.Bias")),
    ("that returns a list", lambda x, t: [x], TypeError, ("a tuple of parts", "a list", "pallas_attn.Bias")),
)
RIGHT_TILES = {
    "a choice": lambda x, t: jnp.where(t.distance > 3, x, jnp.clip(t.distance, -4, 4)),
    "whole numbers": lambda x, t: x * (jnp.mod(t.query_position, 4) ^ t.key_position & 3).astype(jnp.float32),
    "functions of functions": lambda x, t: jax.nn.gelu(jnp.logaddexp(x, t.distance)) + jax.nn.softplus(x),
    "a loop": lambda x, t: jax.lax.fori_loop(0, 3, lambda i, y: y * x, t.distance),
    "a checkpoint": lambda x, t: jax.checkpoint(jnp.sin)(x * t.distance),
    "parts": lambda x, t: (*(x * part for part in t.away), jnp.zeros_like(t.distance)),
    "numbers": lambda x, t: (1.0, np.float32(0.5) * x, jnp.full(t.distance.shape, 2.0)),
}
# fmt: on


def block(**change):
    sizes = {"block_q": 64, "block_k": 64, **change}
    return {"config": Config(forward=Block(**sizes))}


def entmax(**fields) -> dict[str, Any]:
    return {"normalizer": Entmax(**fields)}


def qkv(
    q=(B, T, N, H), k=(B, S, K, H), v=(B, S, K, h), dtypes=("float32",) * 3
) -> dict[str, Any]:
    arrays = (floats(*x, dtype=t) for x, t in zip((q, k, v), dtypes, strict=True))
    return dict(zip(("query", "key", "value"), arrays, strict=True))


# One row, one line.
# fmt: off
WRONG = {
    # query, key, value
    "query is a list": Wrong({"query": [[1.0]]}, TypeError, ("`query`", "must be an array", "a list", "jnp.asarray")),
    "query is None": Wrong({"query": None}, TypeError, ("`query`", "must be an array", "None", "jnp.asarray")),
    "key is text": Wrong({"key": "key"}, TypeError, ("`key`", "must be an array", "'key'", "jnp.asarray")),
    "query without heads": Wrong(qkv(q=(T, H)), ValueError, ("`query`", "[*B, T, N, H]", "(5, 8)", "Give heads")),
    "value without heads": Wrong(qkv(v=(S, h)), ValueError, ("`value`", "[*B, S, K, h]", "(7, 6)", "Give heads")),
    "integer query": Wrong({"query": ints(B, T, N, H)}, TypeError, ("`query`", "float16, bfloat16, float32", "int32", "astype")),
    "complex value": Wrong(qkv(dtypes=("float32", "float32", "complex64")), TypeError, ("`value`", "float32", "complex64", "astype")),
    "mixed dtypes": Wrong(qkv(dtypes=("float32", "bfloat16", "float32")), ValueError, ("`key`", "dtype of query, float32", "bfloat16", "Cast")),
    "value of another dtype": Wrong(qkv(dtypes=("bfloat16", "bfloat16", "float16")), ValueError, ("`value`", "dtype of query, bfloat16", "float16", "Cast")),
    "head dims differ": Wrong(qkv(k=(B, S, K, 9)), ValueError, ("`key`", "[B, S, K, H] = [2, 7, 2, 8]", "(2, 7, 2, 9)", "must agree")),
    "batches differ": Wrong(qkv(k=(3, S, K, H)), ValueError, ("`key`", "[B, S, K, H] = [2, 7, 2, 8]", "(3, 7, 2, 8)", "must agree")),
    "leading axes differ in number": Wrong(qkv(q=(T, N, H)), ValueError, ("`key`", "[S, K, H]", "(2, 7, 2, 8)", "must agree")),
    "key and value lengths differ": Wrong(qkv(v=(B, 8, K, h)), ValueError, ("`value`", "[B, S, K, h] = [2, 7, 2, 6]", "(2, 8, 2, 6)", "key is")),
    "key and value heads differ": Wrong(qkv(v=(B, S, 4, h)), ValueError, ("`value`", "[2, 7, 2, 6]", "(2, 7, 4, 6)", "key is")),
    "heads do not divide": Wrong(qkv(k=(B, S, 3, H), v=(B, S, 3, h)), ValueError, ("`query`", "multiple of the K = 3", "N = 4", "key head n // (N // K)")),
    "no heads": Wrong(qkv(k=(B, S, 0, H), v=(B, S, 0, h)), ValueError, ("K", "at least 1", "got 0", "Only B, T and S may be 0")),
    "no head dim": Wrong(qkv(q=(B, T, N, 0), k=(B, S, K, 0)), ValueError, ("H", "at least 1", "got 0", "Only B, T and S may be 0")),
    # bias
    "bias is a list": Wrong({"bias": [ALiBi(floats(N))]}, TypeError, ("`bias`", "an array or a bias value", "a list", "`a + b`")),
    "bias is a function": Wrong({"bias": lambda i, j: i - j}, TypeError, ("`bias`", "an array or a bias value", "a function", "`tile`")),
    "bias is a module": Wrong({"bias": linen.ALiBi()}, TypeError, ("`bias`", "an array or a bias value", "an ALiBi", "a module", "pallas_attn.linen.MultiHeadAttention", "`pallas_attn.ALiBi(slopes)`")),
    "bias is a class of modules": Wrong({"bias": linen.ALiBi}, TypeError, ("`bias`", "a value, not a class", "the class ALiBi", "ALiBi(...)")),
    "bias is a parameter of nnx": Wrong({"bias": nnx.Param(ALiBi(floats(N)))}, TypeError, ("`bias`", "an array or a bias value", "a Param", "get_value()")),
    "bias is text": Wrong({"bias": "alibi"}, TypeError, ("`bias`", "an array or a bias value", "'alibi'", "pallas_attn.Bias")),
    "bias is a class": Wrong({"bias": ALiBi}, TypeError, ("`bias`", "a value, not a class", "the class ALiBi", "ALiBi(...)")),
    "bool bias": Wrong({"bias": jnp.ones((T, S), bool)}, TypeError, ("`bias`", "float32", "bool", "`mask=bias != 0`")),
    "int bias": Wrong({"bias": ints(T, S)}, TypeError, ("`bias`", "float32", "int32", "`mask=bias != 0`", "cast")),
    "int bias value": Wrong({"bias": DenseBias(ints(T, S))}, TypeError, ("`bias.bias`", "float32", "int32", "`mask=bias != 0`")),
    "bias of other heads": Wrong({"bias": floats(1, 3, T, S)}, ValueError, ("`bias`", "[1 or B, 1 or N, 1 or T, 1 or S] = [1|2, 1|4, 1|5, 1|7]", "(1, 3, 5, 7)", "size 1")),
    "bias of another length": Wrong({"bias": floats(T, S + 1)}, ValueError, ("`bias`", "aligned to the right", "(5, 8)", "size 1")),
    "bias with too many axes": Wrong({"bias": floats(2, 1, N, T, S)}, ValueError, ("`bias`", "1 or B", "(2, 1, 4, 5, 7)", "size 1")),
    "slopes of other heads": Wrong({"bias": ALiBi(floats(3))}, ValueError, ("`bias.slopes`", "[1 or B, 1 or N] = [1|2, 1|4]", "(3,)", "one number per head")),
    "scalar slope": Wrong({"bias": ALiBi(floats())}, ValueError, ("`bias.slopes`", "1 or N", "()", "one number per head")),
    "slopes are a list": Wrong({"bias": ALiBi([0.5] * N)}, TypeError, ("`bias.slopes`", "must be an array", "a list", "jnp.asarray")),  # pyright: ignore[reportArgumentType]
    "integer slopes": Wrong({"bias": ALiBi(ints(N))}, TypeError, ("`bias.slopes`", "float32", "int32", "Cast it")),
    "infinite slopes": Wrong({"bias": ALiBi(cast(Any, np.array([1, 2, -np.inf, 3], np.float32)))}, ValueError, ("`bias.slopes`", "finite", "inf", "local_window_size")),
    "heads before queries": Wrong({**qkv(q=(B, N, 9, H), k=(B, K, 9, H), v=(B, K, 9, h)), "bias": floats(1, N, 9, 9)}, ValueError, ("`bias`", "[1|2, 1|9, 1|4, 1|2]", "(1, 4, 9, 9)", "[*B, heads, length, H]? Swap")),
    "slopes of heads before queries": Wrong({**qkv(q=(B, N, 9, H), k=(B, K, 9, H), v=(B, K, 9, h)), "bias": ALiBi(floats(N))}, ValueError, ("`bias.slopes`", "1|9", "(4,)", "[*B, heads, length, H]? Swap")),
    "factor of another length": Wrong({"bias": factored(k_shape=(2, 6, 4, 3))}, ValueError, ("`bias.k_factor`", "[1 or B, S, 1 or N, R] = [1|2, 7, 1|4, R]", "(2, 6, 4, 3)", "leading axes")),
    "ranks differ": Wrong({"bias": factored(k_shape=(B, S, N, 4))}, ValueError, ("`bias.k_factor`", "[1 or B, S, 1 or N, R] = [1|2, 7, 1|4, 3]", "(2, 7, 4, 4)", "leading axes")),
    "factor without a rank": Wrong({"bias": factored(q_shape=(B, T, N))}, ValueError, ("`bias.q_factor`", "[1 or B, T, 1 or N, R]", "(2, 5, 4)", "leading axes")),
    "factor without a batch": Wrong({"bias": factored(q_shape=(T, N, 2))}, ValueError, ("`bias.q_factor`", "[1 or B, T, 1 or N, R]", "(5, 4, 2)", "leading axes")),
    "rank 0": Wrong({"bias": factored((B, T, N, 0), (B, S, N, 0))}, ValueError, ("`bias.q_factor`", "R]", "(2, 5, 4, 0)", "leading axes")),
    "integer factor": Wrong({"bias": factored(dtype="int32")}, TypeError, ("`bias.k_factor`", "float32", "int32", "Cast it")),
    "a term of a sum": Wrong({"bias": floats(T, S) + ALiBi(floats(3))}, ValueError, ("`bias.terms[1].slopes`", "1 or N", "(3,)", "one number per head")),
    "a term without methods": Wrong({"bias": Nothing(floats(N))}, TypeError, ("`bias`", "must override tile, contract or expand", "a Nothing", "pallas_attn.Bias")),
    "a field without a home": Wrong({"bias": Homeless(floats(N))}, TypeError, ("`bias.power`", "must have a home", "got none", "head_home()")),
    "a vector in a tile": Wrong({"bias": Vectors(floats(B, T, N, 3))}, ValueError, ("`bias.x`", "[1 or B, T, 1 or N]", "(2, 5, 4, 3)", "one number each")),
    "contract of one array": Wrong({"bias": OneSide(floats(B, T, N, 3))}, TypeError, ("`bias.contract`", "two arrays", "array", "Return")),
    "contract of unequal ranks": Wrong({"bias": Unequal(floats(B, T, N, 3), floats(B, S, N, 4))}, ValueError, ("`bias.contract()[1]`", "R] = ", "(2, 7, 4, 4)", "leading axes")),
    "expand returns arrays": Wrong({"bias": Arrays(floats(N))}, TypeError, ("`bias.expand`", "bias values", "array", "DenseBias(array)")),
    "expand returns a term": Wrong({"bias": NoTuple(floats(N))}, TypeError, ("`bias.expand`", "a tuple", "an ALiBi", "return (term,)")),
    # a tile of one's own
    **{f"a tile {what}": Wrong({"bias": formula(tile)}, error, ("`bias.tile`", *says)) for what, tile, error, says in TILES},
    "a tile in a sum": Wrong({"bias": ALiBi(floats(N)) + formula(lambda x, t: t.distance.max())}, ValueError, ("`bias.terms[1].tile`", "entry by entry", "reduce_max", "as a field")),
    # Co-ALiBi
    "contextual slopes of other heads": Wrong({"bias": CoALiBi(floats(3))}, ValueError, ("`bias.slopes`", "[1 or B, 1 or N] = [1|2, 1|4]", "(3,)", "one number per head")),
    "contextual slopes of another batch": Wrong({"bias": CoALiBi(floats(3, N))}, ValueError, ("`bias.slopes`", "[1 or B, 1 or N] = [1|2, 1|4]", "(3, 4)", "one number per head")),
    "scalar contextual slope": Wrong({"bias": CoALiBi(floats())}, ValueError, ("`bias.slopes`", "1 or N", "()", "one number per head")),
    "contextual slopes are a list": Wrong({"bias": CoALiBi([0.5] * N)}, TypeError, ("`bias.slopes`", "must be an array", "a list", "jnp.asarray")),  # pyright: ignore[reportArgumentType]
    "integer contextual slopes": Wrong({"bias": CoALiBi(ints(N))}, TypeError, ("`bias.slopes`", "float32", "int32", "Cast it")),
    "Co-ALiBi is a class": Wrong({"bias": CoALiBi}, TypeError, ("`bias`", "a value, not a class", "the class CoALiBi", "CoALiBi(...)")),
    "Co-ALiBi and ALiBi": Wrong({"bias": ALiBi(floats(N)) + CoALiBi(floats(N))}, NotImplementedError, ("`bias`", "Co-ALiBi with another bias", "a CoALiBi at `bias.terms[1]`", "alone")),
    "Co-ALiBi and an array": Wrong({"bias": CoALiBi(floats(N)) + floats(T, S)}, NotImplementedError, ("`bias`", "Co-ALiBi with another bias", "a CoALiBi at `bias.terms[0]`", "alone")),
    "Co-ALiBi twice": Wrong({"bias": CoALiBi(floats(N)) + CoALiBi(floats(N))}, NotImplementedError, ("`bias`", "Co-ALiBi with another bias", "a CoALiBi at `bias.terms[0]`", "alone")),
    "Co-ALiBi in a sum of sums": Wrong({"bias": Sum((ALiBi(floats(N)), Sum((CoALiBi(floats(N)),))))}, NotImplementedError, ("`bias`", "Co-ALiBi with another bias", "a CoALiBi at `bias.terms[1].terms[0]`", "alone")),
    "Co-ALiBi in an expansion": Wrong({"bias": Hidden(floats(N))}, NotImplementedError, ("`bias`", "Co-ALiBi with another bias", "a CoALiBi at `bias.expand()[0]`", "alone")),
    # mask
    "float mask": Wrong({"mask": floats(T, S)}, TypeError, ("`mask`", "must be bool", "float32", "`mask != 0`", "`bias=mask`")),
    "int mask": Wrong({"mask": ints(T, S)}, TypeError, ("`mask`", "must be bool", "int32", "mask != 0")),
    "mask of another shape": Wrong({"mask": jnp.ones((B, 3, T, S), bool)}, ValueError, ("`mask`", "[1|2, 1|4, 1|5, 1|7]", "(2, 3, 5, 7)", "size 1")),
    "bias as mask": Wrong({"mask": ALiBi(floats(N))}, TypeError, ("`mask`", "must be an array", "an ALiBi", "jnp.asarray")),
    # scale
    "scale is NaN": Wrong({"scale": float("nan")}, ValueError, ("`scale`", "finite", "nan", "where it is made")),
    "scale is infinite": Wrong({"scale": np.float32("inf")}, ValueError, ("`scale`", "finite", "inf", "where it is made")),
    "scale per head": Wrong({"scale": floats(N)}, ValueError, ("`scale`", "shape ()", "(4,)", "Multiply the query")),
    "scale is a bool": Wrong({"scale": True}, TypeError, ("`scale`", "real number", "bool", "Leave it out")),
    "scale is text": Wrong({"scale": "auto"}, TypeError, ("`scale`", "a number or a scalar array", "'auto'", "Leave it out")),
    "complex scale": Wrong({"scale": floats(dtype="complex64")}, TypeError, ("`scale`", "real number", "complex64", "Leave it out")),
    # static flags and the window
    "is_causal is an array": Wrong({"is_causal": jnp.asarray(True)}, TypeError, ("`is_causal`", "True or False", "array", "static_argnames")),
    "is_causal is text": Wrong({"is_causal": "yes"}, TypeError, ("`is_causal`", "True or False", "'yes'", "static")),
    "return_residual is None": Wrong({"return_residual": None}, TypeError, ("`return_residual`", "True or False", "None", "static")),
    "negative window": Wrong({"local_window_size": (3, -1)}, ValueError, ("`local_window_size`", "not be negative", "(3, -1)", "`mask`")),
    "window of three": Wrong({"local_window_size": (1, 2, 3)}, ValueError, ("`local_window_size`", "(left, right)", "3 numbers", "to the left and to the right")),
    "fractional window": Wrong({"local_window_size": 2.5}, TypeError, ("`local_window_size`", "an int or (left, right)", "2.5", "static")),
    "traced window": Wrong({"local_window_size": jnp.asarray(2)}, TypeError, ("`local_window_size`", "an int or (left, right)", "array of int32", "static_argnames")),
    # lengths, offset, positions, segments
    "float lengths": Wrong({"key_value_seq_lengths": floats(B)}, TypeError, ("`key_value_seq_lengths`", "int32", "float32", "astype(jnp.int32)")),
    "lengths of another batch": Wrong({"query_seq_lengths": ints(3)}, ValueError, ("`query_seq_lengths`", "[B] = [2]", "(3,)", "each batch element")),
    "one length for all": Wrong({"key_value_seq_lengths": 3}, ValueError, ("`key_value_seq_lengths`", "[B] = [2]", "()", "each batch element")),
    "bool offset": Wrong({"query_offset": True}, TypeError, ("`query_offset`", "int32", "bool", "astype(jnp.int32)")),
    "float offset": Wrong({"query_offset": 1.5}, TypeError, ("`query_offset`", "int32", "float32", "astype(jnp.int32)")),
    "offset of another batch": Wrong({"query_offset": ints(3)}, ValueError, ("`query_offset`", "[1 or B] = [1|2]", "(3,)", "one for each batch element")),
    "far offset": Wrong({"query_offset": 2**30}, ValueError, ("`query_offset`", "+-2^30", "1073741824", "Subtract a common origin")),
    "offset and positions": Wrong({"query_offset": 2, "query_positions": ints(T)}, ValueError, ("`query_offset`", "exclude each other", "got both", "Add the offset")),
    "offset array and key positions": Wrong({"query_offset": ints(), "key_positions": ints(S)}, ValueError, ("`key_positions`", "exclude each other", "got both", "leave the positions out")),
    "positions of another length": Wrong({"query_positions": ints(S)}, ValueError, ("`query_positions`", "[T] = [5] or [1 or B, T]", "(7,)", "one position for each place")),
    "positions per key head": Wrong({"key_positions": ints(B, K, S)}, ValueError, ("`key_positions`", "[1 or B, 1 or N, S] = [1|2, 1|4, 7]", "(2, 2, 7)", "one position")),
    "float positions": Wrong({"key_positions": floats(S)}, TypeError, ("`key_positions`", "int32", "float32", "astype(jnp.int32)")),
    "16-bit positions": Wrong({"key_positions": jnp.zeros(S, jnp.int16)}, TypeError, ("`key_positions`", "int32", "int16", "astype(jnp.int32)")),
    "far positions": Wrong({"query_positions": np.full(T, -(2**31))}, ValueError, ("`query_positions`", "+-2^30", "-2147483648", "Subtract a common origin")),
    "query ids alone": Wrong({"query_segment_ids": ints(B, T)}, ValueError, ("`key_segment_ids`", "given with `query_segment_ids`", "None", "same ids twice")),
    "key ids alone": Wrong({"key_segment_ids": ints(B, S)}, ValueError, ("`query_segment_ids`", "given with `key_segment_ids`", "None", "same ids twice")),
    "ids of one batch element": Wrong({"query_segment_ids": ints(T), "key_segment_ids": ints(S)}, ValueError, ("`query_segment_ids`", "[B, T] = [2, 5]", "(5,)", "batch axes written out")),
    "float ids": Wrong({"query_segment_ids": floats(B, T), "key_segment_ids": ints(B, S)}, TypeError, ("`query_segment_ids`", "int32", "float32", "astype(jnp.int32)")),
    "huge ids": Wrong({"query_segment_ids": np.full((B, T), 2**40), "key_segment_ids": np.zeros((B, S), int)}, ValueError, ("`query_segment_ids`", "fit int32", "1099511627776", "Number from 0")),
    # normalizer and what is announced only
    "normalizer is a class": Wrong({"normalizer": Softmax}, TypeError, ("`normalizer`", "Softmax() or Entmax(alpha, top_k)", "the class Softmax", "Leave it out")),
    "Entmax is a class": Wrong({"normalizer": Entmax}, TypeError, ("`normalizer`", "Softmax() or Entmax(alpha, top_k)", "the class Entmax", "Entmax(1.5)")),
    "normalizer is text": Wrong({"normalizer": "entmax"}, TypeError, ("`normalizer`", "Softmax() or Entmax(alpha, top_k)", "'entmax'", "Entmax(1.5)")),
    "normalizer is None": Wrong({"normalizer": None}, TypeError, ("`normalizer`", "Softmax()", "None", "Leave it out")),
    "alpha below 1": Wrong(entmax(alpha=0.5), ValueError, ("`normalizer.alpha`", "1 <= alpha <= 2", "0.5", "1 is softmax")),
    "alpha above 2": Wrong(entmax(alpha=3), ValueError, ("`normalizer.alpha`", "1 <= alpha <= 2", "3.0", "2 sparsemax")),
    "alpha is NaN": Wrong(entmax(alpha=float("nan")), ValueError, ("`normalizer.alpha`", "1 <= alpha <= 2", "nan", "1 is softmax")),
    "alpha is infinite": Wrong(entmax(alpha=np.float32("inf")), ValueError, ("`normalizer.alpha`", "1 <= alpha <= 2", "inf", "1 is softmax")),
    "alpha is a bool": Wrong(entmax(alpha=True), TypeError, ("`normalizer.alpha`", "a number or a floating array [N]", "True", "1 is softmax")),
    "alpha is text": Wrong(entmax(alpha="1.5"), TypeError, ("`normalizer.alpha`", "a number or a floating array [N]", "'1.5'", "1 is softmax")),
    "alpha is None": Wrong(entmax(alpha=None), TypeError, ("`normalizer.alpha`", "a number or a floating array [N]", "None", "1 is softmax")),
    "alpha is a list": Wrong(entmax(alpha=[1.5] * N), TypeError, ("`normalizer.alpha`", "a number or a floating array [N]", "a list", "1 is softmax")),
    "alpha of integers": Wrong(entmax(alpha=ints(N) + 1), TypeError, ("`normalizer.alpha`", "float32", "int32", "Cast it")),
    "alpha of other heads": Wrong(entmax(alpha=floats(3)), ValueError, ("`normalizer.alpha`", "[N] = [4]", "(3,)", "one alpha per head")),
    "alpha per key head": Wrong(entmax(alpha=floats(K)), ValueError, ("`normalizer.alpha`", "[N] = [4]", "(2,)", "one alpha per head")),
    "alpha per batch element": Wrong(entmax(alpha=floats(B, N)), ValueError, ("`normalizer.alpha`", "[N] = [4]", "(2, 4)", "one alpha per head")),
    "scalar alpha array": Wrong(entmax(alpha=floats()), ValueError, ("`normalizer.alpha`", "[N] = [4]", "()", "a Python float for all")),
    "one alpha of four above 2": Wrong(entmax(alpha=np.array([1, 1.5, 2.5, 2])), ValueError, ("`normalizer.alpha`", "1 <= alpha <= 2", "2.5", "jnp.clip(alpha, 1, 2)")),
    "top_k of 0": Wrong(entmax(top_k=0), ValueError, ("`normalizer.top_k`", "an int, at least 1, or None", "0", "None keeps every visible key")),
    "top_k is a bool": Wrong(entmax(top_k=True), TypeError, ("`normalizer.top_k`", "an int, at least 1, or None", "True", "static")),
    "fractional top_k": Wrong(entmax(top_k=8.0), TypeError, ("`normalizer.top_k`", "an int, at least 1, or None", "8.0", "static")),
    "top_k is an array": Wrong(entmax(top_k=jnp.asarray(8)), TypeError, ("`normalizer.top_k`", "an int, at least 1, or None", "array of int32", "static_argnames")),
    "top_k per head": Wrong(entmax(top_k=(8,) * N), TypeError, ("`normalizer.top_k`", "an int, at least 1, or None", "a tuple", "static")),
    "Co-ALiBi and entmax": Wrong({"bias": CoALiBi(floats(N)), **entmax()}, NotImplementedError, ("`normalizer`", "Co-ALiBi with entmax or top-k", "an Entmax beside a CoALiBi", "Use Softmax()")),
    "Co-ALiBi and top-k": Wrong({"bias": CoALiBi(floats(N)), **entmax(alpha=1.0, top_k=2)}, NotImplementedError, ("`normalizer`", "Co-ALiBi with entmax or top-k", "an Entmax beside a CoALiBi", "Use Softmax()")),
    "gates of queries": Wrong({"bias": ForgetGate(-floats(B, T, N))}, ValueError, ("`bias.log_gate`", "[1 or B, S, 1 or N]", "(2, 5, 4)", "of size 1 where it is shared")),
    "gates of a vector": Wrong({"bias": ForgetGate(-floats(S))}, ValueError, ("`bias.log_gate`", "[1 or B, S, 1 or N]", "(7,)", "of size 1 where it is shared")),
    "gates above 1": Wrong({"bias": ForgetGate(cast(Any, np.full((B, S, N), 1.5)))}, ValueError, ("`bias.log_gate`", "<= 0", "1.5", "jax.nn.log_sigmoid")),
    "gates above 1 in a sum": Wrong({"bias": ALiBi(floats(N)) + ForgetGate(cast(Any, np.full((1, S, 1), np.inf)))}, ValueError, ("`bias.terms[1].log_gate`", "<= 0", "inf", "jax.nn.log_sigmoid")),
    "gates of integers": Wrong({"bias": ForgetGate(ints(B, S, N))}, TypeError, ("`bias.log_gate`", "float32", "int32", "Cast it")),
    "a list of gates": Wrong({"bias": ForgetGate(cast(Any, [0.0] * S))}, TypeError, ("`bias.log_gate`", "must be an array", "a list", "jnp.asarray")),
    "several gates a key": Wrong({"bias": ForgetGate(-floats(B, S, N, 2))}, ValueError, ("`bias.log_gate`", "[1 or B, S, 1 or N]", "(2, 7, 4, 2)", "one number each")),
    "soft cap of 0": Wrong({"logits_soft_cap": 0.0}, ValueError, ("`logits_soft_cap`", "> 0", "0.0", "None caps nothing")),
    "negative soft cap": Wrong({"logits_soft_cap": -30}, ValueError, ("`logits_soft_cap`", "> 0", "-30", "None caps nothing")),
    "infinite soft cap": Wrong({"logits_soft_cap": float("inf")}, ValueError, ("`logits_soft_cap`", "1e-20..1e+20", "inf", "None caps nothing")),
    "soft cap is NaN": Wrong({"logits_soft_cap": float("nan")}, ValueError, ("`logits_soft_cap`", "1e-20..1e+20", "nan", "None caps nothing")),
    "traced soft cap": Wrong({"logits_soft_cap": floats()}, TypeError, ("`logits_soft_cap`", "a Python number", "array of float32", "static")),
    "soft cap is a bool": Wrong({"logits_soft_cap": True}, TypeError, ("`logits_soft_cap`", "a Python number", "True", "static")),
    "dropout without a key": Wrong({"dropout_rate": 0.1}, ValueError, ("`dropout_rng`", "a JAX key where `dropout_rate` > 0", "None at a rate of 0.1", "jax.random.key")),
    "negative dropout": Wrong({"dropout_rate": -0.1}, ValueError, ("`dropout_rate`", "0 <= rate < 1", "-0.1", "0.0 drops nothing")),
    "dropout is NaN": Wrong({"dropout_rate": float("nan")}, ValueError, ("`dropout_rate`", "0 <= rate < 1", "nan", "0.0 drops nothing")),
    "a seed for a key": Wrong({"dropout_rate": 0.1, "dropout_rng": 7}, TypeError, ("`dropout_rng`", "a JAX key", "array of int32", "jax.random.key")),
    "a wrong key where nothing is dropped": Wrong({"dropout_rng": floats(2)}, TypeError, ("`dropout_rng`", "a JAX key", "array of float32", "jax.random.key")),
    "several keys": Wrong({"dropout_rate": 0.1, "dropout_rng": jax.random.split(jax.random.key(0))}, ValueError, ("`dropout_rng`", "one JAX key", "(2,)", "every batch element and head")),
    "several keys of words": Wrong({"dropout_rate": 0.1, "dropout_rng": jnp.zeros((2, 2), "uint32")}, ValueError, ("`dropout_rng`", "[words]", "(2, 2)", "every batch element and head")),
    "dropout of 1": Wrong({"dropout_rate": 1.0}, ValueError, ("`dropout_rate`", "0 <= rate < 1", "1.0", "0.0 drops nothing")),
    "traced dropout": Wrong({"dropout_rate": floats()}, TypeError, ("`dropout_rate`", "a Python number", "array of float32", "static")),
    # how it is computed
    "unknown precision": Wrong({"precision": "best"}, ValueError, ("`precision`", "jax.lax.Precision", "'best'", "share one precision")),
    "two precisions": Wrong({"precision": ("high", "default")}, ValueError, ("`precision`", "jax.lax.Precision", "('high', 'default')", "share one precision")),
    "unknown implementation": Wrong({"implementation": "cudnn"}, ValueError, ("`implementation`", "'triton', 'triton_interpret', 'xla', 'reference'", "'cudnn'", "None chooses")),
    "one unknown implementation of two": Wrong({"implementation": ("xla", "flash")}, ValueError, ("`implementation`", "several of them", "'flash'", "None chooses")),
    "no implementation": Wrong({"implementation": ()}, ValueError, ("`implementation`", "one of", "()", "None chooses")),
    "implementation is a number": Wrong({"implementation": 3}, TypeError, ("`implementation`", "one of", "3", "None chooses")),
    "wide heads in kernels": Wrong({**qkv(v=(B, S, K, 257)), "implementation": "triton_interpret"}, NotImplementedError, ("`implementation`", "at most 256", "h = 257", "None, or a sequence with 'xla'")),
    "config is a dict": Wrong({"config": {"prune": False}}, TypeError, ("`config`", "a Config", "a dict", "Config(forward=Block(64, 64))")),
    "a tuple for a block": Wrong({"config": Config(rows=(64, 64))}, TypeError, ("`config.rows`", "a Block or None", "a tuple", "Block(block_q")),  # pyright: ignore[reportArgumentType]
    "block of 48": Wrong(block(block_q=48), ValueError, ("`config.forward.block_q`", "power of two, at least 16", "48", "shipped choice")),
    "block of 8": Wrong(block(block_k=8), ValueError, ("`config.forward.block_k`", "power of two, at least 16", "8", "shipped choice")),
    "three warps": Wrong(block(num_warps=3), ValueError, ("`config.forward.num_warps`", "1, 2, 4, 8 or 16", "3", "shipped choice")),
    "no stages": Wrong(block(num_stages=0), ValueError, ("`config.forward.num_stages`", "at least 1", "0", "shipped choice")),
    "fractional block": Wrong(block(block_q=64.0), TypeError, ("`config.forward.block_q`", "power of two", "64.0", "static")),
    "carries of -1 MiB": Wrong({"config": Config(carry_mib=-1)}, ValueError, ("`config.carry_mib`", "at least 0", "-1", "one key head at a time")),
    "fractional carries": Wrong({"config": Config(carry_mib=0.5)}, TypeError, ("`config.carry_mib`", "a number of MiB", "0.5", "static")),  # pyright: ignore[reportArgumentType]
    "one block for Co-ALiBi": Wrong({"bias": CoALiBi(floats(4)), **block()}, ValueError, ("`config`", "all of forward, rows and cols or none", "Block(block_q=64", "shipped choice")),
    "two block_k for Co-ALiBi": Wrong({"bias": CoALiBi(floats(4)), "config": Config(Block(32, 32), Block(32, 32), Block(32, 16))}, ValueError, ("`config`", "one block_k", "Block(block_q=32, block_k=16", "shipped choice")),
    "blocks of rows wider than of forward": Wrong({"bias": CoALiBi(floats(4)), "config": Config(Block(32, 32), Block(64, 32), Block(32, 32))}, ValueError, ("`config`", "those of rows and cols divide", "block_q=64", "shipped choice")),
    "one block for entmax": Wrong({**entmax(), **block()}, ValueError, ("`config`", "all of forward, rows and cols or none", "Block(block_q=64", "shipped choice")),
    "two block_q for entmax": Wrong({**entmax(), "config": Config(Block(32, 32), Block(16, 32), Block(32, 32))}, ValueError, ("`config`", "one block_q and one block_k", "Block(block_q=16, block_k=32", "shipped choice")),
    "two block_k for top-k": Wrong({**entmax(alpha=1.0, top_k=2), "config": Config(Block(32, 32), Block(32, 32), Block(32, 16))}, ValueError, ("`config`", "one block_q and one block_k", "Block(block_q=32, block_k=16", "shipped choice")),
    "prune is None": Wrong({"config": Config(prune=None)}, TypeError, ("`config.prune`", "True or False", "None", "static")),  # pyright: ignore[reportArgumentType]
}
# fmt: on


def arguments(wrong):
    return {**qkv(), **wrong.change}


@pytest.fixture
def launched(monkeypatch):
    """Nothing may be computed: no implementation is reached."""

    def fail(name, kind):
        raise AssertionError(f"{name} was reached")

    monkeypatch.setattr(api, "functions_of", fail)


def wrongly(calls):
    return pytest.mark.parametrize("wrong", calls.values(), ids=list(calls))


def check(wrong, call):
    with pytest.raises(wrong.error) as raised:
        call()
    message = str(raised.value)
    missing = [part for part in wrong.says if part not in message]
    assert not missing, message


@wrongly(WRONG)
def test_a_wrong_call_says_what_is_wrong(wrong, launched):
    check(wrong, lambda: dot_product_attention(**arguments(wrong)))


@wrongly(WRONG)
def test_a_wrong_call_says_so_when_traced(wrong, launched):
    given = arguments(wrong)
    traced = {name: x for name, x in given.items() if _all_arrays(x)}
    static = {name: x for name, x in given.items() if name not in traced}
    call = lambda traced: dot_product_attention(**traced, **static)
    check(wrong, lambda: jax.eval_shape(call, traced))


@wrongly({id: x for id, x in WRONG.items() if "return_residual" not in x.change})
def test_visited_and_sparsity_make_the_same_checks(wrong, launched):
    check(wrong, lambda: visited(**arguments(wrong)))
    check(wrong, lambda: sparsity(**arguments(wrong)))


@pytest.mark.parametrize("name", RIGHT_TILES)
def test_a_tile_of_entries_is_right(name):
    elementwise("bias", formula(RIGHT_TILES[name]), jnp.float32)


def test_a_traced_top_k_is_refused(launched):
    says = ("`normalizer.top_k`", "an int, at least 1", "a traced array", "static")
    call = lambda k: dot_product_attention(**qkv(), normalizer=Entmax(1.5, k))
    check(Wrong({}, TypeError, says), lambda: jax.eval_shape(call, jnp.asarray(8)))


def test_a_traced_alpha_is_one_per_head(launched):
    says = ("`normalizer.alpha`", "[N] = [4]", "()", "a Python float for all")
    call = lambda alpha: dot_product_attention(**qkv(), normalizer=Entmax(alpha))
    check(Wrong({}, ValueError, says), lambda: jax.eval_shape(call, jnp.asarray(1.5)))


def test_several_leading_axes_are_spelled_one_by_one(launched):
    given = qkv((3, B, T, N, H), (3, B, S, K, H), (3, B, S, K, h))
    says = (
        "[1 or B1, 1 or B2, 1 or N, 1 or T, 1 or S] = [1|3, 1|2, 1|4, 1|5, 1|7]",
        "(2, 2, 1, 5, 7)",
    )
    bias = floats(2, B, 1, T, S)
    check(
        Wrong({}, ValueError, says), lambda: dot_product_attention(**given, bias=bias)
    )


def test_no_leading_axis_is_not_spelled(launched):
    given = qkv((T, N, H), (S, K, H), (S, K, h))
    says = ("`bias.k_factor`", "[S, 1 or N, ...] = [7, 1|4, ...]", "(1, 7, 4, 3)")
    bias = factored((T, N, 3), (1, S, N, 3))
    check(
        Wrong({}, ValueError, says), lambda: dot_product_attention(**given, bias=bias)
    )


def test_co_alibi_is_no_array_of_positions():
    says = ("`CoALiBi.materialise`", "depends on the scores", "dot_product_attention")
    rows = jnp.arange(T, dtype=jnp.int32)
    check(
        Wrong({}, NotImplementedError, says),
        lambda: CoALiBi(floats(N)).materialise(rows, rows),
    )


# Beside calls: what is wrong, and what the error must say.
# fmt: off
BESIDE = {
    "twice a bias": (lambda: cast(Any, 2.0) * ALiBi(floats(N)), TypeError, ("no `*`", "ALiBi(2 * slopes)")),
    "a bias times an array": (lambda: cast(Any, DenseBias(floats(T, S))) * floats(T, S), TypeError, ("no `*`", "DenseBias")),
    "half a bias": (lambda: cast(Any, ALiBi(floats(N))) / 2, TypeError, ("no `/`", "ALiBi(2 * slopes)")),
    "a bias taken away": (lambda: floats(T, S) - cast(Any, ALiBi(floats(N))), TypeError, ("no `-`", "DenseBias(-array)")),
    "a bias turned": (lambda: -cast(Any, ALiBi(floats(N))), TypeError, ("no `-`", "DenseBias(-array)")),
    "a bias and a list": (lambda: ALiBi(floats(N)) + [1.0], TypeError, ("+", "list")),
    "a bias and a function": (lambda: ALiBi(floats(N)) + abs, TypeError, ("+", "builtin_function")),
    "lengths for positions": (lambda: ALiBi(floats(N)).materialise(cast(Any, T), cast(Any, S)), ValueError, ("`materialise`", "[L], [B, L]", "()", "jnp.arange(length)")),
    "heads are no int": (lambda: alibi_slopes(cast(Any, 4.0)), TypeError, ("`num_heads`", "an int", "4.0", "query.shape[-2]")),
    "no heads": (lambda: co_alibi_slopes(0), ValueError, ("`num_heads`", "at least 1", "0")),
}
# fmt: on


@pytest.mark.parametrize("name", BESIDE)
def test_what_is_wrong_beside_a_call_says_so(name):
    call, error, says = BESIDE[name]
    check(Wrong({}, error, says), call)


def test_float64_runs_in_xla_and_reference_only(launched):
    with jax.enable_x64(True):
        given = qkv(dtypes=("float64",) * 3)
        says = ("`implementation`", "computes in float32", "float64", "'xla'")
        check(
            Wrong({}, NotImplementedError, says),
            lambda: dot_product_attention(**given, implementation="triton_interpret"),
        )


def _all_arrays(x):
    leaves = jax.tree.leaves(x)
    return bool(leaves) and all(isinstance(leaf, jax.Array) for leaf in leaves)
