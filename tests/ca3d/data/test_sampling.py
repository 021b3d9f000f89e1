import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ca3d.data.reader import open_video
from ca3d.data.sampling import ClipSpec

specs = st.builds(
    ClipSpec,
    frames=st.integers(1, 40),
    stride=st.integers(1, 8),
    frames_per_second=st.none() | st.floats(1, 120),
    window=st.none() | st.integers(40, 60),
)
modes = st.sampled_from([("random", 1), ("center", 1), ("uniform", 1), ("uniform", 5)])


@given(specs, st.integers(1, 600), st.floats(1, 120), modes, st.integers(0, 2**32))
def test_clips_lie_in_the_video(spec, num_frames, fps, mode, seed):
    rng = np.random.default_rng(seed)
    where = spec.sample(num_frames, fps, rng, mode[0], mode[1])
    assert where.shape == (mode[1], spec.frames)
    assert where.min() >= 0
    if spec.frames_per_second is None:
        assert where.dtype == np.int64
        assert where.max() < num_frames
    else:
        assert where.dtype == np.float64
        # A frame of a looped clip may begin up to one step before the end.
        assert where.max() < (num_frames + 0.5) / fps + 1e-6


@given(specs, st.integers(1, 600), st.floats(1, 120), st.integers(0, 2**32))
def test_draws_depend_on_the_generator_only(spec, num_frames, fps, seed):
    first = spec.sample(num_frames, fps, np.random.default_rng(seed), "random")
    again = spec.sample(num_frames, fps, np.random.default_rng(seed), "random")
    assert np.array_equal(first, again)


@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 500), st.integers(0, 2**32))
def test_a_long_enough_video_gives_evenly_spaced_frames(frames, stride, extra, seed):
    spec = ClipSpec(frames, stride)
    num_frames = frames * stride + extra
    where = spec.sample(num_frames, 25.0, np.random.default_rng(seed), "random")[0]
    assert (np.diff(where) == stride).all()


@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 500), st.floats(5, 60))
def test_time_and_index_agree_at_the_models_own_rate(frames, stride, num_frames, fps):
    by_index = ClipSpec(frames, stride)
    by_time = ClipSpec(frames, stride, frames_per_second=fps)
    for mode, clips in (("center", 1), ("uniform", 3)):
        index = by_index.sample(num_frames, fps, mode=mode, clips=clips)
        time = by_time.sample(num_frames, fps, mode=mode, clips=clips)
        assert np.array_equal(np.floor(time * fps + 1e-9).astype(int), index)


class TestPlaces:
    def test_center(self):
        assert ClipSpec(16, 2).sample(100, 25.0).tolist() == [list(range(34, 66, 2))]
        assert ClipSpec(16, 2).sample(32, 25.0).tolist() == [list(range(0, 32, 2))]

    def test_uniform_reaches_both_ends(self):
        starts = ClipSpec(4, 2).sample(28, 25.0, mode="uniform", clips=3)[:, 0]
        assert starts.tolist() == [0, 10, 20]

    def test_random_reaches_both_ends_and_nothing_else(self):
        rng = np.random.default_rng(0)
        starts = {int(ClipSpec(4, 2).sample(12, 25.0, rng, "random")[0, 0]) for _ in range(400)}
        assert starts == {0, 1, 2, 3, 4}

    def test_short_videos_are_looped(self):
        assert ClipSpec(6, 2).sample(7, 25.0).tolist() == [[0, 2, 4, 6, 0, 2]]
        assert ClipSpec(3, 4).sample(1, 25.0).tolist() == [[0, 0, 0]]

    def test_published_window(self):
        # 20 frames at step 2 in the middle, of these the middle 16.
        spec = ClipSpec(16, 2, window=20)
        assert spec.sample(100, 25.0).tolist() == [list(range(34, 66, 2))]
        assert spec.sample(40, 25.0).tolist() == [list(range(4, 36, 2))]
        rng = np.random.default_rng(0)
        starts = {int(spec.sample(40, 25.0, rng, "random")[0, 0]) for _ in range(200)}
        assert starts == {0, 2, 4, 6, 8}
        # Too short for 20: from frame 0; 17 of them are there.
        assert spec.sample(33, 25.0)[0, 0] == 0
        assert spec.sample(9, 25.0).tolist() == [[0, 2, 4, 6, 8] * 3 + [0]]

    def test_another_rate_spans_the_same_time(self):
        spec = ClipSpec(16, 2, frames_per_second=15.0)
        for fps in (10.0, 15.0, 23.976, 30.0, 60.0):
            where = spec.sample(round(20 * fps), fps)[0]
            assert np.diff(where) == pytest.approx(np.full(15, 2 / 15))
            # Centred: as much before the clip as behind it.
            assert where[0] == pytest.approx((20 - 16 * 2 / 15) / 2, abs=1.5 / fps)

    def test_ntsc_rates_do_not_lose_a_start(self):
        spec = ClipSpec(16, 2, frames_per_second=29.97)
        rng = np.random.default_rng(0)
        last = max(spec.sample(40, 30000 / 1001, rng, "random")[0, 0] for _ in range(300))
        assert math.floor(last * 30000 / 1001) == 8


def test_reading_by_time_from_files_of_different_rates(tmp_path, write_video, numbers):
    spec = ClipSpec(8, 2, frames_per_second=10.0)
    slow = write_video(tmp_path / "slow.avi", 40, rate=10)
    fast = write_video(tmp_path / "fast.avi", 120, rate=30)
    shown = []
    for path, factor in ((slow, 1), (fast, 3)):
        with open_video(path) as video:
            where = spec.sample(video.num_frames, video.frames_per_second)
            shown.append([n // factor for n in numbers(spec.read(video, where)[0])])
    assert shown[0] == shown[1] == list(range(12, 28, 2))


@pytest.mark.parametrize(
    ("name", "value"),
    [("frames", 0), ("frames", 1.5), ("stride", -1), ("size", True), ("resize", "112"),
     ("frames_per_second", 0.0), ("frames_per_second", float("nan")), ("window", 3)],
)  # fmt: skip
def test_bad_spec(name, value):
    with pytest.raises(ValueError, match=name):
        ClipSpec(**{name: value})


@pytest.mark.parametrize(
    ("change", "name"),
    [({"num_frames": 0}, "num_frames"), ({"fps": 0.0}, "fps"), ({"clips": 0}, "clips"),
     ({"mode": "dense"}, "mode"), ({"mode": "random"}, "rng"), ({"clips": 2}, "clips=2")],
)  # fmt: skip
def test_bad_arguments(change, name):
    arguments = {"num_frames": 10, "fps": 25.0, "mode": "center", "clips": 1, **change}
    with pytest.raises(ValueError, match=name):
        ClipSpec().sample(**arguments)
