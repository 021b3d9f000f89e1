"""The convolution inside `norm_relu_conv`, in the precision in which torch is quick at it.

It is torch's. On a CPU, float16 is convolved in float32, on copies of a part of the batch that live
no longer than its convolution, and so is bfloat16 where the CPU can't convolve it: torch's own path
there is many times slower.
"""

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ca3d_kernels import half_storage


class Geometry(NamedTuple):
    """How a convolution's weight meets its input.

    Attributes:
        stride, padding: two integers each.
        groups: of channels.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    groups: int

    def arguments(self) -> tuple[Any, ...]:
        """Those of torch's operators: stride, padding, dilation, transposed, output_padding, ..."""
        return list(self.stride), list(self.padding), [1, 1], False, [0, 0], self.groups

    def output_size(self, z: Tensor, weight: Tensor) -> list[int]:
        """Height and width of the output."""
        return [
            (z.shape[i + 2] + 2 * self.padding[i] - weight.shape[i + 2]) // self.stride[i] + 1
            for i in range(2)
        ]


def _is_quick(x: Tensor) -> bool:
    """Whether torch has a convolution of x's dtype that isn't many times slower than float32."""
    if x.device.type != "cpu" or x.dtype in (torch.float32, torch.float64):
        return True
    return x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _plain_precision(device: str) -> contextlib.AbstractContextManager[Any]:
    """Keeps autocast from changing the dtype of a convolution inside the op."""
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def convolve(z: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The output, in z's dtype, in the layout that torch chooses.

    Args:
        z: (N, C, H, W).
        weight: (O, C / groups, kH, kW), of z's dtype.
        bias: (O,) or None.
        geometry: of the convolution.
    """
    with _plain_precision(z.device.type):
        if _is_quick(z):
            return torch.convolution(z, weight, bias, *geometry.arguments())
        return half_storage.convolve(z, weight, bias, geometry.arguments())


def gradients(
    grad: Tensor, inputs: list[Tensor], alike: Tensor, weight: Tensor, geometry: Geometry
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of z, weight and bias; those of weight and bias may be in float32.

    Args:
        grad: of the output, dense like z.
        inputs: z alone. The list is emptied as soon as z is done with, before its gradient takes as
            much memory again.
        alike: any tensor of z's size, dtype and layout, of which no value is read.
        weight, geometry: as they were.
    """
    z = inputs.pop()
    with _plain_precision(z.device.type):
        if not _is_quick(z):
            dz, dweight, dbias = half_storage.convolution_gradients(
                grad, z, weight, geometry.arguments(), (True, True, True)
            )
            assert dz is not None
            assert dweight is not None
            assert dbias is not None
            return dz, dweight, dbias
        backward = torch.ops.aten.convolution_backward
        rest = (weight, [weight.shape[0]], *geometry.arguments())
        _, dweight, dbias = backward(grad, z, *rest, [False, True, True])
        del z
        return backward(grad, alike, *rest, [True, False, False])[0], dweight, dbias
