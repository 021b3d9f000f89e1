import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ca3d.watch.resample import LONGEST_PAUSE, Gap, Resampler


def run(times, period):
    resampler = Resampler(period)
    served = [item for number, time in enumerate(times) for item in resampler.push(time, number)]
    return served + list(resampler.finish())


@given(
    st.lists(st.floats(0.004, 0.2), min_size=1, max_size=60),
    st.sampled_from([0.05, 0.1, 1 / 12.5]),
)
@settings(max_examples=200, deadline=None)
def test_every_point_gets_the_nearest_frame(steps, period):
    times = np.cumsum([0.0, *steps]).tolist()
    start, points = 0.0, 0
    for item in run(times, period):
        if isinstance(item, Gap):
            assert item.seconds > LONGEST_PAUSE * period
            start, points = item.start + item.seconds, 0
            continue
        point, frame = item
        assert point == pytest.approx(start + points * period, abs=1e-6)
        nearest = min(abs(time - point) for time in times)
        assert abs(times[frame] - point) <= nearest + 2e-3
        points += 1


@given(st.lists(st.floats(0.004, 0.149), min_size=1, max_size=60))
@settings(max_examples=100, deadline=None)
def test_pauses_up_to_the_longest_are_no_gap(steps):
    times = np.cumsum([0.0, *steps]).tolist()
    assert not any(isinstance(item, Gap) for item in run(times, 0.1))


def test_a_gap_begins_the_grid_anew():
    served = run([0.0, 0.1, 0.2, 0.36, 0.47], 0.1)
    assert served == [
        (0.0, 0),
        (0.1, 1),
        (0.2, 2),
        Gap(0.2, pytest.approx(0.16)),
        (0.36, 3),
        (pytest.approx(0.46), 4),
    ]


def test_a_clock_that_is_set_back_is_a_gap():
    served = run([10.0, 10.1, 3.0, 3.1], 0.1)
    assert served[2] == Gap(10.1, pytest.approx(-7.1))
    assert served[3:] == [(3.0, 2), (pytest.approx(3.1), 3)]


def test_a_frame_a_little_out_of_order_is_left_out():
    assert run([0.0, 0.1, 0.08, 0.2], 0.1) == [(0.0, 0), (0.1, 1), (0.2, 3)]


def test_a_slower_source_repeats_frames():
    served = run([0.0, 0.07, 0.14, 0.21], 0.05)
    assert [frame for _, frame in served] == [0, 1, 1, 2, 3]


def test_a_file_gives_what_predict_reads(tmp_path):
    """Points on a grid are those of `ClipSpec.sample`, whatever the video's own rate."""
    from tiny_videos import write_video

    from ca3d.data.reader import open_video
    from ca3d.data.sampling import ClipSpec
    from ca3d.watch.decoder import read_frames
    from ca3d.watch.messages import Frame
    from ca3d.watch.request import Request

    rng = np.random.default_rng(0)
    for rate in (10, 24, 30):
        path = tmp_path / f"{rate}.avi"
        write_video(path, rng.integers(0, 255, (60, 32, 32, 3), dtype=np.uint8), rate)
        spec = ClipSpec(frames=12, stride=2, frames_per_second=20.0, size=32, resize=32)
        request = Request("file", str(path), resize=32, size=32, stride=2, frames_per_second=20.0)
        seen = [item.pixels for item in read_frames(request) if isinstance(item, Frame)]
        with open_video(path) as video:
            first = spec.sample(video.num_frames, video.frames_per_second, mode="uniform", clips=2)
            clip = spec.read(video, first[:1], 32)[0].permute(0, 2, 3, 1).numpy()
        assert np.array_equal(np.stack(seen[:12]), clip)


def test_a_period_must_be_positive():
    with pytest.raises(ValueError, match="period must be positive"):
        Resampler(0.0)
