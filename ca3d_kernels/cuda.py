"""The library of CUDA kernels: whether it can run here, and where its kernels go."""

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor


@functools.cache
def library() -> ModuleType | None:
    """The compiled module `ca3d_kernels._cuda`, loaded at the first call; None when missing.

    It is built only where `nvcc` is found, and can be loaded without a GPU.

    Example:
        >>> library() is None or hasattr(library(), "local_attention_forward")
        True
    """
    try:
        return importlib.import_module("ca3d_kernels._cuda")
    except ImportError:
        return None


def place(x: Tensor) -> tuple[int, int]:
    """Device number and address of the current stream, for a kernel that works on a tensor.

    Example:
        >>> place(torch.zeros(1))
        (0, 0)
    """
    if x.device.type != "cuda":
        return 0, 0
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream
