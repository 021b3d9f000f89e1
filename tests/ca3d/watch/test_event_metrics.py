import math

import pytest

from ca3d.watch.event_metrics import (
    Annotation,
    VideoEvents,
    agreement,
    delays,
    false_alarms_per_hour,
    match,
    overlap,
)
from ca3d.watch.events import Event


def event(label, start, end, confidence=0.9, noticed=None):
    return Event(label, start, end, confidence, start + 0.5 if noticed is None else noticed)


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [(0, 10, 1.0), (0, 5, 0.5), (5, 15, 1 / 3), (10, 20, 0.0), (12, 20, 0.0), (2, 4, 0.2)],
)
def test_overlap(start, end, expected):
    assert overlap(event("a", start, end), Annotation("a", 0, 10)) == pytest.approx(expected)


def test_the_surest_event_chooses_first_and_each_annotation_once():
    found = [event("a", 0, 10, 0.5), event("a", 1, 9, 0.9), event("a", 20, 30, 0.7)]
    pairs = match(found, [Annotation("a", 0, 10)], 0.5)
    assert [pair[0].confidence for pair in pairs] == [0.9]


def test_labels_must_agree():
    assert match([event("b", 0, 10)], [Annotation("a", 0, 10)], 0.1) == []


def test_the_threshold_is_reached_by_equality():
    truth = [Annotation("a", 0, 10)]
    assert len(match([event("a", 0, 5)], truth, 0.5)) == 1
    assert len(match([event("a", 0, 4.9)], truth, 0.5)) == 0
    with pytest.raises(ValueError, match="least_overlap"):
        match([], [], 0.0)


def test_counts_over_videos():
    videos = [
        VideoEvents([event("a", 0, 10), event("b", 20, 30)], [Annotation("a", 0, 10)], 1800),
        VideoEvents([], [Annotation("b", 0, 10)], 1800),
    ]
    counts = agreement(videos, 0.5)
    assert (counts.matched, counts.found, counts.annotated) == (1, 2, 2)
    assert counts.f1 == counts.precision == counts.recall == 0.5
    assert false_alarms_per_hour(videos) == 1.0
    assert math.isnan(agreement([], 0.5).f1)
    assert math.isnan(false_alarms_per_hour([]))


def test_delay_is_that_of_the_first_event_that_overlaps():
    found = [event("a", 2, 4, noticed=3.0), event("a", 6, 8, noticed=7.0)]
    video = VideoEvents(found, [Annotation("a", 1, 9), Annotation("b", 1, 9)], 10)
    assert delays([video]) == [2.0]


def test_annotations_end_behind_their_start():
    with pytest.raises(ValueError, match="start < end"):
        Annotation("a", 2.0, 2.0)
