"""The compiled CPU kernels of the passes around a convolution."""

import torch
from torch import Tensor

from ca3d_kernels import backends, pages
from ca3d_kernels.norm_relu_conv.op import Norm, Statistics

_DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


class NativeKernels:
    """Calls the compiled library with addresses; see `op.Kernels`."""

    def __init__(self) -> None:
        native = backends.native()
        assert native is not None
        self._native = native

    def normalise(self, y: Tensor, residual: Tensor | None, norm: Norm, z: Tensor) -> Statistics:
        """See `op.Kernels`."""
        pages.prepare(self._native, z)
        weight, bias = norm.weight.double(), norm.bias.double()
        statistics = Statistics(*_two_of_channels(y))
        self._native.normalise(
            *_problem(y, norm.relu),
            _addresses(weight, bias),
            norm.eps,
            *_addresses(y, residual),
            _addresses(*statistics),
            z.data_ptr(),
            torch.get_num_threads(),
        )
        return statistics

    def normalise_again(self, y: Tensor, norm: Norm, statistics: Statistics, z: Tensor) -> None:
        """See `op.Kernels`."""
        pages.prepare(self._native, z)
        weight, bias = norm.weight.double(), norm.bias.double()
        self._native.normalise_again(
            *_problem(y, norm.relu),
            _addresses(weight, bias),
            norm.eps,
            y.data_ptr(),
            _addresses(*statistics),
            z.data_ptr(),
            torch.get_num_threads(),
        )

    def backward(
        self,
        y: Tensor,
        dz: Tensor,
        more: Tensor | None,
        norm: Norm,
        statistics: Statistics,
        dy: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """See `op.Kernels`."""
        if dy is not None and dy is not dz:
            pages.prepare(self._native, dy)
        weight = norm.weight.double()
        dweight, dbias = _two_of_channels(y)
        self._native.normalise_backward(
            *_problem(y, norm.relu),
            (weight.data_ptr(), 0),
            norm.eps,
            y.data_ptr(),
            _addresses(*statistics),
            *_addresses(dz, more, dy),
            _addresses(dweight, dbias),
            torch.get_num_threads(),
        )
        return dweight, dbias


def _problem(y: Tensor, relu: bool) -> tuple[str, tuple[int, int], bool]:
    """What the library wants to know first: dtype, (rows, channels), relu."""
    channels = y.shape[1]
    return _DTYPES[y.dtype], (y.numel() // channels, channels), relu


def _addresses(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple([0 if x is None else x.data_ptr() for x in tensors])


def _two_of_channels(y: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty(y.shape[1], dtype=torch.float64, device=y.device) for _ in range(2))
