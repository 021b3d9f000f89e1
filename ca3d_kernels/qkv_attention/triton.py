"""Launches the Triton kernels of the projection per head with the attention after it.

With a key table the backward pass takes the kernels of the separate ops: queries, keys, values and
their gradients then go through memory. The projection is torch's, as it is on a CPU.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ca3d_kernels import triton_launch
from ca3d_kernels.backends import UnsupportedInputError
from ca3d_kernels.local_attention import triton as attention
from ca3d_kernels.local_attention.op import Options
from ca3d_kernels.local_attention.triton import PARTS, key_counts, window
from ca3d_kernels.qkv_attention import triton_kernels, triton_table_kernels
from ca3d_kernels.qkv_attention.tiling import limit, table_tile, tile
from ca3d_kernels.triton_launch import Argument, Launch

_WARPS = {"qkv_attention_forward": 4, "qkv_attention_backward": 8}
# A program loads its head's weights once: few programs for each head, but enough for a large GPU.
_PROGRAMS_PER_HEAD = {"qkv_attention_forward": 256, "qkv_attention_backward": 64}
# Of a tile of `qkv_projection_backward`.
_PIXELS = 32


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, options: Options, backward: bool
) -> None:
    if reason := limit(x, weight, bias, options, backward=backward):
        raise UnsupportedInputError(reason)
    if not triton_launch.has_tensor_cores(x.device):
        raise UnsupportedInputError("the GPU is older than sm_80")


def _shared_arguments(
    images: dict[str, Tensor], others: dict[str, Tensor], options: Options
) -> tuple[dict[str, Argument], dict[str, Any]]:
    """Arguments and constants that all kernels have; images are (B, T, N, C)."""
    x, weight, bias = images["x"], others["weight"], others.get("bias")
    heads, _, head_dim = weight.shape
    arguments: dict[str, Argument] = {
        f"{name}_{dim}": stride
        for name, image in images.items()
        for dim, stride in zip(("outer", "frame", "inner"), image.stride(), strict=False)
    }
    per_frame = bias is not None and bias.dim() == 3
    arguments |= {
        "bias_head": 0 if bias is None else bias.stride(0),
        "bias_frame": bias.stride(1) if bias is not None and per_frame else 0,
        "positions": x.shape[0] * x.shape[2],
        "heads": heads,
        "inner": x.shape[2],
        "frames": x.shape[1],
        **window(options, x.shape[1], head_dim),
        **images,
        **others,
        "bias": weight if bias is None else bias,
    }
    constants = {
        "HEAD_DIM": head_dim,
        "ALIGNED": triton_launch.alignment(*images.values()),
        "PARTS": PARTS[x.dtype],
        "BIAS": "none" if bias is None else "frame" if per_frame else "head",
    }
    return arguments, constants


def _described(
    function: Any,
    programs: int,
    arguments: dict[str, Argument],
    constants: dict[str, Any],
    num_warps: int,
    **more: Any,
) -> Launch:
    """The launch, with the arguments in the kernel's order."""
    ordered = {name: arguments[name] for name in function.arg_names if name in arguments}
    return Launch(function, programs, ordered, constants, num_warps, **more)


def _launch(
    kernel: str, images: dict[str, Tensor], others: dict[str, Tensor], options: Options
) -> Launch:
    """The launch of a kernel for each head's own keys."""
    x, heads = images["x"], len(others["weight"])
    cut = tile(x.shape[1], options, backward="dx" in images)
    blocks, groups = cut.blocks(x.shape[1]), cut.groups(x.shape[0] * x.shape[2])
    arguments, constants = _shared_arguments(images, others, options)
    arguments |= {"blocks": blocks, "tiles": blocks * groups}
    constants |= {
        "ROWS": cut.rows,
        "FRAMES": cut.frames,
        "OWNED": cut.owned,
        "FRONT": cut.front,
        "WHOLE": blocks == 1,
    }
    programs = heads * min(blocks * groups, _PROGRAMS_PER_HEAD[kernel])
    function = getattr(triton_kernels, kernel)
    return _described(function, programs, arguments, constants, _WARPS[kernel])


def _table_launch(images: dict[str, Tensor], others: dict[str, Tensor], options: Options) -> Launch:
    """The launch of the forward kernel for a key table."""
    x, heads = images["x"], len(others["weight"])
    table = tuple(options.key_table)
    if "bias" not in others:
        others = {**others, "bias": x.new_zeros(others["weight"].shape[:-1])}
    cut = table_tile(heads, x.shape[1])
    arguments, constants = _shared_arguments(images, others, options)
    arguments["key_counts"] = key_counts(table, heads, options.kernel_size, x.device)
    del constants["BIAS"]
    constants |= {"HEADS": cut.heads, "PLACES": cut.places, "FRAMES": cut.frames}
    # What passes through registers at once.
    constants["SLICE"] = min(constants["HEAD_DIM"], 16)
    programs = -(-x.shape[0] * x.shape[2] // cut.places)
    contents = None
    if x.is_meta:
        counts = key_counts(table, heads, options.kernel_size, torch.device("cpu"))
        contents = {"key_counts": counts}
    function = triton_table_kernels.qkv_attention_table_forward
    return _described(
        function, programs, arguments, constants, cut.num_warps,
        options={"num_stages": 1}, contents=contents,
    )  # fmt: skip


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
        392
    """
    _check(x, weight, bias, options, backward=False)
    others = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    if options.key_table:
        return _table_launch({"x": x, "o": o}, others, options)
    return _launch("qkv_attention_forward", {"x": x, "o": o}, others, options)


class Backward(NamedTuple):
    """The launches of a backward pass, in order, and what is left to add up after them.

    Attributes:
        launches: one, or with a key table two.
        partial_weight: shares of the weight's gradient, (programs per head, heads, 3 * head_dim,
            head_dim), float32; the gradient is their sum over the first dimension.
        partial_bias: the same of the bias, without the last dimension.
    """

    launches: list[Launch]
    partial_weight: Tensor
    partial_bias: Tensor


def backward_launches(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, dx: Tensor, options: Options
) -> Backward:
    """The launches of the backward kernels; see `op.Kernels`.

    Raises:
        UnsupportedInputError: naming the limit of the kernel.

    Example:
        >>> x = torch.empty(2, 8, 196, 256, dtype=torch.float16, device="meta")
        >>> w = torch.empty(4, 192, 64, dtype=torch.float16, device="meta")
        >>> backward_launches(x, x, w, None, x, Options()).partial_weight.shape
        torch.Size([64, 4, 192, 64])
    """
    _check(x, weight, bias, options, backward=True)
    heads, _, head_dim = weight.shape
    frames, positions = x.shape[1], x.shape[0] * x.shape[2]
    if options.key_table:
        tiles = -(-positions * frames // _PIXELS)
    else:
        cut = tile(frames, options, backward=True)
        tiles = cut.blocks(frames) * cut.groups(positions)
    programs = min(tiles, _PROGRAMS_PER_HEAD["qkv_attention_backward"])
    sums = {
        "partial_weight": torch.empty(
            (programs, heads, 3 * head_dim, head_dim), dtype=torch.float32, device=x.device
        ),
        "partial_bias": torch.empty(
            (programs, heads, 3 * head_dim), dtype=torch.float32, device=x.device
        ),
    }
    if options.key_table:
        dqkv = x.new_empty((*x.shape[:3], heads, 3, head_dim))
        launches = [
            _attention_launch(grad, _project(x, weight, bias), dqkv, options),
            _projection_launch(x, dqkv, dx, {"weight": weight, **sums}, tiles, options),
        ]
    else:
        others = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        images = {"x": x, "do": grad, "dx": dx}
        launches = [_launch("qkv_attention_backward", images, {**others, **sums}, options)]
    return Backward(launches, **sums)


def _project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`reference.project` in one pass: the products and the bias are rounded together."""
    heads, _, head_dim = weight.shape
    pixels = x.unflatten(-1, (heads, head_dim)).flatten(0, 2).transpose(0, 1)
    maps = weight.transpose(1, 2)
    y = pixels @ maps if bias is None else torch.baddbmm(bias.unsqueeze(1), pixels, maps)
    y = y.view(heads, *x.shape[:3], 3, head_dim)
    return y.permute(1, 3, 0, 4, 2, 5)  # (B, N, heads, 3, T, head_dim)


def _attention_launch(grad: Tensor, qkv: Tensor, dqkv: Tensor, options: Options) -> Launch:
    """The backward launch of local attention, which writes dqkv (B, T, N, heads, 3, head_dim)."""
    do = grad.unflatten(-1, (dqkv.shape[3], -1)).permute(0, 2, 3, 1, 4)
    q, k, v = qkv.unbind(-3)
    dq, dk, dv = dqkv.permute(0, 2, 3, 4, 1, 5).unbind(-3)
    return attention.backward_launch(do, q, k, v, dq, dk, dv, options)


def _projection_launch(
    x: Tensor, dqkv: Tensor, dx: Tensor, others: dict[str, Tensor], tiles: int, options: Options
) -> Launch:
    """The launch of the projection's backward kernel."""
    images = {"x": x, "dqkv": dqkv.flatten(3), "dx": dx}
    arguments, constants = _shared_arguments(images, others, options)
    arguments |= {"pixels": x.shape[0] * x.shape[1] * x.shape[2], "tiles": tiles}
    constants = {name: constants[name] for name in ("HEAD_DIM", "ALIGNED")} | {"ROWS": _PIXELS}
    programs, heads = others["partial_bias"].shape[:2]
    function = triton_kernels.qkv_projection_backward
    return _described(function, heads * programs, arguments, constants, 8)


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
        backward = backward_launches(grad, x, weight, bias, dx, options)
        for launch in backward.launches:
            triton_launch.run(launch)
        return backward.partial_weight.sum(0), backward.partial_bias.sum(0)
