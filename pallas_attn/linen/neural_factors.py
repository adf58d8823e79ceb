"""Factors of a bias as functions of coordinates: a network per side, and its fit."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, PRNGKeyArray

from pallas_attn.bias.dense import DenseBias
from pallas_attn.bias.factored import FactoredBias
from pallas_attn.layers.factors import points
from pallas_attn.rules import array, floating, static_int, wrong_shape


# Steps that one compiled program takes, between which progress is shown.
CHUNK = 100


class Fit(NamedTuple):
    """What `NeuralFactors.fit` found.

    Args:
        variables: For `NeuralFactors.apply`.
        errors: float32 [steps], before each step the root of the mean over heads of
            |product - target|^2 / |target|^2.
    """

    variables: Any
    errors: Float[Array, " steps"]


class NeuralFactors(nn.Module):
    """A low-rank bias whose factors are functions of coordinates.

    With one network (an MLP) for queries and one for keys:

        b_ij = sum_r f(x_i)_r g(y_j)_r

    It stands for a bias that is known at some points and wanted at others, or that
    depends on inputs, where `svd_factors` would need it written out each time.
    Coordinates should be of the size of 1, where networks start out sensitive.

    Args:
        num_heads: N.
        rank: R.
        hidden: The width of each hidden layer.
        activation: Of the hidden layers.

    Call:
        x_q: Floating [..., #B, T, d], coordinates of the queries; [T, d] is shared.
        x_k: Floating [..., #B, S, d], of the keys; the two d may differ.

    Returns:
        A `FactoredBias`, `q_factor` [..., #B, T, N, R], `k_factor` [..., #B, S, N, R],
        float32.

    Raises:
        TypeError: if coordinates are not floating.
        ValueError: if they have fewer than 2 axes, or num_heads or rank is below 1.

    >>> import jax, jax.numpy as jnp
    >>> module = NeuralFactors(num_heads=2, rank=4)
    >>> x = jnp.linspace(-1, 1, 16)[:, None]
    >>> bias, variables = module.init_with_output(jax.random.key(0), x, x)
    >>> bias.q_factor.shape, bias.k_factor.shape
    ((1, 16, 2, 4), (1, 16, 2, 4))
    >>> target = -jnp.abs(x - x.T)[None] * jnp.array([1.0, 2.0]).reshape(2, 1, 1)
    >>> found = module.fit(
    ...     target, x, x, steps=300, key=jax.random.key(1), progress=False
    ... )
    >>> bool(found.errors[-1] < 0.1)
    True

    Source: FlashBias (arXiv 2505.12044), neural decomposition.
    """

    num_heads: int
    rank: int
    hidden: tuple[int, ...] = (64, 64)
    activation: Callable[[Array], Array] = nn.gelu

    @nn.compact
    def __call__(
        self, x_q: Float[Array, "*#B T d"], x_k: Float[Array, "*#B S d"]
    ) -> FactoredBias:
        """The bias at these coordinates; see the class."""
        for name in ("num_heads", "rank"):
            static_int(name, getattr(self, name), "an int >= 1")
            if getattr(self, name) < 1:
                raise ValueError(
                    f"`{name}` must be at least 1; got {getattr(self, name)}."
                )
        sides = {"query": ("x_q", x_q), "key": ("x_k", x_k)}
        query, key = (
            _Side(self.num_heads, self.rank, self.hidden, self.activation, name=side)(
                points(*given)
            )
            for side, given in sides.items()
        )
        return FactoredBias(query, key)

    @nn.nowrap
    def fit(
        self,
        target: Any,
        x_q: Float[Array, "*#B T d"],
        x_k: Float[Array, "*#B S d"],
        *,
        key: PRNGKeyArray,
        steps: int = 2000,
        learning_rate: float = 1e-2,
        progress: bool = True,
    ) -> Fit:
        """Parameters with which the factors are close to a bias, by Adam.

        What is minimised is the relative squared error, averaged over heads: each head
        counts alike, whatever its size. The target is scaled to the size of 1 per head
        and the last layers are scaled back, so a bias ten times as large is fitted as
        well. The learning rate falls to 0 as a cosine.

        Args:
            target: Floating [..., #B, N, T, S], or a `DenseBias`; [N, T, S] is shared.
            x_q: Floating [..., #B, T, d], coordinates of the queries.
            x_k: Floating [..., #B, S, d], coordinates of the keys.
            key: A JAX key; the same one gives the same fit.
            steps: Of the optimiser, each on all pairs: O(N T S) memory.
            learning_rate: The first and largest.
            progress: Whether to show a bar, with rich.

        Returns:
            A `Fit`: variables, and the error before each step.

        Raises:
            TypeError: if the target is not floating.
            ValueError: if its shape is not that of the factors' product, or steps < 1.
            ImportError: if optax, or rich for the bar, is not installed.
        """
        optax = _needed("optax", "fit", "")
        wanted = array(
            "target", target.bias if isinstance(target, DenseBias) else target
        )
        floating("target", wanted, "Cast it: `.astype(jnp.float32)`.")
        wanted = wanted.astype(jnp.float32)
        static_int("steps", steps, "an int >= 1")
        if steps < 1:
            raise ValueError(f"`steps` must be at least 1; got {steps}.")
        shapes = jax.eval_shape(lambda: self.init_with_output(key, x_q, x_k)[0])
        self._check(wanted, shapes)

        # of each head, over all axes but its own
        over = tuple(axis for axis in range(wanted.ndim) if axis != wanted.ndim - 3)
        size = jnp.sqrt(jnp.mean(wanted**2, axis=over))
        size = jnp.where(size > 0, size, 1)
        scaled = wanted / size[:, None, None].reshape(
            (1,) * (wanted.ndim - 3) + (-1, 1, 1)
        )
        scaled = scaled.reshape((1,) * (4 - scaled.ndim) + scaled.shape)

        def loss(variables: Any) -> Float[Array, ""]:
            bias: Any = self.apply(variables, x_q, x_k)
            return jnp.mean((product(bias) - scaled) ** 2)

        schedule = optax.cosine_decay_schedule(learning_rate, steps)
        optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

        def step(carry: Any, _: None) -> tuple[Any, Float[Array, ""]]:
            variables, state = carry
            value, gradient = jax.value_and_grad(loss)(variables)
            with jax.numpy_dtype_promotion("standard"):  # optax: float ** int32
                update, state = optimiser.update(gradient, state, variables)
            return (optax.apply_updates(variables, update), state), jnp.sqrt(value)

        @jax.jit
        def start(key: PRNGKeyArray) -> Any:
            variables = self.init(key, x_q, x_k)
            return variables, optimiser.init(variables)

        advance = jax.jit(
            lambda carry, count: jax.lax.scan(step, carry, length=count),
            static_argnums=1,
        )
        carry, errors = start(key), []
        with _bar(steps, shown=progress) as told:
            for first in range(0, steps, CHUNK):
                carry, found = advance(carry, min(CHUNK, steps - first))
                errors.append(found)
                told(len(found), float(found[-1]))
        return Fit(_scaled(carry[0], jnp.sqrt(size)), jnp.concatenate(errors))

    @nn.nowrap
    def _check(self, target: Array, factors: FactoredBias) -> None:
        """That the target has the shape of the product, each leading axis 1 or full."""
        q, k = factors.q_factor.shape, factors.k_factor.shape
        rule = (self.num_heads, q[-3], k[-3])
        leading = target.shape[:-3]
        try:
            jnp.broadcast_shapes(leading, q[:-3], k[:-3])
        except ValueError:
            leading = None
        if leading is None or target.shape[-3:] != rule:
            spelled = f"[..., #B, N, T, S] with N, T, S = {', '.join(map(str, rule))}"
            advice = f"x_q and x_k make factors of shapes {q} and {k}."
            wrong_shape("target", target, spelled, advice)


class _Side(nn.Module):
    """The network of queries, or of keys."""

    num_heads: int
    rank: int
    hidden: tuple[int, ...]
    activation: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Float[Array, "*B L d"]) -> Float[Array, "*B L N R"]:
        for i, width in enumerate(self.hidden):
            x = self.activation(nn.Dense(width, name=f"hidden_{i}")(x))
        return nn.DenseGeneral((self.num_heads, self.rank), name="out")(x)


def product(bias: FactoredBias) -> Float[Array, "*#B N T S"]:
    """A product of factors, with any leading axes."""
    q, k = (jnp.swapaxes(x, -3, -2) for x in (bias.q_factor, bias.k_factor))
    return jnp.matmul(q, jnp.swapaxes(k, -1, -2), precision="highest")


def _scaled(variables: Any, factor: Float[Array, " N"]) -> Any:
    """The last layers of both sides times a factor per head."""

    def leaf(path: Any, x: Array) -> Array:
        last = any(getattr(part, "key", None) == "out" for part in path)
        shape = (1,) * (x.ndim - 2) + (-1, 1)
        return x * factor.reshape(shape) if last else x

    return jax.tree_util.tree_map_with_path(leaf, variables)


@contextlib.contextmanager
def _bar(steps: int, *, shown: bool) -> Iterator[Callable[[int, float], None]]:
    """A function that is told of steps done and of the error."""
    if not shown:
        yield lambda count, error: None
        return
    bars = _needed("rich.progress", "progress=True", " Or pass progress=False.")
    columns = (
        bars.TextColumn("fit, error {task.fields[error]:.2e}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
    )
    with bars.Progress(*columns) as bar:
        task = bar.add_task("fit", total=steps, error=float("nan"))
        yield lambda count, error: bar.update(task, advance=count, error=error)


def _needed(module: str, what: str, otherwise: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f"`NeuralFactors.fit`: {what} needs {package}, which is not installed. "
            f"pip install {package}.{otherwise}"
        ) from error
