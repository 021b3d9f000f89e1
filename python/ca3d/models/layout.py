"""The one physical layout of the models, and the free views that each half of a block works on.

A clip is logically (B, C, T, H, W) and physically (B, T, H, W, C), torch's `channels_last_3d`. In
that layout a spatial convolution sees every frame as an image of its own, and a temporal
convolution sees every pixel as a line of frames, without a byte being moved.
"""

import torch
from torch import Tensor

__all__ = ["as_clip", "as_frames", "as_lines", "to_channels_last"]


def to_channels_last(clip: Tensor) -> Tensor:
    """Brings a clip into the models' layout: one copy, or none when it already has it.

    Args:
        clip: (B, C, T, H, W), any strides.

    Returns:
        The same values, physically (B, T, H, W, C).

    Example:
        >>> import torch
        >>> to_channels_last(torch.zeros(2, 3, 4, 8, 8)).stride()
        (768, 1, 192, 24, 3)
    """
    return clip.contiguous(memory_format=torch.channels_last_3d)


def as_frames(clip: Tensor) -> Tensor:
    """Views a clip as a batch of images, (B, C, T, H, W) -> (B * T, C, H, W).

    Args:
        clip: a clip in the models' layout (any other is copied).

    Returns:
        A `channels_last` view; frame t of clip b is image ``b * T + t``.

    Example:
        >>> import torch
        >>> as_frames(to_channels_last(torch.zeros(2, 3, 4, 8, 8))).shape
        torch.Size([8, 3, 8, 8])
    """
    return clip.transpose(1, 2).flatten(0, 1)


def as_clip(frames: Tensor, batch: int) -> Tensor:
    """Views a batch of images as clips again, (B * T, C, H, W) -> (B, C, T, H, W).

    Args:
        frames: images in the order of `as_frames`.
        batch: number of clips B.

    Returns:
        A view in the models' layout.

    Example:
        >>> import torch
        >>> as_clip(torch.zeros(8, 3, 8, 8), batch=2).shape
        torch.Size([2, 3, 4, 8, 8])
    """
    return frames.unflatten(0, (batch, -1)).transpose(1, 2)


def as_lines(clip: Tensor) -> Tensor:
    """Views a clip as lines of frames, one a pixel, (B, C, T, H, W) -> (B, C, T, H * W).

    A 2-D convolution with kernel (k, 1) on this view is a temporal convolution.

    Args:
        clip: a clip in the models' layout (any other is copied).

    Returns:
        A `channels_last` view.

    Example:
        >>> import torch
        >>> as_lines(to_channels_last(torch.zeros(2, 3, 4, 8, 8))).shape
        torch.Size([2, 3, 4, 64])
    """
    return clip.flatten(3)
