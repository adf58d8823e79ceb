"""The public functions: check, choose an implementation, call it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, NamedTuple, overload, Unpack

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from pallas_attn.arguments import Options, takes_options
from pallas_attn.bias.base import Bias
from pallas_attn.canonical import canonical, Request
from pallas_attn.checks import options as check
from pallas_attn.implementations import functions_of
from pallas_attn.placement.run import run
from pallas_attn.problem import Problem, sink_of


class Visited(NamedTuple):
    """The share of visible blocks that each pass visits, float32 [*B, N] each.

    Args:
        forward: [*B, N], of the forward pass.
        rows: [*B, N], of the backward pass that owns dq.
        cols: [*B, N], of the backward pass that owns dk and dv.

    >>> import jax, jax.numpy as jnp, pallas_attn
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 97, 8, 64))
    >>> alibi = pallas_attn.ALiBi(pallas_attn.alibi_slopes(8))
    >>> shares = pallas_attn.visited(q, k, v, alibi, implementation="xla")
    >>> shares.rows.shape, float(jnp.max(shares.cols))  # "xla" visits all
    ((2, 8), 1.0)
    """

    forward: Float[Array, "*B N"]
    rows: Float[Array, "*B N"]
    cols: Float[Array, "*B N"]


class Sparsity(NamedTuple):
    """What weights of exactly 0 save, float32 [*B, N] each, between 0 and 1.

    Args:
        zero_weights: [*B, N], the share of visible pairs whose weight is 0.
        skipped_blocks: [*B, N], the share of visible blocks that kernels leave out.

    >>> import jax, pallas_attn
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 97, 8, 64))
    >>> sparse = pallas_attn.Entmax(1.5, top_k=4)
    >>> shares = pallas_attn.sparsity(q, k, v, normalizer=sparse)
    >>> bool((shares.zero_weights >= 93 / 97 - 1e-6).all())
    True
    """

    zero_weights: Float[Array, "*B N"]
    skipped_blocks: Float[Array, "*B N"]


@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: Bias | ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    return_residual: Literal[False] = False,
    **options: Unpack[Options],
) -> Float[Array, "*B T N h"]: ...


@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: Bias | ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    return_residual: Literal[True],
    **options: Unpack[Options],
) -> tuple[Float[Array, "*B T N h"], Float[Array, "*B T N"]]: ...


@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: Bias | ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    return_residual: bool,
    **options: Unpack[Options],
) -> Array | tuple[Array, Array]: ...


@takes_options
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: Bias | ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    return_residual: bool = False,
    **options: Unpack[Options],
) -> Any:
    """Attention with biases: P v, where P = softmax(scale q.k + bias) or sparser.

    A superset of `jax.nn.dot_product_attention`. With t_ij = scale q_i.k_j + bias_ij
    and V(i) the keys that query i may attend to:

        lse_i = log sum_{j in V(i)} exp t_ij
        o_i   = sum_{j in V(i)} exp(t_ij - lse_i) v_j

    A query that may attend to nothing has o = 0, lse = -inf and zero gradients; a key
    to which a bias adds -1e30 or less has no weight, and NaN in it reaches nothing, as
    with a mask (which the kernels hide faster). With `Entmax(alpha, top_k)`,
    a = alpha - 1 and V(i) cut to the top_k largest t:

        o_i   = sum_{j in V(i)} p_ij v_j    where p_ij = max(0, a t_ij - tau_i)^(1/a)

    and the threshold tau_i is the one at which sum_j p_ij = 1. Dropout multiplies the
    weights of normalized rows by keep_ij / (1 - rate); lse and tau do not know of it.

    Many devices: batch and heads may be sharded, on a mesh of explicit or automatic
    axes and inside `jax.shard_map`; each device attends to its own, and only gradients
    of what devices share are summed over them. Heads go over as many devices as divide
    N; under automatic sharding kernels gather them where these do not divide K.
    Output, residual and all else that a backward keeps have the checkpoint name
    "attention": under `jax.checkpoint_policies.save_only_these_names("attention")` no
    forward runs twice. `jax.export` takes a symbolic batch; "xla" and "reference" take
    symbolic lengths too, whose scores they hold all at once.

    Letters: B batch; T queries; S keys; N query heads; K key heads, a divisor of N
    (query head n reads key head n // (N // K)); H head dim of query and key; h of
    value. #B is "1 or B". B stands for any number of leading axes, none included; each
    may be shared by itself.

    Args:
        query: [B, T, N, H]; float16, bfloat16 or float32 (float64: "xla", "reference").
        key: [B, S, K, H], in query's dtype.
        value: [B, S, K, h], in query's dtype.
        bias: Added to the scaled scores, never scaled: an array [#B, #N, #T, #S] (fewer
            axes align to the right), a bias value (`DenseBias`, `FactoredBias`,
            `ALiBi`, your own `Bias`), or a sum of them with `+`; in any floating dtype.
            `CoALiBi`, which reads the scores themselves, is given alone.
            Gradients are summed over shared axes. Under `vmap` over the query with an
            unmapped bias JAX forms one bias gradient per mapped element before it sums:
            use a batch axis instead.
        mask: bool [#B, #N, #T, #S], True where a query may attend. Kernels leave out
            whole blocks that it hides where it has all T and S.
        scale: Of the scores; 1/sqrt(H) by default. A number, or a scalar array by which
            the query is multiplied first.
        is_causal: Attend to key positions <= the query's position only.
        query_seq_lengths: int32 [B]; queries beyond have output 0.
        key_value_seq_lengths: int32 [B]; keys beyond are not attended to. Lengths
            outside 0..T (S) act as the nearest.
        local_window_size: An int or (left, right): attend to key positions from
            position - left to position + right, inclusive.
        query_offset: Position of query 0, an int or int32 [] or [#B]; keys stand at
            0..S-1. S - T is a decode step, or one shard of a long sequence.
        query_positions: int32 [T], [#B, T] or [#B, #N, T], within +-2^30, in any order;
            instead of an offset. Causality, the window and ALiBi read positions.
        key_positions: int32 [S], [#B, S] or [#B, #N, S].
        query_segment_ids: int32 [B, T]; attend only where ids are equal.
        key_segment_ids: int32 [B, S].
        normalizer: How scores become weights: `Softmax()`, or `Entmax(alpha, top_k)`,
            of which a float32 alpha [N] has a gradient. What top_k selects is constant
            in every derivative.
        logits_soft_cap: A number c > 0: c tanh(scale q.k / c) stands for scale q.k. The
            bias and masks come after; with `CoALiBi` the gates read the capped scores.
        dropout_rate: 0 <= rate < 1: each weight is kept with probability 1 - rate, and
            divided by that. A Python number.
        dropout_rng: A JAX key, typed or of uint32 words, needed where the rate is above
            0. What is kept is a hash of it and of a weight's batch entry, head, query
            and key: the same in every implementation and however `jax.jit` shards the
            arrays. In your own `shard_map` batch entries and heads count from 0 in each
            shard: fold the shard's index into the key.
        precision: Of the products, as `jax.lax.Precision`; None is
            `jax.default_matmul_precision`.
        implementation: "triton" (Pallas kernels; a CUDA GPU of compute capability
            >= 8.0, heads of at most 256), "triton_interpret" (the same kernels,
            interpreted on any platform), "xla" (chunked, linear memory, any platform)
            or "reference" (dense); each is differentiable in every mode of JAX. None is
            "triton" where it can run, else "xla"; a sequence is tried in order. A named
            one never falls back.
        config: Block sizes of the kernels, and whether to prune.
        return_residual: Also return lse; of entmax tau, where alpha is 1 lse.

    Returns:
        The output [B, T, N, h] in query's dtype; with `return_residual` a pair of it
        and lse or tau, float32 [B, T, N] (float64 for float64), differentiable. Tau is
        +inf where a query may attend to nothing.

    Raises:
        ValueError: if a shape, range, name or combination of arguments is wrong.
        TypeError: if a dtype or class is, or a static argument is traced.
        NotImplementedError: if a named implementation cannot run the call, or `CoALiBi`
            is in a sum or beside entmax.

    Example:
        >>> import jax, jax.numpy as jnp, pallas_attn
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 97, 8, 64))
        >>> alibi = pallas_attn.ALiBi(pallas_attn.alibi_slopes(8))
        >>> pair = jnp.zeros((1, 8, 97, 97))
        >>> attention = pallas_attn.dot_product_attention
        >>> attention(q, k, v, alibi + pair, is_causal=True).shape
        (2, 97, 8, 64)
        >>> sparse = pallas_attn.Entmax(alpha=1.5)
        >>> attention(q, k, v, alibi, normalizer=sparse).shape
        (2, 97, 8, 64)

    Sources: Dao et al., FlashAttention-2 (arXiv 2307.08691); Press et al., ALiBi (arXiv
    2108.12409); FlashBias (arXiv 2505.12044); Co-ALiBi (github.com/Nathancgy/Co-ALIBI);
    Peters et al., entmax (arXiv 1905.05702).
    """
    return_residual = check.flag("return_residual", return_residual)
    given = canonical(query, key, value, bias, mask, **options)
    return attended(given, return_residual)


def attended(given: Request, return_residual: bool) -> Any:
    """What a call returns, its leading axes as they were given."""
    sizes, problem = given.sizes, given.problem
    if sizes.empty:
        output = jnp.zeros((sizes.B, sizes.T, sizes.N, sizes.h), problem.query.dtype)
        residual = jnp.broadcast_to(given.residual_of_nothing, output.shape[:-1])
        made = (output, residual)
    else:
        attend = functions_of(given.implementation, problem.family).attend
        made = run(attend, given, 2 if return_residual else 1)
    if return_residual:
        made = made[0], without_padding(made[1], problem)
    led = tuple(x.reshape(*sizes.leading, *x.shape[1:]) for x in made)
    return led if return_residual else led[0]


def without_padding(
    residual: Float[Array, "B T N"], problem: Problem
) -> Float[Array, "B T N"]:
    """Residuals; what is at or beyond `query_seq_lengths` is no row and has no sink."""
    lengths = problem.visibility.query_lengths
    if lengths is None or sink_of(problem) is None:
        return residual
    rows = jnp.arange(residual.shape[1], dtype=lengths.dtype)
    inside = rows[None] < lengths[:, None]
    return jnp.where(inside[..., None], residual, -jnp.inf)


@takes_options
def attention_weights(
    query: ArrayLike,
    key: ArrayLike,
    bias: Bias | ArrayLike | None = None,
    mask: ArrayLike | None = None,
    **options: Unpack[Options],
) -> Float[Array, "*B N T S"]:
    """The dense weights of a call, for plots and for interpretability.

        output = weights v

    An array of [T, S] for each head, which `dot_product_attention` never forms: it is
    computed by products of full precision, whatever `implementation` and `precision`
    say, and differentiable.

    Takes the arguments of `dot_product_attention`, and raises what it raises; there is
    no value.

    Returns:
        [*B, N, T, S], float32 (float64 where the query is): 0 where a query may not
        attend, and in all of a row that sees no key. Rows add up to 1, or to less where
        a sink takes some or where dropout, which is part of it, has a rate.

    Example:
        >>> import jax, pallas_attn
        >>> q, k = jax.random.normal(jax.random.key(0), (2, 2, 97, 8, 64))
        >>> weights = pallas_attn.attention_weights(q, k, is_causal=True)
        >>> weights.shape, bool((abs(weights.sum(-1) - 1) < 1e-5).all())
        ((2, 8, 97, 97), True)
    """
    return weights_of(canonical(query, key, key, bias, mask, **options))


def weights_of(given: Request, *, dropped: bool = True) -> Float[Array, "*B N T S"]:
    """The weights of a call: its output, where each key's value is its own axis.

    Args:
        given: The call; its value is not read.
        dropped: Whether dropout, if the call has any, is part of them.
    """
    sizes, problem = given.sizes, given.problem
    dtype = jnp.dtype(problem.call.accumulator)
    if sizes.empty:
        return jnp.zeros((*sizes.leading, sizes.N, sizes.T, sizes.S), dtype)
    call = replace(
        problem.call, h=sizes.S, dtype=dtype.name, precision=lax.Precision.HIGHEST
    )
    visibility = problem.visibility
    if not dropped:
        call, visibility = replace(call, dropout=0.0), replace(visibility, seed=None)
    axes = jnp.eye(sizes.S, dtype=dtype)[None, :, None, :]
    problem = replace(
        problem,
        query=problem.query.astype(dtype),
        key=problem.key.astype(dtype),
        value=jnp.broadcast_to(axes, (sizes.B, sizes.S, sizes.K, sizes.S)),
        visibility=visibility,
        call=call,
    )
    given = given._replace(problem=problem, implementation="xla")
    (made,) = run(functions_of("xla", problem.family).attend, given, 1)
    return jnp.swapaxes(made, 1, 2).reshape(*sizes.leading, sizes.N, sizes.T, sizes.S)


@takes_options
def visited(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: Bias | ArrayLike | None = None,
    mask: ArrayLike | None = None,
    **options: Unpack[Options],
) -> Visited:
    """The share of visible blocks that each pass visits: what pruning leaves.

    Blocks that a `mask` hides are visible here, as far as nothing else hides them.

    Takes the arguments of `dot_product_attention`, and raises what it raises.

    Returns:
        `Visited(forward, rows, cols)`, float32 [B, N] each, between 0 and 1: the
        forward pass, the backward pass that owns dq, and the one that owns dk and dv.
        Ones where the implementation does not prune ("xla", "reference").

    Example:
        >>> import jax, pallas_attn
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 97, 8, 64))
        >>> pallas_attn.visited(q, k, v, implementation="xla").forward.shape
        (2, 8)
    """
    given = canonical(query, key, value, bias, mask, **options)
    sizes = given.sizes
    blocks = functions_of(given.implementation, given.problem.family).visited
    if sizes.empty or blocks is None:
        shares = [jnp.ones((sizes.B, sizes.N), jnp.float32)] * 3
    else:
        shares = run(blocks, given, 3)
    return Visited(*(x.reshape(*sizes.leading, sizes.N) for x in shares))


@takes_options
def sparsity(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: Bias | ArrayLike | None = None,
    mask: ArrayLike | None = None,
    **options: Unpack[Options],
) -> Sparsity:
    """How sparse the weights of a call are, and what that saves.

    Takes the arguments of `dot_product_attention`, and raises what it raises. Weights
    themselves are those of `attention_weights`; and a key's follows from the
    thresholds: `return_residual=True` gives tau [B, T, N], and with a = alpha - 1 key j
    has weight where a t_ij > tau_i, namely (a t_ij - tau_i)^(1/a).

    Returns:
        `Sparsity(zero_weights, skipped_blocks)`, float32 [B, N] each: of the visible
        pairs of query and key the share whose weight is exactly 0, and of the visible
        blocks of them the share that holds no weight and that the kernels leave out (0
        for "xla" and "reference", which have no blocks). Zeros for softmax.

    Example:
        >>> import jax, pallas_attn
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 97, 8, 64))
        >>> sparse = pallas_attn.Entmax(alpha=1.5, top_k=1)
        >>> shares = pallas_attn.sparsity(q, k, v, normalizer=sparse)
        >>> bool((abs(shares.zero_weights - 96 / 97) < 1e-6).all())
        True
    """
    given = canonical(query, key, value, bias, mask, **options)
    sizes = given.sizes
    count = functions_of(given.implementation, given.problem.family).sparsity
    if sizes.empty or count is None:
        shares = [jnp.zeros((sizes.B, sizes.N), jnp.float32)] * 2
    else:
        shares = run(count, given, 2)
    return Sparsity(*(x.reshape(*sizes.leading, sizes.N) for x in shares))
