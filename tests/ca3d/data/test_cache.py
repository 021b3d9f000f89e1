import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ca3d.data import cache as cache_module
from ca3d.data.cache import FrameCache, build
from ca3d.data.folder import VideoFolder
from ca3d.data.reader import VideoError, open_video
from ca3d.data.sampling import ClipSpec
from ca3d.errors import UserError

CLIP = ClipSpec(frames=4, stride=2, size=32, resize=36)


@pytest.fixture
def root(dataset, tmp_path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "videos"))


def clips(root: Path, cache, training: bool = True, **options) -> torch.Tensor:
    data = VideoFolder(root, clip=CLIP, training=training, cache=cache, **options)
    return torch.stack([data[i][0] for i in range(len(data))])


class TestReading:
    def test_exact_frames_give_the_same_clips(self, root):
        plain = clips(root, None)
        report = build(root, short_side=36, format="npy")
        assert (report.written, report.kept, report.broken) == (12, 0, {})
        assert report.bytes > 12 * 24 * 36 * 48 * 3
        assert torch.equal(plain, clips(root, "auto"))
        assert str(root / ".ca3d-cache") in VideoFolder(root, clip=CLIP, training=True).describe()

    def test_it_is_really_the_cache_that_is_read(self, root, monkeypatch):
        build(root, short_side=36, format="npy")
        monkeypatch.setattr("ca3d.data.folder.open_video", None)
        clips(root, "auto")
        with pytest.raises(TypeError):
            clips(root, None)

    def test_jpeg_is_near(self, root):
        plain = clips(root, None, training=False)
        build(root, short_side=36)
        difference = clips(root, "auto", training=False) - plain
        assert 0 < difference.abs().mean() < 0.01

    def test_larger_frames_are_resized(self, root):
        build(root, root.parent / "cache", short_side=48, format="npy")
        cached = clips(root, root.parent / "cache", training=False)
        assert cached.shape == (12, 3, 4, 32, 32)
        assert (cached - clips(root, None, training=False)).abs().mean() < 0.03

    def test_small_videos_keep_their_size(self, root):
        video = next(root.glob("*/*.avi"))
        build(root, short_side=200, format="npy")
        with FrameCache(root / ".ca3d-cache", root).open(video) as cached, open_video(video) as own:
            assert (cached.width, cached.height) == (own.width, own.height)
        assert (clips(root, "auto") - clips(root, None)).abs().mean() < 0.03

    def test_frame_rate_times_and_size_are_kept(self, root, write_video):
        from fractions import Fraction

        times = [50 * i for i in range(10)] + [1500 + 20 * i for i in range(10)]
        path = write_video(
            root / "walk" / "vfr.mp4", 20, codec="libx264", pts=times, time_base=Fraction(1, 1000),
            rotation=(90, False),
        )  # fmt: skip
        build(root, short_side=48, format="npy")
        cached = FrameCache(root / ".ca3d-cache", root).open(path)
        with open_video(path) as source:
            assert cached.num_frames == source.num_frames
            assert cached.frames_per_second == source.frames_per_second
            assert cached.duration == source.duration
            assert np.array_equal(cached.times(), source.times())
            assert cached.path == source.path
            assert (cached.width, cached.height) == (source.width, source.height)
            where = [0.0, 0.22, 1.0, 1.56, 9.0]
            assert torch.equal(cached.frames_at(where), source.frames_at(where))
            assert torch.equal(cached.frames([5, 99]), source.frames([5, 99]))

    def test_too_small(self, root):
        build(root, short_side=24, format="npy")
        assert FrameCache.find(root, "auto", 36) is None
        with pytest.raises(UserError, match="holds frames of 24 pixels, 36 are needed"):
            clips(root, root / ".ca3d-cache")

    def test_none_there(self, root):
        assert FrameCache.find(root, "auto", 36) is None
        with pytest.raises(UserError, match="no frame cache"):
            clips(root, root / "nothing")

    @pytest.mark.parametrize(("format", "kept"), [("jpeg", 1000), ("npy", 1000), ("npy", -1)])
    def test_damaged_frames(self, root, format, kept):
        """Cut off in the middle, or one byte before the end."""
        build(root, short_side=36, format=format)
        suffix = {"jpeg": "jpegs", "npy": "npy"}[format]
        frames = root / ".ca3d-cache" / "walk" / f"p0_t0.avi.{suffix}"
        frames.write_bytes(frames.read_bytes()[:kept])
        reader = FrameCache(root / ".ca3d-cache", root).open(root / "walk" / "p0_t0.avi")
        with pytest.raises(VideoError, match="damaged cache file"):
            reader.frames([20])


class TestBuilding:
    @pytest.mark.parametrize("format", ["jpeg", "npy"])
    def test_again_changes_nothing(self, root, format):
        build(root, short_side=36, format=format)
        before = {p: p.stat().st_mtime_ns for p in (root / ".ca3d-cache").rglob("*.*s")}
        report = build(root, short_side=36, format=format)
        assert (report.written, report.kept) == (0, 12)
        assert before == {p: p.stat().st_mtime_ns for p in (root / ".ca3d-cache").rglob("*.*s")}

    def test_changed_videos_are_noticed(self, root, write_video):
        build(root, short_side=36, format="npy")
        path = write_video(root / "walk" / "p0_t0.avi", 18)
        cache = FrameCache(root / ".ca3d-cache", root)
        assert cache.open(path) is None
        assert cache.open(root / "walk" / "p0_t1.avi") is not None
        assert torch.equal(clips(root, "auto"), clips(root, None))
        report = build(root, short_side=36, format="npy")
        assert (report.written, report.kept) == (1, 11)
        assert cache.open(path).num_frames == 18

    def test_a_new_time_stamp_alone_is_noticed(self, root):
        build(root, short_side=36)
        path = root / "walk" / "p0_t0.avi"
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))
        assert FrameCache(root / ".ca3d-cache", root).open(path) is None

    def test_interrupted_build_goes_on(self, root, monkeypatch):
        def stop(done: int, total: int, path: str) -> None:
            if done == 4:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            build(root, short_side=36, workers=1, progress=stop)
        assert not list((root / ".ca3d-cache").rglob("*.tmp"))
        report = build(root, short_side=36)
        assert report.kept >= 4
        assert report.kept + report.written == 12

    def test_killed_while_writing(self, root, monkeypatch):
        """Frames without an index, and half an index, count as not cached."""
        build(root, short_side=36)
        walk = root / ".ca3d-cache" / "walk"
        (walk / "p0_t0.avi.index").unlink()
        index = walk / "p0_t1.avi.index"
        index.write_bytes(index.read_bytes()[:100])
        cache = FrameCache(root / ".ca3d-cache", root)
        assert cache.open(root / "walk" / "p0_t0.avi") is None
        assert cache.open(root / "walk" / "p0_t1.avi") is None
        assert build(root, short_side=36).written == 2

    def test_broken_videos_are_counted(self, root):
        (root / "walk" / "p0_t0.avi").write_bytes(b"no video")
        report = build(root, short_side=36)
        assert report.written == 11
        assert list(report.broken) == [root / "walk" / "p0_t0.avi"]
        assert "p0_t0.avi: not a video file" in str(report)

    def test_another_size_or_format(self, root):
        build(root, short_side=36)
        with pytest.raises(UserError, match="holds a cache of 36 pixels in jpeg"):
            build(root, short_side=48)
        with pytest.raises(UserError, match="holds a cache of 36 pixels in jpeg"):
            build(root, short_side=36, format="npy")

    def test_the_cache_is_no_class(self, root):
        build(root, short_side=36)
        assert VideoFolder(root, clip=CLIP, training=True).classes == ["jump", "walk"]

    def test_full_disk(self, root, monkeypatch):
        def full(image: np.ndarray) -> bytes:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(cache_module, "_jpeg", full)
        with pytest.raises(UserError, match="cannot be written: No space left on device"):
            build(root, short_side=36)
        assert not list((root / ".ca3d-cache").rglob("*.tmp"))
        monkeypatch.undo()
        assert build(root, short_side=36).written == 12

    @pytest.mark.parametrize(
        ("options", "name"),
        [({"format": "png"}, "format"), ({"short_side": 0}, "short_side"),
         ({"workers": 0}, "workers")],
    )  # fmt: skip
    def test_bad_arguments(self, root, options, name):
        with pytest.raises(ValueError, match=name):
            build(root, **options)

    def test_another_version(self, root):
        build(root, short_side=36)
        (root / ".ca3d-cache" / "cache.json").write_text('{"version": 99}')
        with pytest.raises(UserError, match="another version"):
            clips(root, "auto")
