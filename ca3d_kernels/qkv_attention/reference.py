"""Definition of the projection per head with the attention after it, in plain torch operations."""

from typing import Any

import torch
from torch import Tensor

from ca3d_kernels.local_attention import reference


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Queries, keys and values of pixels, by one linear map for each head.

    Args:
        x: (B, T, N, C).
        weight: (heads, 3 * head_dim, head_dim), rows of q, k and v; ``heads * head_dim`` is C.
        bias: (heads, 3 * head_dim), one for every frame, (heads, T, 3 * head_dim), or None.

    Returns:
        (B, N, heads, 3, T, head_dim), a view of a (B, T, N, 3 * C) tensor.

    Example:
        >>> project(torch.ones(1, 2, 3, 8), torch.ones(2, 12, 4), None).shape
        torch.Size([1, 3, 2, 3, 2, 4])
    """
    heads, _, head_dim = weight.shape
    y = torch.einsum("btnhi,hoi->btnho", x.unflatten(-1, (heads, head_dim)), weight)
    if bias is not None:
        y = y + (bias if bias.dim() == 2 else bias.transpose(0, 1).unsqueeze(1))
    return y.unflatten(-1, (3, head_dim)).permute(0, 2, 3, 4, 1, 5)


def qkv_attention(x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
    """Local temporal attention of projected pixels: ``attention(*project(x))``, head by head.

    Half precision is computed in float32; q, k and v are rounded to x's dtype in between, as if
    they had been stored.

    Args:
        x: (B, T, N, C), floating point.
        weight, bias: see `project`; of x's dtype.
        options: those of `ca3d_kernels.local_attention.reference.attention`.

    Returns:
        (B, T, N, C) in x's dtype.

    Example:
        >>> x = torch.randn(2, 8, 9, 32)
        >>> qkv_attention(x, torch.randn(4, 24, 8), None).shape
        torch.Size([2, 8, 9, 32])
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    shift = None if bias is None else bias.to(wide)
    qkv = project(x.to(wide), weight.to(wide), shift).to(x.dtype)
    return reference.attention(*qkv.unbind(-3), **options).permute(0, 3, 1, 2, 4).flatten(-2)
