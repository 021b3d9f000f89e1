"""The compiled CUDA kernels of the pre-parameter step."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ca3d_kernels import cuda
from ca3d_kernels.preparam_step import remembered
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
        """See `op.Kernels`.

        A step that obeys a flag notes how large theta and momentum became, for the next search.
        """
        function = self._library.preparam_sgd_step
        if found_inf is None:
            self._call(function, batch)
            return
        chunk = self._library.PREPARAM_CHUNK
        with remembered.leaving(batch, lambda: remembered.unknown_largest(batch, chunk)) as largest:
            self._call(function, batch, found_inf, largest)

    def overflows(self, batch: Batch) -> Tensor:
        """See `op.Kernels`; the flag stays on the device.

        After a `step` of the same tensors, untouched since, gradients alone mostly tell.
        """
        found_inf = torch.zeros((), dtype=torch.float32, device=batch.params[0].device)
        function = self._library.preparam_sgd_step_overflows
        self._call(function, batch, found_inf, remembered.known(batch))
        return found_inf

    def _call(
        self,
        function: Callable[..., Any],
        batch: Batch,
        found_inf: Tensor | None = None,
        largest: Tensor | None = None,
    ) -> None:
        device = batch.params[0].device
        addresses = (
            _address("device_numbers", batch.device_numbers, torch.float64, 6, device),
            _address("found_inf", found_inf, torch.float32, 1, device),
            0 if largest is None else largest.data_ptr(),
        )
        arguments = (*library_arguments(batch), addresses)
        cuda.call(self._library, function, arguments, batch.params[0])


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
