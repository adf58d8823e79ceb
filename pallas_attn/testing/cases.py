"""The table of cases: every bias, situation and normalizer, sampled from a key.

A new bias is one line in `BIASES`; every law then covers it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_attn.bias.alibi import ALiBi
from pallas_attn.bias.base import (
    Bias,
    distance_home,
    head_home,
    key_home,
    pair_home,
    query_home,
    Sum,
)
from pallas_attn.bias.co_alibi import CoALiBi
from pallas_attn.bias.dense import DenseBias
from pallas_attn.bias.factored import FactoredBias
from pallas_attn.bias.forget_gate import ForgetGate
from pallas_attn.bias.relative import RelativeBias
from pallas_attn.normalizers.entmax import Entmax
from pallas_attn.normalizers.softmax import Softmax


@dataclass(frozen=True)
class Shape:
    """The sizes of a case and the dtype of its query, key and value; ragged."""

    B: int = 2
    N: int = 2
    K: int = 2
    T: int = 37
    S: int = 53
    H: int = 16
    h: int = 16
    dtype: Any = jnp.float32

    def sizes(self, form: str) -> tuple[int, ...]:
        """The shape that letters spell: "1N1S" -> (1, 2, 1, 53)."""
        return tuple(1 if x == "1" else getattr(self, x) for x in form)


class SquaredDistance(Bias):
    """b_ij = -w |x_i - y_j|^2, a sum of a product and two vectors."""

    weight: Array  # [#N]
    x: Array  # [#B, T, #N, d]
    y: Array  # [#B, S, #N, d]

    def expand(self) -> tuple[Bias, ...]:
        """2 w x.y - w x.x - w y.y."""
        w = self.weight[None, None, :]
        square = lambda x: jnp.swapaxes(-w * (x**2).sum(3), 1, 2)
        return (
            FactoredBias(2 * w[..., None] * self.x, self.y),
            DenseBias(square(self.x)[:, :, :, None]),
            DenseBias(square(self.y)[:, :, None, :]),
        )


class Saturating(Bias):
    """A tile with fields of all four homes, and parts of different shapes."""

    weight: Array = head_home()
    query: Array = query_home()
    key: Array = key_home()
    pair: Array = pair_home()

    def tile(self, t: Any) -> Any:
        """W tanh(u_i + v_j z_ij) - |d| / 100, and u_i."""
        bent = jnp.tanh(self.query + self.key * self.pair)
        near = jnp.exp(-0.01 * jnp.abs(t.distance))
        return self.weight * bent - self.key * near, self.query


class Bent(Bias):
    """A tile that bends a table of distances."""

    table: Array = distance_home(first=-8)
    key: Array = key_home()

    def tile(self, t: Any) -> Any:
        """v_j tanh(table_d)."""
        return self.key * jnp.tanh(self.table)


@dataclass(frozen=True)
class Situation:
    """What a call is beside its bias.

    Args:
        shape: The sizes that differ from a `Shape`'s defaults.
        sample: (key, shape) -> keyword arguments of the public function.
    """

    shape: dict[str, int] = field(default_factory=dict)
    sample: Callable[[Array, Shape], dict[str, Any]] = lambda key, s: {}


def normal(key: Array, *shape: int, dtype: Any = jnp.float32) -> Array:
    """Standard normal numbers, drawn in float32 and rounded."""
    return jax.random.normal(key, shape, jnp.float32).astype(dtype)


def dense(form: str, dtype: Any = None) -> Callable[[Array, Shape], Bias]:
    """Samples a dense bias of a form such as "1N1S"."""
    return lambda key, s: DenseBias(normal(key, *s.sizes(form), dtype=dtype or s.dtype))


def factored(
    form: str = "BN BN", rank: int = 5, dtype: Any = None
) -> Callable[[Array, Shape], Bias]:
    """Samples a factored bias; the form says (B, N) of the query's and key's factor."""
    (b, n), (b2, n2) = form.split()

    def sample(key: Array, s: Shape) -> Bias:
        kq, kk = jax.random.split(key)
        q = normal(kq, *s.sizes(f"{b}T{n}"), rank, dtype=dtype or s.dtype)
        return FactoredBias(
            q * 0.5, normal(kk, *s.sizes(f"{b2}S{n2}"), rank, dtype=dtype or s.dtype)
        )

    return sample


def alibi(form: str = "N", first: float = 0.05) -> Callable[[Array, Shape], Bias]:
    """Samples ALiBi slopes of a form, from `first` up."""
    return lambda key, s: ALiBi(_slopes(key, s.sizes(form), first))


def co_alibi(form: str = "N", first: float = 0.05) -> Callable[[Array, Shape], Bias]:
    """Samples Co-ALiBi slopes of a form, from `first` up."""
    return lambda key, s: CoALiBi(_slopes(key, s.sizes(form), first))


def _slopes(key: Array, shape: tuple[int, ...], first: float) -> Array:
    return first + 0.8 * jax.random.uniform(key, shape, jnp.float32)


def forget_gate(form: str = "BSN", shift: float = 1.0) -> Callable[[Array, Shape], Any]:
    """Samples a forget gate of a form; a larger shift forgets less."""

    def sample(key: Array, s: Shape) -> Bias:
        return ForgetGate(jax.nn.log_sigmoid(2 * normal(key, *s.sizes(form)) + shift))

    return sample


def resetting(key: Array, s: Shape) -> Bias:
    """Samples a forget gate that resets with every size, -inf included."""
    kept, size, where = jax.random.split(key, 3)
    shape = s.sizes("BSN")
    sizes = jnp.array([-1e4, -65504, -1e9, -1e20, -3e38, -jnp.inf], jnp.float32)
    resets = jax.random.choice(size, sizes, shape)
    gates = jax.nn.log_sigmoid(normal(kept, *shape) + 2)
    return ForgetGate(jnp.where(jax.random.bernoulli(where, 0.1, shape), resets, gates))


def added(*samples: Callable[[Array, Shape], Any]) -> Callable[[Array, Shape], Bias]:
    """Samples the sum of several biases."""

    def sample(key: Array, s: Shape) -> Bias:
        keys = jax.random.split(key, len(samples))
        return sum((f(k, s) for f, k in zip(samples, keys, strict=True)), Sum(()))

    return sample


def squared_distance(key: Array, s: Shape) -> Bias:
    """Samples a `SquaredDistance` in three dimensions, points shared over heads."""
    kw, kx, ky = jax.random.split(key, 3)
    weight = 0.1 + 0.2 * jax.random.uniform(kw, (s.N,), jnp.float32)
    return SquaredDistance(weight, normal(kx, 1, s.T, 1, 3), normal(ky, s.B, s.S, 1, 3))


def saturating(key: Array, s: Shape) -> Bias:
    """Samples a `Saturating` whose fields have one broadcast axis each."""
    keys = jax.random.split(key, 4)
    forms = ("1N", "BT1", "1SN", "1NTS")
    return Saturating(
        *(normal(k, *s.sizes(f)) for k, f in zip(keys, forms, strict=True))
    )


def relative(
    form: str, distances: int, first: int, dtype: Any = jnp.float32
) -> Callable[[Array, Shape], Bias]:
    """Samples a table of distances of a form, from `first` on."""
    return lambda key, s: RelativeBias(
        normal(key, *s.sizes(form), distances, dtype=dtype), first
    )


def by_distance(key: Array, s: Shape) -> Bias:
    """Samples a `Bent`."""
    return Bent(normal(key, 1, s.N, 31), normal(key, s.B, s.S, 1))


def forms(letters: str) -> list[str]:
    """All broadcast forms of an array: "NT" -> ["NT", "N1", "1T", "11"]."""
    return ["".join(x) for x in itertools.product(*((x, "1") for x in letters))]


# One line per bias. A name with a hyphen is a variant of the kind before it: the laws
# of values and gradients take all, the others one of each kind.
BIASES: dict[str, Callable[[Array, Shape], Any]] = {
    "none": lambda key, s: None,
    "dense": dense("BNTS"),
    **{f"dense-{form}": dense(form) for form in forms("BNTS")[1:]},
    "dense-float32": dense("BNTS", jnp.float32),
    "dense-array NTS": lambda key, s: normal(key, s.N, s.T, s.S, dtype=s.dtype),
    "dense-array TS": lambda key, s: normal(key, s.T, s.S, dtype=s.dtype),
    "factored": factored(),
    **{
        f"factored-{form} R{rank}": factored(form, rank)
        for form, rank in zip(
            [f"{x[:2]} {x[2:]}" for x in forms("BNBN")], [1, 5, 16, 20] * 4, strict=True
        )
    },
    "factored-float32": factored("1N B1", 8, jnp.float32),
    "factored-float32 R20": factored("BN 1N", 20, jnp.float32),
    "factored-bfloat16": factored("B1 1N", 8, jnp.bfloat16),
    "alibi": alibi(),
    "alibi-1N": alibi("1N"),
    "alibi-BN": alibi("BN"),
    "alibi-negative": alibi("N", -0.4),
    "sum": added(alibi(), factored(), dense("1NTS")),
    "sum-alibi factored": added(alibi("BN"), factored("1N 1N")),
    "sum-factored dense": added(factored(), dense("BNTS")),
    "sum-three dense": added(dense("BNTS"), dense("1NTS"), dense("B11S")),
    "sum-two alibi": added(alibi(), alibi("B1")),
    "squared distance": squared_distance,
    "saturating": saturating,
    "saturating-with alibi": added(saturating, alibi()),
    "forget gate": forget_gate(),
    "forget gate-1S1": forget_gate("1S1"),
    "forget gate-BS1": forget_gate("BS1", 4.0),
    "forget gate-resets": resetting,
    "forget gate-with alibi dense": added(forget_gate("1SN"), alibi(), dense("B11S")),
    "relative": relative("1N", 23, -9),
    **{f"relative-{form}": relative(form, 11, 4) for form in forms("BN")},
    "relative-long": relative("BN", 200, -60),
    "relative-bfloat16": relative("1N", 40, -20, jnp.bfloat16),
    "relative-own tile": by_distance,
    "relative-sum": added(relative("11", 30, -2), alibi(), dense("1NTS")),
    "co_alibi": co_alibi(),
    "co_alibi-1N": co_alibi("1N"),
    "co_alibi-BN": co_alibi("BN"),
    "co_alibi-B1": co_alibi("B1"),
    "co_alibi-negative": co_alibi("N", -0.4),
}
KINDS = [name for name in BIASES if "-" not in name]


def learned(top_k: int | None = None) -> Callable[[Array, Shape], Entmax]:
    """Samples an alpha per head, 1 among them."""

    def sample(key: Array, s: Shape) -> Entmax:
        alphas = jnp.array([1.0, 1.5, 1.2, 2.0], jnp.float32)
        return Entmax(jnp.resize(alphas, (s.N,)), top_k)

    return sample


def sunk(key: Array, s: Shape) -> Softmax:
    """A sink that takes from little of a row to nearly all of it."""
    return Softmax(normal(key, s.N) * 3)


def _entmax(alpha: float, top_k: int | None = None) -> Callable[[Array, Shape], Entmax]:
    return lambda key, s: Entmax(alpha, top_k)


ALPHAS = (1.0, 1.1, 1.25, 1.5, 1.75, 2.0)
TOP_K = (1, 3, 8, 33, 99)  # 99: more keys than there are

# One line per normalizer: (key, shape) -> normalizer.
NORMALIZERS: dict[str, Callable[[Array, Shape], Any]] = {
    "softmax": lambda key, s: Softmax(),
    "sink": sunk,
    **{f"entmax {alpha}": _entmax(alpha) for alpha in ALPHAS},
    **{
        f"entmax {alpha} top {k}": _entmax(alpha, k)
        for alpha, k in itertools.product(ALPHAS, TOP_K)
    },
    "entmax 1.001": _entmax(1.001),
    "entmax learned": learned(),
    "entmax learned top 8": learned(8),
}


def _mask(form: str) -> Callable[[Array, Shape], dict[str, Any]]:
    return lambda key, s: {"mask": jax.random.bernoulli(key, 0.7, s.sizes(form))}


def _lengths(key: Array, s: Shape) -> dict[str, Any]:
    kq, kk = jax.random.split(key)
    return {
        "query_seq_lengths": jax.random.randint(kq, (s.B,), 1, s.T, jnp.int32),
        "key_value_seq_lengths": jax.random.randint(kk, (s.B,), 1, s.S, jnp.int32),
    }


def _segments(key: Array, s: Shape) -> dict[str, Any]:
    kq, kk = jax.random.split(key)
    ids = lambda key, n: jnp.sort(jax.random.randint(key, (s.B, n), 0, 4, jnp.int32), 1)
    return {"query_segment_ids": ids(kq, s.T), "key_segment_ids": ids(kk, s.S)}


def _packed(key: Array, s: Shape) -> dict[str, Any]:
    """Documents side by side, each from position 0 on."""
    ids = _segments(key, s)

    def within(ids: Array) -> Array:
        here = jax.lax.broadcasted_iota(jnp.int32, ids.shape, 1)
        new = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))
        return here - jax.lax.cummax(jnp.where(new, here, 0), axis=1)

    sides = {name: within(ids[f"{name}_segment_ids"]) for name in ("query", "key")}
    return ids | {f"{name}_positions": x for name, x in sides.items()}


def _positions(form: str, gap: int = 1) -> Callable[[Array, Shape], dict[str, Any]]:
    """Every position in a random order; or gappy and in order where `gap` > 1."""

    def sample(key: Array, s: Shape) -> dict[str, Any]:
        def draw(key: Array, n: int) -> Array:
            shape = (*s.sizes(form), n)
            if gap > 1:
                steps = jax.random.randint(key, shape, 0, gap, jnp.int32)
                return jnp.cumsum(steps, -1, dtype=jnp.int32) - jnp.int32(9)
            order = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), shape)
            return jax.random.permutation(key, order, axis=-1, independent=True)

        kq, kk = jax.random.split(key)
        return {"query_positions": draw(kq, s.T), "key_positions": draw(kk, s.S)}

    return sample


def _settings(**settings: Any) -> Callable[[Array, Shape], dict[str, Any]]:
    return lambda key, s: settings


def _together(
    *samples: Callable[[Array, Shape], dict[str, Any]],
) -> Callable[[Array, Shape], dict[str, Any]]:
    def sample(key: Array, s: Shape) -> dict[str, Any]:
        keys = jax.random.split(key, len(samples))
        drawn = [f(k, s) for f, k in zip(samples, keys, strict=True)]
        return {name: x for each in drawn for name, x in each.items()}

    return sample


def _dropout(rate: float) -> Callable[[Array, Shape], dict[str, Any]]:
    return lambda key, s: {
        "dropout_rate": rate,
        "dropout_rng": jax.random.key_data(key),
    }


_causal = _settings(is_causal=True)
SITUATIONS: dict[str, Situation] = {
    "full": Situation(),
    "causal": Situation(sample=_causal),
    "causal GQA": Situation({"N": 4, "K": 2, "B": 1}, _causal),
    "multi-query": Situation({"N": 3, "K": 1}),
    "bottom-right": Situation(
        sample=lambda key, s: {"is_causal": True, "query_offset": s.S - s.T}
    ),
    "empty rows": Situation(sample=_settings(is_causal=True, query_offset=-20)),
    "offset per batch": Situation(
        sample=lambda key, s: {
            "is_causal": True,
            "query_offset": jax.random.randint(key, (s.B,), -9, s.S, jnp.int32),
        }
    ),
    "H24 h40": Situation({"H": 24, "h": 40}),
    "mask BNTS": Situation(sample=_mask("BNTS")),
    "mask B11S": Situation(sample=_together(_mask("B11S"), _causal)),
    "mask TS GQA": Situation({"N": 4, "K": 2, "B": 1}, _mask("TS")),
    "mask BNT1": Situation(sample=_mask("BNT1")),
    "lengths": Situation(sample=_lengths),
    "causal lengths GQA": Situation(
        {"N": 4, "K": 1}, _together(_lengths, _settings(is_causal=True))
    ),
    "window": Situation(sample=_settings(local_window_size=9)),
    "window left": Situation(
        sample=_settings(local_window_size=(7, 0), query_offset=11)
    ),
    "causal window lengths": Situation(
        sample=_together(_lengths, _settings(is_causal=True, local_window_size=(12, 3)))
    ),
    "segments": Situation(sample=_segments),
    "causal segments": Situation(sample=_together(_segments, _causal)),
    "positions shuffled": Situation(sample=_together(_positions(""), _causal)),
    "positions gappy": Situation(
        sample=_together(_positions("B", 4), _settings(local_window_size=(20, 5)))
    ),
    "positions per head": Situation(
        {"N": 4, "K": 2}, _together(_positions("BN"), _causal)
    ),
    "scale": Situation(sample=_settings(scale=0.3)),
    "scale 0": Situation(sample=_settings(scale=0.0, is_causal=True)),
    "scale negative": Situation(sample=_settings(scale=-0.3)),
    "scale array": Situation(sample=lambda key, s: {"scale": jnp.float32(1.1)}),
    "all at once": Situation(
        {"N": 4, "K": 2, "h": 24},
        _together(
            _lengths,
            _segments,
            _mask("B1TS"),
            _settings(is_causal=True, query_offset=9, local_window_size=(25, 4)),
        ),
    ),
    "soft cap": Situation(sample=_settings(logits_soft_cap=0.9, is_causal=True)),
    "dropout": Situation(sample=_dropout(0.3)),
    "dropout GQA soft cap": Situation(
        {"N": 4, "K": 2},
        _together(
            _dropout(0.1),
            _lengths,
            _settings(is_causal=True, logits_soft_cap=1.5, scale=0.4),
        ),
    ),
    "packed": Situation(sample=_together(_packed, _causal)),
}


@dataclass(frozen=True)
class Sample:
    """One call: its arguments, sorted by what may be done to them.

    Args:
        operands: The floating arrays, differentiated: query, key, value, bias, scale,
            and the normalizer, which may hold an alpha.
        conditions: The arrays of integers and booleans.
        settings: Python values.
        cotangents: Of the output and of the residual.
    """

    operands: dict[str, Any]
    conditions: dict[str, Any]
    settings: dict[str, Any]
    cotangents: tuple[Array, Array]


@dataclass(frozen=True)
class Case:
    """A bias in a situation; `shape` holds sizes that differ from the situation's."""

    bias: str
    situation: str = "full"
    shape: tuple[tuple[str, Any], ...] = ()
    normalizer: str = "softmax"

    def __str__(self) -> str:
        changed = "".join(f", {name}={size}" for name, size in self.shape)
        sparse = "" if self.normalizer == "softmax" else f"{self.normalizer}, "
        return f"{sparse}{self.bias}, {self.situation}{changed}"

    def at(self, **sizes: Any) -> Case:
        """The same case with other sizes or another dtype."""
        return replace(self, shape=(*self.shape, *sizes.items()))

    @property
    def sizes(self) -> Shape:
        """The sizes and the dtype."""
        return Shape(**{**SITUATIONS[self.situation].shape, **dict(self.shape)})

    def sample(self, seed: int = 0) -> Sample:
        """Draws the arguments of the call."""
        s = self.sizes
        first = jax.random.key(seed)
        keys = jax.random.split(first, 7)
        draw = lambda place, *shape: normal(keys[place], *shape, dtype=s.dtype)
        arguments = {
            "query": draw(0, s.B, s.T, s.N, s.H),
            "key": draw(1, s.B, s.S, s.K, s.H),
            "value": draw(2, s.B, s.S, s.K, s.h),
            "bias": BIASES[self.bias](keys[3], s),
            **SITUATIONS[self.situation].sample(keys[4], s),
        }
        if self.normalizer != "softmax":
            key = jax.random.fold_in(first, 7)
            arguments["normalizer"] = NORMALIZERS[self.normalizer](key, s)
        cotangents = draw(5, s.B, s.T, s.N, s.h), normal(keys[6], s.B, s.T, s.N)
        return Sample(*_sorted(arguments), cotangents)

    def specs(self) -> Sample:
        """The sample as shapes and dtypes: nothing is computed, whatever the sizes."""
        settings = {}

        def arrays() -> Any:
            sample = self.sample()
            settings.update(sample.settings)
            return sample.operands, sample.conditions, sample.cotangents

        operands, conditions, cotangents = jax.eval_shape(arrays)
        return Sample(operands, conditions, settings, cotangents)


def _sorted(
    arguments: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    operands, conditions, settings = {}, {}, {}
    for name, x in arguments.items():
        leaves = jax.tree.leaves(x)
        if not all(isinstance(leaf, jax.Array) for leaf in leaves):
            settings[name] = x
        elif all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves):
            operands[name] = x
        else:
            conditions[name] = x
    return operands, conditions, settings


def cases() -> list[Case]:
    """Every bias in one common situation, and every situation with one common bias.

    The common ones take turns, so that few cases hold most pairs. Co-ALiBi, which has
    passes of its own, meets every situation.
    """
    common = itertools.cycle(
        ["full", "causal", "causal GQA", "bottom-right", "lengths"]
    )
    by_bias = [Case(bias, next(common)) for bias in BIASES]
    kinds = itertools.cycle(["alibi", "none", "dense-1NTS", "factored", "sum"])
    by_situation = [Case(next(kinds), situation) for situation in SITUATIONS]
    contextual = [Case("co_alibi", situation) for situation in SITUATIONS]
    return list(dict.fromkeys(by_bias + by_situation + contextual))
