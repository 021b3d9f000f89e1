"""The torchcodec path, where torchcodec and its FFmpeg libraries load."""

import sys

import numpy as np
import pytest

from ca3d.data.reader import VideoError, open_video


def loads() -> bool:
    try:
        from torchcodec._core import get_ffmpeg_library_versions
        from torchcodec.decoders import VideoDecoder  # noqa: F401

        get_ffmpeg_library_versions()
    except (ImportError, RuntimeError, OSError):
        return False
    return True


@pytest.fixture
def path(tmp_path, write_video):
    return write_video(tmp_path / "v.mp4", 40, codec="libx264", options={"g": "12", "bf": "2"})


@pytest.mark.skipif(loads(), reason="torchcodec loads here")
def test_says_what_is_missing(path):
    with pytest.raises(VideoError, match=r"torchcodec (is not installed|finds no FFmpeg)"):
        open_video(path, "torchcodec")


@pytest.mark.skipif(not loads(), reason="torchcodec does not load")
class TestFrames:
    def test_same_frames_as_pyav(self, path, numbers):
        wanted = [39, 3, 7, 100]
        with open_video(path, "torchcodec") as new, open_video(path, "av") as old:
            assert new.num_frames == old.num_frames
            assert (new.width, new.height) == (old.width, old.height)
            assert new.frames_per_second == pytest.approx(old.frames_per_second)
            assert new.duration == pytest.approx(old.duration)
            assert np.allclose(new.times(), old.times())
            assert numbers(new.frames(wanted)) == numbers(old.frames(wanted)) == [39, 3, 7, 39]
            assert numbers(new.frames_at([0.5, 9.0], 24)) == numbers(old.frames_at([0.5, 9.0], 24))
            difference = new.frames(wanted).float() - old.frames(wanted).float()
            assert difference.abs().mean() < 2

    def test_auto_takes_it_where_pyav_is_missing(self, path, monkeypatch):
        monkeypatch.setitem(sys.modules, "av", None)
        monkeypatch.delitem(sys.modules, "ca3d.data.decode_av")
        with open_video(path) as video:
            assert type(video).__name__ == "TorchCodecReader"

    def test_closed(self, path):
        with open_video(path, "torchcodec") as video:
            pass
        with pytest.raises(ValueError, match="closed"):
            video.frames([0])

    def test_not_a_video(self, tmp_path):
        (tmp_path / "noise.mp4").write_bytes(b"\0\0\0\x18ftypisom" + bytes(range(256)) * 9)
        with pytest.raises(VideoError, match=r"noise\.mp4: not a readable video file"):
            open_video(tmp_path / "noise.mp4", "torchcodec")
