"""Definition of the folded convolution in plain torch operations."""

from collections.abc import Sequence

import torch
from torch import Tensor


def folded_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    groups: int = 1,
) -> Tensor:
    """``scale * relu(conv(x) + bias) + shift + residual_scale * residual``.

    Half precision is computed in float32 and rounded once.

    Args:
        x: (N, C, H, W), floating point.
        weight: (K, C / groups, h, w), of x's dtype.
        bias, shift, scale, residual_scale: (K,), of x's dtype; None for 1.
        residual: of the result's shape and x's dtype, or None.
        stride, padding, groups: of the convolution.

    Returns:
        (N, K, H', W') in x's dtype.

    Example:
        >>> x, one = torch.ones(1, 1, 2, 2), torch.ones(1)
        >>> folded_conv(x, torch.ones(1, 1, 1, 1), one, one).flatten()
        tensor([3., 3., 3., 3.])
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32

    def column(values: Tensor) -> Tensor:
        return values.to(wide)[:, None, None]

    y = torch.nn.functional.conv2d(
        x.to(wide), weight.to(wide), bias.to(wide), tuple(stride), tuple(padding), groups=groups
    ).relu()
    if scale is not None:
        y = y * column(scale)
    y = y + column(shift)
    if residual is not None:
        more = residual.to(wide)
        y = y + (more if residual_scale is None else more * column(residual_scale))
    return y.to(x.dtype)
