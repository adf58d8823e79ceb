"""A training step of a small GPT: our layer with ALiBi, and the bias as an array."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pallas_attn import linen
from pallas_attn.api import dot_product_attention
from pallas_attn.benchmark import measure, peers, timing
from pallas_attn.benchmark.programs import compiled
from pallas_attn.benchmark.results import Result
from pallas_attn.benchmark.timing import Failure
from pallas_attn.bias.alibi import ALiBi, alibi_slopes
from pallas_attn.bias.dense import DenseBias
from pallas_attn.implementations import Implementation
from pallas_attn.testing.numerics import FORMULA, GRADIENT_RATIO


Attend = Callable[..., Float[Array, "B T N H"]]
SIDES = ("ours", "peer")
WORKS = ("attention", "step")
LEARNING_RATE = 3e-4


@dataclass(frozen=True)
class StepTarget:
    """What a step is to reach; each is ours over the peer's.

    Args:
        attention: Time of the attention of all layers, forward and backward.
        step: Time of the whole step.
        memory_share: Memory of the whole step.
    """

    attention: float
    step: float
    memory_share: float


@dataclass(frozen=True)
class StepCase:
    """A GPT with ALiBi, in the letters of GUIDE.md; its width is N H.

    Args:
        name: By which `bench` selects it.
        origin: Where the model is from.
        layers: Of the transformer.
        vocabulary: How many tokens there are.
        dtype: Of activations; parameters are float32.
        peer: The implementation of `jax.nn.dot_product_attention`.
        target: What to reach, or None.
        on_request: Run only where it is named.
    """

    name: str
    origin: str
    B: int
    N: int
    T: int
    H: int
    layers: int = 4
    vocabulary: int = 8192
    dtype: str = "bfloat16"
    peer: peers.Backend = "cudnn"
    target: StepTarget | None = None
    platform: Literal["gpu", "cpu"] = "gpu"
    on_request: bool = False

    @property
    def shape(self) -> str:
        """The problem in one line."""
        sizes = f"B{self.B} N{self.N} T{self.T} H{self.H} {self.dtype}"
        return f"{sizes}, GPT of {self.layers} layers, {self.vocabulary} tokens, ALiBi"

    @property
    def peer_title(self) -> str:
        """As it stands in a table."""
        name = "cuDNN" if self.peer == "cudnn" else self.peer
        return f"flax, jax.nn {name}, the bias as an array"


STEPS = (
    StepCase(
        name="gpt-4k",
        origin="no system's: the heads and widths of GPT-2 medium, 4 layers, AdamW",
        B=4,
        N=16,
        T=4096,
        H=64,
        target=StepTarget(attention=1 / 2.5, step=1.0, memory_share=1.0),
    ),
    StepCase(
        name="cpu-gpt",
        origin="no system's: what two CPU threads do in about a second",
        B=1,
        N=4,
        T=512,
        H=32,
        vocabulary=256,
        dtype="float32",
        peer="xla",
        platform="cpu",
        on_request=True,
    ),
)


class GPT(nn.Module):
    """Pre-norm transformer without biases in its projections.

    Args:
        case: Its sizes.
        attention: Makes the layer called `name`, which maps [B, T, N H] to the same.
    """

    case: StepCase
    attention: Callable[[str], nn.Module]

    @nn.compact
    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T vocabulary"]:
        """Logits of each next token, at least float32."""
        case, width = self.case, self.case.N * self.case.H
        dense = functools.partial(nn.Dense, use_bias=False, dtype=case.dtype)
        norm = functools.partial(nn.LayerNorm, use_bias=False, dtype=case.dtype)
        x = nn.Embed(case.vocabulary, width, dtype=case.dtype)(tokens)
        for i in range(case.layers):
            x = x + self.attention(f"attention_{i}")(norm()(x))
            x = x + dense(width)(nn.gelu(dense(4 * width)(norm()(x))))
        logits = dense(case.vocabulary)(norm()(x))
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


@dataclass(frozen=True)
class Side:
    """Ours or the peer. `bias` is what the peer reads and ours does not: [1, N, T, T].

    Args:
        model: (bias) -> the GPT.
        attend: (query, key, value, bias) -> output, with ALiBi, causal.
    """

    case: StepCase
    model: Callable[[Array | None], GPT]
    attend: Attend

    def attention(self, bias: Array | None, layers: Sequence[Any]) -> list[Any]:
        """Outputs and the gradients of query, key and value, layer by layer."""
        found = []
        for query, key, value, cotangent in layers:
            attend = functools.partial(self.attend, bias=bias)
            output, pullback = jax.vjp(attend, query, key, value)
            found.append((output, pullback(cotangent)))
        return found

    def loss(
        self, parameters: Any, tokens: Int[Array, "B T+1"], bias: Array | None
    ) -> Float[Array, ""]:
        """Mean cross entropy of each next token, in nats."""
        logits: Any = self.model(bias).apply(parameters, tokens[:, :-1])
        logs = jax.nn.log_softmax(logits)
        return -jnp.mean(jnp.take_along_axis(logs, tokens[:, 1:, None], axis=-1))

    def gradient(
        self, parameters: Any, tokens: Int[Array, "B T+1"], bias: Array | None
    ) -> dict[str, Any]:
        """The loss and its gradient."""
        loss, gradient = jax.value_and_grad(self.loss)(parameters, tokens, bias)
        return {"loss": loss, "gradient": gradient}

    def step(
        self, bias: Array | None, parameters: Any, state: Any, tokens: Array
    ) -> tuple[Any, Any, Float[Array, ""]]:
        """A step of AdamW: new parameters, new state, the loss before."""
        import optax

        loss, gradient = jax.value_and_grad(self.loss)(parameters, tokens, bias)
        with jax.numpy_dtype_promotion("standard"):  # optax: float ** int32
            update, state = adamw().update(gradient, state, parameters)
        return optax.apply_updates(parameters, update), state, loss


def adamw() -> Any:
    """The optimiser."""
    import optax

    return optax.adamw(LEARNING_RATE)


def ours(case: StepCase, implementation: Implementation | None) -> Side:
    """Our layer, with slopes instead of an array."""

    def model(bias: Array | None) -> GPT:
        del bias
        layer = functools.partial(
            linen.MultiHeadAttention,
            num_heads=case.N,
            use_bias=False,
            dtype=case.dtype,
            bias=linen.ALiBi(),
            is_causal=True,
            implementation=implementation,
        )
        return GPT(case, lambda name: layer(name=name))

    def attend(query: Array, key: Array, value: Array, bias: Array | None) -> Array:
        del bias
        return dot_product_attention(
            query,
            key,
            value,
            ALiBi(alibi_slopes(case.N)),
            is_causal=True,
            implementation=implementation,
        )

    return Side(case, model, attend)


def peer(case: StepCase) -> Side:
    """Flax's layer around jax.nn's attention, with the bias as an array.

    The bias is made once, outside the step. Nobody asks for its gradient, but cuDNN's
    backward pass in jax.nn computes it of any floating bias: that is the peer's cost.
    """

    def attend(
        query: Array, key: Array, value: Array, bias: Array | None = None
    ) -> Array:
        assert bias is not None
        return peers.with_bias(
            query, key, value, DenseBias(bias), causal=True, backend=case.peer
        )

    def model(bias: Array | None) -> GPT:
        # flax passes its own `bias`, which is None
        def attention_fn(
            query: Array, key: Array, value: Array, mask: None = None
        ) -> Array:
            del mask
            return attend(query, key, value, bias)

        layer = functools.partial(
            nn.MultiHeadDotProductAttention,
            num_heads=case.N,
            use_bias=False,
            dtype=case.dtype,
            attention_fn=attention_fn,
        )
        return GPT(case, lambda name: layer(name=name))

    return Side(case, model, attend)


def truth(case: StepCase) -> Side:
    """Ours at twice the precision, by "xla"."""
    wide = "float64" if case.dtype == "float32" else "float32"
    return ours(dataclasses.replace(case, dtype=wide), "xla")


def drawn(case: StepCase, seed: PRNGKeyArray) -> dict[str, Any]:
    """All arrays: parameters, state, tokens, the bias, and operands of attention."""
    seeds = jax.random.split(seed, 3)
    tokens = jax.random.randint(seeds[0], (case.B, case.T + 1), 0, case.vocabulary)
    parameters = ours(case, "xla").model(None).init(seeds[1], tokens[:, :-1])
    shape = (case.layers, 4, case.B, case.T, case.N, case.H)
    operands = jax.random.normal(seeds[2], shape, jnp.dtype(case.dtype))
    positions = jnp.arange(case.T, dtype=jnp.int32)
    bias = ALiBi(alibi_slopes(case.N)).materialise(positions, positions)
    return {
        "tokens": tokens.astype(jnp.int32),
        "parameters": parameters,
        "state": adamw().init(parameters),
        "bias": bias.astype(case.dtype),
        "layers": [tuple(layer) for layer in operands],
    }


def relative_errors(side: Side, *operands: Any) -> dict[str, Array]:
    """norm(x - truth) / norm(truth) of the loss and of each parameter's gradient."""
    parameters, tokens, bias = operands
    found = side.gradient(parameters, tokens, bias)
    standard = jax.numpy_dtype_promotion("standard")  # flax: float32 parameters
    with jax.default_matmul_precision("highest"), standard:
        want = truth(side.case).gradient(parameters, tokens, None)
    dtype = want["loss"].dtype
    leaves = jax.tree_util.tree_leaves_with_path(want)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): jnp.linalg.norm(
            (x.astype(dtype) - y.astype(dtype)).ravel()
        )
        / jnp.linalg.norm(y.astype(dtype).ravel())
        for (path, y), x in zip(leaves, jax.tree.leaves(found), strict=True)
    }


def jobs(
    case: StepCase, implementation: Implementation
) -> dict[str, Callable[[], Any]]:
    """By name, what compiles each program of a case."""
    shapes = jax.eval_shape(functools.partial(drawn, case), jax.random.key(0))
    found: dict[str, Callable[[], Any]] = {
        "draw": functools.partial(
            compiled, functools.partial(drawn, case), jax.random.key(0)
        )
    }
    for name, side in sides(case, implementation).items():
        programs = {
            "attention": side.attention,
            "step": side.step,
            "errors": functools.partial(relative_errors, side),
        }
        for work, program in programs.items():
            found[f"{name} {work}"] = functools.partial(
                compiled,
                program,
                *operands(name, work, shapes),
                wide=work == "errors" and case.dtype == "float32",
            )
    return found


def sides(case: StepCase, implementation: Implementation) -> dict[str, Side]:
    """By name."""
    return {"ours": ours(case, implementation), "peer": peer(case)}


def operands(side: str, work: str, arrays: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a program is given; the bias where it reads it."""
    bias = arrays["bias"] if side == "peer" else None
    match work:
        case "attention":
            return bias, arrays["layers"]
        case "step":
            return bias, arrays["parameters"], arrays["state"], arrays["tokens"]
        case _:
            return arrays["parameters"], arrays["tokens"], bias


def measured(
    cases: Sequence[StepCase],
    implementation: Implementation,
    repeats: int,
    say: measure.Say,
) -> Iterator[Result]:
    """A result for each case, as they are done.

    Args:
        cases: What to measure.
        implementation: Ours.
        repeats: The most rounds of each timing.
        say: Gets a line of progress.
    """
    for case in cases:
        targets = {} if case.target is None else dataclasses.asdict(case.target)
        result = Result(
            case.name,
            case.shape,
            case.origin,
            case.peer_title,
            targets,
            truth="float32",
        )
        try:
            if importlib.util.find_spec("optax") is None:
                raise ImportError("a training step needs optax: pip install optax")
            programs = measure.compiled_programs(jobs(case, implementation), say)
            yield _measure(case, result, programs, repeats)
        except Exception as error:  # the other cases go on
            failures = {"case": Failure.of(error).text}
            yield dataclasses.replace(result, failures=failures)


def _measure(
    case: StepCase, result: Result, programs: Mapping[str, Any], repeats: int
) -> Result:
    failures = {n: x.text for n, x in programs.items() if isinstance(x, Failure)}
    if "draw" in failures:
        return dataclasses.replace(result, failures=failures)
    arrays = programs["draw"](jax.random.key(0))
    calls = {
        name: functools.partial(programs[name], *operands(side, work, arrays))
        for work in WORKS
        for side in SIDES
        if (name := f"{side} {work}") not in failures
    }
    taken = timing.interleaved(calls, queued=measure.on_gpu(), repeats=repeats)
    failures |= {name: x.text for name, x in taken.items() if isinstance(x, Failure)}
    errors = {}
    for side in SIDES:
        if (name := f"{side} errors") not in failures:
            found = programs[name](*operands(side, "errors", arrays))
            errors[side] = {leaf: float(x) for leaf, x in found.items()}
    if wrong := _inaccurate(case, errors):
        failures["accuracy"] = wrong
    return dataclasses.replace(
        result,
        timings={n: x for n, x in taken.items() if not isinstance(x, Failure)},
        temporaries=_mib(calls, programs, measure.temporaries_mib),
        memory=_mib(calls, programs, measure.memory_mib),
        errors=errors,
        truth="float64" if case.dtype == "float32" else "float32",
        failures=failures,
    )


def _mib(
    names: Mapping[str, Any], programs: Mapping[str, Any], of: Callable[[Any], Any]
) -> dict[str, float]:
    return {name: x for name in names if (x := of(programs[name])) is not None}


def _inaccurate(case: StepCase, errors: Mapping[str, Mapping[str, float]]) -> str:
    """Leaves that are much further from the truth than the peer's."""
    if set(errors) != set(SIDES):
        return ""
    unit = float(jnp.finfo(case.dtype).eps)
    least = FORMULA if case.dtype == "float32" else unit
    wrong = {
        leaf: f"{leaf} {error:.1e}, peer {errors['peer'][leaf]:.1e}"
        for leaf, error in errors["ours"].items()
        if not error <= max(GRADIENT_RATIO * errors["peer"][leaf] + unit, least)
    }
    return "; ".join(wrong.values())
