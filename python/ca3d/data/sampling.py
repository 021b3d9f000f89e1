"""Which frames of a video make a clip: no video library here, only frame numbers and times."""

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from torch import Tensor

from ca3d.data.reader import VideoReader
from ca3d.data.transforms import apply_cut
from ca3d.data.view import Cut, View

Mode = Literal["random", "center", "uniform"]


@dataclass(frozen=True)
class ClipSpec:
    """The clip that a model takes: how many frames, how far apart, how large.

    A clip spans frames · stride frames of the video. Without `frames_per_second` positions are
    frame numbers. With it they are times: frames lie stride / frames_per_second seconds apart
    whatever the video's own rate, so a clip always spans the same time. A video shorter than the
    clip is looped. Training draws the clip's start uniformly; evaluation takes the centre.

    Attributes:
        frames: Frames in a clip.
        stride: Step from frame to frame, in frames at the model's rate.
        frames_per_second: The model's frame rate, or None to count frames of the video.
        size: Height and width of the clip in pixels, after the crop.
        resize: Shorter side of a frame in pixels before the crop.
        view: Which region of a frame the clip shows.
        window: None, or more than `frames`: that many frames are placed at the centre (drawn, in
            training), and the clip is the middle (a drawn part) of them. The published protocol
            reads 20 for a clip of 16.

    Raises:
        ValueError: A number is out of range.

    Example:
        >>> spec = ClipSpec(frames=4, stride=2)
        >>> spec.sample(20, 25.0, None, mode="center")
        array([[ 6,  8, 10, 12]])
        >>> spec.sample(5, 25.0, None, mode="center")  # too short: 0, 2, 4 looped
        array([[0, 2, 4, 0]])
    """

    frames: int = 16
    stride: int = 2
    frames_per_second: float | None = None
    size: int = 112
    resize: int = 112
    window: int | None = None
    view: View = field(default_factory=View)

    def __post_init__(self) -> None:
        for name in ("frames", "stride", "size", "resize"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        rate = self.frames_per_second
        if rate is not None and not (math.isfinite(rate) and rate > 0):
            raise ValueError(f"frames_per_second must be positive or None, got {rate!r}")
        if self.window is not None and self.window < self.frames:
            raise ValueError(f"window must be at least frames ({self.frames}), got {self.window!r}")

    def span(self, fps: float) -> float:
        """Returns the seconds that a clip spans in a video of `fps` frames per second.

        Example:
            >>> ClipSpec(frames=16, stride=2).span(fps=32.0)
            1.0
        """
        return self.frames * self.stride / (self.frames_per_second or fps)

    def sample(
        self,
        num_frames: int,
        fps: float,
        rng: np.random.Generator | None = None,
        mode: Mode = "center",
        clips: int = 1,
    ) -> np.ndarray:
        """Places clips in a video.

        Args:
            num_frames: Frames in the video.
            fps: The video's frames per second.
            rng: Source of the draws; needed for mode "random" only.
            mode: "random" draws each clip's start; "center" is one clip in the middle; "uniform"
                spreads the clips evenly from the video's begin to its end (one clip: the middle).
            clips: Number of clips.

        Returns:
            (clips, frames): int64 frame numbers, or float64 seconds if `frames_per_second` is set.

        Raises:
            ValueError: An argument is out of range, or rng is missing.

        Example:
            >>> spec = ClipSpec(frames=3, stride=1, frames_per_second=10.0)
            >>> spec.sample(100, 50.0, mode="center").round(2).tolist()  # 2 s of video
            [[0.85, 0.95, 1.05]]
        """
        if num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, got {num_frames}")
        if not (math.isfinite(fps) and fps > 0):
            raise ValueError(f"fps must be positive, got {fps}")
        if clips < 1:
            raise ValueError(f"clips must be at least 1, got {clips}")
        if mode not in ("random", "center", "uniform"):
            raise ValueError(f"mode must be random, center or uniform, got {mode!r}")
        if mode == "center" and clips != 1:
            raise ValueError(f"mode center places one clip, got clips={clips}")
        if mode == "random" and rng is None:
            raise ValueError("rng is needed for mode random, got None")
        # One clip frame lasts `step` frames of this video.
        step = self.stride * (fps / self.frames_per_second if self.frames_per_second else 1.0)
        window = self.window or self.frames
        # A tolerance: a rate of 29.97 announced as 29.970030 must not cost the last start.
        room = max(0, math.floor(num_frames - window * step + 1e-6 * num_frames))
        held = max(1, math.ceil(num_frames / step - 1e-6))
        slack = min(window, held) - self.frames
        rows = []
        for start, offset in self._starts(room, max(0, slack), mode, clips, rng):
            slots = (np.arange(self.frames) + offset) % min(window, held)
            rows.append(start + slots * step)
        positions = np.stack(rows)
        if self.frames_per_second is None:
            return positions.astype(np.int64)
        # The middle of each frame's time on the screen, where rounded timestamps do no harm.
        return (positions + 0.5) / fps

    def read(
        self, reader: VideoReader, positions: np.ndarray, short_side: int | None = None
    ) -> Tensor:
        """Reads the clips that `sample` has placed.

        Args:
            reader: An open video.
            positions: (clips, frames) from `sample` of this very spec.
            short_side: Shorter side in pixels of what the view shows, None for whole frames in the
                size of the file.

        Returns:
            uint8 (clips, frames, 3, H, W), RGB.

        Raises:
            ca3d.errors.UserError: The view reaches beyond the frames.

        Example:
            >>> spec = ClipSpec(frames=4, stride=2)
            >>> with open_video(video_file) as video:
            ...     where = spec.sample(video.num_frames, video.frames_per_second)
            ...     spec.read(video, where).shape
            torch.Size([1, 4, 3, 48, 64])
        """
        flat = positions.reshape(-1)
        cut = Cut(None)
        if short_side is not None:
            cut = self.view.cut(reader.width, reader.height, short_side)
        if np.issubdtype(flat.dtype, np.integer):
            frames = reader.frames(flat.tolist(), cut.short_side)
        else:
            frames = reader.frames_at(flat.tolist(), cut.short_side)
        frames = apply_cut(frames, cut)
        return frames.unflatten(0, positions.shape)

    def _starts(
        self, room: int, slack: int, mode: Mode, clips: int, rng: np.random.Generator | None
    ) -> list[tuple[int, int]]:
        """Returns (start in frames of the video, offset in clip frames) of every clip."""
        if mode == "random" and rng is not None:
            return [
                (int(rng.integers(room + 1)), int(rng.integers(slack + 1))) for _ in range(clips)
            ]
        if clips == 1:
            return [(room // 2, slack // 2)]
        return [(round(room * k / (clips - 1)), slack // 2) for k in range(clips)]
