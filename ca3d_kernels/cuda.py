"""The library of CUDA kernels: whether it can run here, and where its kernels go."""

import contextlib
import functools
import importlib
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ca3d_kernels import backends


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    # torch first, for the same reasons as in backends.py.
    try:
        return importlib.import_module("ca3d_kernels._cuda"), None
    except ModuleNotFoundError:
        reason = "the CUDA library is not built (nvcc was not found at the installation, or failed)"
        return None, reason
    except ImportError as error:
        return None, f"the CUDA library can't be loaded ({error})"


def library() -> ModuleType:
    """The compiled module `ca3d_kernels._cuda`, loaded at the first call.

    It is built only where ``nvcc`` is found, and can be loaded, and plan launches, without a GPU.

    Raises:
        ImportError: it is not built, or can't be loaded.

    Example:
        >>> try:
        ...     print(callable(library().local_attention_forward))
        ... except ImportError:
        ...     print(True)
        True
    """
    module, reason = _load()
    if module is None:
        raise ImportError(reason)
    return module


def unavailable(device: str) -> str | None:
    """Why the CUDA library can't run on tensors of a device type, or None when it can.

    Example:
        >>> unavailable("cpu")
        'it serves CUDA tensors only'
    """
    if device != "cuda":
        return "it serves CUDA tensors only"
    return _obstacle()


@functools.cache
def _obstacle() -> str | None:
    module, reason = _load()
    if module is None:
        return reason
    if torch.version.hip:
        return "torch is a build for ROCm"
    driver, runtime = module.driver_version(), module.runtime_version()
    if obstacle := driver_obstacle(driver, runtime):
        return obstacle
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if not covers(module.architectures(), capability, driver >= runtime):
            name = f"cuda:{index} is of sm_{capability[0]}{capability[1]}"
            return f"{name}, the CUDA library was built for {module.architectures()}"
    return None


def driver_obstacle(driver: int, runtime: int) -> str | None:
    """Why a driver can't run a library built with a CUDA runtime, or None when it can.

    A driver runs what any release of the same major version built. Of large kernel arguments, which
    one before 12.1 would refuse, the library makes several small ones.

    Args:
        driver: newest CUDA version that the driver supports, such as 12040; 0 without a driver.
        runtime: CUDA version of the library, such as 13000.

    Example:
        >>> driver_obstacle(12040, 13000)
        'the driver supports CUDA up to 12.4, the CUDA library was built with 13.0'
        >>> driver_obstacle(0, 13000)
        'there is no NVIDIA driver'
        >>> driver_obstacle(13000, 13010) is None
        True
    """
    if driver == 0:
        return "there is no NVIDIA driver"
    if driver // 1000 >= runtime // 1000:
        return None
    supported, built = (f"{x // 1000}.{x % 1000 // 10}" for x in (driver, runtime))
    return f"the driver supports CUDA up to {supported}, the CUDA library was built with {built}"


def covers(architectures: str, capability: tuple[int, int], compiles: bool = True) -> bool:
    """Whether compiled kernels run on a GPU.

    Machine code runs on GPUs of the same major version that are not older; PTX on all that are not
    older, if the driver can compile it.

    Args:
        architectures: what the kernels were compiled to, such as ``"sm_80,sm_90,compute_80"``.
        capability: compute capability of the GPU.
        compiles: whether the driver is new enough for the PTX.

    Example:
        >>> covers("sm_80,sm_90", (8, 9)), covers("sm_80,sm_90", (12, 0))
        (True, False)
        >>> covers("sm_80,compute_80", (12, 0)), covers("sm_80,compute_80", (7, 5))
        (True, False)
    """
    for kind, digits in re.findall(r"(sm|compute)_(\d+)", architectures):
        built = (int(digits[:-1]), int(digits[-1]))
        same_code = kind == "sm" and built[0] == capability[0]
        if built <= capability and (same_code or (kind == "compute" and compiles)):
            return True
    return False


def is_capturing(device: torch.device) -> bool:
    """Whether what is queued on a device goes into a CUDA graph instead.

    Example:
        >>> is_capturing(torch.device("cpu"))
        False
    """
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def used_here(x: Tensor) -> Tensor:
    """A tensor that is kept between steps, when a kernel on the current stream is to read it.

    Its memory is then not given away before that kernel has ended, even if another stream's step
    drops the tensor in between.

    Example:
        >>> used_here(torch.ones(2))
        tensor([1., 1.])
    """
    if x.is_cuda and not is_capturing(x.device):
        x.record_stream(torch.cuda.current_stream(x.device))
    return x


def call(
    library: ModuleType, function: Callable[..., Any], arguments: tuple[Any, ...], near: Tensor
) -> None:
    """Has the compiled library queue a kernel on the current stream of a tensor's device.

    Args:
        library: the module `ca3d_kernels._cuda`.
        function: of it, that takes a device number and the address of a stream last.
        arguments: its other arguments.
        near: a tensor of the device.

    Raises:
        UnsupportedInputError: naming the limit of the kernel.

    Example:
        >>> library = ModuleType("_cuda")
        >>> library.UnsupportedError = ArithmeticError
        >>> call(library, print, ("a kernel on",), torch.zeros(1))
        a kernel on 0 0
    """
    number, stream = 0, 0
    device: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if near.is_cuda:
        number, stream = near.device.index, torch.cuda.current_stream(near.device).cuda_stream
        # The library guards the device too, but its way back would make a context on one that this
        # process has never used: hundreds of MB there, since CUDA 12. torch's guard knows.
        device = torch.cuda.device(near.device)
    try:
        with device:
            function(*arguments, number, stream)
    except library.UnsupportedError as limit:
        raise backends.UnsupportedInputError(str(limit)) from None
