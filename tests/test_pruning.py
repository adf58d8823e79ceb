"""What pruning leaves out is not missed, whatever the input; and it is a lot."""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_attn import (
    ALiBi,
    Bias,
    Block,
    CoALiBi,
    Config,
    DenseBias,
    FactoredBias,
    ForgetGate,
    RelativeBias,
    visited,
)
from pallas_attn.bias.base import head_home
from pallas_attn.testing.cases import Case, Sample
from pallas_attn.testing.evaluate import (
    EXACT,
    gradients,
    kernel_implementation,
    SMALL_CONTEXTUAL,
    truth,
    values,
)
from pallas_attn.testing.numerics import (
    assert_nothing_missed,
    assert_rounded_apart,
    assert_rounding,
    largest_errors,
    OUTPUT_RATIO,
    PRUNING,
)
from pallas_attn.triton import schedule


BLOCK = Block(32, 32)
PRUNED = Config(BLOCK, BLOCK, BLOCK, BLOCK)
UNPRUNED = replace(PRUNED, prune=False)
OPTIONS: dict[str, Any] = {"implementation": kernel_implementation(), **EXACT}
STEEP = ALiBi(jnp.array([2.0, 0.25]))
CAUSAL = {"is_causal": True}


@dataclass(frozen=True)
class Adversary:
    """An input that would show a bound that claims too little."""

    settings: dict[str, Any] = field(default_factory=lambda: CAUSAL)
    bias: Bias = STEEP
    sizes: dict[str, int] = field(default_factory=dict)
    edit: Any = lambda query, key, value: (query, key, value)
    conditions: dict[str, Any] = field(default_factory=dict)


def factor(seed, length):
    return 0.3 * jax.random.normal(jax.random.key(seed), (1, length, 2, 5))


def gates(*logs):
    """Log gates [1, 192, 2], one kind a head, that vary from key to key."""
    steps = jax.random.uniform(jax.random.key(3), (1, 192, 2), minval=0.2, maxval=2.0)
    return ForgetGate(steps * jnp.array(logs)[None, None])


def table(*spread, first=-192):
    """A table that decays, and some numbers that would show a wrong bound."""
    away = jnp.abs(jnp.arange(384.0) + first)[None]
    noise = jax.random.normal(jax.random.key(5), (2, 384))
    numbers = jnp.array([[-0.9], [-0.2]]) * away + noise
    for place, x in spread:
        numbers = numbers.at[:, place - first].set(x)
    return RelativeBias(numbers, first)


def of_keys(*spread):
    """One number a key, and some values that would show a wrong extreme."""
    bias = jax.random.normal(jax.random.key(4), (1, 2, 1, 192))
    for place, x in spread:
        bias = bias.at[..., place].set(x)
    return DenseBias(bias)


ADVERSARIES = {
    "causal": Adversary(),
    "full": Adversary({}),
    "ragged full": Adversary({}, sizes={"T": 181, "S": 167}),
    "GQA": Adversary(sizes={"K": 1}),
    "offset": Adversary({"is_causal": True, "query_offset": 60}, sizes={"T": 140}),
    "sink": Adversary(edit=lambda q, k, v: (q, k.at[:, 3].multiply(60), v)),
    "sink full": Adversary({}, edit=lambda q, k, v: (q, k.at[:, 3].multiply(60), v)),
    "huge key": Adversary(edit=lambda q, k, v: (q, k.at[:, 70].multiply(1e4), v)),
    "huge value": Adversary(edit=lambda q, k, v: (q, k, v.at[:, 5].multiply(1e4))),
    "NaN key": Adversary(edit=lambda q, k, v: (q, k.at[:, 5, :, 2].set(jnp.nan), v)),
    "NaN value": Adversary(edit=lambda q, k, v: (q, k, v.at[:, 5, :, 2].set(jnp.nan))),
    "inf value": Adversary(edit=lambda q, k, v: (q, k, v.at[:, 5, 1, 2].set(jnp.inf))),
    "NaN query": Adversary(
        edit=lambda q, k, v: (q.at[:, 150, 0, 1].set(jnp.nan), k, v)
    ),
    "scores x40": Adversary(edit=lambda q, k, v: (q * 40, k, v)),
    "scores 0": Adversary(edit=lambda q, k, v: (q * 0, k, v)),
    "negative slopes": Adversary(bias=ALiBi(jnp.array([-0.3, 0.2]))),
    "negative slopes full": Adversary({}, ALiBi(jnp.array([-0.3, 0.2]))),
    "zero slopes": Adversary(bias=ALiBi(jnp.zeros(2))),
    "window": Adversary({"is_causal": True, "local_window_size": (40, 0)}),
    "window full": Adversary({"local_window_size": (50, 20)}),
    "lengths": Adversary(
        conditions={
            "query_seq_lengths": jnp.array([170], jnp.int32),
            "key_value_seq_lengths": jnp.array([90], jnp.int32),
        }
    ),
    "factored": Adversary(bias=STEEP + FactoredBias(factor(1, 192), factor(2, 192))),
    "two slopes": Adversary(bias=STEEP + ALiBi(jnp.array([0.1, 0.6]))),
    "gates": Adversary(bias=gates(-1.5, -0.1)),
    "gates full": Adversary({}, gates(-1.5, -0.1), {"T": 181}),
    "gates that forget everything": Adversary(bias=gates(-300.0, -1e-3)),
    "gates and slopes": Adversary(bias=gates(-0.2, -0.1) + STEEP),
    "table": Adversary(bias=table()),
    "table full": Adversary({}, table(), {"T": 181, "S": 167}),
    "table with a far peak": Adversary(bias=table((150, 7.0))),
    "table with a peak of the first key": Adversary({}, table((-191, 9.0), (191, 9.0))),
    "NaN in a table": Adversary(bias=table((-40, jnp.nan))),
    "table of a short first": Adversary(
        {"is_causal": True, "query_offset": 60},
        table((200, 3.0), first=-30) + STEEP,
        {"T": 140},
    ),
    "keys at -1e9": Adversary({}, of_keys((slice(60, 192), -1e9))),
    "keys at -inf": Adversary(CAUSAL, of_keys((slice(40, 140), -jnp.inf))),
    "NaN of a key": Adversary({}, of_keys((slice(60, 192), -1e9), (100, jnp.nan))),
}


def sample(adversary):
    sizes = {"B": 1, "T": 192, "S": 192, **adversary.sizes}
    drawn = Case("none").at(**sizes).sample()
    names = ("query", "key", "value")
    edited = adversary.edit(*(drawn.operands[name] for name in names))
    operands = {**dict(zip(names, edited, strict=True)), "bias": adversary.bias}
    return Sample(operands, adversary.conditions, adversary.settings, drawn.cotangents)


@pytest.fixture
def no_budget(monkeypatch):
    """Calls a function where the bound may leave out nothing: the same arithmetic."""

    def call(function, *arguments, **options):
        with monkeypatch.context() as patch:
            patch.setattr(schedule, "BUDGET", -1.0)
            jax.clear_caches()
            result = jax.block_until_ready(function(*arguments, **options))
        jax.clear_caches()
        return result

    return call


FEW = ("GQA", "scores x40", "gates and slopes")
ROWS = [pytest.param(x, marks=[pytest.mark.light] * (x in FEW)) for x in ADVERSARIES]


@pytest.mark.whole
@pytest.mark.parametrize("name", ROWS)
def test_what_is_left_out_is_not_missed(name, no_budget):
    drawn = sample(ADVERSARIES[name])
    pruned = gradients(drawn, config=PRUNED, **OPTIONS)
    whole = no_budget(gradients, drawn, config=PRUNED, **OPTIONS)
    assert_nothing_missed(pruned, whole)
    unpruned = gradients(drawn, config=UNPRUNED, **OPTIONS)
    assert_rounded_apart(pruned, unpruned, truth(drawn))


@pytest.mark.at_most(2)
@pytest.mark.parametrize(("dtype", "size"), [("float16", 1.0), ("bfloat16", 1e20)])
def test_weights_stay_within_range(dtype, size):
    """One key is 2^70 above the others; and its value, in bfloat16, is large too."""

    def edit(q, k, v):
        return jnp.abs(q), k.at[:, 3].set(16.0), v.at[:, 3].multiply(size)

    sink = Adversary({}, edit=edit)
    drawn = sample(sink)
    narrow = {x: drawn.operands[x].astype(dtype) for x in ("query", "key", "value")}
    drawn = replace(drawn, operands={**drawn.operands, **narrow})
    pruned, unpruned = (
        values(drawn, config=config, **OPTIONS) for config in (PRUNED, UNPRUNED)
    )
    assert_rounding(pruned, unpruned, truth(drawn)[0], OUTPUT_RATIO)


def test_without_a_budget_everything_is_visited(no_budget):
    for name, share in no_budget(shares, Adversary())._asdict().items():
        assert (np.asarray(share) == 1).all(), f"{name} visits {share}"


class Overconfident(Bias):
    """ALiBi whose bound claims too little: less than the farthest pair's value."""

    slopes: Any = head_home()

    def tile(self, t):
        return -self.slopes * jnp.abs(t.distance)

    def bound(self, q0, q1, k0, k1):
        farthest = jnp.maximum(jnp.abs(q1 - k0), jnp.abs(k1 - q0)) + 40
        return -self.slopes * farthest.astype(jnp.float32)


def test_a_wrong_bound_is_noticed(no_budget):
    """The comparison has teeth: with a bound that claims too little it fails."""
    drawn = sample(Adversary(bias=Overconfident(jnp.array([0.5, 0.25]))))
    pruned = gradients(drawn, config=PRUNED, **OPTIONS)
    found = largest_errors(
        pruned, no_budget(gradients, drawn, config=PRUNED, **OPTIONS)
    )
    for name in ("[0][0]", "[1]['query']", "[1]['key']", "[1]['value']"):
        assert found[name] > PRUNING, name


def shares(adversary, config=PRUNED):
    drawn = sample(adversary)
    given = {**drawn.operands, **drawn.conditions, **drawn.settings}
    return jax.jit(
        lambda operands: visited(**{**given, **operands}, config=config, **OPTIONS)
    )(drawn.operands)


@pytest.mark.parametrize("settings", [CAUSAL, {}], ids=["causal", "full"])
def test_a_table_of_linear_numbers_is_left_out_as_slopes_are(settings):
    """But for the grains of diagonals that a block has beside its own."""
    slopes = jnp.array([0.9, 0.1])
    away = jnp.abs(jnp.arange(1023.0) - 511)[None]
    drawn = Case("none").at(B=1, T=512, S=512).sample().operands
    query, key, value = (drawn[name] for name in ("query", "key", "value"))
    shares, least = (
        visited(query, key, value, bias, config=PRUNED, **settings, **OPTIONS)
        for bias in (RelativeBias(-slopes[:, None] * away, -511), ALiBi(slopes))
    )
    grain = 64 / 512 * (2 if settings else 4)
    for some, of_slopes in zip(shares, least, strict=True):
        assert (some >= of_slopes).all()
        assert (some <= of_slopes + grain).all()
        assert (some[:, 0] < 0.8).all()


@pytest.mark.parametrize("settings", [CAUSAL, {}], ids=["causal", "full"])
def test_a_steep_head_visits_little(settings):
    """Slope 2 falls below 2^-24 in 9 keys, and |q||k| makes up for a few more."""
    for name, share in shares(Adversary(settings))._asdict().items():
        assert share.shape == (1, 2), name
        assert ((share > 0) & (share <= 1)).all(), name
        assert share[0, 0] < 0.6, f"{name} visits {share[0, 0]:.2f}"
        assert share[0, 0] < share[0, 1], name


@pytest.mark.parametrize(
    ("adversary", "config"),
    [
        pytest.param(Adversary(), UNPRUNED, id="prune=False"),
        pytest.param(ADVERSARIES["zero slopes"], PRUNED, id="zero slopes"),
        pytest.param(
            Adversary(bias=STEEP + DenseBias(jnp.zeros((1, 1, 192, 192)))),
            PRUNED,
            id="a term without a bound",
        ),
        pytest.param(
            Adversary(edit=lambda q, k, v: (q * 1e3, k, v)), PRUNED, id="scores x1000"
        ),
        pytest.param(
            Adversary(edit=lambda q, k, v: (q, k.at[:, ::32].set(jnp.nan), v)),
            PRUNED,
            id="NaN in every block",
        ),
    ],
)
def test_everything_is_visited_where_nothing_may_be_left_out(adversary, config):
    for name, share in shares(adversary, config)._asdict().items():
        assert (np.asarray(share) == 1).all(), f"{name} visits {share}"


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_others_visit_everything(implementation):
    drawn = sample(Adversary())
    found = visited(**drawn.operands, **drawn.settings, implementation=implementation)
    assert all((np.asarray(share) == 1).all() for share in found)


CONTEXTUAL = {
    "steep": ([8.0, 2.0], lambda q: q),
    "steep, scores x12": ([8.0, 2.0], lambda q: q * 12),
    "negative": ([-0.5, 8.0], lambda q: q),
    "zero": ([0.0, 8.0], lambda q: q),
    "NaN query": ([8.0, 2.0], lambda q: q.at[:, 150, 0, 1].set(jnp.nan)),
}


def contextual(name, **settings):
    slopes, edit = CONTEXTUAL[name]
    adversary = Adversary(
        {**CAUSAL, **settings},
        CoALiBi(jnp.array(slopes)),
        edit=lambda q, k, v: (edit(q), k, v),
    )
    return adversary


@pytest.mark.at_most(2)
@pytest.mark.parametrize("settings", [{}, {"local_window_size": (90, 0)}], ids=str)
@pytest.mark.parametrize("name", CONTEXTUAL)
def test_an_early_exit_is_not_noticed(name, settings):
    drawn = sample(contextual(name, **settings))
    pruned, unpruned = (
        gradients(drawn, config=replace(SMALL_CONTEXTUAL, prune=prune), **OPTIONS)
        for prune in (True, False)
    )
    assert_rounded_apart(pruned, unpruned, truth(drawn))


def test_a_key_loses_no_more_than_a_row():
    """Every query leaves out the same key, which has 2^-26 of each one's weight."""
    length, queries = 192, slice(64, None)
    one = jnp.zeros((1, length, 1, 4)).at[..., 0].set(1.0)
    near = jnp.zeros((length, 1), bool).at[0].set(True).at[32:64].set(True)
    operands = {
        "query": one,
        "key": jnp.where(near[None, :, :, None], 20 * one, -20 * one),
        "value": jnp.ones((1, length, 1, 1)),
        "bias": CoALiBi(jnp.array([0.54])),
    }
    do = jnp.zeros((1, length, 1, 1)).at[:, queries].set(1.0)
    drawn = Sample(operands, {}, {**CAUSAL, "scale": 1.0}, (do, do[..., 0]))
    _, got = gradients(drawn, config=SMALL_CONTEXTUAL, **OPTIONS)
    lost = np.abs(got["value"] - truth(drawn)[1]["value"])[0, 0, 0, 0]
    assert lost <= schedule.BUDGET, f"{lost / schedule.BUDGET:.1f} budgets of a key"


def test_an_early_exit_leaves_out_a_lot():
    found = shares(contextual("steep"), SMALL_CONTEXTUAL)
    for name, share in found._asdict().items():
        assert (share[0] < 0.6).all(), f"{name} visits {share}"
    unpruned = replace(SMALL_CONTEXTUAL, prune=False)
    for name, share in shares(contextual("steep"), unpruned)._asdict().items():
        assert (np.asarray(share) == 1).all(), f"{name} visits {share}"


@pytest.mark.parametrize("name", ["negative", "zero"])
def test_a_slope_up_to_0_never_exits(name):
    for share in shares(contextual(name), SMALL_CONTEXTUAL):
        assert share[0, 0] == 1
        assert share[0, 1] < 1
