"""Long videos in which the actions of the mocap sets come and go, and what lies between them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from ca3d.data.embedded.mocap import MocapClip, draw_clip, mocap_classes, render_empty, render_mocap

# Seconds of an action and of the pause behind it; sometimes there is no pause.
_ACTION_SECONDS = (2.5, 5.0)
_PAUSE_SECONDS = (2.0, 8.0)
_NO_PAUSE = 0.15
# Motions whose first pose is that of somebody standing.
_STANDING = ("jump", "kick", "punch", "spin", "walk")


@dataclass(frozen=True)
class Segment:
    """A stretch of an untrimmed video.

    Attributes:
        label: the action; empty for a pause.
        begin, end: frame numbers.
        clip: what is shown, None for an empty room.
    """

    label: str
    begin: int
    end: int
    clip: MocapClip | None


def render_pause(rng: np.random.Generator, clip: MocapClip, frames: int, rate: float) -> np.ndarray:
    """Renders what the class `background` means: an empty room, or somebody who stands still.

    Args:
        rng: decides which of the two.
        clip: gives room, body and camera.
        frames: number of frames.
        rate: frames a second.

    Returns:
        (frames, S, S, 3) uint8 RGB.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> clip = draw_clip(rng, 0, "train", 48, 0.0, False)
        >>> render_pause(rng, clip, 4, 16.0).shape
        (4, 48, 48, 3)
    """
    figure = _standing(rng, clip)
    return render_empty(clip, frames) if figure is None else render_mocap(figure, frames, rate)


def draw_segments(
    rng: np.random.Generator,
    split: str,
    frames: int,
    rate: float,
    size: int,
    clutter: float,
    with_reversed: bool,
    views: str,
) -> tuple[MocapClip, list[Segment]]:
    """Draws the course of one untrimmed video: one room, camera and body, many actions.

    Every action has its turn before one comes again. The video begins and ends with a pause.

    Args:
        rng: source of randomness.
        split: decides the intervals that room, camera and body are drawn from.
        frames: length of the video.
        rate: frames a second.
        size: side of the frames in pixels.
        clutter: 0 to 1.
        with_reversed: whether actions are also played backwards, as classes of their own.
        views: a key of `ca3d.data.embedded.intervals.YAW`.

    Returns:
        The room, and the segments, which follow each other without a gap.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> _, segments = draw_segments(rng, "test", 480, 16.0, 48, 0.0, False, "side")
        >>> segments[0].label, segments[0].begin, segments[-1].end
        ('', 0, 480)
    """
    names = mocap_classes(with_reversed)
    room = draw_clip(rng, 0, split, size, clutter, with_reversed, views)
    labels = _turns(rng, len(names))
    segments: list[Segment] = []
    now = 0
    while now < frames:
        pause = round(rng.uniform(*_PAUSE_SECONDS) * rate)
        action = round(rng.uniform(*_ACTION_SECONDS) * rate)
        if segments and rng.random() < _NO_PAUSE:
            pause = 0
        # No action is cut off by the end of the video.
        if now + pause + action + _PAUSE_SECONDS[0] * rate > frames:
            pause, action = frames - now, 0
        if pause:
            segments.append(Segment("", now, now + pause, _standing(rng, room)))
            now += pause
        if action:
            label = next(labels)
            drawn = draw_clip(rng, label, split, size, clutter, with_reversed, views)
            clip = replace(
                room,
                motion=drawn.motion,
                backwards=drawn.backwards,
                phase=drawn.phase,
                spell=drawn.spell,
            )
            segments.append(Segment(names[label], now, now + action, clip))
            now += action
    return room, segments


def render_segments(room: MocapClip, segments: list[Segment], rate: float) -> np.ndarray:
    """Renders an untrimmed video.

    Args:
        room: what `draw_segments` returned.
        segments: likewise.
        rate: frames a second.

    Returns:
        (T, S, S, 3) uint8 RGB.
    """
    size = room.camera.size
    video = np.empty((segments[-1].end, size, size, 3), dtype=np.uint8)
    for part in segments:
        length = part.end - part.begin
        video[part.begin : part.end] = (
            render_empty(room, length)
            if part.clip is None
            else render_mocap(part.clip, length, rate)
        )
    return video


def _standing(rng: np.random.Generator, room: MocapClip) -> MocapClip | None:
    motion = str(rng.choice(_STANDING))
    if rng.random() < 0.5:
        return None
    return replace(room, motion=motion, backwards=False, phase=0.0, tempo=0.0)


def _turns(rng: np.random.Generator, count: int) -> Iterator[int]:
    while True:
        yield from (int(label) for label in rng.permutation(count))
