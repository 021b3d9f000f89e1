"""I3D: the Inception network with its kernels inflated along time (Carreira and Zisserman, CVPR
2017), after the published description."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ca3d.models.baselines.baseline import (
    Baseline,
    Mean,
    check_integers,
    initialize_convolutions,
)

__all__ = ["i3d", "i3d_tiny"]

# Channels of a module's branches: 1x1x1; 1x1x1 then 3x3x3; 1x1x1 then 3x3x3; pool then 1x1x1.
_MODULES: tuple[tuple[tuple[int, ...], ...], ...] = (
    ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
    (
        (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128),
    ),
    ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
)


def _unit(channels: int, width: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(channels, width, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm3d(width, eps=1e-3, momentum=0.01),
        nn.ReLU(inplace=True),
    )


class _Inception(nn.Module):
    """Four branches side by side."""

    def __init__(self, channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        one, before3, three, before_other, other, pooled = widths
        self.branches = nn.ModuleList(
            [
                _unit(channels, one, 1),
                nn.Sequential(_unit(channels, before3, 1), _unit(before3, three, 3)),
                nn.Sequential(_unit(channels, before_other, 1), _unit(before_other, other, 3)),
                nn.Sequential(nn.MaxPool3d(3, 1, 1), _unit(channels, pooled, 1)),
            ]
        )
        self.width = one + three + other + pooled

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


def i3d(
    num_classes: int,
    frames: int = 16,
    size: int = 112,
    width: float = 1.0,
    dropout: float = 0.5,
) -> Baseline:
    """I3D on RGB frames: 12.4 million parameters, 6.9 GMAC at 101 classes and 16x112x112.

    Args:
        num_classes: number of classes.
        frames: frames of a clip.
        size: height and width of the clips that it is meant for; it takes any.
        width: factor of all channels, rounded down to at least 1.
        dropout: probability of dropping a feature before the classifier.

    Returns:
        The model, in training mode.

    Raises:
        ValueError, TypeError: an option that is not allowed.

    Example:
        >>> sum(p.numel() for p in i3d(num_classes=101).parameters())
        12390789
    """
    check_integers(frames=frames, size=size)
    if not width > 0:
        raise ValueError(f"width must be above 0, got {width!r}")

    def scaled(channels: int) -> int:
        return max(int(channels * width), 1)

    # A pool of kernel 3 sees one pixel beyond each edge; maxima don't notice the padding.
    layers: list[nn.Module] = [
        _unit(3, scaled(64), 7, stride=2),
        nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
        _unit(scaled(64), scaled(64), 1),
        _unit(scaled(64), scaled(192), 3),
        nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
    ]
    pools = (nn.MaxPool3d(3, 2, 1), nn.MaxPool3d(2, 2, ceil_mode=True), None)
    channels = scaled(192)
    for modules, pool in zip(_MODULES, pools, strict=True):
        for widths in modules:
            block = _Inception(channels, [scaled(x) for x in widths])
            layers.append(block)
            channels = block.width
        if pool is not None:
            layers.append(pool)
    layers += [Mean(), nn.Flatten(), nn.Dropout(dropout)]
    model = Baseline(nn.Sequential(*layers), nn.Linear(channels, num_classes), frames)
    initialize_convolutions(model)
    return model


def i3d_tiny(
    num_classes: int,
    frames: int = 16,
    size: int = 32,
    width: float = 0.125,
    dropout: float = 0.5,
) -> Baseline:
    """An I3D of at most 128 channels; the arguments are those of `i3d`.

    Example:
        >>> i3d_tiny(num_classes=5).classifier.in_features
        128
    """
    return i3d(num_classes, frames, size, width, dropout)
