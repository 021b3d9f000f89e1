"""Registers ``ca3d::temporal_block`` with torch. It is for inference: it has no derivatives."""

import functools
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ca3d_kernels import backends, triton_launch
from ca3d_kernels.grad_mode import unrecorded
from ca3d_kernels.local_attention.op import Options
from ca3d_kernels.temporal_block import reference


class Weights(NamedTuple):
    """The weights of a block, contiguous; see `ca3d_kernels.temporal_block`."""

    qkv_weight: Tensor
    qkv_bias: Tensor
    norm_scale: Tensor
    norm_shift: Tensor
    column_weight: Tensor
    column_bias: Tensor
    column_scale: Tensor
    column_shift: Tensor

    @staticmethod
    def shapes(heads: int, head_dim: int, frames: int, convolutions: int) -> dict[str, Any]:
        """The shape of each tensor.

        Example:
            >>> Weights.shapes(4, 64, 8, 4)["column_weight"]
            (4, 4, 192, 64)
        """
        return {
            "qkv_weight": (heads, head_dim, 3 * head_dim),
            "qkv_bias": (heads, frames, 3 * head_dim),
            "norm_scale": (heads, head_dim),
            "norm_shift": (heads, frames, head_dim),
            "column_weight": (convolutions, heads, 3 * head_dim, head_dim),
            "column_bias": (convolutions, heads, head_dim),
            "column_scale": (convolutions, heads, head_dim),
            "column_shift": (convolutions, heads, head_dim),
        }


class Kernels(Protocol):
    """What a backend provides for this op. Channels of x and out are contiguous."""

    def forward(self, x: Tensor, weights: Weights, out: Tensor, options: Options) -> None:
        """Writes the output (B, T, N, C) into out."""


class ReferenceKernels:
    """The definition in torch operations, on any device."""

    def forward(self, x: Tensor, weights: Weights, out: Tensor, options: Options) -> None:
        """Writes the output into out."""
        out.copy_(reference.temporal_block(x, *weights, **options.definition()))


@functools.cache
def _load_cpu() -> Kernels:
    from ca3d_kernels.temporal_block.cpu import NativeKernels

    return NativeKernels()


def _cpu_unavailable(device: str) -> str | None:
    if device != "cpu":
        return "it serves CPU tensors only"
    return backends.native_lacks("temporal_block", "advise_huge_pages")


@functools.cache
def _load_triton() -> Kernels:
    from ca3d_kernels.temporal_block.triton import TritonKernels

    return TritonKernels()


backends.register(
    "temporal_block", backends.Implementation("reference", ReferenceKernels, lambda device: None)
)
backends.register("temporal_block", backends.Implementation("cpu", _load_cpu, _cpu_unavailable))
backends.register(
    "temporal_block", backends.Implementation("triton", _load_triton, triton_launch.unavailable)
)


def _forward(x: Tensor, *rest: Any) -> Tensor:
    count = len(Weights._fields)
    weights = Weights(*(t.contiguous() for t in rest[:count]))
    window = Options(*rest[count:])
    out = x.new_empty(x.shape)
    x = x if x.stride(-1) == 1 else x.contiguous()
    if out.numel():
        backends.run(
            "temporal_block",
            x.device.type,
            window.backend,
            lambda kernels: kernels.forward(x, weights, out, window),
        )
    return out


_library = torch.library.Library("ca3d", "FRAGMENT")
_library.define(
    "temporal_block(Tensor x, Tensor qkv_weight, Tensor qkv_bias, Tensor norm_scale, "
    "Tensor norm_shift, Tensor column_weight, Tensor column_bias, Tensor column_scale, "
    "Tensor column_shift, int kernel_size, int dilation, bool causal, float? scale, str edge, "
    "int[] key_table, str backend) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _device in ("CPU", "CUDA"):
    _library.impl("temporal_block", unrecorded(_forward), _device)
torch.library.register_fake(
    "ca3d::temporal_block", lambda x, *rest: x.new_empty(x.shape), lib=_library
)
