"""From the probabilities of windows to events: something began, lasted, ended."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ca3d.data.background import background_index
from ca3d.watch.calibration import Calibration

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Event:
    """Something that was seen.

    Attributes:
        label: The class.
        start: Seconds since the source's begin.
        end: Likewise; NaN while it lasts.
        confidence: Mean calibrated probability of the class over its windows so far.
        noticed: When it was decided, in the same seconds: `start` and the delay.

    Example:
        >>> Event("fall", 1.0, 3.0, 0.9, 2.0).lasting
        False
    """

    label: str
    start: float
    end: float
    confidence: float
    noticed: float

    @property
    def lasting(self) -> bool:
        """Whether it has not ended yet."""
        return math.isnan(self.end)


@dataclass
class _Candidate:
    place: int
    start: float
    last: float
    total: float
    windows: int = 1
    noticed: float = math.nan


class EventDetector:
    """Turns one probability vector a window into events.

    A class begins when it is the likeliest and passes its threshold, and goes on while it stays
    above `leave` times its threshold (hysteresis) and no other activity begins. It is an event only
    when it lasts `min_duration` seconds. A window counts at its middle. The class `background` is
    never an event; where no class passes, the state is `unknown`, which is none either.

    Args:
        classes: Class names.
        calibration: Thresholds, of probabilities that are calibrated.
        leave: Share of its threshold above which a class goes on, in (0, 1].
        min_duration: Seconds.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> detector = EventDetector(["fall", "background"], Calibration(1.0, (0.6, 0.5)))
        >>> series = [0.1, 0.7, 0.8, 0.5, 0.1]
        >>> for i, p in enumerate(series):
        ...     for event in detector.push(float(i), i + 0.5, [p, 1 - p]):
        ...         print(event.label, event.start, event.end, round(event.confidence, 2))
        fall 1.0 nan 0.75
        fall 1.0 3.0 0.67
    """

    def __init__(
        self,
        classes: Sequence[str],
        calibration: Calibration,
        leave: float = 0.7,
        min_duration: float = 0.5,
    ) -> None:
        if not 0 < leave <= 1:
            raise ValueError(f"leave must be in (0, 1], got {leave}")
        if not (math.isfinite(min_duration) and min_duration >= 0):
            raise ValueError(f"min_duration must not be negative, got {min_duration}")
        self.classes, self.calibration = tuple(classes), calibration
        self.leave, self.min_duration = leave, min_duration
        self._background = background_index(classes)
        self._current: _Candidate | None = None
        self.state = UNKNOWN
        self.confidence = 0.0

    def push(self, middle: float, newest: float, probabilities: Sequence[float]) -> list[Event]:
        """Takes the next window.

        Args:
            middle: Time of the window's middle in seconds.
            newest: Time of its last frame: when it became known.
            probabilities: Of the classes, calibrated.

        Returns:
            Events that ended, then the one that has been found to have begun (its end is NaN).
        """
        events: list[Event] = []
        thresholds = self.calibration.thresholds
        place = max(range(len(probabilities)), key=probabilities.__getitem__)
        passes = probabilities[place] >= thresholds[place]
        current = self._current
        if current is not None:
            own = probabilities[current.place]
            replaced = passes and place not in (current.place, self._background)
            if own >= self.leave * thresholds[current.place] and not replaced:
                current.last, current.windows = middle, current.windows + 1
                current.total += own
            else:
                events += self.interrupt()
        if self._current is None and passes and place != self._background:
            self._current = _Candidate(place, middle, middle, probabilities[place])
        self._describe(place, passes, probabilities)
        current = self._current
        if (
            current is not None
            and math.isnan(current.noticed)
            and current.last - current.start >= self.min_duration
        ):
            current.noticed = newest
            events.append(self._event(current, math.nan))
        return events

    def interrupt(self) -> list[Event]:
        """Ends what lasts: the source ended, or there is a gap.

        Returns:
            The event that lasted, or none.
        """
        current, self._current = self._current, None
        self.state, self.confidence = UNKNOWN, 0.0
        if current is None or math.isnan(current.noticed):
            return []
        return [self._event(current, current.last)]

    def _describe(self, place: int, passes: bool, probabilities: Sequence[float]) -> None:
        if self._current is not None:
            place = self._current.place
        known = passes or self._current is not None
        self.state = self.classes[place] if known else UNKNOWN
        self.confidence = probabilities[place]

    def _event(self, candidate: _Candidate, end: float) -> Event:
        return Event(
            self.classes[candidate.place],
            round(candidate.start, 3),
            round(end, 3),
            candidate.total / candidate.windows,
            round(candidate.noticed, 3),
        )
