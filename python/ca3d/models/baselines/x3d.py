"""X3D: bottlenecks with depthwise 3x3x3 convolutions and squeeze-and-excitation (Feichtenhofer,
CVPR 2020), after the published description."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ca3d.models.baselines.baseline import (
    Baseline,
    Mean,
    check_integers,
    initialize_convolutions,
)

__all__ = ["x3d_l", "x3d_m", "x3d_tiny", "x3d_xl"]

_WIDTHS, _DEPTHS = (12, 24, 48, 96), (1, 2, 5, 3)
_BOTTLENECK, _SQUEEZE = 2.25, 0.0625


def _rounded(channels: float) -> int:
    """To a multiple of 8, at least 8, and no more than a tenth below."""
    nearest = max(int(channels + 4) // 8 * 8, 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest


class _SqueezeExcitation(nn.Module):
    """Scales each channel by a gate made of all channels' means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = _rounded(_SQUEEZE * channels)
        self.gate = nn.Sequential(
            nn.Conv3d(channels, inner, 1),
            nn.ReLU(inplace=True),
            nn.Conv3d(inner, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x.mean((2, 3, 4), keepdim=True))


class _Block(nn.Module):
    """Widen, mix each channel in space and time, gate, narrow, add."""

    def __init__(self, channels: int, width: int, stride: int, gated: bool) -> None:
        super().__init__()
        inner = int(_BOTTLENECK * width)
        self.body = nn.Sequential(
            nn.Conv3d(channels, inner, 1, bias=False),
            nn.BatchNorm3d(inner),
            nn.ReLU(inplace=True),
            nn.Conv3d(inner, inner, 3, (1, stride, stride), 1, groups=inner, bias=False),
            nn.BatchNorm3d(inner),
            _SqueezeExcitation(inner) if gated else nn.Identity(),
            nn.SiLU(inplace=True),
            nn.Conv3d(inner, width, 1, bias=False),
            nn.BatchNorm3d(width),
        )
        self.skip: nn.Module = nn.Identity()
        if channels != width or stride != 1:
            self.skip = nn.Sequential(
                nn.Conv3d(channels, width, 1, (1, stride, stride), bias=False),
                nn.BatchNorm3d(width),
            )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + self.skip(x))


def _x3d(
    num_classes: int,
    frames: int,
    size: int,
    width: float,
    depth: float,
    head_width: int,
    dropout: float,
) -> Baseline:
    check_integers(frames=frames, size=size, head_width=head_width)
    for name, value in (("width", width), ("depth", depth)):
        if not value > 0:
            raise ValueError(f"{name} must be above 0, got {value!r}")
    widths = [_rounded(width * base) for base in _WIDTHS]
    stem = widths[0]
    layers: list[nn.Module] = [
        nn.Conv3d(3, stem, (1, 3, 3), (1, 2, 2), (0, 1, 1), bias=False),
        nn.Conv3d(stem, stem, (5, 1, 1), padding=(2, 0, 0), groups=stem, bias=False),
        nn.BatchNorm3d(stem),
        nn.ReLU(inplace=True),
    ]
    channels = stem
    for stage, base in zip(widths, _DEPTHS, strict=True):
        for i in range(math.ceil(depth * base)):
            layers.append(_Block(channels, stage, stride=1 if i else 2, gated=i % 2 == 0))
            channels = stage
    inner = int(_BOTTLENECK * channels)
    layers += [
        nn.Conv3d(channels, inner, 1, bias=False),
        nn.BatchNorm3d(inner),
        nn.ReLU(inplace=True),
        Mean(),
        nn.Conv3d(inner, head_width, 1, bias=False),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Dropout(dropout),
    ]
    model = Baseline(nn.Sequential(*layers), nn.Linear(head_width, num_classes), frames)
    initialize_convolutions(model)
    # In the other layout a depthwise 3-D convolution takes a CPU 3 to 6 times as long backward
    # (18 to 54 channels of 8x8x8 to 8x2x2, batch 32, float32, Intel Xeon, one thread, 2026-11-28).
    return model.to(memory_format=torch.channels_last_3d)


def x3d_xl(
    num_classes: int,
    frames: int = 16,
    size: int = 112,
    width: float = 2.9,
    depth: float = 5.0,
    head_width: int = 2048,
    dropout: float = 0.5,
) -> Baseline:
    """X3D-XL: 10.5 million parameters, 4.8 GMAC at 101 classes and 16x112x112.

    Args:
        num_classes: number of classes.
        frames: frames of a clip.
        size: height and width of the clips that it is meant for; it takes any.
        width: factor of the channels 12, 24, 48 and 96 of the four stages.
        depth: factor of the blocks 1, 2, 5 and 3 of the four stages, rounded up.
        head_width: features in front of the classifier.
        dropout: probability of dropping such a feature.

    Returns:
        The model, in training mode.

    Raises:
        ValueError, TypeError: an option that is not allowed.

    Example:
        >>> sum(p.numel() for p in x3d_xl(num_classes=101).parameters())
        10483253
    """
    return _x3d(num_classes, frames, size, width, depth, head_width, dropout)


def x3d_l(
    num_classes: int,
    frames: int = 16,
    size: int = 112,
    width: float = 2.0,
    depth: float = 5.0,
    head_width: int = 2048,
    dropout: float = 0.5,
) -> Baseline:
    """X3D-L: 5.5 million parameters, 2.4 GMAC; the arguments are those of `x3d_xl`.

    Example:
        >>> sum(p.numel() for p in x3d_l(num_classes=101).parameters()) // 10**4
        554
    """
    return _x3d(num_classes, frames, size, width, depth, head_width, dropout)


def x3d_m(
    num_classes: int,
    frames: int = 16,
    size: int = 112,
    width: float = 2.0,
    depth: float = 2.2,
    head_width: int = 2048,
    dropout: float = 0.5,
) -> Baseline:
    """X3D-M (and X3D-S, which is the same network for smaller clips): 3.2 million parameters,
    1.3 GMAC; the arguments are those of `x3d_xl`.

    Example:
        >>> sum(p.numel() for p in x3d_m(num_classes=101).parameters()) // 10**4
        318
    """
    return _x3d(num_classes, frames, size, width, depth, head_width, dropout)


def x3d_tiny(
    num_classes: int,
    frames: int = 16,
    size: int = 32,
    width: float = 1.0,
    depth: float = 2.2,
    head_width: int = 128,
    dropout: float = 0.5,
) -> Baseline:
    """An X3D with as many multiply-adds as `ca3d_tiny`; the arguments are those of `x3d_xl`.

    Example:
        >>> x3d_tiny(num_classes=5).classifier.in_features
        128
    """
    return _x3d(num_classes, frames, size, width, depth, head_width, dropout)
