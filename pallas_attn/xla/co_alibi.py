"""Co-ALiBi chunk by chunk: the chunks, masks and softmax of `xla.attention`.

A chunk holds every key that its queries may attend to, so that the sums of a row's
gates are within it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_attn.bias.base import Added
from pallas_attn.bias.co_alibi import CoALiBi
from pallas_attn.bias.region import Region, spread
from pallas_attn.problem import Problem
from pallas_attn.visibility import weighty
from pallas_attn.xla.attention import in_chunks, Logits


def attend(problem: Problem) -> tuple[Float[Array, "B T N h"], Float[Array, "B T N"]]:
    """Attention of every query; the function of `reference.co_alibi.attend`."""
    return in_chunks(problem, _logits)


def _logits(scores: Array, places: Array, added: Added, region: Region) -> Logits:
    """The logits s - m z, summed from the end of a row where its weights are.

    z reaches the number of keys, and near 2^14 a float32 is 1e-3 apart from the next.
    A penalty (m > 0) leaves weight to the last keys, where z is small. A reward leaves
    it to the first ones; there, with the sum Z of all gates of the row,

        s - m z = (s + m (Z - z)) - m Z    where Z - z_ij = sum_{n < j} g_in is small
    """
    (bias,) = added.terms
    assert isinstance(bias, CoALiBi)
    m = spread("head", bias.slopes)
    places = places & weighty(scores)
    # a place that is not visible may still be NaN, which 0 * sigmoid' would pass on
    s = jnp.where(places, scores, 0)
    g = jnp.where(places, jax.nn.sigmoid(s), 0)
    before = lax.cumsum(g, axis=3) - g
    z = jnp.where(m < 0, -before, lax.cumsum(g, axis=3, reverse=True))
    shift = jnp.where(m < 0, -m * g.sum(3, keepdims=True), 0)
    t = s - m * z
    return Logits(t, places & weighty(t + shift), shift)
