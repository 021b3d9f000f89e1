import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ca3d.watch.calibration import Calibration
from ca3d.watch.events import UNKNOWN, EventDetector

CLASSES = ("background", "fall", "meal")


def detector(**options) -> EventDetector:
    return EventDetector(CLASSES, Calibration(1.0, (0.5, 0.6, 0.6)), **options)


def run(found: EventDetector, series, step=0.25):
    events = []
    for number, fall in enumerate(series):
        meal = 0.0
        if isinstance(fall, tuple):
            fall, meal = fall
        middle = number * step
        events += found.push(middle, middle + 0.5, [1 - fall - meal, fall, meal])
    return events + found.interrupt()


def ended(events):
    return [(e.label, e.start, e.end) for e in events if not e.lasting]


def test_hysteresis_keeps_an_event_together():
    series = [0, 0.7, 0.5, 0.45, 0.7, 0.45, 0.1]
    assert ended(run(detector(leave=0.7), series)) == [("fall", 0.25, 1.25)]
    assert len(ended(run(detector(leave=1.0, min_duration=0.0), series))) == 2


def test_what_is_too_short_is_no_event():
    assert run(detector(min_duration=0.5), [0, 0.9, 0.9, 0, 0]) == []
    assert ended(run(detector(min_duration=0.5), [0, 0.9, 0.9, 0.9, 0])) == [("fall", 0.25, 0.75)]


def test_background_and_unknown_are_no_events():
    found = detector()
    assert run(found, [0.0] * 8 + [0.55] * 8) == []
    found.push(0, 0, [0.9, 0.1, 0.0])
    assert found.state == "background"
    found.push(0, 0, [0.3, 0.4, 0.3])
    assert found.state == UNKNOWN


def test_one_activity_replaces_another():
    series = [(0.9, 0.0)] * 4 + [(0.1, 0.8)] * 4
    assert ended(run(detector(), series)) == [("fall", 0.0, 0.75), ("meal", 1.0, 1.75)]


def test_an_event_is_told_twice_when_it_begins_and_when_it_ends():
    begin, end = run(detector(min_duration=0.5), [0.7, 0.8, 0.9, 1.0])
    assert begin.lasting
    assert math.isnan(begin.end)
    assert (begin.start, begin.noticed) == (0.0, 1.0)
    assert begin.confidence == pytest.approx(0.8)
    assert (end.start, end.end, end.noticed) == (0.0, 0.75, 1.0)
    assert end.confidence == pytest.approx(0.85)


def test_a_gap_ends_an_event():
    found = detector()
    run_before = [found.push(i * 0.25, i * 0.25, [0.1, 0.9, 0.0]) for i in range(4)]
    assert sum(map(len, run_before)) == 1
    assert ended(found.interrupt()) == [("fall", 0.0, 0.75)]
    assert found.interrupt() == []


@given(st.lists(st.floats(0, 1), max_size=60), st.floats(0.1, 1.0), st.floats(0, 2))
@settings(max_examples=200, deadline=None)
def test_events_are_apart_and_long_enough(series, leave, min_duration):
    events = run(detector(leave=leave, min_duration=min_duration), series)
    done = [e for e in events if not e.lasting]
    assert len(done) == sum(e.lasting for e in events)
    for event in done:
        assert event.end - event.start >= min_duration - 2e-3
        assert event.noticed >= event.start
    for before, after in pairwise(done):
        assert before.end < after.start


@pytest.mark.parametrize("options", [{"leave": 0.0}, {"leave": 1.1}, {"min_duration": -1.0}])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        detector(**options)
