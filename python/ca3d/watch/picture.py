"""Decoded frames of any size, shape and pixel format as the square pictures of a model."""

from __future__ import annotations

from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from ca3d.data.av_frames import SCALER, orientation, upright
from ca3d.data.view import Cut, View, short_side_size


class Pictures:
    """Makes pictures of decoded frames.

    A rectangle in pixels belongs to the first frame's size; when the size changes, it keeps its
    share of the frame.

    Args:
        view: The region that the model sees.
        resize: Shorter side of that region in pixels, before the centre crop.
        size: Side of the pictures.

    Attributes:
        frame_size: (width, height) of the last upright frame, None before the first.

    Example:
        >>> pictures = Pictures(View(), 32, 32)
        >>> pictures.picture(av.VideoFrame(64, 48, "yuv420p")).shape, pictures.region
        ((32, 32, 3), (8, 0, 48, 48))
    """

    def __init__(self, view: View, resize: int, size: int) -> None:
        self.view, self.resize, self.size = view, resize, size
        self.frame_size: tuple[int, int] | None = None
        self._reformatter = VideoReformatter()
        self._cut = Cut(None)
        self._turn: np.ndarray | None = None

    @property
    def region(self) -> tuple[int, int, int, int]:
        """What is seen of the last frame: left, top, width, height in its pixels."""
        assert self.frame_size is not None
        return self.view.region(*self.frame_size)

    def notice_size(self, frame: Any) -> bool:
        """Takes note of a frame's size.

        Args:
            frame: A decoded PyAV frame.

        Returns:
            Whether it is another one than before.

        Raises:
            ca3d.errors.UserError: The view reaches beyond the first frame.
        """
        if self._turn is None:
            self._turn = orientation(frame)
        turned = self._turn[0, 0] == 0
        size = (frame.height, frame.width) if turned else (frame.width, frame.height)
        if size == self.frame_size:
            return False
        if self.frame_size is not None and self.view.roi is not None and self.view.in_pixels:
            width, height = self.frame_size
            left, top, w, h = self.view.roi
            self.view = View("roi", (left / width, top / height, w / width, h / height))
        self._cut = self.view.cut(*size, self.resize)
        self.frame_size = size
        return True

    def picture(self, frame: Any) -> np.ndarray:
        """Returns a frame as the model sees it.

        Args:
            frame: A decoded PyAV frame of any pixel format; transparency is ignored.

        Returns:
            uint8 (size, size, 3) RGB.
        """
        self.notice_size(frame)
        assert self._turn is not None
        width, height = short_side_size(frame.width, frame.height, self._cut.short_side)
        image = upright(self._scaled(frame, width, height), self._turn)
        if self._cut.box is not None:
            left, top, width, height = self._cut.box
            image = image[top : top + height, left : left + width]
        if self._cut.scaled is not None:
            part = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            image = self._scaled(part, *self._cut.scaled)
        left, top, right, bottom = self._cut.pad
        image = np.pad(image, ((top, bottom), (left, right), (0, 0)))
        return center_crop(image, self.size)

    def _scaled(self, frame: Any, width: int, height: int) -> np.ndarray:
        return self._reformatter.reformat(
            frame, width=width, height=height, format="rgb24", interpolation="BILINEAR", **SCALER
        ).to_ndarray()


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Cuts the middle square, padded with black; the same pixels as torchvision's.

    Args:
        image: (H, W, 3).
        size: Side of the square.

    Example:
        >>> center_crop(np.ones((5, 8, 3)), 6).sum(axis=(1, 2))
        array([18., 18., 18., 18., 18.,  0.])
    """
    short = [max(0, size - side) for side in image.shape[:2]]
    image = np.pad(image, (*((s // 2, s - s // 2) for s in short), (0, 0)))
    top, left = (round((side - size) / 2) for side in image.shape[:2])
    return np.ascontiguousarray(image[top : top + size, left : left + size])
