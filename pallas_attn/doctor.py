"""`python -m pallas_attn doctor`: what would run here, why, and what to install."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Sequence
from importlib import metadata

import jax

from pallas_attn import __version__
from pallas_attn.command import Parser
from pallas_attn.implementations import current_device, Device, NAMES, resolve


# A package, and what it is for.
PACKAGES = {
    "jax": "needed",
    "jaxlib": "needed",
    "flax": "models",
    "triton": "python -m pallas_attn inspect, and compile tests without a GPU",
    "jax-cuda12-plugin": "NVIDIA GPUs, CUDA 12",
    "jax-cuda13-plugin": "NVIDIA GPUs, CUDA 13",
    "optax": "demo",
    "rich": "demo and bench",
    "matplotlib": "demo",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints versions, the device, the chosen implementation, and advice.

    Args:
        argv: Command-line arguments; None: those of the process.

    Returns:
        The exit status, 0.
    """
    Parser(
        prog="python -m pallas_attn doctor",
        description="Says what would run here, why, and what to install.",
    ).parse_args(argv)
    device = current_device()
    versions = {name: _version(name) for name in PACKAGES}
    _print_versions(versions)
    _print_device(device)
    _print_choice(device)
    print("\nAdvice")
    for line in advice(device, versions, driver=shutil.which("nvidia-smi") is not None):
        print(f"  {line}")
    return 0


def advice(
    device: Device, versions: dict[str, str | None], *, driver: bool
) -> list[str]:
    """What to install or to expect.

    Args:
        device: Where calls run.
        versions: Of each of `PACKAGES`; None where one is not installed.
        driver: Whether this machine has an NVIDIA driver.

    Returns:
        Lines, at least one.
    """
    plugins = [name for name in versions if "plugin" in name and versions[name]]
    lines = []
    if device.platform == "gpu":
        lines.append(
            "A GPU is in use: `pallas_attn verify` checks every number on it, "
            "`pallas_attn bench` compares it with its peers."
        )
    elif driver and not plugins:
        lines.append(
            "There is an NVIDIA driver, but jax cannot use it: "
            "pip install -e '.[cuda12]' or '.[cuda13]', as nvidia-smi says."
        )
    elif driver:
        lines.append(
            f"{plugins[0]} is installed but jax uses {device.platform}: "
            "look at JAX_PLATFORMS, and at what `jax.devices('gpu')` raises."
        )
    else:
        lines.append(
            'No NVIDIA GPU here: calls run on "xla"; the kernels run in '
            '"triton_interpret", slowly, and compile for a GPU under `inspect`.'
        )
    if len(plugins) > 1:
        lines.append(f"{' and '.join(plugins)} exclude each other: uninstall one.")
    missing = [name for name in ("optax", "rich", "matplotlib") if not versions[name]]
    if missing:
        lines.append(f"For the demo, {', '.join(missing)}: pip install -e '.[demo]'.")
    if not versions["triton"]:
        lines.append("For inspect, triton: pip install triton (Linux; no GPU needed).")
    return lines


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _print_versions(versions: dict[str, str | None]) -> None:
    print("Versions")
    print(f"  {'python':19}{platform.python_version():12}{platform.platform()}")
    print(f"  {'pallas_attn':19}{__version__}")
    for name, version in versions.items():
        print(f"  {name:19}{version or '-':12}{PACKAGES[name]}")


def _print_device(device: Device) -> None:
    print("\nDevice")
    print(f"  {device.kind} ({device.platform}), said by {device.source}")
    if device.capability:
        print(f"  compute capability {device.capability}")
    print(f"  all devices of that kind: {', '.join(str(d) for d in jax.devices())}")


def _print_choice(device: Device) -> None:
    print("\nImplementation (float32, head dim 64)")
    chosen = resolve(None, device, dtype="float32", H=64, h=64)
    print(f"  None -> {chosen.name}: {chosen.reason}")
    for name in NAMES:
        choice = resolve(name, device, dtype="float32", H=64, h=64)
        print(f"  {name:17}{'yes' if choice.name else 'no '}  {choice.reason}")
