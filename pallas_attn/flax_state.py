"""What `flax.serialization` writes of our values: a dict of their fields, by name."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


FLAX = "flax.serialization"

# Classes that flax will be told of when somebody imports it.
_waiting: list[tuple[type, tuple[str, ...]]] = []


def serializable(cls: type, fields: Sequence[str]) -> None:
    """Lets `flax.serialization` write values of a dataclass, and read them back.

    flax itself is not imported for it: that takes three times as long as this package.
    If it is not there yet, it is told as soon as it is.

    Args:
        cls: A dataclass.
        fields: Those to write; the others are the restored value's own.
    """
    _waiting.append((cls, tuple(fields)))
    flax = sys.modules.get(FLAX)
    if "register_serialization_state" in vars(flax or object):
        _tell(flax)


def _tell(flax: Any) -> None:
    while _waiting:
        cls, fields = _waiting.pop()
        _register(flax, cls, fields)


def _register(flax: Any, cls: type, fields: tuple[str, ...]) -> None:
    def state(x: Any) -> dict[str, Any]:
        return {name: flax.to_state_dict(getattr(x, name)) for name in fields}

    def restored(x: Any, state: dict[str, Any]) -> Any:
        if set(state) != set(fields):
            raise ValueError(
                f"A state of {cls.__name__} must have the fields {list(fields)}; got "
                f"{sorted(state)} at {flax.current_path()}. Restore it into a value of "
                "the class that was written."
            )
        values = {
            name: flax.from_state_dict(getattr(x, name), state[name], name=name)
            for name in fields
        }
        return dataclasses.replace(x, **values)

    flax.register_serialization_state(cls, state, restored)


class _Watch(MetaPathFinder):
    """Finds nothing, but sees flax come."""

    def find_spec(
        self, fullname: str, path: Any = None, target: Any = None
    ) -> ModuleSpec | None:
        if fullname != FLAX:
            return None
        sys.meta_path.remove(self)  # for the others are asked now
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _tell(module)

        vars(spec.loader)["exec_module"] = exec_module  # of this module's own loader
        return spec


if FLAX not in sys.modules:
    sys.meta_path.insert(0, _Watch())
