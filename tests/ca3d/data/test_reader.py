import os
import shutil
import struct
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from ca3d.data import reader as reader_module
from ca3d.data.decode_av import AVReader
from ca3d.data.reader import VideoError, check_file, open_video
from ca3d.data.view import short_side_size
from ca3d.errors import UserError

# Container, codec, options: key frames every 12 frames, far apart, or everywhere; with and without
# frames out of order; with exact, rounded and missing presentation times.
KINDS = {
    "avi": (".avi", {"codec": "mpeg4"}),
    "avi-reordered": (".avi", {"codec": "mpeg4", "options": {"bf": "2"}}),
    "mp4": (".mp4", {"codec": "libx264", "options": {"g": "12", "bf": "3"}}),
    "mp4-long": (".mp4", {"codec": "libx264", "options": {"g": "250", "bf": "3"}}),
    "mp4-open": (".mp4", {"codec": "libx264", "options": {"g": "10", "x264-params": "open-gop=1"}}),
    "mkv": (".mkv", {"codec": "libx264", "options": {"g": "12", "bf": "2"}}),
    "webm": (".webm", {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "g": "16"}}),
    "ts": (".ts", {"codec": "mpeg2video", "options": {"g": "12", "bf": "2"}}),
    "mpg": (".mpg", {"codec": "mpeg2video", "options": {"g": "12"}}),
    "mov": (".mov", {"codec": "mjpeg", "pix_fmt": "yuvj420p"}),
    "flv": (".flv", {"codec": "libx264", "options": {"g": "12"}}),
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for name, (suffix, options) in KINDS.items():
        write_video(folder / f"{name}{suffix}", 60, **options)
    return folder


@pytest.fixture
def video(videos: Path) -> Path:
    return videos / "mp4-long.mp4"


@pytest.mark.parametrize("name", ["avi", "avi-reordered", "mp4", "mp4-long", "mp4-open", "mkv",
                                  "webm", "ts", "mpg", "mov", "flv"])  # fmt: skip
class TestExactFrames:
    def test_every_frame_is_the_one_asked_for(self, videos, numbers, name):
        with open_video(videos / f"{name}{KINDS[name][0]}", "av") as video:
            assert video.num_frames == 60
            assert numbers(video.frames(range(60))) == list(range(60))

    def test_random_access_equals_decoding_everything(self, videos, name):
        path = videos / f"{name}{KINDS[name][0]}"
        with av.open(str(path)) as container:
            everything = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        rng = np.random.default_rng(1)
        with open_video(path, "av") as video:
            for _ in range(12):
                wanted = rng.integers(60, size=rng.integers(1, 6)).tolist()
                for i, frame in zip(wanted, video.frames(wanted), strict=True):
                    assert np.array_equal(frame.permute(1, 2, 0).numpy(), everything[i])

    def test_times_are_those_of_the_stream(self, videos, numbers, name):
        with open_video(videos / f"{name}{KINDS[name][0]}", "av") as video:
            assert video.frames_per_second == pytest.approx(25, rel=1e-3)
            assert video.duration == pytest.approx(2.4, abs=2e-3)
            assert video.times() == pytest.approx(np.arange(60) / 25, abs=1e-3)
            # 0.04 s a frame: the middle of frame 31, its very begin, and just before it.
            assert numbers(video.frames_at([1.26, 1.24, 1.2385])) == [31, 31, 30]
            assert numbers(video.frames_at([0.0, 100.0])) == [0, 59]

    def test_thread_count_changes_nothing(self, videos, name):
        path = videos / f"{name}{KINDS[name][0]}"
        with open_video(path, threads=1) as one, open_video(path, threads=3) as three:
            wanted = [5, 7, 9, 40, 41, 59]
            assert torch.equal(one.frames(wanted), three.frames(wanted))


def test_shape_type_order_and_repetition(video, numbers):
    with open_video(video) as v:
        frames = v.frames([8, 3, 8])
        assert frames.shape == (3, 3, 48, 64)
        assert frames.dtype == torch.uint8
        assert numbers(frames) == [8, 3, 8]
        assert v.frames([]).shape[0] == 0
        assert (v.width, v.height) == (64, 48)


def test_colours_are_red_green_blue(tmp_path, write_video):
    image = np.zeros((48, 64, 3), dtype=np.uint8)
    image[..., 0] = 200
    with open_video(write_video(tmp_path / "red.avi", [image] * 4)) as video:
        red, green, blue = video.frames([1])[0].float().mean(dim=(1, 2)).tolist()
    assert red > 180
    assert green < 25
    assert blue < 25


def test_decoding_begins_at_the_key_frame_before(videos, monkeypatch):
    decoded = []
    original = AVReader._frames_of

    def counted(self, packet):
        for frame in original(self, packet):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(AVReader, "_frames_of", counted)
    with open_video(videos / "mp4.mp4", threads=1) as video:
        video.frames([50, 52])
    # Key frames at 0, 12, ..., 48: nothing before 48 is decoded.
    assert len(decoded) <= 12


def test_reading_on_does_not_seek_back(videos, monkeypatch):
    seeks = []
    original = AVReader._seek
    monkeypatch.setattr(
        AVReader, "_seek", lambda self, pts: (seeks.append(pts), original(self, pts))
    )
    with open_video(videos / "mp4-long.mp4") as video:
        for start in range(0, 60, 10):
            video.frames(range(start, start + 10))
    assert len(seeks) == 1


def test_short_side(video, numbers):
    with open_video(video) as v:
        small = v.frames(range(10), short_side=24)
        assert small.shape[2:] == (24, 32)
        assert numbers(small) == list(range(10))
        assert v.frames([0], short_side=96).shape[2:] == (96, 128)
        with pytest.raises(ValueError, match="short_side"):
            v.frames([0], short_side=0)


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [((320, 240), 112, (149, 112)), ((240, 320), 112, (112, 149)), ((64, 64), 32, (32, 32)),
     ((1000, 1), 2, (2000, 2)), ((7, 5), None, (7, 5))],
)  # fmt: skip
def test_short_side_size(size, short_side, expected):
    assert short_side_size(*size, short_side) == expected


@pytest.mark.parametrize("rotation", [0, 90, 180, -90])
@pytest.mark.parametrize("hflip", [False, True])
def test_the_cameras_rotation_is_applied(tmp_path, write_video, rotation, hflip):
    stored = np.full((48, 64, 3), 20, dtype=np.uint8)
    stored[:16, :16] = (230, 30, 30)
    stored[:16, 48:] = (30, 230, 30)
    path = write_video(
        tmp_path / "phone.mp4", [stored] * 3, codec="libx264", rotation=(rotation, hflip)
    )
    expected = np.rot90(stored, rotation // 90)
    expected = expected[:, ::-1] if hflip else expected
    with open_video(path) as video:
        assert (video.width, video.height) == expected.shape[1::-1]
        shown = video.frames([1])[0].permute(1, 2, 0).numpy()
    assert shown.shape == expected.shape
    assert np.abs(shown.astype(int) - expected).mean() < 12
    with open_video(path) as video:
        assert min(video.frames([1], short_side=24).shape[2:]) == 24


@pytest.mark.parametrize(
    ("suffix", "codec", "pix_fmt"),
    [(".mkv", "ffv1", "gray"), (".mkv", "ffv1", "gray16le"), (".mkv", "ffv1", "bgra"),
     (".mov", "qtrle", "argb"), (".mkv", "ffv1", "yuva420p"), (".mkv", "ffv1", "yuv422p10le"),
     (".mp4", "libx264", "yuv444p"), (".gif", "gif", "rgb8")],
)  # fmt: skip
def test_pixel_formats(tmp_path, write_video, numbers, suffix, codec, pix_fmt):
    path = write_video(tmp_path / f"video{suffix}", 10, codec=codec, pix_fmt=pix_fmt)
    with open_video(path) as video:
        frames = video.frames(range(10))
    assert frames.shape == (10, 3, 48, 64)
    assert numbers(frames) == list(range(10))


@pytest.mark.parametrize("size", [(33, 47), (1, 1), (17, 16)])
def test_odd_sizes(tmp_path, write_video, size):
    image = np.full((size[1], size[0], 3), 90, dtype=np.uint8)
    path = write_video(tmp_path / "odd.mkv", [image] * 3, codec="ffv1", pix_fmt="yuv444p")
    with open_video(path) as video:
        assert (video.width, video.height) == size
        assert (video.frames([2]).float() - 90).abs().max() < 4
        assert min(video.frames([0], short_side=8).shape[2:]) == 8


class TestVariableFrameRate:
    @pytest.fixture
    def path(self, tmp_path, write_video):
        # Milliseconds: ten frames at 10 a second, a gap of one second, then 50 a second.
        times = [100 * i for i in range(10)] + [2000 + 20 * i for i in range(20)]
        return write_video(
            tmp_path / "vfr.mkv", 30, codec="libx264", pts=times, time_base=Fraction(1, 1000)
        )

    def test_times(self, path, numbers):
        with open_video(path) as video:
            assert video.num_frames == 30
            assert video.times()[[0, 9, 10, 29]] == pytest.approx([0, 0.9, 2.0, 2.38])
            assert numbers(video.frames(range(30))) == list(range(30))
            # Inside the gap the last frame stays on the screen.
            assert numbers(video.frames_at([0.45, 0.95, 1.9, 2.0, 2.051])) == [4, 9, 9, 10, 12]

    def test_rate_is_the_mean(self, path):
        with open_video(path) as video:
            assert video.frames_per_second == pytest.approx(29 / 2.38)
            assert video.duration == pytest.approx(2.38 + 0.02, abs=0.03)


def test_time_starts_with_the_first_frame(tmp_path, write_video, numbers):
    path = write_video(
        tmp_path / "late.mkv", 20, codec="libx264", pts=[5000 + 40 * i for i in range(20)],
        time_base=Fraction(1, 1000),
    )  # fmt: skip
    with open_video(path) as video:
        assert video.times()[0] == 0
        assert numbers(video.frames_at([0.0, 0.2])) == [0, 5]


class TestDamagedFiles:
    def test_cut_off_avi_gives_what_is_there(self, videos, tmp_path, numbers):
        whole = (videos / "avi.avi").read_bytes()
        path = tmp_path / "cut.avi"
        begin, end = whole.index(b"movi"), whole.rindex(b"idx1")
        path.write_bytes(whole[: begin + (end - begin) * 7 // 10])
        with open_video(path) as video:
            assert 20 < video.num_frames < 60
            last = video.num_frames - 2
            assert numbers(video.frames([0, last // 2, last])) == [0, last // 2, last]

    def test_cut_off_mp4_gives_what_is_there(self, tmp_path, write_video, numbers):
        # The index in front: it names frames that the file no longer holds.
        path = write_video(
            tmp_path / "whole.mp4", 60, codec="libx264", options={"g": "12"},
            container={"movflags": "faststart"},
        )  # fmt: skip
        whole = path.read_bytes()
        begin = whole.index(b"mdat")
        path.write_bytes(whole[: begin + (len(whole) - begin) * 7 // 10])
        with open_video(path) as video:
            frames = numbers(video.frames(range(60)))
            assert numbers(video.frames([59])) == [frames[-1]]
        last = max(frames)
        assert 20 < last < 59
        assert frames[:last] == list(range(last))
        assert set(frames[last:]) <= {last - 1, last}

    def test_mp4_without_its_index(self, tmp_path, write_video):
        path = write_video(tmp_path / "unfinished.mp4", 30, codec="libx264")
        path.write_bytes(path.read_bytes()[:-600])
        with pytest.raises(VideoError, match=r"unfinished\.mp4: not a readable video file"):
            open_video(path)

    def test_holes_are_filled_with_the_frame_before(self, videos, tmp_path, numbers):
        data = bytearray((videos / "avi.avi").read_bytes())
        middle = len(data) // 2
        data[middle : middle + 400] = bytes(400)
        path = tmp_path / "hole.avi"
        path.write_bytes(data)
        with open_video(path) as video:
            frames = numbers(video.frames(range(video.num_frames)))
        assert frames[:15] == list(range(15))
        assert len(frames) == video.num_frames

    def test_header_announces_more_frames_than_there_are(self, videos, tmp_path, numbers):
        data = bytearray((videos / "avi.avi").read_bytes())
        for tag, offset in ((b"avih", 24), (b"strh", 40)):
            where = data.index(tag) + offset
            assert struct.unpack_from("<I", data, where)[0] == 60
            struct.pack_into("<I", data, where, 84)
        path = tmp_path / "lying.avi"
        path.write_bytes(data)
        with open_video(path) as video:
            assert numbers(video.frames([58, 59, 60, 83])) == [58, 59, 59, 59]

    def test_packets_that_hold_no_frame(self, videos, tmp_path, numbers):
        # XviD leaves one-byte place holders behind, so a file has more packets than frames.
        path = tmp_path / "placeholder.avi"
        source = av.open(str(videos / "avi-reordered.avi"))
        with source, av.open(str(path), "w") as output:
            stream = output.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    output.mux(packet)
            extra = av.Packet(b"\x7f")
            extra.stream, extra.pts, extra.dts = stream, 61, 61
            extra.time_base = Fraction(1, 25)
            output.mux(extra)
        with open_video(path) as video:
            assert video.num_frames == 61
            assert numbers(video.frames([10, 59, 60])) == [10, 59, 59]
            # And again, when the end has been passed already.
            assert numbers(video.frames([60])) == [59]
            assert numbers(video.frames([3])) == [3]

    def test_wrong_metadata_text(self, tmp_path, write_video, numbers):
        path = write_video(tmp_path / "title.avi", 10)
        data = path.read_bytes()
        at = data.index(b"Lavf")
        path.write_bytes(data[:at] + b"\xff\xfe\xfa\xe4" + data[at + 4 :])
        with open_video(path) as video:
            assert numbers(video.frames([4])) == [4]

    def test_no_frames(self, tmp_path, videos):
        data = (videos / "avi.avi").read_bytes()
        path = tmp_path / "header.avi"
        path.write_bytes(data[: data.index(b"movi") + 4])
        with pytest.raises(VideoError, match=r"header\.avi: (holds no frames|not a readable)"):
            open_video(path)


class TestErrors:
    def test_missing(self, tmp_path):
        with pytest.raises(VideoError, match=r"gone\.mp4: no such file"):
            open_video(tmp_path / "gone.mp4")

    def test_directory(self, tmp_path):
        with pytest.raises(VideoError, match="is a directory"):
            open_video(tmp_path)

    def test_empty(self, tmp_path):
        (tmp_path / "empty.mp4").touch()
        with pytest.raises(VideoError, match=r"empty\.mp4: the file is empty"):
            open_video(tmp_path / "empty.mp4")

    @pytest.mark.parametrize("content", [b"hello", b"\x89PNG\r\n\x1a\n" + bytes(99), bytes(5000)])
    def test_not_a_video(self, tmp_path, content):
        (tmp_path / "text.mp4").write_bytes(content)
        with pytest.raises(VideoError, match=r"text\.mp4: not a video file"):
            open_video(tmp_path / "text.mp4")

    def test_begins_like_a_video(self, tmp_path):
        rng = np.random.default_rng(0)
        (tmp_path / "noise.mp4").write_bytes(b"\0\0\0\x18ftypisom" + rng.bytes(9000))
        with pytest.raises(VideoError, match=r"noise\.mp4: "):
            open_video(tmp_path / "noise.mp4")

    def test_only_sound(self, tmp_path, write_audio):
        with pytest.raises(VideoError, match=r"song\.mp4: holds only sound"):
            open_video(write_audio(tmp_path / "song.mp4"))

    def test_pipe_is_refused_without_waiting(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.mp4")
        with pytest.raises(VideoError, match="no regular file"):
            open_video(tmp_path / "pipe.mp4")

    def test_device(self):
        with pytest.raises(VideoError, match="no regular file"):
            open_video("/dev/zero")

    def test_impossible_name(self):
        with pytest.raises(VideoError, match="cannot be read"):
            open_video("a\0b.mp4")

    def test_unknown_decoder(self, video):
        with pytest.raises(ValueError, match=r"decoder must be one of .*'opencv'"):
            open_video(video, "opencv")

    @pytest.mark.parametrize("index", [1.5, "1", True, None])
    def test_index_type(self, video, index):
        with open_video(video) as v, pytest.raises(TypeError, match="frame indices"):
            v.frames([index])

    def test_negative_index(self, video):
        with open_video(video) as v, pytest.raises(ValueError, match="-1"):
            v.frames([-1])

    @pytest.mark.parametrize("time", [-0.1, float("nan"), float("inf")])
    def test_time(self, video, time):
        with open_video(video) as v, pytest.raises(ValueError, match="seconds"):
            v.frames_at([time])

    def test_closed(self, video):
        with open_video(video) as v:
            pass
        with pytest.raises(ValueError, match="closed"):
            v.frames([0])

    def test_pyav_missing(self, video, monkeypatch):
        monkeypatch.setitem(sys.modules, "av", None)
        monkeypatch.delitem(sys.modules, "ca3d.data.decode_av")
        monkeypatch.setattr(reader_module.importlib.util, "find_spec", lambda name: None)
        for decoder in ("auto", "av"):
            with pytest.raises(VideoError, match=r'pip install "ca3d-kernels\[app\]"'):
                open_video(video, decoder)

    def test_every_error_is_for_the_user(self):
        assert issubclass(VideoError, UserError)


@pytest.mark.parametrize(
    "name", ["a:b.mp4", "http:x.mp4", "100%d.mp4", "ü ö.mp4", "concat:a|b.avi"]
)
def test_odd_names_are_files(video, tmp_path, monkeypatch, numbers, name):
    shutil.copy(video, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    with open_video(name) as v:
        assert numbers(v.frames([7])) == [7]


@pytest.mark.parametrize("suffix", [kind[0] for kind in KINDS.values()])
def test_every_container_passes_the_first_look(videos, suffix):
    for path in videos.glob(f"*{suffix}"):
        assert check_file(path) == path


def test_closing_frees_the_decoders_threads(video):
    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    before = threads()
    with open_video(video) as v:
        v.frames([3, 30], short_side=24)
        assert threads() == before
    v = open_video(video, threads=4)
    v.frames([3, 30])
    assert threads() > before
    v.close()
    assert threads() == before
