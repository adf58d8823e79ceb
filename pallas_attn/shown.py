"""Values as text: arrays by their dtype and shape."""

from __future__ import annotations

import dataclasses
from typing import Any


def shown(x: Any) -> str:
    """An array, or what stands for one, as f32[2,97]; anything else as its repr.

    >>> import numpy as np
    >>> shown(np.ones((2, 97), np.float32)), shown(1.5), shown(None)
    ('f32[2,97]', '1.5', 'None')
    """
    shape, dtype = getattr(x, "shape", None), getattr(x, "dtype", None)
    if isinstance(x, type) or not isinstance(shape, tuple) or dtype is None:
        return repr(x)
    name = str(getattr(dtype, "name", dtype))
    for long, short in {"float": "f", "uint": "u", "int": "i", "complex": "c"}.items():
        name = name.replace(long, short)
    return f"{name}[{','.join(map(str, shape))}]"


def with_fields(x: Any) -> str:
    """A dataclass as its class and what its fields are: ALiBi(slopes=f32[8])."""
    fields = (f.name for f in dataclasses.fields(x))
    # JAX may show one that it has not filled yet
    said = (f"{name}={shown(getattr(x, name, None))}" for name in fields)
    return f"{type(x).__name__}({', '.join(said)})"
