"""What a kernel sees of a bias: fields on a tile, products as columns of q and k."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_attn.bias.base import Added, Bias, has_bound, homes, parts_of
from pallas_attn.call import Call
from pallas_attn.kernels.tile import Tile


f32 = jnp.float32
bf16 = jnp.bfloat16

# A field of a sum: the index of its term, and its name.
Field = tuple[int, str]


def fields(added: Added) -> dict[Field, Any]:
    """All fields of all terms."""
    return {
        (n, name): getattr(term, name)
        for n, term in enumerate(added.terms)
        for name in homes(term)
    }


def home(added: Added, field: Field) -> str:
    """Where a field lives."""
    return homes(added.terms[field[0]])[field[1]]


def span(added: Added, field: Field) -> str:
    """What a field varies along, "", "q", "k" or "qk": who owns its gradient."""
    where = home(added, field)
    if where == "pair":
        shape = getattr(added.terms[field[0]], field[1]).shape
        return "q" * (shape[2] > 1) + "k" * (shape[3] > 1)
    return {"head": "", "query": "q", "key": "k"}[where]


def is_identity(added: Added, field: Field) -> bool:
    """Whether the field's gradient is that of the score."""
    return field[1] in added.terms[field[0]].identity


def with_fields(added: Added, values: dict[Field, Any]) -> tuple[Bias, ...]:
    """The terms with other values in their fields."""
    return tuple(
        replace(term, **{name: values[n, name] for name in homes(term)})
        for n, term in enumerate(added.terms)
    )


def turned(added: Added) -> Added:
    """Full pair fields transposed, for kernels that keep scores as [keys, queries]."""
    values = {
        f: x.swapaxes(2, 3) if span(added, f) == "qk" else x
        for f, x in fields(added).items()
    }
    return Added(with_fields(added, values), added.products)


def hold(added: Added, t: Tile, spans: Iterable[str]) -> dict[Field, Any]:
    """The fields that vary along no more than `spans`, loaded once before a loop."""
    return {
        f: t.field(home(added, f), x)
        for f, x in fields(added).items()
        if span(added, f) in spans
    }


def on_tile(added: Added, t: Tile, held: dict[Field, Any]) -> tuple[Bias, ...]:
    """The terms with their fields loaded on this tile, those in `held` as they are."""
    rest = {
        f: t.field(home(added, f), x) for f, x in fields(added).items() if f not in held
    }
    return with_fields(added, held | rest)


def parts(terms: tuple[Bias, ...], t: Tile) -> tuple[Any, list[jax.Array]]:
    """(row, rest): the sum of what does not depend on the key, and all that does."""
    row, rest = 0.0, []
    for term in terms:
        for part in parts_of(term.tile(t)):
            if jnp.ndim(part) == 0 or part.shape[0 if t.flip else 1] == 1:
                row = row + part
            else:
                rest.append(part)
    return row, rest


def pullback(
    terms: tuple[Bias, ...], mine: tuple[Field, ...], t: Tile, ds: jax.Array
) -> dict[Field, jax.Array]:
    """Gradients of the fields `mine` on this tile, by JAX's own vjp of `tile`.

    A head's number is spread over queries, so that its sum waits for the loop's end.
    """
    if not mine:
        return {}
    t = t.settled()

    def total(values: dict[Field, jax.Array]) -> jax.Array:
        out = jnp.zeros(t.shape, f32)
        for n in sorted({n for n, _ in mine}):
            new = {name: values[m, name] for m, name in mine if m == n}
            for part in parts_of(replace(terms[n], **new).tile(t)):
                out = out + jnp.broadcast_to(part, t.shape)
        return out

    def primal(field: Field) -> jax.Array:
        x = getattr(terms[field[0]], field[1])
        return t.along_q(jnp.full((t.bq,), x)) if jnp.ndim(x) == 0 else x

    values = {field: primal(field) for field in mine}
    (grads,) = jax.vjp(total, values)[1](ds)
    return {
        field: g.reshape(max(g.shape)) if 1 in g.shape else g
        for field, g in grads.items()
    }


def bound(added: Added, held: dict[Field, Any], *ranges: Any) -> Any:
    """The largest sum of the terms on ranges of positions, in log2 units."""
    total = f32(0)
    for n, term in enumerate(added.terms):
        assert has_bound(term)
        heads = {name: held.get((n, name)) for name in homes(term)}
        total = total + replace(term, **heads).bound(*ranges)
    return total * math.log2(math.e)


def with_columns(added: Added, call: Call) -> Added:
    """Products in the units of q.k, ready for the kernels."""
    products = (columns(a, b, call) for a, b in added.products)
    return Added(added.terms, tuple(pair for group in products for pair in group))


def columns(
    a: Float[Array, "#B T #N R"], b: Float[Array, "#B S #N R"], call: Call
) -> tuple[tuple[Array, Array], ...]:
    """A product as columns beside q and k: pairs whose products sum to A.B / scale.

    Unless every dot is IEEE float32, float32 factors become bfloat16 pieces x1, x2, x3:
        a b = a1 b1 + (a1 b2 + a1 b3 + a2 b1 + a2 b2 + a3 b1) + O(2^-24),
    the main product and its corrections, columns of two dots. Only the main product
    carries the gradient.
    """
    narrow = a.dtype == b.dtype == bf16
    exact = narrow and math.log2(call.scale) % 1 == 0
    a = a.astype(f32) / call.scale
    if call.dtype == "float32" and call.precision == lax.Precision.HIGHEST:
        return ((a, b.astype(f32)),)
    if exact:
        return ((a.astype(bf16), b),)
    rank = a.shape[-1]
    if narrow:
        a1, a2 = pieces(a, 2)
        if rank <= 8:
            return ((_cat(a1, a2), _cat(b, b)),)
        return ((a1, b), (lax.stop_gradient(a2), lax.stop_gradient(b)))
    a1, a2, a3 = pieces(a, 3)
    b1, b2, b3 = pieces(b.astype(f32), 3)
    if rank <= 10:
        return ((_cat(a1, a1, a1, a2, a2, a3), _cat(b1, b2, b3, b1, b2, b1)),)
    rest = _cat(a1, a1, a2, a2, a3), _cat(b2, b3, b1, b2, b1)
    return ((a1, b1), *_chunks(*(lax.stop_gradient(x) for x in rest)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _pieces(x: jax.Array, n: int) -> tuple[jax.Array, ...]:
    """Some n bfloat16 arrays that sum to x up to 2^-8n; the first has the gradient.

    Not by casting and subtracting: XLA may keep excess precision, and the rest is 0.
    """
    out = []
    for _ in range(n):
        y = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        out.append(y.astype(bf16))
        x = x - y
    return tuple(out)


def _pieces_fwd(x: jax.Array, n: int) -> Any:
    return _pieces(x, n), None


def _pieces_bwd(n: int, _: None, g: tuple[jax.Array, ...]) -> tuple[jax.Array]:
    return (g[0].astype(f32),)


_pieces.defvjp(_pieces_fwd, _pieces_bwd)
pieces = cast(Callable[[jax.Array, int], tuple[jax.Array, ...]], _pieces)


def _cat(*xs: jax.Array) -> jax.Array:
    return jnp.concatenate(xs, -1)


def _chunks(a: jax.Array, b: jax.Array) -> tuple[tuple[jax.Array, jax.Array], ...]:
    """Columns in powers of two, the widest first: a dot pads its columns to one."""
    n = a.shape[-1]
    width = min(64, pl.next_power_of_2(n + 1) // 2)
    if n <= 16 or n == width:
        return ((a, b),)
    head = (a[..., :width], b[..., :width])
    return (head, *_chunks(a[..., width:], b[..., width:]))
