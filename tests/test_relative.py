"""Tables of distances: what they are, what they cost, what is refused."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_attn import (
    Bias,
    DenseBias,
    distance_home,
    dot_product_attention,
    Entmax,
    RelativeBias,
)
from pallas_attn.bias import lookup
from pallas_attn.bias.diagonals import summed, toeplitz
from pallas_attn.testing.evaluate import EXACT, implementations, small
from pallas_attn.testing.jaxprs import largest_array
from pallas_attn.testing.numerics import assert_formula, assert_same_bits
from pallas_attn.triton import passes


B, T, S, N, K, H = 2, 19, 29, 4, 2, 16
TABLES = {
    "all": ((N, 61), -30),
    "few": ((B, N, 5), -2),
    "beyond": ((1, N, 7), 40),
    "one": ((1, 1, 1), 0),
    "batch": ((B, 1, 120), -60),
}
PLACES: dict[str, Any] = {
    "full": {},
    "causal": {"is_causal": True},
    "offset": {"query_offset": S - T, "is_causal": True},
    "offsets": {"query_offset": jnp.array([-4, 1000], jnp.int32)},
    "positions": {
        "query_positions": jnp.arange(T, dtype=jnp.int32)[::-1] * 2**25,
        "key_positions": jnp.arange(S, dtype=jnp.int32) - 9,
    },
    "entmax": {"normalizer": Entmax(1.5)},
}

everywhere = pytest.mark.parametrize(
    "implementation", [*implementations(), "reference"]
)


FRACTION: Any = 1.5


def operands(key: int = 0) -> Any:
    keys = jax.random.split(jax.random.key(key), 4)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H)
    return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


def positions(place):
    """[#B, 1, T] and [1, 1, S]."""
    queries, keys = place.get("query_positions"), place.get("key_positions")
    if queries is not None:
        return queries[None, None], keys[None, None]
    start = jnp.reshape(
        jnp.asarray(place.get("query_offset", 0), jnp.int32), (-1, 1, 1)
    )
    return start + jnp.arange(T, dtype=jnp.int32).reshape(1, 1, T), jnp.arange(
        S, dtype=jnp.int32
    ).reshape(1, 1, S)


def both(make, table, implementation, place):
    """The results, and the gradient of a table, of a bias that is made of it."""
    q, k, v, do = operands()
    # of one sign: what a row adds to an entry that it reads alone does not cancel
    dresidual = jnp.abs(jax.random.normal(jax.random.key(9), (B, T, N)))
    config = small("relative", "entmax 1.5" if "normalizer" in place else "softmax")

    def attend(table):
        return dot_product_attention(
            q, k, v, make(table), implementation=implementation, config=config,
            return_residual=True, **EXACT, **place,
        )  # fmt: skip

    results, back = jax.vjp(attend, table)
    return results, back((do, dresidual))[0]


@pytest.mark.at_most(12)
@everywhere
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_the_array_that_indices_read(name, place, implementation):
    """Of NumPy's own indices, within its ends and beyond."""
    (shape, first), place = TABLES[name], PLACES[place]
    table = jax.random.normal(jax.random.key(5), shape)
    queries, keys = (np.asarray(x, np.int64) for x in positions(place))
    away = queries[..., :, None] - keys[..., None, :] - first
    at = jnp.asarray(np.clip(away, 0, shape[-1] - 1), jnp.int32)
    whole = (max(at.shape[0], shape[0] if len(shape) == 3 else 1), N)

    def written(table):
        table = table.reshape((1,) * (3 - table.ndim) + table.shape)
        rows = jnp.broadcast_to(table, (*whole, shape[-1]))
        index = jnp.broadcast_to(at, (*whole, T, S)).reshape(*whole, -1)
        return DenseBias(jnp.take_along_axis(rows, index, 2).reshape(*whole, T, S))

    got = both(lambda x: RelativeBias(x, first), table, implementation, place)
    want = both(written, table, "reference", place)
    assert_formula(got, want)


def test_heads_by_themselves_are_heads_together(monkeypatch, retraced):
    """The same bits: each tile has one owner."""
    table = jax.random.normal(jax.random.key(5), (1, N, 61))
    make = lambda x: RelativeBias(x, -30)
    together = both(make, table, implementations()[-1], PLACES["causal"])
    monkeypatch.setattr(passes, "SCRATCH", 1)
    jax.clear_caches()
    apart = both(make, table, implementations()[-1], PLACES["causal"])
    assert_same_bits(apart, together)


@pytest.mark.parametrize(
    ("T", "S", "n", "first"),
    [(16, 16, 16, 0), (40, 56, 16, 0), (37, 53, 16, 2), (5, 70, 32, 1), (70, 5, 32, 0)],
)
def test_sums_of_tiles_are_those_of_diagonals(T, S, n, first):
    """Of whole numbers, exactly: the transpose of `toeplitz`."""
    down, across = -(-T // n), -(-S // n)
    x = np.zeros((down * n, across * n), np.float32)
    x[:T, :S] = np.random.default_rng(0).integers(-9, 9, (T, S))
    tiles = np.zeros((down + across - 1, n, n), np.float32)
    for i in range(down):
        for j in range(across):
            c = i - j + across - 1
            if c < first:
                x[i * n : i * n + n, j * n : j * n + n] = 0
            tiles[c] += x[i * n : i * n + n, j * n : j * n + n]
    (want,) = jax.linear_transpose(
        lambda d: toeplitz(d, T, S), jnp.zeros(T + S - 1)
    )(jnp.asarray(x[:T, :S]))  # fmt: skip
    assert_same_bits(summed(jnp.asarray(tiles[first:]), T, S, first), want)


@pytest.mark.parametrize("causal", [True, False])
def test_no_array_of_pairs_is_made(causal):
    """Forward and backward; but for tiles along diagonals, `SCRATCH` at most."""
    length = 2048
    q = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.bfloat16)
    table = jax.ShapeDtypeStruct((2, length), jnp.float32)

    def loss(q, k, v, table):
        made = dot_product_attention(
            q, k, v, RelativeBias(table), is_causal=causal,
            implementation="triton_interpret",
        )  # fmt: skip
        return jnp.sum(made.astype(jnp.float32) ** 2)

    found = largest_array(jax.grad(loss, (0, 1, 2, 3)), q, q, q, table)
    assert math.prod(found) <= passes.SCRATCH // 4 < length**2


class Two(Bias):
    """Two tables, of other distances each."""

    near: jax.Array = distance_home(first=-2)
    far: jax.Array = distance_home("start")
    start: int = 10

    def tile(self, t):
        return self.near * jnp.exp(self.far)


def test_tables_of_a_term_have_a_first_distance_each():
    at = jnp.arange(30, dtype=jnp.int32)
    near, far = jnp.arange(5.0)[None], jnp.arange(3.0)[None]
    away = np.arange(30)[:, None] - np.arange(30)[None]
    want = np.clip(away + 2, 0, 4) * np.exp(np.clip(away - 10, 0, 2))
    query, key, value, _ = operands()
    with pytest.raises(TypeError, match="start` must"):
        dot_product_attention(query, key, value, Two(near, far))
    assert_formula(Two(near, far).materialise(at, at)[0, 0], want.astype(np.float32))


@pytest.mark.parametrize(
    ("bias", "error", "match"),
    [
        (lambda: RelativeBias(jnp.ones((N, 3)), FRACTION), TypeError, "`bias.first`"),
        (lambda: RelativeBias(jnp.ones((N, 3)), 2**31), ValueError, "`bias.first`"),
        (lambda: RelativeBias(jnp.ones((3, 5))), ValueError, "`bias.table` must be"),
        (lambda: RelativeBias(jnp.ones((N, 0))), ValueError, "`bias.table` must be"),
        (lambda: RelativeBias(jnp.float32(1)), ValueError, "`bias.table` must be"),
        (lambda: RelativeBias(jnp.ones((N, 3), int)), TypeError, "`bias.table`"),
    ],
)
def test_what_is_no_table_is_refused(bias, error, match):
    query, key, value, _ = operands()
    with pytest.raises(error, match=match):
        dot_product_attention(query, key, value, bias())


@pytest.mark.parametrize("compared", [2**24, 0], ids=["compared", "sorted"])
@pytest.mark.parametrize(
    ("L", "n", "R"), [(7, 50, 3), (1, 1, 1), (5, 2, 2), (40, 1000, 4), (3, 0, 2)]
)
def test_what_indices_read_goes_back_to_its_row(L, n, R, compared, monkeypatch):
    """Of whole numbers, exactly; what has no row is nowhere, NaN in its own alone."""
    monkeypatch.setattr(lookup, "COMPARED", compared)
    rng = np.random.default_rng(0)
    table, ct = (rng.integers(-9, 9, (m, R)).astype(np.float32) for m in (L, max(n, 1)))
    index, ct = rng.integers(-2, L + 2, n), ct[:n].copy()
    inside = (index >= 0) & (index < L)
    ct[index == 0] = np.nan
    read_at = jnp.asarray(index)
    out, back = jax.vjp(lambda x: lookup.entries(x, read_at), jnp.asarray(table))
    want = np.zeros((L, R), np.float32)
    np.add.at(want, index[inside], ct[inside])
    np.testing.assert_array_equal(back(ct)[0], want)
    read = np.full((n, R), np.nan, np.float32)
    read[inside] = table[index[inside]]
    np.testing.assert_array_equal(out, read)
