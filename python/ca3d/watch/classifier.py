"""From frames to probabilities of the newest window."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ca3d import precision, weights
from ca3d.data.transforms import Normalize
from ca3d.errors import UserError
from ca3d.evaluate import weights_file
from ca3d.predict import check_complete, load_for_inference
from ca3d.streaming import Stream
from ca3d.training.device import choose_device


class Stepper(Protocol):
    """Takes frames one after the other and knows when a window is due."""

    def push(self, frames: Tensor) -> Tensor | None:
        """Takes frames (3, n, H, W); returns logits (classes,) of the newest window when due."""

    def reset(self) -> None:
        """Forgets all frames."""


class SlidingWindow:
    """Computes whole windows: for models whose frames cannot be computed one by one.

    Args:
        forward: Maps (1, 3, frames, H, W) to logits (1, classes).
        frames: Frames in a window.
        stride: Frames from window to window.

    Example:
        >>> window = SlidingWindow(lambda clip: clip.mean((3, 4)).flatten(1), frames=2, stride=2)
        >>> window.push(torch.zeros(3, 1, 4, 4)) is None
        True
        >>> window.push(torch.ones(3, 1, 4, 4))
        tensor([0., 1., 0., 1., 0., 1.])
    """

    def __init__(self, forward: Callable[[Tensor], Tensor], frames: int, stride: int) -> None:
        self._forward, self._stride = forward, stride
        self._frames: deque[Tensor] = deque(maxlen=frames)
        self._until_due = frames

    def push(self, frames: Tensor) -> Tensor | None:
        """Takes frames; returns the logits of the newest window when one is due.

        Args:
            frames: (3, n, H, W), oldest first; n at most the stride.
        """
        self._frames.extend(frames.unbind(1))
        self._until_due -= frames.shape[1]
        if self._until_due > 0:
            return None
        self._until_due += self._stride
        clip = torch.stack(list(self._frames), 1)[None]
        return self._forward(clip)[0]

    def reset(self) -> None:
        """Forgets all frames."""
        self._frames.clear()
        self._until_due = self._frames.maxlen or 1


class Classifier:
    """A model that is shown one frame after the other.

    A CA3D model computes only what is new (`ca3d.Stream`), any other one whole windows.

    Args:
        model: Maps (batch, 3, frames, height, width) to (batch, classes).
        info: Its information.
        stride: Model frames from window to window, at most the frames of a window.
        device: Where to compute.

    Raises:
        ca3d.errors.UserError: `info` lacks what the model's input must look like.
        ValueError: The stride is out of range.

    Example:
        >>> from ca3d import models
        >>> model = models.create("ca3d_tiny", num_classes=2, frames=8)
        >>> info = weights.ModelInfo(
        ...     "ca3d_tiny", model.options, classes=("run", "walk"), mean=(0.4, 0.4, 0.4),
        ...     std=(0.2, 0.2, 0.2), frames=8, size=32, resize=32,
        ... )
        >>> classifier = Classifier(model, info, stride=4)
        >>> picture = np.zeros((32, 32, 3), dtype=np.uint8)
        >>> [classifier.push(picture) is not None for _ in range(13)].count(True)
        2
    """

    def __init__(
        self,
        model: nn.Module,
        info: weights.ModelInfo,
        stride: int = 4,
        device: torch.device | None = None,
    ) -> None:
        check_complete(info)
        if not 1 <= stride <= info.frames:
            raise ValueError(f"stride must be 1 to {info.frames}, got {stride}")
        self.info, self.stride = info, stride
        self._device = device or torch.device("cpu")
        self._regime = precision.for_inference(info.precision)
        self._model = self._regime.prepare(model).eval()
        self._normalize = Normalize(info.mean, info.std, info.color)
        self._stepper: Stepper = self._make_stepper()
        self._waiting: list[np.ndarray] = []
        self._until_due = info.frames

    @classmethod
    def from_file(cls, path: str | Path, stride: int, device: str) -> Classifier:
        """Loads a model and fuses it where it can be.

        Args:
            path: Weights file or run folder.
            stride: Model frames from window to window; `--step` on the command line.
            device: As `ca3d.training.device.choose_device` takes it.

        Raises:
            ca3d.errors.UserError: The file can't be used, or the stride not with its model.

        Example:
            >>> Classifier.from_file("missing.safetensors", stride=4, device="cpu")
            Traceback (most recent call last):
            ca3d.errors.UserError: missing.safetensors: no such file
        """
        file = weights_file(path)
        chosen = choose_device(device)
        model, info = load_for_inference(file, chosen)
        if stride > info.frames:
            raise UserError(f"--step must be 1 to {info.frames} for this model, not {stride}")
        try:
            return cls(model, info, stride, chosen)
        except UserError as error:
            raise UserError(f"{file}: {error}") from error

    def push(self, picture: np.ndarray) -> Tensor | None:
        """Takes a frame.

        Args:
            picture: uint8 (size, size, 3) RGB, one period after the one before.

        Returns:
            Logits of the newest window, float32 (classes,) on the CPU, when one is due.
        """
        self._waiting.append(picture)
        self._until_due -= 1
        # A stride's frames at once cost less than one by one, and the result is not due before.
        if self._until_due > 0 and len(self._waiting) < self.stride:
            return None
        if self._until_due == 0:
            self._until_due = self.stride
        frames = torch.from_numpy(np.stack(self._waiting)).permute(0, 3, 1, 2)
        self._waiting.clear()
        with torch.inference_mode():
            logits = self._stepper.push(self._normalize(frames).to(self._device))
            return None if logits is None else logits.float().cpu()

    def reset(self) -> None:
        """Forgets all frames: the next window begins with the next one."""
        self._waiting.clear()
        self._until_due = self.info.frames
        self._stepper.reset()

    def _make_stepper(self) -> Stepper:
        try:
            return Stream(self._model, self.stride, precision=self.info.precision)
        except TypeError:  # No part of the model sees single frames.
            return SlidingWindow(self._whole_clip, self.info.frames, self.stride)

    def _whole_clip(self, clip: Tensor) -> Tensor:
        return self._regime.forward(self._model, clip)
