"""Networks of coordinates that stand for a bias, and their fit to one."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_attn import DenseBias, dot_product_attention
from pallas_attn.linen.neural_factors import NeuralFactors, product
from pallas_attn.testing.numerics import assert_formula, assert_same_bits


B, T, S, N, R, H = 2, 37, 53, 3, 4, 16


def line(length):
    return jnp.linspace(-1, 1, length)[:, None]


def smooth(heads=N):
    """A bump in the distance, of another width in each head, and of other sizes."""
    width = jnp.linspace(0.5, 1.5, heads).reshape(heads, 1, 1)
    apart = (line(T) - line(S).T)[None]
    size = 10.0 ** jnp.arange(heads, dtype=jnp.float32).reshape(heads, 1, 1)
    return size * jnp.exp(-((apart / width) ** 2))


def fitted(target, rank=R, steps=1000, seed=0):
    module = NeuralFactors(num_heads=target.shape[-3], rank=rank)
    key = jax.random.key(seed)
    return module, module.fit(
        target, line(T), line(S), key=key, steps=steps, progress=False
    )


def made(module, variables):
    """[1, N, T, S]."""
    bias: Any = module.apply(variables, line(T), line(S))
    return product(bias)


def error_of(bias, target):
    """Per head, |product - target| / |target|."""
    wrong = np.asarray(product(bias) - target[None])[0]
    return np.linalg.norm(wrong, axis=(1, 2)) / np.linalg.norm(target, axis=(1, 2))


def test_a_fit_comes_close_to_the_best_that_its_rank_allows():
    """Nothing of that rank is nearer than the truncated SVD: here 4 % are lost."""
    target = smooth()
    module, found = fitted(target)
    assert found.errors.shape == (1000,)
    bias: Any = module.apply(found.variables, line(T), line(S))
    values = np.linalg.svd(np.asarray(target, np.float64), compute_uv=False)
    least = np.linalg.norm(values[:, R:], axis=1) / np.linalg.norm(values, axis=1)
    errors = error_of(bias, target)
    assert (errors > 0.999 * least).all()
    assert np.sqrt(np.mean(errors**2)) < 1.1 * np.sqrt(np.mean(least**2))
    assert found.errors[-1] < found.errors[0] / 10


def test_a_fit_is_a_function_of_its_key():
    target = smooth(1)
    first, again, other = (fitted(target, steps=5, seed=s)[1] for s in (0, 0, 1))
    assert_same_bits(first, again)
    assert (first.errors != other.errors).all()


def test_a_fit_does_not_depend_on_the_size_of_its_target():
    target = smooth(1)
    one, other = (fitted(x, steps=50) for x in (target, 256 * target))
    assert_formula(one[1].errors, other[1].errors)
    first, second = (made(module, found.variables) for module, found in (one, other))
    assert_formula(256 * first, second)


def test_errors_are_those_before_each_step():
    target = smooth(1)
    module, found = fitted(target, steps=1)
    start = made(module, module.init(jax.random.key(0), line(T), line(S)))
    size = jnp.sqrt(jnp.mean(target**2))
    want = jnp.sqrt(jnp.mean((start - target[None] / size) ** 2))
    assert_formula(found.errors, want[None])


def test_a_head_of_zeros_and_steps_that_are_no_whole_chunk():
    target = jnp.concatenate([smooth(1), jnp.zeros((1, T, S))])
    module, found = fitted(target, steps=103)
    assert found.errors.shape == (103,)
    assert np.isfinite(found.errors).all()
    assert found.errors[-1] < found.errors[0]


@pytest.mark.parametrize(
    ("x_q", "x_k", "leading"),
    [
        ((T, 2), (S, 3), (1,)),
        ((B, T, 2), (1, S, 2), (B,)),
        ((5, B, T, 2), (5, 1, S, 2), (5, B)),
    ],
    ids=str,
)
def test_axes_of_the_factors(getkey, x_q, x_k, leading):
    module = NeuralFactors(num_heads=N, rank=R)
    points = [jax.random.normal(getkey(), shape) for shape in (x_q, x_k)]
    bias: Any = module.init_with_output(getkey(), *points)[0]
    assert bias.q_factor.shape == (*leading, T, N, R)
    assert bias.k_factor.shape == (*(x_k[:-2] or (1,)), S, N, R)
    assert product(bias).shape == (*leading, N, T, S)


def test_factors_train_inside_attention(getkey):
    """The gradient of a loss of attention reaches both networks.

    All but the constant that keys share: softmax does not see it, its gradient is 0.
    """
    module = NeuralFactors(num_heads=N, rank=R, hidden=(8,))
    x, y = line(T).astype(jnp.bfloat16), line(S)
    variables = module.init(getkey(), x, y)
    query = jax.random.normal(getkey(), (B, T, N, H))
    key, value = jax.random.normal(getkey(), (2, B, S, N, H))

    def loss(variables, dense):
        bias: Any = module.apply(variables, x, y)
        bias = DenseBias(product(bias)) if dense else bias
        output = dot_product_attention(
            query, key, value, bias, implementation="reference"
        )
        return jnp.sum(output**2)

    with jax.default_matmul_precision("highest"):
        gradient = jax.jit(jax.grad(loss), static_argnums=1)
        got, want = gradient(variables, False), gradient(variables, True)
    for tree in (got, want):
        del tree["params"]["key"]["out"]["bias"]
    assert_formula(got, want)
    assert min(jnp.abs(leaf).max() for leaf in jax.tree.leaves(got)) > 0


def test_a_dense_bias_of_a_batch_is_a_target(getkey):
    points = jax.random.normal(getkey(), (B, T, 2))
    target = DenseBias(jax.random.normal(getkey(), (B, N, T, T)))
    module = NeuralFactors(num_heads=N, rank=R, hidden=(8,))
    found = module.fit(target, points, points, key=getkey(), steps=3, progress=False)
    bias: Any = module.apply(found.variables, points, points)
    assert bias.q_factor.shape == (B, T, N, R)


def test_progress_is_shown(capsys):
    module = NeuralFactors(num_heads=1, rank=1, hidden=(4,))
    module.fit(smooth(1), line(T), line(S), key=jax.random.key(0), steps=7)
    assert "7/7" in capsys.readouterr().out


@pytest.mark.parametrize("package", ["optax", "rich.progress"])
def test_a_missing_package_is_named(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    module = NeuralFactors(num_heads=1, rank=1, hidden=(4,))
    with pytest.raises(ImportError, match=f"needs {package.partition('.')[0]}"):
        module.fit(smooth(1), line(T), line(S), key=jax.random.key(0), steps=1)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"target": smooth(2)}, ValueError, "`target` must be .* N, T, S = 3, 37, 53"),
        ({"target": smooth()[..., 1:]}, ValueError, "`target` must be"),
        ({"target": jnp.ones((4, N, T, S)), "x_q": jnp.ones((2, T, 1))}, ValueError,
         "`target` must be"),
        ({"target": smooth() > 0}, TypeError, "`target` must be float16"),
        ({"steps": 0}, ValueError, "`steps` must be at least 1"),
        ({"x_q": jnp.ones(T)}, ValueError, "`x_q` must be"),
        ({"x_k": jnp.ones((S, 1), int)}, TypeError, "`x_k` must be float16"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)  # fmt: skip
def test_errors_of_a_fit_name_the_argument(changes, error, message):
    module = NeuralFactors(num_heads=N, rank=R, hidden=(4,))
    arguments = {"target": smooth(), "x_q": line(T), "x_k": line(S), **changes}
    with pytest.raises(error, match=message):
        module.fit(**arguments, key=jax.random.key(0), progress=False)


@pytest.mark.parametrize("name", ["num_heads", "rank"])
def test_errors_of_a_module_name_the_field(name):
    fields: dict[str, Any] = {"num_heads": N, "rank": R, name: 0}
    module = NeuralFactors(**fields)
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1"):
        module.init(jax.random.key(0), line(T), line(S))
