"""What an attention layer is called with: its inputs, and where tokens stand."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_attn.rules import kind
from pallas_attn.shapes import Sizes


def key_value_inputs(
    inputs_q: Float[Array, "*B T features"],
    inputs_k: Float[Array, "*B S features"] | None,
    inputs_v: Float[Array, "*B S features"] | None,
    inputs_kv: Float[Array, "*B S features"] | None,
) -> tuple[Float[Array, "*B S features"], Float[Array, "*B S features"]]:
    """The inputs of key and value, by flax's rules.

    Raises:
        ValueError: if they are given twice, the key's are not, or one is no sequence of
            inputs for these queries.
    """
    if inputs_kv is not None:
        if inputs_k is not None or inputs_v is not None:
            raise ValueError(
                "`inputs_kv` excludes `inputs_k` and `inputs_v`; got both. Give "
                "`inputs_k` alone."
            )
        _fits("inputs_kv", inputs_kv, "inputs_q", inputs_q, inputs_q.ndim - 2)
        return inputs_kv, inputs_kv
    if inputs_k is None and inputs_v is not None:
        raise ValueError(
            "`inputs_k` must be given with `inputs_v`; got None. Give the value's "
            "inputs as `inputs_k` to use them for both."
        )
    k = inputs_q if inputs_k is None else inputs_k
    v = k if inputs_v is None else inputs_v
    _fits("inputs_k", k, "inputs_q", inputs_q, inputs_q.ndim - 2)
    _fits("inputs_v", v, "inputs_k", k, k.ndim - 1)
    return k, v


def standing(
    given: tuple[Int[Array, "*#B #N T"] | None, Int[Array, "*#B #N S"] | None],
    offset: int | Int[Array, "*#B"],
    sizes: Sizes,
) -> tuple[Int[Array, "*#B #N T"], Int[Array, "*#B #N S"]]:
    """The positions of queries and keys, written out.

    Args:
        given: Those of the call, [L], [*#B, L] or [*#B, #N, L]; None: in order.
        offset: The position of query 0, where queries have none.
        sizes: Of the call.
    """
    batch = len(sizes.leading)

    def full(x: Array) -> Array:
        return x.reshape((1,) * (batch + 2 - x.ndim) + x.shape)

    q, k = given
    queries = counted(sizes.T, batch)
    if isinstance(offset, int):
        queries = queries + jnp.int32(offset)
    else:
        queries = queries + full(offset[..., None, None])
    return (
        queries if q is None else full(q),
        counted(sizes.S, batch) if k is None else full(k),
    )


def counted(length: int, batch: int) -> Int[Array, "*#B #N L"]:
    """0 .. length - 1, behind as many axes of 1 as a batch and heads have."""
    return jnp.arange(length, dtype=jnp.int32).reshape((1,) * (batch + 1) + (length,))


def _fits(name: str, x: Array, other: str, y: Array, shared: int) -> None:
    """Refuses what is no sequence of inputs, as a mask given by its place."""
    if x.dtype == bool or x.ndim != y.ndim or x.shape[:shared] != y.shape[:shared]:
        raise ValueError(
            f"`{name}` must be floating [*B, S, features], its first {shared} axes "
            f"those of `{other}`, {y.shape[:shared]}; got {kind(x)}. A mask is given "
            "by name: `mask=...`."
        )
