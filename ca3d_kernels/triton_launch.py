"""What the Triton backends of all ops share: one description of a launch, and where they can run.

A launcher describes each launch as a `Launch`. `run` executes it; the dump of the kernels and the
offline tests compile the same description for a GPU that isn't there.
"""

import contextlib
import contextvars
import functools
import importlib.util
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

Argument = Tensor | int | float

_planned_tensor_cores = contextvars.ContextVar("ca3d_planned_tensor_cores", default=True)


class Launch(NamedTuple):
    """One launch of a Triton kernel.

    Attributes:
        kernel: the ``triton.jit`` function.
        programs: size of the grid; it has one dimension.
        arguments: run-time arguments by name, in the kernel's order. A tensor stands for its
            address; it may be a meta tensor if the launch is only compiled.
        constants: compile-time arguments by name.
        num_warps: of 32 threads, in each program.
        reached: tensors that the kernel reaches through addresses in other tensors.
        options: further options of the compiler.
        contents: what tables hold that are arguments, on the CPU.
    """

    kernel: Any
    programs: int
    arguments: dict[str, Argument]
    constants: dict[str, Any]
    num_warps: int
    reached: tuple[Tensor, ...] = ()
    options: dict[str, Any] | None = None
    contents: dict[str, Tensor] | None = None


def run(launch: Launch) -> None:
    """Executes a launch on the device of its tensors, on the current stream.

    Args:
        launch: its grid must have fewer than 2^31 programs.
    """
    first = next(x for x in launch.arguments.values() if isinstance(x, Tensor))
    device = torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext()
    with device:
        launch.kernel[(launch.programs,)](
            **launch.arguments,
            **launch.constants,
            **options_for(launch, amd=torch.version.hip is not None),
            num_warps=launch.num_warps,
        )


def options_for(launch: Launch, *, amd: bool) -> dict[str, Any]:
    """The compiler's options of a launch; a limit of registers is for NVIDIA's GPUs.

    Example:
        >>> options_for(Launch(None, 1, {}, {}, 4, options={"maxnreg": 255}), amd=True)
        {}
    """
    options = launch.options or {}
    return {key: value for key, value in options.items() if not (amd and key == "maxnreg")}


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, which takes CPU tensors.

    Example:
        >>> interpreted()
        False
    """
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


@functools.cache
def _no_gpu() -> str | None:
    if not torch.cuda.is_available():
        return "there is no GPU that torch can use"
    for index in range(torch.cuda.device_count() if torch.version.hip is None else 0):
        major, minor = torch.cuda.get_device_capability(index)
        if (major, minor) < (7, 5):
            return f"cuda:{index} is of sm_{major}{minor}, older than sm_75"
    return None


def unavailable(device: str) -> str | None:
    """Why Triton kernels can't run on tensors of a device type, or None when they can.

    Args:
        device: device type, ``"cpu"`` or ``"cuda"``.

    Example:
        >>> unavailable("cpu")
        'it serves CUDA tensors only'
    """
    if device == "cpu":
        return _missing() if interpreted() else "it serves CUDA tensors only"
    return _missing() or _no_gpu()


def has_tensor_cores(device: torch.device) -> bool:
    """Whether a device multiplies matrices of float16 and of bfloat16 in tensor cores.

    A device that isn't a GPU stands for the one that `planned_for` names, else for one that has.

    Example:
        >>> has_tensor_cores(torch.device("meta"))
        True
    """
    if device.type != "cuda":
        return _planned_tensor_cores.get()
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


@contextlib.contextmanager
def planned_for(arch: str) -> Iterator[None]:
    """Launches described inside the ``with`` block on meta tensors are those for an architecture.

    Args:
        arch: such as ``"sm_75"``.

    Example:
        >>> with planned_for("sm_75"):
        ...     has_tensor_cores(torch.device("meta"))
        False
    """
    token = _planned_tensor_cores.set(arch != "sm_75")
    try:
        yield
    finally:
        _planned_tensor_cores.reset(token)


def alignment(*tensors: Tensor) -> int:
    """Largest power of two, up to 16 bytes, that divides every stride but the last, in elements.

    Dimensions of size 1 don't count.

    Args:
        tensors: of one dtype, their last dimension contiguous.

    Example:
        >>> alignment(torch.empty(3, 4, 8, dtype=torch.float16)), alignment(torch.empty(4, 6))
        (8, 2)
    """
    result = 16 // tensors[0].element_size()
    for x in tensors:
        for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
            while size > 1 and stride % result:
                result //= 2
    return result
