"""Registers ``ca3d::folded_conv`` with torch. It is for inference: it has no derivatives."""

import functools
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ca3d_kernels import backends
from ca3d_kernels.folded_conv import reference
from ca3d_kernels.grad_mode import unrecorded


class Options(NamedTuple):
    """Everything but the tensors, in the order of the op's schema; see `folded_conv`.

    Attributes:
        stride, padding: of the convolution, two integers each.
        groups: of the convolution.
        backend: the demanded backend, or ``""``.
    """

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    groups: int = 1
    backend: str = ""

    def output_size(self, x: Tensor, weight: Tensor) -> list[int]:
        """Shape of the result."""
        size = [
            (x.shape[i + 2] + 2 * self.padding[i] - weight.shape[i + 2]) // self.stride[i] + 1
            for i in range(2)
        ]
        return [x.shape[0], weight.shape[0], *size]


class Affine(NamedTuple):
    """What follows the convolution, channel by channel; see `folded_conv`."""

    bias: Tensor
    shift: Tensor
    scale: Tensor | None
    residual_scale: Tensor | None


class Kernels(Protocol):
    """What a backend provides for this op. Images are physically (N, H, W, C)."""

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        affine: Affine,
        residual: Tensor | None,
        z: Tensor,
        options: Options,
    ) -> None:
        """Writes the result into z."""


class ReferenceKernels:
    """The definition in torch operations, on any device."""

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        affine: Affine,
        residual: Tensor | None,
        z: Tensor,
        options: Options,
    ) -> None:
        """Writes the result into z."""
        z.copy_(
            reference.folded_conv(
                x,
                weight,
                affine.bias,
                affine.shift,
                affine.scale,
                residual,
                affine.residual_scale,
                stride=options.stride,
                padding=options.padding,
                groups=options.groups,
            )
        )


@functools.cache
def _load_cpu() -> Kernels:
    from ca3d_kernels.folded_conv.cpu import NativeKernels

    return NativeKernels()


def _cpu_unavailable(device: str) -> str | None:
    if device != "cpu":
        return "it serves CPU tensors only"
    return backends.native_lacks("folded_conv", "folded_epilogue", "advise_huge_pages")


backends.register(
    "folded_conv", backends.Implementation("reference", ReferenceKernels, lambda device: None)
)
backends.register("folded_conv", backends.Implementation("cpu", _load_cpu, _cpu_unavailable))


def _empty(x: Tensor, shape: list[int]) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _dense(x: Tensor) -> Tensor:
    """The same values, physically (N, H, W, C); a copy only if they aren't."""
    dense = x.is_contiguous(memory_format=torch.channels_last)
    return x if dense else _empty(x, list(x.shape)).copy_(x)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    scale: Tensor | None,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    *arguments: Any,
) -> Tensor:
    options = Options(*arguments)
    z = _empty(x, options.output_size(x, weight))
    if z.numel() == 0:
        return z
    x = _dense(x)
    residual = None if residual is None else _dense(residual)
    affine = Affine(bias, shift, scale, residual_scale)
    backends.run(
        "folded_conv",
        x.device.type,
        options.backend,
        lambda kernels: kernels.forward(x, weight, affine, residual, z, options),
    )
    return z


_library = torch.library.Library("ca3d", "FRAGMENT")
_library.define(
    "folded_conv(Tensor x, Tensor weight, Tensor bias, Tensor shift, Tensor? scale, "
    "Tensor? residual, Tensor? residual_scale, int[] stride, int[] padding, int groups, "
    "str backend) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _device in ("CPU", "CUDA"):
    _library.impl("folded_conv", unrecorded(_forward), _device)
torch.library.register_fake(
    "ca3d::folded_conv",
    lambda x, weight, bias, shift, scale, residual, residual_scale, *options: _empty(
        x, Options(*options).output_size(x, weight)
    ),
    lib=_library,
)
