"""What a data set is made of: its parameters, its classes, and any of its clips."""

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from ca3d.data.background import BACKGROUND
from ca3d.data.embedded.intervals import INTERVALS, SPLITS, YAW, Intervals
from ca3d.data.embedded.mocap import draw_clip, mocap_classes, render_mocap
from ca3d.data.embedded.motion_order import (
    LEAST_FRAMES,
    SPRITE_INTERVALS,
    draw_order_clip,
    order_classes,
    render_order,
)
from ca3d.data.embedded.untrimmed import draw_segments, render_pause, render_segments

UNTRIMMED = "-untrimmed"
HONESTY = (
    "rendered figures driven by motion capture, one performer and one recording per action: it "
    "measures generalisation over view, tempo and body, never over people"
)
DESCRIPTIONS = {
    "mocap15": f"15 human actions; {HONESTY}",
    "mocap30": (
        "15 human actions, each also played backwards, so that single frames can't tell more than "
        f"half of the classes; {HONESTY}"
    ),
    "mocap15-untrimmed": (
        "long videos for `ca3d eval --untrimmed`, in which the actions of mocap15 come and go in"
        " one room, with pauses (an empty room, or somebody standing still) between;"
        f" {HONESTY}"
    ),
    "mocap30-untrimmed": (
        f"as mocap15-untrimmed, with the actions of mocap30: each also played backwards; {HONESTY}"
    ),
    "motion-order": (
        "a drawn sprite that moves once along each axis of the picture; the class is the order and "
        "the senses of its motions: neither a frame nor a bag of frames tells it; test sprites "
        "have outlines that no training sprite has"
    ),
}


@dataclass(frozen=True)
class Recipe:
    """All parameters of one data set; every clip follows from them, its split and its index.

    Attributes:
        name: the data set.
        size: side of the square frames in pixels.
        frames: frames of every clip.
        frames_per_second: rate of every clip.
        clutter: 0 to 1.
        seed: another seed gives other clips.
        segments: motions in a row in a clip of `motion-order`.
        views: where the camera of the mocap sets stands, a key of `YAW`.
        background: whether the mocap sets have a class of no action.
    """

    name: str
    size: int
    frames: int
    frames_per_second: int
    clutter: float
    seed: int
    segments: int = 2
    views: str = "side"
    background: bool = False

    @property
    def untrimmed(self) -> bool:
        """Whether the videos are long, and show many actions.

        Example:
            >>> Recipe("mocap30-untrimmed", 64, 480, 16, 0.0, 0).untrimmed
            True
        """
        return self.name.endswith(UNTRIMMED)

    @property
    def with_reversed(self) -> bool:
        """Whether the actions are played backwards too.

        Example:
            >>> Recipe("mocap30", 64, 40, 16, 0.0, 0).with_reversed
            True
        """
        return self.name.startswith("mocap30")

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in label order.

        Example:
            >>> len(Recipe("mocap15", 64, 40, 16, 0.0, 0).classes)
            15
        """
        if self.name == "motion-order":
            return order_classes(self.segments)
        return mocap_classes(self.with_reversed) + (BACKGROUND,) * self.background

    @property
    def intervals(self) -> dict[str, dict[str, Intervals]]:
        """Quantity -> split -> the intervals that the split draws from.

        Example:
            >>> "yaw" in Recipe("mocap15", 64, 40, 16, 0.0, 0).intervals
            True
        """
        if self.name == "motion-order":
            table = SPRITE_INTERVALS
        else:
            table = {"yaw": YAW[self.views], **INTERVALS}
        return {quantity: dict(splits) for quantity, splits in table.items()}

    @property
    def least_frames(self) -> int:
        """Fewest frames that a clip may have.

        Example:
            >>> Recipe("motion-order", 64, 16, 16, 0.0, 0).least_frames
            16
        """
        return LEAST_FRAMES if self.name == "motion-order" else 2

    def label(self, index: int) -> int:
        """Label of a split's clip: classes take turns.

        Example:
            >>> Recipe("mocap15", 64, 40, 16, 0.0, 0).label(16)
            1
        """
        return index % len(self.classes)

    def render(self, split: str, index: int) -> tuple[np.ndarray, dict[str, Any]]:
        """Renders one clip.

        Args:
            split: `"train"`, `"val"` or `"test"`.
            index: number of the clip in its split.

        Returns:
            frames: (T, S, S, 3) uint8 RGB. varied: the values drawn from `intervals`; for an
            untrimmed video also its `events` (label, start, end in seconds).

        Example:
            >>> video, varied = Recipe("mocap15", 48, 4, 16, 0.0, 0).render("test", 3)
            >>> video.shape, 0.985 <= varied["tempo"] < 1.045
            ((4, 48, 48, 3), True)
        """
        rng = np.random.default_rng(
            [zlib.crc32(self.name.encode()), self.seed, SPLITS.index(split), index]
        )
        label = self.label(index)
        if self.name == "motion-order":
            order = draw_order_clip(rng, label, split, self.size, self.clutter, self.segments)
            return render_order(order, self.frames), order.varied()
        rate = self.frames_per_second
        if self.untrimmed:
            room, segments = draw_segments(
                rng,
                split,
                self.frames,
                rate,
                self.size,
                self.clutter,
                self.with_reversed,
                self.views,
            )
            events = [
                {"label": s.label, "start": s.begin / rate, "end": s.end / rate}
                for s in segments
                if s.label
            ]
            return render_segments(room, segments, rate), {**room.varied(), "events": events}
        pause = self.classes[label] == BACKGROUND
        motion = 0 if pause else label
        clip = draw_clip(
            rng, motion, split, self.size, self.clutter, self.with_reversed, self.views
        )
        if pause:
            return render_pause(rng, clip, self.frames, rate), clip.varied()
        return render_mocap(clip, self.frames, rate), clip.varied()
