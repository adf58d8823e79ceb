"""The four implementations, and which of them a call runs on."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args, Literal, NamedTuple

import jax


# Families of calls, each with functions of its own, and where they are.
MODULES = {
    "softmax": ("attention", "attention"),
    "entmax": ("entmax", "entmax.attention"),
    "co_alibi": ("co_alibi", "co_alibi.attention"),
}

Implementation = Literal["triton", "triton_interpret", "xla", "reference"]
NAMES: tuple[Implementation, ...] = get_args(Implementation)

# None: the first of these that can run.
PREFERENCE = ("triton", "xla")

# Heads wider than this do not fit the kernels' registers.
WIDEST_HEAD = 256


@dataclass(frozen=True)
class Device:
    """The device a call is traced for, and what said so."""

    platform: str
    kind: str
    source: str
    capability: str | None = None  # "9.0"; None: not a CUDA device, or abstract
    abstract: bool = False


class Choice(NamedTuple):
    """An implementation, or None where none can run, and the reason."""

    name: str | None
    reason: str


def current_device() -> Device:
    """The device of a call traced now.

    The abstract device of the current mesh if it has one, else `jax.default_device`,
    else the first device of `jax.default_backend()`.
    """
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return Device(
            abstract.platform,
            abstract.device_kind,
            "the abstract device of the current mesh",
            abstract=True,
        )
    default: Any = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if default is None:
        source, device = "jax.default_backend()", jax.local_devices()[0]
    elif isinstance(default, str):
        source, device = "jax.default_device", jax.local_devices(backend=default)[0]
    else:
        source, device = "jax.default_device", default
    capability = getattr(device, "compute_capability", None)
    return Device(device.platform, device.device_kind, source, capability)


def refusal(name: str, device: Device, *, dtype: str, H: int, h: int) -> str | None:
    """Why an implementation cannot run a call; None if it can."""
    if name in ("xla", "reference"):
        return None
    if name == "triton" and (reason := _no_cuda(device)):
        return f'"triton" needs a CUDA GPU of compute capability >= 8.0, and {reason}'
    if dtype == "float64":
        return f'"{name}" computes in float32, and query is float64'
    if max(H, h) > WIDEST_HEAD:
        return f'"{name}" has heads of at most {WIDEST_HEAD}, and H = {H}, h = {h}'
    return None


def resolve(
    implementation: str | Sequence[str] | None,
    device: Device,
    *,
    dtype: str,
    H: int,
    h: int,
) -> Choice:
    """The implementation a call runs on, and why: a pure function.

    Args:
        implementation: A name, names to try in order, or None for `PREFERENCE`.
        device: As `current_device` says.
        dtype: Of query, key and value.
        H: Head dim of query and key.
        h: Head dim of value.

    Returns:
        The first name that can run, and the reason; (None, the reasons) if none can.

    >>> resolve(None, Device("cpu", "cpu", "jax.default_backend()"),
    ...         dtype="float32", H=64, h=64).name
    'xla'
    >>> resolve("triton", Device("gpu", "A100", "jax.default_device", "8.0"),
    ...         dtype="float32", H=64, h=64).reason
    '"triton" runs on A100 (compute capability 8.0, says jax.default_device)'
    """
    names = PREFERENCE if implementation is None else implementation
    refusals = []
    for name in (names,) if isinstance(names, str) else names:
        reason = refusal(name, device, dtype=dtype, H=H, h=h)
        if reason is None:
            return Choice(name, "; ".join([*refusals, _runs(name, device)]))
        refusals.append(reason)
    return Choice(None, "; ".join(refusals))


def attend_of(name: str, family: str) -> Callable[..., Any]:
    """The function of a `Problem` behind a name, imported when it is first used.

    Args:
        name: One of `NAMES`.
        family: One of `MODULES`.
    """
    return _module(name, family).attend


def visited_of(name: str, family: str) -> Callable[..., Any] | None:
    """What counts the blocks that an implementation visits; None: it visits all."""
    if name in ("xla", "reference"):
        return None
    return _module(name, family).visited_blocks


def sparsity_of(name: str, family: str) -> Callable[..., Any] | None:
    """What counts weights of 0 and blocks without weight; None: there are none."""
    return _module(name, family).sparsity_shares if family == "entmax" else None


def _module(name: str, family: str) -> Any:
    plain, kernels = MODULES[family]
    if name in ("xla", "reference"):
        return importlib.import_module(f"pallas_attn.{name}.{plain}")
    return importlib.import_module(f"pallas_attn.triton.{kernels}")


def _no_cuda(device: Device) -> str | None:
    if device.platform not in ("gpu", "cuda"):
        return f"{device.source} is {device.platform}"
    if device.abstract:  # says nothing about its capability
        return None
    try:
        major = int((device.capability or "").split(".")[0])
    except ValueError:
        return f"{device.source} is {device.kind}, which is not a CUDA device"
    return None if major >= 8 else f"{device.kind} has {device.capability}"


def _runs(name: str, device: Device) -> str:
    if name == "triton" and device.capability:
        fact = f"compute capability {device.capability}, says {device.source}"
        return f'"triton" runs on {device.kind} ({fact})'
    if name == "triton":
        return f'"triton" is lowered for {device.kind} ({device.source})'
    return f'"{name}" runs on {device.platform} ({device.source})'
