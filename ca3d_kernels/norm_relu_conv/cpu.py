"""The compiled CPU kernels of the passes around a convolution."""

import torch
from torch import Tensor

from ca3d_kernels import backends, pages

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

    def statistics(self, y: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
        """See `op.Kernels`."""
        mean, variance = _doubles(y), _doubles(y)
        self._native.norm_relu_statistics(
            *_problem(y, relu), *_addresses(y, mean, variance), torch.get_num_threads()
        )
        return mean, variance

    def apply(
        self,
        y: Tensor,
        residual: Tensor | None,
        mean: Tensor,
        scale: Tensor,
        bias: Tensor,
        relu: bool,
        z: Tensor,
    ) -> None:
        """See `op.Kernels`."""
        pages.prepare(self._native, z)
        coefficients = _addresses(mean, scale, bias)
        self._native.norm_relu_apply(
            *_problem(y, relu),
            *_addresses(y, residual),
            coefficients,
            z.data_ptr(),
            z.dtype != y.dtype,
            torch.get_num_threads(),
        )

    def reduce(
        self, y: Tensor, dz: Tensor, more: Tensor | None, mean: Tensor, relu: bool
    ) -> tuple[Tensor, Tensor]:
        """See `op.Kernels`."""
        total, product = _doubles(y), _doubles(y)
        self._native.norm_relu_reduce(
            *_problem(y, relu),
            *_addresses(mean, y, dz, more, total, product),
            torch.get_num_threads(),
        )
        return total, product

    def backward(
        self,
        y: Tensor,
        dz: Tensor,
        mean: Tensor,
        scale: Tensor,
        offset: Tensor,
        slope: Tensor,
        relu: bool,
        dy: Tensor,
    ) -> None:
        """See `op.Kernels`."""
        if dy is not dz:
            pages.prepare(self._native, dy)
        coefficients = _addresses(mean, scale, offset, slope)
        self._native.norm_relu_backward(
            *_problem(y, relu),
            *_addresses(y, dz),
            coefficients,
            dy.data_ptr(),
            torch.get_num_threads(),
        )


def _problem(y: Tensor, relu: bool) -> tuple[str, int, int, bool]:
    """What the library wants to know besides addresses: dtype, rows, channels, relu."""
    channels = y.shape[1]
    return _DTYPES[y.dtype], y.numel() // channels, channels, relu


def _addresses(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(0 if x is None else x.data_ptr() for x in tensors)


def _doubles(y: Tensor) -> Tensor:
    return torch.empty(y.shape[1], dtype=torch.float64)
