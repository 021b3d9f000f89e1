"""R(2+1)D, convolutions split into space and time (Tran et al., CVPR 2018), by torchvision."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torchvision.models.video.resnet import Conv2Plus1D

from ca3d.models.baselines.baseline import Baseline
from ca3d.models.baselines.r3d import video_resnet

__all__ = ["r2plus1d_18", "r2plus1d_18_15m", "r2plus1d_tiny"]


class _Narrow(Conv2Plus1D):
    """With as many channels between the two convolutions as behind them."""

    def __init__(
        self, in_planes: int, out_planes: int, midplanes: int, stride: int = 1, padding: int = 1
    ) -> None:
        super().__init__(in_planes, out_planes, out_planes, stride, padding)


def _stem(width: int) -> nn.Sequential:
    inner = max(45 * width // 64, 1)
    return nn.Sequential(
        nn.Conv3d(3, inner, (1, 7, 7), (1, 2, 2), (0, 3, 3), bias=False),
        nn.BatchNorm3d(inner),
        nn.ReLU(inplace=True),
        nn.Conv3d(inner, width, (3, 1, 1), padding=(1, 0, 0), bias=False),
        nn.BatchNorm3d(width),
        nn.ReLU(inplace=True),
    )


def r2plus1d_18(
    num_classes: int,
    frames: int = 16,
    size: int = 112,
    widths: Sequence[int] = (64, 128, 256, 512),
    depths: Sequence[int] = (2, 2, 2, 2),
) -> Baseline:
    """R(2+1)D-18, with as many parameters a convolution as R3D-18: 31.4 million, 40.5 GMAC.

    Args:
        num_classes: number of classes.
        frames: frames of a clip.
        size: height and width of the clips that it is meant for; it takes any.
        widths: channels of the four stages.
        depths: blocks of the four stages.

    Returns:
        The model, in training mode.

    Raises:
        ValueError, TypeError: an option that is not allowed.

    Example:
        >>> sum(p.numel() for p in r2plus1d_18(num_classes=101).parameters())
        31351938
    """
    return video_resnet(num_classes, frames, size, widths, depths, Conv2Plus1D, _stem(widths[0]))


def r2plus1d_18_15m(
    num_classes: int,
    frames: int = 16,
    size: int = 112,
    widths: Sequence[int] = (64, 128, 256, 512),
    depths: Sequence[int] = (2, 2, 2, 2),
) -> Baseline:
    """R(2+1)D-18 with as many channels inside a split convolution as behind it: 15.4 million
    parameters, as the paper's table has, 19.4 GMAC. The arguments are those of `r2plus1d_18`.

    Example:
        >>> sum(p.numel() for p in r2plus1d_18_15m(num_classes=101).parameters()) // 10**5
        154
    """
    return video_resnet(num_classes, frames, size, widths, depths, _Narrow, _stem(widths[0]))


def r2plus1d_tiny(
    num_classes: int,
    frames: int = 16,
    size: int = 32,
    widths: Sequence[int] = (6, 12, 24, 48),
    depths: Sequence[int] = (2, 2, 2, 2),
) -> Baseline:
    """An R(2+1)D with as many multiply-adds as `ca3d_tiny`; the arguments are those of
    `r2plus1d_18`.

    Example:
        >>> r2plus1d_tiny(num_classes=5).classifier.out_features
        5
    """
    return r2plus1d_18(num_classes, frames, size, widths, depths)
