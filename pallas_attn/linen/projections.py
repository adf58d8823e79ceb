"""What an attention layer makes of its inputs by products, in flax's names."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flax import linen as nn
from jaxtyping import Array, Float

from pallas_attn.rules import kind


@dataclass(frozen=True)
class Projections:
    """The products of a layer that is being called; parameters are flax's.

    Args:
        heads: N.
        key_heads: K.
        head_dim: H.
        value_dim: h.
        biased: Which of "query", "key", "value" and "out" have a bias.
        dense: `nn.DenseGeneral`, with what all four share.
    """

    heads: int
    key_heads: int
    head_dim: int
    value_dim: int
    biased: frozenset[str]
    dense: Callable[..., nn.Module]

    def of(
        self, q: Array, k: Array, v: Array, **fields: Any
    ) -> tuple[
        Float[Array, "*B T N H"], Float[Array, "*B S K H"], Float[Array, "*B S K h"]
    ]:
        """Query, key and value of their inputs, each [*B, L, features]."""
        make = functools.partial(self._made, axis=-1, **fields)
        return (
            make("query", (self.heads, self.head_dim), q),
            make("key", (self.key_heads, self.head_dim), k),
            make("value", (self.key_heads, self.value_dim), v),
        )

    def out(
        self, x: Float[Array, "*B T N h"], features: int, **fields: Any
    ) -> Float[Array, "*B T features"]:
        """The layer's output of that of attention."""
        return self._made("out", features, x, axis=(-2, -1), **fields)

    def _made(self, name: str, features: Any, x: Array, **fields: Any) -> Array:
        own = {"features": features, "use_bias": name in self.biased, "name": name}
        return self.dense(**own, **fields)(x)


def normalized(
    by: Any, query: Array, key: Array, **fields: Any
) -> tuple[Float[Array, "*B T N H"], Float[Array, "*B S K H"]]:
    """Query and key by a norm each, "query_ln" and "key_ln".

    Args:
        by: False; True: layer norms, as flax's; "rms"; or a module to be copied.
        query: [*B, T, N, H].
        key: [*B, S, K, H].
        **fields: Dtypes, of the norms that have a name here.

    Raises:
        TypeError: if it is none of these.
    """
    if by is False:
        return query, key
    make: Callable[..., nn.Module]
    if by is True:
        make = functools.partial(nn.LayerNorm, use_bias=False, **fields)
    elif isinstance(by, str) and by == "rms":
        make = functools.partial(nn.RMSNorm, **fields)
    elif isinstance(by, nn.Module):
        make = by.copy
    else:
        raise TypeError(
            '`normalize_qk` must be a bool, "rms" or a flax module of [.., H]; got '
            f"{kind(by)}. `nn.RMSNorm(epsilon=1e-6)` is one."
        )
    return make(name="query_ln")(query), make(name="key_ln")(key)
