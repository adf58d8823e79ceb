"""What is added to a score: the base class of every bias, homes of fields, and sums."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, ClassVar, dataclass_transform

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_attn.bias.diagonals import diagonals, toeplitz, written
from pallas_attn.bias.region import Place, Positions, product_on, Region, spread
from pallas_attn.flax_state import serializable
from pallas_attn.shown import with_fields


def head_home() -> Any:
    """A field with one number per head, [#B, #N].

    >>> class Slope(Bias):
    ...     slope: Any = head_home()
    >>> Slope(jnp.ones((1, 8))).slope.shape
    (1, 8)
    """
    return dataclasses.field(metadata={"home": "head"})


def query_home() -> Any:
    """A field with one number (or vector) per query, [#B, T, #N, ...].

    >>> class Reach(Bias):
    ...     reach: Any = query_home()
    >>> Reach(jnp.ones((1, 97, 8))).reach.shape
    (1, 97, 8)
    """
    return dataclasses.field(metadata={"home": "query"})


def key_home() -> Any:
    """A field with one number (or vector) per key, [#B, S, #N, ...].

    >>> class Importance(Bias):
    ...     importance: Any = key_home()
    >>> Importance(jnp.ones((2, 97, 1))).importance.shape
    (2, 97, 1)
    """
    return dataclasses.field(metadata={"home": "key"})


def pair_home() -> Any:
    """A field with one number per pair of query and key, [#B, #N, #T, #S].

    >>> class Pairs(Bias):
    ...     pairs: Any = pair_home()
    >>> Pairs(jnp.ones((1, 8, 97, 97))).pairs.shape
    (1, 8, 97, 97)
    """
    return dataclasses.field(metadata={"home": "pair"})


def distance_home(first: int | str = 0) -> Any:
    """A field with one number per distance, [#B, #N, D].

    The number of a pair is that of its distance, query position minus key position:
    entry `distance - first`, from the nearer end where the table has none. No array of
    all pairs is made where positions are implicit, nor of its gradient.

    Args:
        first: The distance of entry 0, or the name of the static field that has it.

    >>> class Table(Bias):  # of keys up to two places before
    ...     numbers: Any = distance_home(first=0)
    ...     def tile(self, t):
    ...         return self.numbers
    >>> at = jnp.arange(4)
    >>> print(Table(jnp.array([[[5.0, 6.0, 7.0]]])).materialise(at, at)[0, 0])
    [[5. 5. 5. 5.]
     [6. 5. 5. 5.]
     [7. 6. 5. 5.]
     [7. 7. 6. 5.]]
    """
    return dataclasses.field(metadata={"home": "distance", "first": first})


@dataclass_transform(
    frozen_default=True,
    eq_default=False,
    field_specifiers=(
        head_home,
        query_home,
        key_home,
        pair_home,
        distance_home,
        dataclasses.field,
    ),
)
class Bias:
    """A term added to the scaled scores: the base class.

    A subclass becomes a frozen dataclass and a pytree by itself. It declares its arrays
    as fields with a home and overrides at least one of `expand`, `contract` and `tile`;
    every gradient, broadcast reduction, sum and kernel follows from these. A field
    declared with `dataclasses.field(metadata={"static": True})` is not an array.

    Values are added with `+`; an array counts as a `DenseBias`. Nothing is validated
    here (JAX rebuilds the classes with None, specs and stacked arrays): calls validate.

    Args: the fields that a subclass declares, in their order; their shapes are those of
    `head_home` [#B, #N], `query_home` [#B, T, #N, ...], `key_home` [#B, S, #N, ...],
    `pair_home` [#B, #N, #T, #S] and `distance_home` [#B, #N, D].

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from pallas_attn import ALiBi, Bias, head_home
        >>> class LogDistance(Bias):  # b_ij = -weight log(1 + |i - j|)
        ...     weight: jax.Array = head_home()
        ...     def tile(self, t):
        ...         return -self.weight * jnp.log1p(jnp.abs(t.distance))
        >>> bias = LogDistance(jnp.ones(8)) + ALiBi(jnp.ones(8))
        >>> positions = jnp.arange(97)
        >>> bias.materialise(positions, positions).shape
        (1, 8, 97, 97)

    Source: FlashBias (arXiv 2505.12044), for products; FlexAttention (arXiv
    2412.05496), for terms as code.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    # `tile` reads `t.away`: it is cheaper where every query is on one side of every key
    sided = False
    # fields whose gradient is the score's own: `tile` adds them up
    identity: tuple[str, ...] = ()
    # fields along queries or keys may give every key of a row a value such as -1e9,
    # beside which float32 has no room: weights are told from the row's largest score
    steep = True
    # values may be at or below -1e30, and take keys away, NaN included, as a mask does
    hides = True
    # a field along keys holds running sums: its gradient is added up over keys, and
    # with it what rounding left of the sum of each row
    running = False
    # keys before a query fade, what comes after it does not: it asks for causality
    fades = False
    # a field along queries or keys may have an axis behind them, of a product
    ranked = False
    # whose functions take it, and it alone, as no term of a sum: the normalizer's
    family: ClassVar[str] = ""

    # NumPy arrays leave `array + bias` to __radd__
    __array_ufunc__ = None

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, eq=False, repr=False)(cls)
        fields = dataclasses.fields(cls)
        static = [f.name for f in fields if f.metadata.get("static")]
        data = [f.name for f in fields if f.name not in static]
        jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=static)
        serializable(cls, data)

    def __repr__(self) -> str:
        return with_fields(self)

    def at(self, place: Place) -> Bias:
        """The term where a call puts its queries and keys; computed on whole arrays."""
        return self

    def expand(self) -> tuple[Bias, ...]:
        """The term as a sum of simpler terms; computed on whole arrays."""
        return (self,)

    def contract(
        self,
    ) -> tuple[Float[Array, "#B T #N R"], Float[Array, "#B S #N R"]] | None:
        """(A, B) of a term that is a product sum_r A_ir B_jr; on whole arrays."""
        return None

    def tile(self, t: Positions) -> Any:
        """The term on a tile: a float32 array, or a tuple of parts that add up.

        Inside, a field is what its home says, loaded: one number per head, query, key
        or pair (of a table of distances too), shaped to broadcast against the tile.
        `t.distance` (float32: query position minus key position), `t.query_position`
        and `t.key_position` (int32) are there, and `t.away`, |distance| as parts each
        as small as it can be.

        It works entry by entry: a call raises where a tile adds up, sorts or indexes
        entries, changes axes, or reads an array that is no field.
        """
        return ()

    def bound(self, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        """The largest value on query positions q0..q1, key positions k0..k1, inclusive.

        Arguments are integers or vectors of integers over blocks. A head field is a
        number; any other that does not vary along queries and keys both has the numbers
        `least` and `most` of the ranges. Optional: a term that does not override it is
        never pruned by.
        """
        raise NotImplementedError

    def check(self, name: str) -> None:
        """Refuses fields, as they were given, whose values are known and wrong."""

    @property
    def placed(self) -> bool:
        """Whether the term asks where a call puts its queries and keys."""
        return type(self).at is not Bias.at

    @property
    def bounded(self) -> bool:
        """Whether the term knows the largest value it takes on a range.

        Not of a table of distances that is written out, whose extremes nobody knows.
        """
        known = all(
            is_diagonal(home, getattr(self, name).ndim)
            for name, home in homes(self).items()
            if home == "distance"
        )
        return known and type(self).bound is not Bias.bound

    def materialise(
        self,
        query_positions: Int[Array, "*#BN T"],
        key_positions: Int[Array, "*#BN S"],
    ) -> Float[Array, "#B #N T S"]:
        """The term as an array, for plots and tests: O(TS) memory.

        Args:
            query_positions: int32 [T], [B, T] or [B, #N, T].
            key_positions: int32 [S], [B, S] or [B, #N, S].

        Returns:
            The added values [#B, #N, T, S], float32, or float64 if a field is.

        Raises:
            ValueError: if positions have no axis, or more than three.
        """
        queries, keys = _with_heads(query_positions), _with_heads(key_positions)
        dtype = at_least_float32(*jax.tree.leaves(self))
        region = Region(queries[..., :, None], keys[..., None, :], dtype)
        place = Place(queries, keys, dtype=dtype)
        terms = tuple(by_distance(term.at(place), place) for term in self.expand())
        products = tuple(ab for t in terms if (ab := t.contract()) is not None)
        values = Added(tuple(t for t in terms if has_tile(t)), products).on(region)
        shape = (1, 1, region.query_position.shape[2], region.key_position.shape[3])
        return functools.reduce(jnp.add, values, jnp.zeros(shape, region.dtype))

    def __add__(self, other: Any) -> Sum:
        if not _term(other):
            return NotImplemented
        return Sum((*terms_of(self), *terms_of(other)))

    # Any: of 0 it is the term itself, which `sum` starts with
    def __radd__(self, other: Any) -> Any:
        if isinstance(other, int) and other == 0:
            return self
        if not _term(other):
            return NotImplemented
        return Sum((*terms_of(other), *terms_of(self)))


def _refused(sign: str) -> Any:
    def refuse(self: Bias, *other: Any) -> Any:
        raise TypeError(
            f"A bias has no `{sign}`, only `+`; got {type(self).__name__}. Scale or "
            "negate its arrays: `ALiBi(2 * slopes)`, `DenseBias(-array)`; of a product "
            "one factor."
        )

    return refuse


# Set from here, so that type checkers refuse them too.
for _name, _sign in {
    "__mul__": "*",
    "__rmul__": "*",
    "__truediv__": "/",
    "__sub__": "-",
    "__rsub__": "-",
    "__neg__": "-",
}.items():
    setattr(Bias, _name, _refused(_sign))


class Sum(Bias):
    """A sum of terms, as `a + b` makes it; `Sum(())` is no bias at all.

    Args:
        terms: Bias values; arrays that are added to one become `DenseBias` values
            [#B, #N, #T, #S].

    Example:
        >>> import jax.numpy as jnp
        >>> from pallas_attn import ALiBi, alibi_slopes
        >>> ALiBi(alibi_slopes(8)) + jnp.zeros((1, 8, 97, 97))
        Sum(ALiBi(slopes=f32[8]) + DenseBias(bias=f32[1,8,97,97]))
    """

    terms: tuple[Bias, ...] = ()

    def __repr__(self) -> str:
        if not isinstance(self.terms, tuple):
            return with_fields(self)
        return f"Sum({' + '.join(map(repr, self.terms))})"

    def expand(self) -> tuple[Bias, ...]:
        """All terms, each expanded."""
        return tuple(part for term in self.terms for part in term.expand())


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Added:
    """What the implementations see of a bias, its axes checked and flattened to one B.

    `terms` have a `tile` and fields with homes, [#B, #N], [#B, T, #N], [#B, S, #N],
    [#B, #N, #T, #S] and, by distance, [#B, #N, T + S - 1], one number per diagonal i -
    j + S - 1; `products` are pairs (A [#B, T, #N, R], B [#B, S, #N, R]).
    """

    # whose functions take it: the normalizer's
    family: ClassVar[str] = ""

    terms: tuple[Bias, ...] = ()
    products: tuple[tuple[Array, Array], ...] = ()

    def on(self, region: Region) -> list[Float[Array, "#B #N #T #S"]]:
        """The value of each term and product on whole axes, in the region's dtype."""
        return [tile_on(term, region) for term in self.terms] + [
            product_on(*sides, region.dtype) for sides in self.products
        ]

    def parts_on(self, region: Region) -> list[Float[Array, "#B #N #T #S"]]:
        """What adds up to the values of `on`, each as small as its fields make it."""
        return [part for term in self.terms for part in parts_on(term, region)] + [
            product_on(*sides, region.dtype) for sides in self.products
        ]

    def spread_out(self, T: int, S: int) -> Added:
        """With one number per pair in place of one per diagonal."""

        def term(x: Bias) -> Bias:
            fields = {
                name: toeplitz(getattr(x, name), T, S)
                for name, home in homes(x).items()
                if is_diagonal(home, getattr(x, name).ndim)
            }
            return dataclasses.replace(x, **fields)

        return Added(tuple(map(term, self.terms)), self.products)


def is_diagonal(home: str, ndim: int) -> bool:
    """Whether a field has one number per diagonal: a table, if not written out."""
    return home == "distance" and ndim == 3


def by_distance(term: Bias, place: Place) -> Bias:
    """A term whose tables of distances are what a call reads of them there.

    One number per diagonal, [*#B, #N, T + S - 1], or where positions are explicit one
    per pair, [*#B, #N, T, S].
    """
    fields = {}
    T, S = place.query_positions.shape[-1], place.key_positions.shape[-1]
    for field in dataclasses.fields(term):
        if field.metadata.get("home") != "distance":
            continue
        table, first = getattr(term, field.name), field.metadata["first"]
        first = getattr(term, first) if isinstance(first, str) else first
        table = table.astype(place.dtype)  # what many pairs add to it is rounded once
        table = table.reshape((1,) * (2 - table.ndim) + table.shape)
        if place.offset is not None:
            along = diagonals(table, first, place.offset, T, S)
            fields[field.name] = along if place.diagonal else toeplitz(along, T, S)
        else:
            at = place.query_positions, place.key_positions
            fields[field.name] = written(table, first, *at)
    return dataclasses.replace(term, **fields)


def homes(term: Bias | type[Bias]) -> dict[str, str]:
    """The fields that have a home, and which."""
    fields = dataclasses.fields(term)
    return {f.name: f.metadata["home"] for f in fields if "home" in f.metadata}


def has_tile(term: Bias) -> bool:
    """Whether the term is added elementwise."""
    return type(term).tile is not Bias.tile


def parts_of(value: Any) -> tuple[Array, ...]:
    """What `tile` returned, as a tuple of parts."""
    return value if isinstance(value, tuple) else (value,)


def tile_on(term: Bias, region: Region) -> Float[Array, "#B #N #T #S"]:
    """A term's `tile` on whole axes."""
    return functools.reduce(jnp.add, parts_on(term, region))


def parts_on(term: Bias, region: Region) -> tuple[Float[Array, "#B #N #T #S"], ...]:
    """The parts of a term's `tile` on whole axes."""
    fields = {
        name: spread(home, getattr(term, name)).astype(region.dtype)
        for name, home in homes(term).items()
    }
    return parts_of(dataclasses.replace(term, **fields).tile(region))


def as_bias(x: Any) -> Bias:
    """None, an array or a bias value, as a bias value."""
    from pallas_attn.bias.dense import DenseBias

    if x is None:
        return Sum(())
    return x if isinstance(x, Bias) else DenseBias(x)


def terms_of(x: Any) -> tuple[Bias, ...]:
    """The terms that were added up to a bias; a bias that is no sum is one term."""
    bias = as_bias(x)
    return bias.terms if isinstance(bias, Sum) else (bias,)


def at_least_float32(*arrays: Any) -> Any:
    """float64 if any array is, else float32."""
    wide = any(jnp.result_type(x) == jnp.float64 for x in arrays)
    return jnp.float64 if wide else jnp.float32


def _term(x: Any) -> bool:
    """Whether `+` takes it: not a list, a function or a module, which adds itself."""
    if isinstance(x, list | tuple | str):
        return False
    return not callable(x) or getattr(x, "shape", None) is not None


def _with_heads(positions: Any) -> Int[Array, "#B #N L"]:
    """[L], [B, L] or [B, #N, L] as [#B, #N, L]."""
    positions = jnp.asarray(positions)
    if not 1 <= positions.ndim <= 3:
        raise ValueError(
            "`materialise` takes positions [L], [B, L] or [B, #N, L]; got shape "
            f"{positions.shape}. Write `jnp.arange(length)`."
        )
    if positions.ndim == 1:
        return positions[None, None, :]
    return positions[:, None, :] if positions.ndim == 2 else positions
