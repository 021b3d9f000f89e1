"""The compiled CUDA kernels of the pre-parameter step."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ca3d_kernels import backends
from ca3d_kernels.cuda import place
from ca3d_kernels.preparam_step.cpu import library_arguments
from ca3d_kernels.preparam_step.op import Batch


class CudaKernels:
    """Queues the kernels on the current stream of the tensors' device; see `op.Kernels`.

    Nothing waits for the device, and nothing is copied to it: a step can be captured in a CUDA
    graph. Numbers that change between replays of a graph are the batch's `device_numbers`.

    Args:
        library: the module `ca3d_kernels._cuda`.
    """

    asynchronous = True  # see `op.is_asynchronous`

    def __init__(self, library: ModuleType) -> None:
        self._library = library

    def step(self, batch: Batch, found_inf: Tensor | None = None) -> None:
        """See `op.Kernels`."""
        self._call(self._library.preparam_sgd_step, batch, found_inf)

    def overflows(self, batch: Batch) -> Tensor:
        """See `op.Kernels`; the flag stays on the device."""
        found_inf = torch.zeros((), device=batch.params[0].device)
        self._call(self._library.preparam_sgd_step_overflows, batch, found_inf)
        return found_inf

    def _call(self, function: Callable[..., Any], batch: Batch, found_inf: Tensor | None) -> None:
        device = batch.params[0].device
        addresses = (
            _address("device_numbers", batch.device_numbers, torch.float64, 6, device),
            _address("found_inf", found_inf, torch.float32, 1, device),
        )
        try:
            function(*library_arguments(batch), addresses, *place(batch.params[0]))
        except self._library.UnsupportedError as limit:
            raise backends.UnsupportedInputError(str(limit)) from None


def _address(
    name: str, x: Tensor | None, dtype: torch.dtype, count: int, device: torch.device
) -> int:
    if x is None:
        return 0
    if x.dtype != dtype or x.numel() != count or x.device != device or not x.is_contiguous():
        raise ValueError(
            f"{name} must be a contiguous tensor of {count} {dtype} on {device}, "
            f"got {tuple(x.shape)} of {x.dtype} on {x.device}"
        )
    return x.data_ptr()
