"""Launches the Triton kernels of the projection per head with the attention after it."""

import torch
from torch import Tensor

from ca3d_kernels import triton_launch
from ca3d_kernels.backends import UnsupportedInputError
from ca3d_kernels.local_attention.op import Options
from ca3d_kernels.local_attention.triton import before, power_of_two
from ca3d_kernels.qkv_attention import triton_kernels
from ca3d_kernels.qkv_attention.op import limit
from ca3d_kernels.triton_launch import Launch

_PARTS = {torch.float16: 2, torch.bfloat16: 3}
# Rows of a tile and warps of a program: what fits into registers.
_ROWS = {"qkv_attention_forward": 32, "qkv_attention_backward": 16}
_WARPS = {"qkv_attention_forward": 4, "qkv_attention_backward": 8}
# A program loads its head's weights once: few programs for each head, but enough for a large GPU.
_PROGRAMS_PER_HEAD = {"qkv_attention_forward": 256, "qkv_attention_backward": 64}


def _launch(
    kernel: str, images: dict[str, Tensor], others: dict[str, Tensor], options: Options
) -> Launch:
    """The launch of a kernel; images are (B, T, N, C), named in the kernel's order."""
    x, weight = images["x"], others["weight"]
    heads, _, head_dim = weight.shape
    if reason := limit(x, weight, options):
        raise UnsupportedInputError(reason)
    if not triton_launch.has_tensor_cores(x.device):
        raise UnsupportedInputError("the GPU is older than sm_80")
    frame_rows = power_of_two(x.shape[1])
    positions = x.shape[0] * x.shape[2]
    tiles = -(-positions // (_ROWS[kernel] // frame_rows))
    strides = {
        f"{name}_{dim}": stride
        for name, image in images.items()
        for dim, stride in zip(("outer", "frame", "inner"), image.stride(), strict=False)
    }
    numbers = {
        "positions": positions,
        "heads": heads,
        "inner": x.shape[2],
        "frames": x.shape[1],
        "tiles": tiles,
        "kernel_size": options.kernel_size,
        "dilation": options.dilation,
        "before": before(options),
        "shift": int(options.edge == "shift" and not options.causal),
        "zeros": float(options.edge == "zero"),
        "scale": head_dim**-0.5 if options.scale is None else options.scale,
    }
    constants = {
        "HEAD_DIM": head_dim,
        "FRAMES": frame_rows,
        "ROWS": _ROWS[kernel],
        "ALIGNED": triton_launch.alignment(*images.values()),
        "PARTS": _PARTS[x.dtype],
        "BIAS": "bias" in others,
    }
    tensors = {**images, **others}
    tensors.setdefault("bias", weight)
    function = getattr(triton_kernels, kernel)
    ordered = {name: tensors[name] for name in function.arg_names if name in tensors}
    programs = heads * min(positions, _PROGRAMS_PER_HEAD[kernel])
    arguments = {**ordered, **strides, **numbers}
    return Launch(function, programs, arguments, constants, _WARPS[kernel])


def forward_launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, o: Tensor, options: Options
) -> Launch:
    """The launch of the forward kernel; see `op.Kernels`.

    Raises:
        UnsupportedInputError: naming the limit of the kernel.

    Example:
        >>> x = torch.empty(2, 8, 196, 256, dtype=torch.float16, device="meta")
        >>> w = torch.empty(4, 192, 64, dtype=torch.float16, device="meta")
        >>> forward_launch(x, w, None, x, Options()).programs
        1024
    """
    others = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    return _launch("qkv_attention_forward", {"x": x, "o": o}, others, options)


def backward_launch(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, dx: Tensor, options: Options
) -> tuple[Launch, Tensor, Tensor]:
    """The launch of the backward kernel, and the shares of dweight and dbias that it writes.

    The shares have shapes (programs per head, heads, 3 * head_dim, head_dim) and the same without
    the last dimension, float32.

    Raises:
        UnsupportedInputError: naming the limit of the kernel.

    Example:
        >>> x = torch.empty(2, 8, 196, 256, dtype=torch.float16, device="meta")
        >>> w = torch.empty(4, 192, 64, dtype=torch.float16, device="meta")
        >>> backward_launch(x, x, w, None, x, Options())[1].shape
        torch.Size([64, 4, 192, 64])
    """
    heads, _, head_dim = weight.shape
    # No more shares than tiles; a tile holds at least one position.
    shares = min(x.shape[0] * x.shape[2], _PROGRAMS_PER_HEAD["qkv_attention_backward"])
    partial = x.new_empty((shares, heads, 3 * head_dim, head_dim), dtype=torch.float32)
    partial_bias = x.new_empty((shares, heads, 3 * head_dim), dtype=torch.float32)
    others = {"weight": weight, "partial_weight": partial, "partial_bias": partial_bias}
    if bias is not None:
        others["bias"] = bias
    images = {"x": x, "do": grad, "dx": dx}
    launch = _launch("qkv_attention_backward", images, others, options)
    return launch, partial, partial_bias


class TritonKernels:
    """Runs the Triton kernels; see `op.Kernels`."""

    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, o: Tensor, options: Options
    ) -> None:
        """Writes the output into o."""
        triton_launch.run(forward_launch(x, weight, bias, o, options))

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dx: Tensor,
        options: Options,
    ) -> tuple[Tensor, Tensor]:
        """Writes the gradient of x into dx, returns those of weight and bias in float32."""
        launch, partial, partial_bias = backward_launch(grad, x, weight, bias, dx, options)
        triton_launch.run(launch)
        return partial.sum(0), partial_bias.sum(0)
