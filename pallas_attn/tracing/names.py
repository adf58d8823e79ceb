"""The checkpoint name of what attention computes, for policies that save by name."""

from __future__ import annotations

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name


# Of output and residual, and of all else that a backward pass keeps of the forward one.
NAME = "attention"


def named(values: Any) -> Any:
    """The values under the checkpoint name; None and integers alone stay as they are.

    What is returned and what a backward pass keeps must be one named array: a policy
    saves what has the name, and computes again whatever else is read.
    """
    return jax.tree.map(lambda x: checkpoint_name(x, NAME), values)
