"""Definition of the folded temporal half in plain torch operations."""

from typing import Any

import torch
from torch import Tensor

from ca3d_kernels.local_attention import reference


def temporal_block(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    norm_scale: Tensor,
    norm_shift: Tensor,
    column_weight: Tensor,
    column_bias: Tensor,
    column_scale: Tensor,
    column_shift: Tensor,
    **options: Any,
) -> Tensor:
    """Projection, local attention, residual and temporal convolutions of every pixel, head by head.

    Half precision is computed in float32 and rounded once.

    Args:
        x: (B, T, N, C), floating point; the other tensors have its dtype.
        qkv_weight, qkv_bias, norm_scale, norm_shift: see `ca3d_kernels.temporal_block`.
        column_weight, column_bias, column_scale, column_shift: likewise.
        options: those of `ca3d_kernels.local_attention.reference.attention`.

    Returns:
        (B, T, N, C) in x's dtype.

    Example:
        >>> x, one, zero = torch.randn(1, 4, 9, 6), torch.ones(2, 3), torch.zeros(0, 2, 3)
        >>> weights = torch.randn(2, 3, 9), torch.randn(2, 4, 9), one, torch.randn(2, 4, 3)
        >>> temporal_block(x, *weights, torch.zeros(0, 2, 9, 3), zero, zero, zero).shape
        torch.Size([1, 4, 9, 6])
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    heads, head_dim, _ = qkv_weight.shape
    qkv_weight, qkv_bias, norm_scale, norm_shift = (
        t.to(wide) for t in (qkv_weight, qkv_bias, norm_scale, norm_shift)
    )
    pixels = x.to(wide).unflatten(-1, (heads, head_dim)).permute(0, 2, 3, 1, 4)  # (B, N, H, T, d)
    qkv = (pixels @ qkv_weight + qkv_bias).unflatten(-1, (3, head_dim))
    attended = reference.attention(*qkv.unbind(-2), **options)
    y = (pixels + attended) * norm_scale.unsqueeze(1) + norm_shift
    steps = [t.to(wide) for t in (column_weight, column_bias, column_scale, column_shift)]
    for i in range(0, len(column_weight), 2):
        u = _step(y, *(t[i] for t in steps))
        y = y + _step(u, *(t[i + 1] for t in steps))
    return y.permute(0, 3, 1, 2, 4).flatten(-2).to(x.dtype)


def _step(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``scale * relu(conv(x) + bias) + shift`` over three frames, (B, N, heads, T, head_dim)."""
    padded = torch.nn.functional.pad(x, (0, 0, 1, 1))
    frames = x.shape[-2]
    taps = torch.cat([padded.narrow(-2, i, frames) for i in range(3)], -1)
    y = (taps @ weight + bias.unsqueeze(1)).relu()
    return y * scale.unsqueeze(1) + shift.unsqueeze(1)
