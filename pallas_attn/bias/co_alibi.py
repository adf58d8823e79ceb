"""Contextual ALiBi: distances that count the keys a query cares about."""

from jaxtyping import Array, Float, Int

from pallas_attn.bias.alibi import alibi_slopes
from pallas_attn.bias.base import Bias, head_home


class CoALiBi(Bias):
    """b_ij = -slope * z_ij, where z_ij counts keys from j on by how well they match.

    With s_ij = scale q_i.k_j and V(i) the keys that query i may attend to:

        g_ij = sigmoid(s_ij) on V(i), 0 elsewhere
        z_ij = sum_{n >= j} g_in    (in storage order, j included)
        t_ij = s_ij - slope z_ij    (the softmax over V(i) is of t)

    A key is penalised by the gates of the keys after it: where all scores are 0 each
    gate is 1/2, and under causality this is ALiBi of half the slope. As b depends on
    the row's scores it is no term of a sum: the call takes it alone.

    Args:
        slopes: float32 [N] or [#B, N]; > 0 is a penalty.

    Example:
        >>> import jax, pallas_attn
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 97, 8, 64))
        >>> bias = pallas_attn.CoALiBi(pallas_attn.co_alibi_slopes(8))
        >>> pallas_attn.dot_product_attention(q, k, v, bias, is_causal=True).shape
        (2, 97, 8, 64)

    Source: Co-ALiBi (github.com/Nathancgy/Co-ALIBI).
    """

    slopes: Float[Array, "*#B N"] = head_home()

    hides = False
    # whose functions take it: its own
    family = "co_alibi"

    def materialise(
        self,
        query_positions: Int[Array, "*#BN T"],
        key_positions: Int[Array, "*#BN S"],
    ) -> Float[Array, "#B #N T S"]:
        """Refused: positions do not determine it.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "`CoALiBi.materialise`: what CoALiBi adds depends on the scores, not on "
            "positions alone. Call dot_product_attention."
        )


def co_alibi_slopes(num_heads: int, bias_max: float = 8.0) -> Float[Array, " N"]:
    """Twice `alibi_slopes`, since sigmoid(0) = 1/2: at q.k = 0 this is plain ALiBi.

    Args:
        num_heads: N >= 1.
        bias_max: The exponent of ALiBi's least slope, 2^-bias_max.

    Returns:
        Slopes, float32 [N], positive.

    Raises:
        ValueError: if num_heads < 1.
        TypeError: if it is no int.

    >>> [float(x) for x in co_alibi_slopes(6)]
    [0.5, 0.125, 0.03125, 0.0078125, 1.0, 0.25]
    """
    return 2 * alibi_slopes(num_heads, bias_max)
