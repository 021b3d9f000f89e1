"""R3D, a residual network of 3x3x3 convolutions (Tran et al., CVPR 2018), by torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torchvision.models.video.resnet import BasicBlock, Conv3DSimple, VideoResNet

from ca3d.models.baselines.baseline import Baseline, check_integers

__all__ = ["r3d_18", "r3d_tiny", "video_resnet"]


class _Resnet(VideoResNet):
    """torchvision's network with channels of choice; its own class has 64, 128, 256 and 512."""

    def __init__(self, widths: Sequence[int], *args: Any, **kwargs: Any) -> None:
        self.stem_width, self.widths = (
            widths[0],
            dict(zip((64, 128, 256, 512), widths, strict=True)),
        )
        super().__init__(*args, **kwargs)

    def _make_layer(
        self, block: Any, conv_builder: Any, planes: int, blocks: int, stride: int = 1
    ) -> nn.Sequential:
        if planes == 64:
            self.inplanes = self.stem_width
        return super()._make_layer(block, conv_builder, self.widths[planes], blocks, stride)


def video_resnet(
    num_classes: int,
    frames: int,
    size: int,
    widths: Sequence[int],
    depths: Sequence[int],
    convolution: Any,
    stem: nn.Module,
) -> Baseline:
    """A residual video network of two-convolution blocks.

    Args:
        num_classes: number of classes.
        frames: frames of a clip.
        size: height and width of the clips that it is meant for; it takes any.
        widths: channels of the four stages; the stem has those of the first.
        depths: blocks of the four stages.
        convolution: torchvision's class (or a like one) that makes a block's convolutions.
        stem: what comes before the first stage, (B, 3, T, H, W) to (B, widths[0], T', H', W').

    Returns:
        The model.

    Raises:
        ValueError, TypeError: an option that is not allowed.

    Example:
        >>> from torchvision.models.video.resnet import BasicStem
        >>> model = video_resnet(5, 16, 112, [64] * 4, [1] * 4, Conv3DSimple, BasicStem())
        >>> model.classifier.in_features
        64
    """
    check_integers(frames=frames, size=size)
    for name, values in (("widths", widths), ("depths", depths)):
        if isinstance(values, str) or len(values) != 4:
            raise ValueError(f"{name} must have four entries, one a stage, got {values!r}")
        check_integers(**{f"{name}[{i}]": value for i, value in enumerate(values)})
    network = _Resnet(widths, BasicBlock, [convolution] * 4, list(depths), lambda: stem)
    network.fc = nn.Identity()
    classifier = nn.Linear(widths[-1], num_classes)
    nn.init.normal_(classifier.weight, 0, 0.01)
    nn.init.zeros_(classifier.bias)
    return Baseline(network, classifier, frames)


def r3d_18(
    num_classes: int,
    frames: int = 16,
    size: int = 112,
    widths: Sequence[int] = (64, 128, 256, 512),
    depths: Sequence[int] = (2, 2, 2, 2),
) -> Baseline:
    """R3D-18: 33.2 million parameters, 40.7 GMAC at 101 classes and 16x112x112.

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
        >>> sum(p.numel() for p in r3d_18(num_classes=101).parameters())
        33218085
    """
    stem = nn.Sequential(
        nn.Conv3d(3, widths[0], (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False),
        nn.BatchNorm3d(widths[0]),
        nn.ReLU(inplace=True),
    )
    return video_resnet(num_classes, frames, size, widths, depths, Conv3DSimple, stem)


def r3d_tiny(
    num_classes: int,
    frames: int = 16,
    size: int = 32,
    widths: Sequence[int] = (5, 11, 24, 48),
    depths: Sequence[int] = (2, 2, 2, 2),
) -> Baseline:
    """An R3D with as many multiply-adds as `ca3d_tiny`; the arguments are those of `r3d_18`.

    Example:
        >>> r3d_tiny(num_classes=5).classifier.in_features
        48
    """
    return r3d_18(num_classes, frames, size, widths, depths)
