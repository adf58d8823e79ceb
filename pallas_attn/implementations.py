"""The four implementations, and which of them a call runs on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args, Literal, NamedTuple

import jax
from jaxtyping import Array

from pallas_attn.problem import Problem


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


class Functions(NamedTuple):
    """What an implementation makes of a `Problem`.

    attend: (output [B, T, N, h], residual [B, T, N]).
    visited: Of the visible blocks the shares, each [B, N], that forward, rows and cols
        visit; None: all of them.
    sparsity: The shares, each [B, N], of visible pairs whose weight is 0, and of
        visible blocks that are left out for it; None: there are none.
    """

    attend: Callable[[Problem], tuple[Array, Array]]
    visited: Callable[[Problem], tuple[Array, Array, Array]] | None = None
    sparsity: Callable[[Problem], tuple[Array, Array]] | None = None


@functools.cache
def functions_of(name: str, family: str) -> Functions:
    """The functions behind a name, imported when they are first used; always the same.

    Args:
        name: One of `NAMES`.
        family: Of the problems, as `Problem.family` says.
    """
    match name:
        case "reference":
            return _reference(family)
        case "xla":
            return _xla(family)
        case _:
            return _triton(family)


def _reference(family: str) -> Functions:
    from pallas_attn.reference import attention, co_alibi, entmax

    if family == "entmax":
        return Functions(entmax.attend, sparsity=entmax.sparsity_shares)
    return Functions((co_alibi if family == "co_alibi" else attention).attend)


def _xla(family: str) -> Functions:
    from pallas_attn.xla import attention, co_alibi, entmax

    if family == "entmax":
        return Functions(entmax.attend, sparsity=entmax.sparsity_shares)
    return Functions((co_alibi if family == "co_alibi" else attention).attend)


def _triton(family: str) -> Functions:
    """Kernels; of derivatives, what no kernel computes is what "xla" does."""
    plain = _xla(family).attend
    if family == "entmax":
        from pallas_attn.triton.entmax import attention as entmax

        attend = functools.partial(entmax.attend, plain=plain)
        return Functions(attend, entmax.visited_blocks, entmax.sparsity_shares)
    if family == "co_alibi":
        from pallas_attn.triton.co_alibi import attention as co_alibi

        attend = functools.partial(co_alibi.attend, plain=plain)
        return Functions(attend, co_alibi.visited_blocks)
    from pallas_attn.triton import attention

    attend = functools.partial(attention.attend, plain=plain)
    return Functions(attend, attention.visited_blocks)


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
