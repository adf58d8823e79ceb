"""Kernels lowered for CUDA on any machine, and what the `triton` wheel makes of them.

Nothing here needs a GPU: JAX lowers for the abstract device of a mesh, and the wheel
brings its own copy of ptxas. XLA compiles with another version of Triton, so the
figures are those of a sibling; the card decides.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from pallas_attn.cards import shared_kib
from pallas_attn.lowering.triton_ir import accumulated, copied, loaded_in_loops


# One device of each compute capability, as `jax.Device.device_kind` names it.
DEVICES = {
    80: "NVIDIA A100-SXM4-80GB",
    86: "NVIDIA A10",
    89: "NVIDIA L4",
    90: "NVIDIA H100 80GB HBM3",
    100: "NVIDIA B200",
    120: "NVIDIA RTX PRO 6000 Blackwell Server Edition",
}
# The most shared memory one program may use, in bytes.
SHARED_LIMIT = {
    arch: 1024 * shared_kib(f"{arch // 10}.{arch % 10}") for arch in DEVICES
}
# The version of PTX that Triton is told; shared memory does not depend on it.
PTX = 87


@dataclass(frozen=True)
class Kernel:
    """One launch of a Triton kernel inside a lowered computation.

    Args:
        name: The kernel's name.
        ir: Its Triton IR, MLIR bytecode.
        num_warps: Warps of a program.
        num_stages: Depth of the software pipeline.
        grid: Programs along x, y and z.
        arguments: (shape, dtype) of each operand, then of each result, in the order of
            the kernel's pointer arguments.
    """

    name: str
    ir: bytes
    num_warps: int
    num_stages: int
    grid: tuple[int, int, int]
    arguments: tuple[tuple[tuple[int, ...], str], ...]


@dataclass(frozen=True)
class Record:
    """What a compiled kernel uses.

    Args:
        name: The kernel's name.
        arch: Compute capability times ten, a key of `DEVICES`.
        num_warps: Warps of a program.
        num_stages: Depth of the software pipeline.
        registers: Per thread.
        spills: Bytes stored to and loaded from local memory because registers ran out.
        stack: Bytes of a thread's stack frame.
        shared: Bytes of shared memory.
        wgmma: Warp-group matrix instructions (`wgmma`, Hopper only).
        serialised: Whether ptxas makes each of them wait for the one before.
        copied: Arguments (places in `Kernel.arguments`) read by asynchronous copies.
        loaded: Arguments loaded into registers inside a loop, tile by tile.
        accumulated: Arguments that a product takes as the start of its accumulator.
    """

    name: str
    arch: int
    num_warps: int
    num_stages: int
    registers: int
    spills: int
    stack: int
    shared: int
    wgmma: int
    serialised: bool
    copied: frozenset[int]
    loaded: frozenset[int]
    accumulated: frozenset[int]


@contextlib.contextmanager
def abstract_gpu(arch: int = 90) -> Iterator[None]:
    """A context in which tracing and lowering take place as on a GPU of `arch`."""
    device = jax.sharding.AbstractDevice(DEVICES[arch], None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


def lower(f: Callable[..., Any], *specs: Any, arch: int = 90) -> tuple[Kernel, ...]:
    """The Triton kernels that `f` launches on a GPU, each once for each launch.

    Args:
        f: A function of arrays; it is jitted here.
        *specs: Its arguments, as arrays or `jax.ShapeDtypeStruct`s.
        arch: The GPU's compute capability times ten, a key of `DEVICES`.

    Returns:
        The kernels, in the order of the lowered text.
    """
    with abstract_gpu(arch):
        # a fresh function: jit's trace cache does not look at the mesh's device
        lowered = (
            jax.jit(lambda *a: f(*a)).trace(*specs).lower(lowering_platforms=("cuda",))
        )
    module: Any = lowered.compiler_ir()
    return tuple(_kernels(module.operation))


def unavailable() -> str | None:
    """Why `compile_kernel` cannot work here, or None if it can."""
    try:
        importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return (
            "the triton package is missing: pip install triton (Linux; no GPU needed)"
        )
    return None


def triton_version() -> str:
    """The version of the `triton` wheel, and of its ptxas."""
    from triton.backends.nvidia.compiler import get_ptxas

    return (
        f"triton {importlib.metadata.version('triton')}, ptxas {get_ptxas(90).version}"
    )


@functools.lru_cache(maxsize=4096)
def compile_kernel(kernel: Kernel, arch: int = 90) -> Record:
    """Compiles a kernel to machine code.

    The stages are Triton's own from the first one on: it merges common expressions and
    moves them out of loops, as XLA's pipeline does, and without it registers are
    overstated.

    Args:
        kernel: From `lower`.
        arch: The compute capability times ten to compile for.

    Returns:
        What the machine code uses.

    Raises:
        RuntimeError: if ptxas refuses the kernel.
    """
    from triton.backends.nvidia.compiler import get_ptxas

    metadata: dict[str, Any] = {}
    text: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        module, stages = _parsed(kernel, arch, folder)
        for stage in ("ttir", "ttgir", "llir", "ptx"):
            module = stages[stage](module, metadata)
            text[stage] = str(module)
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(text["ptx"])
        target = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={target}", str(ptx)]
        done = subprocess.run(
            [*command, "-o", str(Path(folder) / "kernel.cubin")],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"ptxas refuses {kernel.name} for {target}:\n{done.stderr}")
    log = done.stdout + done.stderr
    return Record(
        name=kernel.name,
        arch=arch,
        num_warps=kernel.num_warps,
        num_stages=kernel.num_stages,
        registers=_number(r"Used (\d+) registers", log),
        spills=_number(r"(\d+) bytes spill stores", log)
        + _number(r"(\d+) bytes spill loads", log),
        stack=_number(r"(\d+) bytes stack frame", log),
        shared=metadata["shared"],
        wgmma=text["ptx"].count("wgmma.mma_async"),
        serialised="instructions are serialized" in log,
        copied=copied(text["ttgir"]),
        loaded=loaded_in_loops(text["ttgir"]),
        accumulated=accumulated(text["ttir"]),
    )


@functools.lru_cache(maxsize=4096)
def shared_memory(kernel: Kernel, arch: int) -> int:
    """Bytes of shared memory of a kernel: `compile_kernel(kernel, arch).shared`.

    It is settled before there is machine code, in a third of the time.
    """
    from triton._C.libtriton import ir, nvidia, passes

    metadata: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        module, stages = _parsed(kernel, arch, folder)
        for stage in ("ttir", "ttgir"):
            module = stages[stage](module, metadata)
    # what Triton's make_llir does first
    manager = ir.pass_manager(module.context)
    passes.ttgpuir.add_combine_tensor_select_and_if(manager)
    passes.ttgpuir.add_allocate_warp_groups(manager, False)
    passes.convert.add_scf_to_cf(manager)
    passes.gluon.add_inliner(manager)
    nvidia.passes.ttgpuir.add_allocate_shared_memory_nv(manager, arch, PTX)
    manager.run(module, "shared_memory")
    return module.get_int_attr("ttg.shared")


def _parsed(kernel: Kernel, arch: int, folder: str) -> tuple[Any, dict[str, Any]]:
    """A kernel as Triton's module, and the stages that Triton takes it through."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget, Language
    from triton.compiler.compiler import make_backend

    backend = make_backend(GPUTarget("cuda", arch, 32))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    options = backend.parse_options(
        {
            "num_warps": kernel.num_warps,
            "num_stages": kernel.num_stages,
            "enable_fp_fusion": True,  # as XLA does
        }
    )
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, Language.TRITON)
    source = Path(folder) / "kernel.ttir"
    source.write_text(triton_ir(kernel))
    module = ir.parse_mlir_module(str(source), context)
    module.context = context
    return module, stages


def triton_ir(kernel: Kernel) -> str:
    """The kernel's Triton IR as text."""
    from jaxlib.mlir import ir
    from jaxlib.triton import dialect

    context = ir.Context()
    dialect.register_dialect(context)
    context.load_all_available_dialects()
    context.allow_unregistered_dialects = True
    with context:
        module = ir.Module.parse(kernel.ir)
        return str(module.operation.get_asm(print_generic_op_form=False))


def programs(kernel: Kernel) -> int:
    """How many programs a launch has."""
    return math.prod(kernel.grid)


def _kernels(operation: Any) -> Iterator[Kernel]:
    for region in operation.regions:
        for block in region.blocks:
            for inner in block.operations:
                found = inner.operation
                if found.name == "stablehlo.custom_call" and "triton" in str(
                    found.attributes["call_target_name"]
                ):
                    yield _kernel(found)
                yield from _kernels(found)


def _kernel(call: Any) -> Kernel:
    config = call.attributes["mhlo.backend_config"]
    number = lambda name: int(config[name].value)
    types = [x.type for x in (*call.operands, *call.results)]
    return Kernel(
        name=config["name"].value,
        ir=config["ir"].value_bytes,
        num_warps=number("num_warps"),
        num_stages=number("num_stages"),
        grid=(number("grid_x"), number("grid_y"), number("grid_z")),
        arguments=tuple((tuple(t.shape), str(t.element_type)) for t in types),
    )


def _number(pattern: str, log: str) -> int:
    found = re.search(pattern, log)
    assert found is not None, f"ptxas' report has no {pattern!r}:\n{log}"
    return int(found.group(1))
