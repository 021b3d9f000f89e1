"""What happens to the frames of a clip between reading and the model."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from ca3d.data.view import Cut

COLORS = ("rgb", "bgr")
AUGMENTATIONS = ("light", "none")


class _Reverse(v2.Transform):
    """Plays (..., T, 3, H, W) frames backwards."""

    def transform(self, inpt: Tensor, params: dict[str, Any]) -> Tensor:
        return inpt.flip(-4)


def training_transform(
    size: int, resize: int, flip: bool = True, augment: str = "light", reverse: bool = False
) -> v2.Transform:
    """Builds the augmentation of training clips: one draw for all frames of a clip.

    "light" is that of the published recipe. Horizontal flip (p 0.5, where the label allows it);
    shorter side to a random size from 0.8 to 1.25 of `resize` (p 0.3); rotation by up to 10
    degrees (p 0.3); a crop of 1.25 of `size` and in it a random crop (p 0.5); at last the centre
    crop; backwards (p 0.5, where the label allows it). Whatever lies outside a frame is black.
    "none" leaves flip, reversal and the centre crop.

    Args:
        size: Height and width of the result in pixels.
        resize: Shorter side in pixels of the frames that come in.
        flip: Whether a mirrored clip keeps its label.
        augment: "light" or "none".
        reverse: Whether a clip played backwards keeps its label.

    Returns:
        A torchvision v2 transform for (..., T, 3, H, W) videos.

    Raises:
        ValueError: Unknown augmentation.

    Example:
        >>> clip = torch.zeros(4, 3, 40, 60, dtype=torch.uint8)
        >>> training_transform(32, 40)(clip).shape
        torch.Size([4, 3, 32, 32])
    """
    if augment not in AUGMENTATIONS:
        raise ValueError(f"augment must be one of {', '.join(AUGMENTATIONS)}, got {augment!r}")
    steps: list[v2.Transform] = [v2.RandomHorizontalFlip(0.5)] if flip else []
    if augment == "light":
        smallest, largest = max(1, int(0.8 * resize)), int(1.25 * resize)
        steps += [
            v2.RandomApply([v2.RandomResize(smallest, largest + 1)], p=0.3),
            v2.RandomApply([v2.RandomRotation(10.0, expand=True)], p=0.3),
            v2.RandomApply([v2.CenterCrop(int(1.25 * size)), v2.RandomCrop(size)], p=0.5),
        ]
    steps.append(v2.CenterCrop(size))
    if reverse:
        steps.append(v2.RandomApply([_Reverse()], p=0.5))
    return v2.Compose(steps)


def evaluation_crops(clip: Tensor, size: int, crops: int = 1) -> Tensor:
    """Cuts the square views of a clip that evaluation uses.

    Args:
        clip: (..., H, W).
        size: Height and width of a view in pixels; smaller clips are padded with black.
        crops: 1 for the centre, 3 for both ends of the longer side and the centre.

    Returns:
        (crops, ..., size, size).

    Raises:
        ValueError: crops is neither 1 nor 3.

    Example:
        >>> evaluation_crops(torch.zeros(4, 3, 40, 60), 32, crops=3).shape
        torch.Size([3, 4, 3, 32, 32])
    """
    if crops not in (1, 3):
        raise ValueError(f"crops must be 1 or 3, got {crops!r}")
    center = v2.functional.center_crop(clip, [size, size])
    if crops == 1:
        return center[None]
    height, width = clip.shape[-2:]
    if width >= height:
        strip = v2.functional.center_crop(clip, [size, max(size, width)])
        ends = strip[..., :size], strip[..., -size:]
    else:
        strip = v2.functional.center_crop(clip, [max(size, height), size])
        ends = strip[..., :size, :], strip[..., -size:, :]
    return torch.stack([ends[0], center, ends[1]])


class Normalize:
    """Turns uint8 frames into a model's input: (x / 255 - mean) / std, in its colour order.

    Args:
        mean: Three channel means in the colour order `color`, of values from 0 to 1; None for 0.
        std: Three channel standard deviations; None for 1.
        color: "rgb", or "bgr" for a model that was trained on blue first.

    Raises:
        ValueError: Unknown colour order, not three numbers, or a std that is not positive.

    Example:
        >>> frames = torch.full((4, 3, 8, 8), 255, dtype=torch.uint8)
        >>> clip = Normalize(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))(frames)
        >>> clip.shape, clip.unique().tolist()
        (torch.Size([3, 4, 8, 8]), [2.0])
    """

    def __init__(
        self,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        color: str = "rgb",
    ) -> None:
        if color not in COLORS:
            raise ValueError(f"color must be rgb or bgr, got {color!r}")
        self.color = color
        self.mean = _three("mean", mean, 0.0)
        self.std = _three("std", std, 1.0)
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")

    def __call__(self, frames: Tensor) -> Tensor:
        """Maps uint8 (..., T, 3, H, W) RGB to float32 (..., 3, T, H, W)."""
        clip = frames.as_subclass(Tensor).movedim(-4, -3)
        if self.color == "bgr":
            clip = clip.flip(-4)
        # One multiplication and one addition in place, on memory in the model's order.
        std = torch.tensor(self.std).view(3, 1, 1, 1)
        mean = torch.tensor(self.mean).view(3, 1, 1, 1)
        out = clip.to(torch.float32, memory_format=torch.contiguous_format)
        return out.mul_(1 / (255 * std)).sub_(mean / std)


def apply_cut(frames: Tensor, cut: Cut) -> Tensor:
    """Cuts out of scaled frames what a view shows.

    Args:
        frames: uint8 (..., H, W), scaled to `cut.short_side`.
        cut: From `ca3d.data.view.View.cut`.

    Returns:
        (..., H', W').

    Example:
        >>> from ca3d.data.view import View
        >>> cut = View("letterbox").cut(64, 48, 32)
        >>> apply_cut(torch.zeros(3, 24, 32, dtype=torch.uint8), cut).shape
        torch.Size([3, 32, 32])
    """
    if cut.box is not None:
        left, top, width, height = cut.box
        frames = frames[..., top : top + height, left : left + width]
    if cut.scaled is not None:
        frames = v2.functional.resize(frames, [cut.scaled[1], cut.scaled[0]])
    if any(cut.pad):
        left, top, right, bottom = cut.pad
        frames = torch.nn.functional.pad(frames, (left, right, top, bottom))
    return frames


def as_video(frames: Tensor) -> tv_tensors.Video:
    """Marks (..., T, 3, H, W) frames as one video, so that a v2 transform draws once for all.

    Example:
        >>> type(as_video(torch.zeros(2, 3, 8, 8))).__name__
        'Video'
    """
    return tv_tensors.Video(frames)


def _three(name: str, values: Sequence[float] | None, default: float) -> tuple[float, float, float]:
    if values is None:
        return default, default, default
    numbers = tuple(float(v) for v in values)
    if len(numbers) != 3 or not all(abs(v) < float("inf") for v in numbers):
        raise ValueError(f"{name} must be three finite numbers, got {values!r}")
    return numbers[0], numbers[1], numbers[2]
