"""Compiles described launches of Triton kernels for a GPU that need not be there."""

import inspect
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ca3d_kernels.triton_launch import Launch, options_for

_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_MEMORY = ("LDG", "LDGSTS", "STG", "LDL", "STL", "ATOMG", "RED", "LDS", "STS")


class Resources(NamedTuple):
    """What the assembler says about a kernel.

    Attributes:
        registers: of a thread.
        stack: bytes of local memory of a thread; 0 if nothing spills.
        shared: bytes of shared memory of a program.
        accesses: memory instructions by opcode and width, such as ``"LDG.128"``.
    """

    registers: int
    stack: int
    shared: int
    accesses: dict[str, int]


def target(arch: str) -> GPUTarget:
    """Triton's name of a GPU architecture.

    Args:
        arch: such as ``"sm_90"`` or ``"gfx942"``.

    Raises:
        ValueError: not an architecture.

    Example:
        >>> target("sm_90").arch
        90
    """
    if match := re.fullmatch(r"sm_(\d+)", arch):
        return GPUTarget("cuda", int(match[1]), 32)
    if re.fullmatch(r"gfx\d+\w?", arch):
        return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    raise ValueError(f"arch must be like 'sm_90' or 'gfx942', got {arch!r}")


def signature(launch: Launch) -> dict[str, str]:
    """Triton types of the parameters of a kernel, in order, constants included."""
    annotations = inspect.get_annotations(launch.kernel.fn)
    types = {}
    for name in launch.kernel.arg_names:
        if name in launch.constants:
            types[name] = "constexpr"
        elif isinstance(value := launch.arguments[name], Tensor):
            types[name] = _POINTERS[value.dtype]
        else:
            types[name] = _scalar_type(annotations[name])
    return types


def _scalar_type(annotation: Any) -> str:
    return {"int64": "i64", "int32": "i32", "fp32": "fp32", "fp64": "fp64"}[str(annotation)]


def compile_for(launch: Launch, arch: str) -> Any:
    """Compiles the kernel of a launch.

    Args:
        launch: tensors may be on the meta device; all are taken to be aligned to 16 bytes.
        arch: such as ``"sm_90"`` or ``"gfx942"``.

    Returns:
        Triton's compiled kernel: ``.asm["ptx"]``, ``.asm["cubin"]``, ``.metadata``.
    """
    types = signature(launch)
    aligned = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=launch.kernel,
        signature=types,
        constexprs=launch.constants,
        attrs={(i,): aligned for i, kind in enumerate(types.values()) if kind.startswith("*")},
    )
    options = {"num_warps": launch.num_warps, **options_for(launch, amd=arch.startswith("gfx"))}
    return triton.compile(source, target=target(arch), options=options)


def tool(name: str, *arguments: str, folder: str | None = None) -> str:
    """Runs one of NVIDIA's tools, which Triton brings along; returns what it prints."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    command = [str(tools / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stdout


def resources(cubin: bytes, entry: str, shared: int) -> Resources:
    """Reads machine code with NVIDIA's tools, which Triton brings along.

    Args:
        cubin: of one or several kernels.
        entry: the kernel.
        shared: bytes of dynamic shared memory that it is launched with.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        code = tool("cuobjdump", "-sass", "-fun", entry, file.name)
    (line,) = re.findall(rf"Function {entry}:\s*(.*)", usage)
    numbers = {key: int(n) for key, n in re.findall(r"(\w+):(\d+)", line)}
    accesses: Counter[str] = Counter()
    for opcode in re.findall(r"^\s+/\*\w+\*/\s+(?:@!?U?P\d+ )?\s*(\S+)", code, re.MULTILINE):
        first, *modifiers = opcode.rstrip(";").split(".")
        if first in _MEMORY:
            width = next((m for m in modifiers if m in ("128", "64", "U16", "S16", "U8")), "32")
            accesses[f"{first}.{width}"] += 1
    return Resources(
        numbers["REG"],
        numbers["STACK"] + numbers["LOCAL"],
        shared,
        dict(sorted(accesses.items())),
    )
