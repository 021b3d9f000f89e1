"""From a camera's frames, which come when they come, to a model's, evenly spaced in time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

# A pause between frames that is longer than so many of the model's periods cannot be filled.
LONGEST_PAUSE = 1.5
# Containers round their time stamps, Matroska to a millisecond.
_CLOCK_ROUNDING = 1e-3


@dataclass(frozen=True)
class Gap:
    """A stretch without frames: no window may reach over it.

    Attributes:
        start: Seconds since the source's begin; the last frame before the gap.
        seconds: Its length; negative when the source's clock jumped back.
    """

    start: float
    seconds: float


class Resampler(Generic[T]):
    """Picks for every point of an even grid in time the frame that is nearest to it.

    The grid begins at the first frame, and anew after a gap. A frame that serves no point is left
    out, one that serves two is given twice.

    Args:
        period: Seconds from point to point.

    Example:
        >>> resampler = Resampler(period=0.1)
        >>> [resampler.push(0.04 * i, i) for i in range(6)]
        [[(0.0, 0)], [], [], [(0.1, 3)], [], [(0.2, 5)]]
        >>> resampler.push(0.5, 6)
        [Gap(start=0.2, seconds=0.3), (0.5, 6)]
    """

    def __init__(self, period: float) -> None:
        if not period > 0:
            raise ValueError(f"period must be positive, got {period}")
        self.period = period
        self._start = 0.0
        self._points = 0
        self._held: tuple[float, T] | None = None

    def push(self, time: float, frame: T) -> list[tuple[float, T] | Gap]:
        """Takes the next frame.

        Args:
            time: When it was taken, in seconds.
            frame: Anything.

        Returns:
            The points that can be served now, as (time of the point, frame), in order; a `Gap`
            before them when the pause was too long.
        """
        served: list[tuple[float, T] | Gap] = []
        if self._held is not None:
            before, earlier = self._held
            pause = time - before
            if abs(pause) > LONGEST_PAUSE * self.period + _CLOCK_ROUNDING:
                served.append(Gap(round(before, 6), round(pause, 6)))
                self._held = None
            elif pause <= 0:
                return []
        if self._held is None:
            self._start, self._points = time, 1
            self._held = (time, frame)
            return [*served, (time, frame)]
        while (point := self._start + self._points * self.period) <= time + _CLOCK_ROUNDING:
            # As in a file: half-way, the later frame is the one that is on the screen.
            later = time - point <= point - before + _CLOCK_ROUNDING
            served.append((point, frame if later else earlier))
            self._points += 1
        self._held = (time, frame)
        return served

    def finish(self) -> list[tuple[float, T]]:
        """Returns the last point, if the end of the video came before a frame behind it."""
        if self._held is None:
            return []
        before, frame = self._held
        point = self._start + self._points * self.period
        return [(point, frame)] if point - before < self.period / 2 else []
