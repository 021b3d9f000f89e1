"""How well events that were found match those that took place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ca3d.watch.events import Event


@dataclass(frozen=True)
class Annotation:
    """Something that took place.

    Attributes:
        label: The class.
        start: Seconds since the video's begin.
        end: Likewise.

    Raises:
        ValueError: It ends before it starts.
    """

    label: str
    start: float
    end: float

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end < math.inf:
            raise ValueError(f"start {self.start} and end {self.end} must be 0 <= start < end")


@dataclass
class VideoEvents:
    """What was found in one video, and what took place in it.

    Attributes:
        found: Events that have ended.
        annotations: The truth.
        seconds: Length of the video.
    """

    found: list[Event]
    annotations: list[Annotation]
    seconds: float


@dataclass(frozen=True)
class Agreement:
    """Counts of matched and unmatched events at one overlap.

    Attributes:
        matched: Pairs of a found event and an annotation.
        found: Found events.
        annotated: Annotations.

    Example:
        >>> Agreement(matched=1, found=2, annotated=2).f1
        0.5
    """

    matched: int
    found: int
    annotated: int

    @property
    def precision(self) -> float:
        """Share of the found events that are matched; NaN without any."""
        return self.matched / self.found if self.found else math.nan

    @property
    def recall(self) -> float:
        """Share of the annotations that are matched; NaN without any."""
        return self.matched / self.annotated if self.annotated else math.nan

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; NaN without events at all."""
        total = self.found + self.annotated
        return 2 * self.matched / total if total else math.nan


def overlap(event: Event, annotation: Annotation) -> float:
    """Intersection over union of two stretches of time, in [0, 1].

    Example:
        >>> overlap(Event("fall", 0.0, 2.0, 0.9, 1.0), Annotation("fall", 1.0, 3.0))
        0.3333333333333333
    """
    common = min(event.end, annotation.end) - max(event.start, annotation.start)
    union = max(event.end, annotation.end) - min(event.start, annotation.start)
    return max(0.0, common) / union if union > 0 else 0.0


def match(
    found: Sequence[Event], annotations: Sequence[Annotation], least_overlap: float
) -> list[tuple[Event, Annotation]]:
    """Pairs found events with annotations of the same label, greedily.

    The surest event chooses first: the free annotation of its label that it overlaps most, if by
    at least `least_overlap`. Every event and every annotation is in one pair at most.

    Args:
        found: Events of one video.
        annotations: Annotations of the same video.
        least_overlap: Intersection over union in time, above 0 and at most 1.

    Returns:
        The pairs.

    Raises:
        ValueError: `least_overlap` is out of range.

    Example:
        >>> events = [Event("fall", 0.0, 2.0, 0.6, 1.0), Event("fall", 0.5, 2.5, 0.9, 1.0)]
        >>> match(events, [Annotation("fall", 0.5, 2.5)], 0.5)[0][0].confidence
        0.9
    """
    if not 0 < least_overlap <= 1:
        raise ValueError(f"least_overlap must be above 0 and at most 1, got {least_overlap}")
    free = list(annotations)
    pairs = []
    for event in sorted(found, key=lambda e: (-e.confidence, e.start)):
        same = [a for a in free if a.label == event.label]
        best = max(same, key=lambda a: overlap(event, a), default=None)
        if best is not None and overlap(event, best) >= least_overlap:
            free.remove(best)
            pairs.append((event, best))
    return pairs


def agreement(videos: Sequence[VideoEvents], least_overlap: float) -> Agreement:
    """Counts matches over all videos and classes.

    Args:
        videos: One item a video.
        least_overlap: As in `match`.
    """
    return Agreement(
        sum(len(match(v.found, v.annotations, least_overlap)) for v in videos),
        sum(len(v.found) for v in videos),
        sum(len(v.annotations) for v in videos),
    )


def delays(videos: Sequence[VideoEvents]) -> list[float]:
    """Seconds from an annotation's start to when an event of its label was decided.

    An annotation counts when an event of its label overlaps it at all; the first decides.

    Args:
        videos: One item a video.

    Returns:
        One number for every annotation that was noticed; negative when too early.

    Example:
        >>> event = Event("fall", 1.5, 3.0, 0.9, noticed=2.25)
        >>> delays([VideoEvents([event], [Annotation("fall", 1.0, 3.0)], 9.0)])
        [1.25]
    """
    result = []
    for video in videos:
        for annotation in video.annotations:
            noticed = [
                event.noticed
                for event in video.found
                if event.label == annotation.label and overlap(event, annotation) > 0
            ]
            if noticed:
                result.append(min(noticed) - annotation.start)
    return result


def false_alarms_per_hour(videos: Sequence[VideoEvents]) -> float:
    """Events that overlap no annotation of their label, for each hour of video.

    Args:
        videos: One item a video.

    Returns:
        NaN without video.

    Example:
        >>> false_alarms_per_hour([VideoEvents([Event("fall", 1.0, 2.0, 0.9, 1.5)], [], 1800.0)])
        2.0
    """
    hours = sum(video.seconds for video in videos) / 3600
    alarms = sum(
        not any(a.label == event.label and overlap(event, a) > 0 for a in video.annotations)
        for video in videos
        for event in video.found
    )
    return alarms / hours if hours else math.nan
