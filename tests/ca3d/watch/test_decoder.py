"""Every kind of source that can be wrong gets a clear line, and the program goes on."""

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from rtsp_camera import RtspCamera, encoded
from tiny_videos import SIDE, bar_video, write_8k, write_any, write_video

from ca3d.data.reader import open_video
from ca3d.data.sampling import ClipSpec
from ca3d.data.transforms import evaluation_crops
from ca3d.data.view import View
from ca3d.watch.credentials import Credentials
from ca3d.watch.decoder import RTSP_OPTIONS, read_frames
from ca3d.watch.messages import Frame, Notice
from ca3d.watch.request import Request

SECRET = "S3cr3tWord"


def read(path: Path | str, **options):
    request = Request(
        **{
            "kind": "file",
            "address": str(path),
            "resize": 32,
            "size": 32,
            "stride": 1,
            "frames_per_second": 10.0,
            "timeout": 5.0,
            **options,
        }
    )
    messages = list(read_frames(request))
    frames = [m for m in messages if isinstance(m, Frame)]
    notices = [m for m in messages if isinstance(m, Notice)]
    assert notices[-1].last
    return frames, notices


def test_a_file_from_its_begin_to_its_end(clip_file):
    frames, notices = read(clip_file)
    assert [n.kind for n in notices] == ["opened", "resized", "end"]
    assert [round(f.time, 3) for f in frames] == [round(0.1 * i, 3) for i in range(40)]
    assert notices[1].values == {"width": SIDE, "height": SIDE, "region": [0, 0, SIDE, SIDE]}


@pytest.mark.parametrize("view", ["center", "letterbox", "roi 8,4,40,40", "roi 0.5,0,0.25,0.25"])
def test_the_model_sees_what_it_was_trained_on(tmp_path, view):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (6, 48, 80, 3), dtype=np.uint8)
    path = write_any(tmp_path / "a.avi", images, codec="mpeg4", pix_fmt="yuv420p")
    frames, _ = read(path, view=view, frames_per_second=10.0)
    spec = ClipSpec(6, 1, size=32, resize=32, view=View.parse(view))
    with open_video(path) as video:
        clip = spec.read(video, spec.sample(video.num_frames, video.frames_per_second), 32)
    expected = evaluation_crops(clip, 32)[0][0].permute(0, 2, 3, 1)
    seen = torch.from_numpy(np.stack([f.pixels for f in frames]))
    if view == "roi 0.5,0,0.25,0.25":
        # Enlarged by two libraries, which round differently.
        assert (seen.float() - expected.float()).abs().mean() < 4
    else:
        assert torch.equal(seen, expected)


def test_nothing_listens():
    frames, notices = read(
        "rtsp://127.0.0.1:1/stream", kind="rtsp", credentials=Credentials("ann", SECRET)
    )
    assert not frames
    assert notices[0].kind == "lost"
    assert "nothing listens there" in notices[0].text
    assert "ann" not in notices[0].text


def test_pyav_itself_shows_the_password():
    """The control: why messages are our own, and redacted."""
    with pytest.raises(av.error.FFmpegError, match=SECRET):
        av.open(f"rtsp://ann:{SECRET}@127.0.0.1:1/stream", format="rtsp")


def test_no_such_webcam():
    _, notices = read("/dev/video97", kind="webcam")
    assert notices[0].kind == "lost"
    assert "no such webcam" in notices[0].text


def test_a_camera_with_a_password():
    with RtspCamera(encoded(bar_video("up", 0, 12)), user_password=f"ann:{SECRET}") as camera:
        options = {"kind": "rtsp", "credentials": Credentials("ann", SECRET)}
        frames, notices = read(camera.url, **options)
        assert len(frames) >= 10
        assert notices[-1].kind == "lost"
        assert notices[-1].text.endswith("the stream ended")
        for wrong in (Credentials("ann", "other"), Credentials()):
            frames, notices = read(camera.url, kind="rtsp", credentials=wrong)
            assert [n.kind for n in notices] == ["failed"]
            assert "refuses the user name or password" in notices[0].text
            assert SECRET not in notices[0].text


def test_a_camera_that_sends_us_elsewhere_is_refused():
    pictures = encoded(bar_video("up", 0, 12))
    with RtspCamera(pictures, host="127.0.0.2") as other:
        with RtspCamera(pictures, location=other.url) as camera:
            frames, notices = read(camera.url, kind="rtsp")
        assert not frames
        assert notices[-1].kind == "failed"
        assert "sends us on to 127.0.0.2" in notices[-1].text
        assert other.plays == 0 or not frames


def test_only_the_camera_s_protocols_are_open():
    assert set(RTSP_OPTIONS["tcp"]["protocol_whitelist"].split(",")) == {"rtsp", "tcp"}
    udp = set(RTSP_OPTIONS["udp"]["protocol_whitelist"].split(","))
    assert udp == {"rtsp", "tcp", "udp", "rtp"}


def test_a_playlist_opens_nothing(tmp_path, clip_file):
    path = tmp_path / "list.avi"
    path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{clip_file}\n#EXT-X-ENDLIST\n")
    frames, notices = read(path)
    assert not frames
    assert notices[-1].kind == "failed"


def test_an_unsupported_codec(tmp_path, clip_file):
    data = clip_file.read_bytes().replace(b"FMP4", b"ZZZZ")
    path = tmp_path / "foreign.avi"
    path.write_bytes(data)
    frames, notices = read(path)
    assert not frames
    assert notices[-1].kind == "failed"
    assert "codec" in notices[-1].text


def test_zero_frames(tmp_path):
    path = tmp_path / "none.mp4"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("mpeg4", rate=10)
        stream.height = stream.width = 32
        stream.pix_fmt = "yuv420p"
        output.start_encoding()
    frames, notices = read(path)
    assert not frames
    assert notices[-1].kind == "failed"


def test_only_sound(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("aac", rate=16000)
        for _ in range(4):
            sound = np.zeros((1, 1024), dtype=np.float32)
            frame = av.AudioFrame.from_ndarray(sound, format="fltp", layout="mono")
            frame.rate = 16000
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    _, notices = read(path)
    assert "holds only sound" in notices[-1].text


def test_a_variable_frame_rate(tmp_path, make_frames):
    """Frames 20 to 140 ms apart, then a pause of a second: even points, and one gap."""
    rng = np.random.default_rng(0)
    steps = rng.integers(20, 140, 39)
    steps[20] = 1000
    pts = [0, *np.cumsum(steps).tolist()]
    path = write_any(
        tmp_path / "a.mkv", make_frames(40), codec="mpeg4", pix_fmt="yuv420p", pts=pts, rate=1000
    )
    frames, notices = read(path)
    gaps = [n for n in notices if n.kind == "gap"]
    assert [g.values["start"] for g in gaps] == [pytest.approx(pts[20] / 1000, abs=2e-3)]
    times = np.asarray([f.time for f in frames])
    apart = np.diff(times)
    broken = np.argmax(apart)
    assert apart[broken] > 0.9
    assert np.allclose(np.delete(apart, broken), 0.1, atol=1e-3)


def test_portrait(tmp_path):
    images = np.zeros((4, 96, 32, 3), dtype=np.uint8)
    images[:, 32:64] = 200
    path = write_any(tmp_path / "a.avi", images, codec="mpeg4", pix_fmt="yuv420p")
    frames, notices = read(path)
    assert notices[1].values["region"] == [0, 32, 32, 32]
    assert frames[0].pixels[2:-2].min() > 150


@pytest.mark.parametrize(
    ("suffix", "codec", "pix_fmt"),
    [
        ("mkv", "ffv1", "gray"),
        ("mkv", "ffv1", "bgra"),
        ("mkv", "ffv1", "gray16le"),
        ("mkv", "ffv1", "yuv444p10le"),
        ("mov", "png", "rgba"),
        ("mov", "qtrle", "argb"),
        ("gif", "gif", "rgb8"),
    ],
)
def test_alpha_and_grey(tmp_path, suffix, codec, pix_fmt):
    images = np.full((4, 48, 48, 3), 40, dtype=np.uint8)
    images[:, 12:36, 12:36] = 200
    path = write_any(tmp_path / f"a.{suffix}", images, codec=codec, pix_fmt=pix_fmt)
    frames, notices = read(path)
    assert notices[-1].kind == "end"
    assert len(frames) >= 4
    for frame in frames:
        assert frame.pixels.shape == (32, 32, 3)
        assert abs(int(frame.pixels[16, 16].mean()) - 200) < 30
        assert abs(int(frame.pixels[2, 2].mean()) - 40) < 30


def test_8k(tmp_path):
    path = write_8k(tmp_path / "8k.avi")
    frames, notices = read(path, view="letterbox")
    assert notices[1].values["width"] == 7680
    assert frames[0].pixels[16, 8].max() < 40
    assert frames[0].pixels[16, 24].min() > 180
    assert frames[0].pixels[2].max() < 5


def test_another_size_half_way(tmp_path):
    """A transport stream of two sizes: the rectangle keeps its share of the frame."""
    small = np.zeros((10, 48, 64, 3), dtype=np.uint8)
    small[:, 24:, 32:] = 200
    large = np.zeros((10, 96, 128, 3), dtype=np.uint8)
    large[:, 48:, 64:] = 200
    parts = []
    for name, images in (("a", small), ("b", large)):
        path = tmp_path / f"{name}.mpg"
        write_any(path, images, codec="mpeg2video", pix_fmt="yuv420p", rate=25, g="1", bf="0")
        parts.append(path.read_bytes())
    path = tmp_path / "both.mpg"
    path.write_bytes(b"".join(parts))
    frames, notices = read(path, view="roi 32,24,32,24", frames_per_second=None)
    sizes = [n.values for n in notices if n.kind == "resized"]
    assert [s["width"] for s in sizes] == [64, 128]
    assert [s["region"] for s in sizes] == [[32, 24, 32, 24], [64, 48, 64, 48]]
    assert len(frames) > 15
    assert min(f.pixels[4:-4, 4:-4].min() for f in frames) > 150


def test_a_rectangle_outside_of_the_frames(clip_file):
    _, notices = read(clip_file, view="roi 0,0,100,100")
    assert notices[-1].kind == "failed"
    assert "beyond the frame of 32x32" in notices[-1].text


def test_damaged_packets(tmp_path):
    rng = np.random.default_rng(3)
    images = rng.integers(0, 255, (60, 64, 64, 3), dtype=np.uint8)
    path = write_any(tmp_path / "a.avi", images, codec="mpeg4", pix_fmt="yuv420p", g="5")
    data = bytearray(path.read_bytes())
    begin = data.index(b"movi")
    for place in rng.integers(begin, len(data) - 4000, 300):
        data[place] ^= 0xFF
    path.write_bytes(data)
    frames, notices = read(path)
    assert notices[-1].kind == "end"
    assert len(frames) > 20


def test_a_file_that_is_cut_off(tmp_path, clip_file):
    path = tmp_path / "half.avi"
    data = clip_file.read_bytes()
    path.write_bytes(data[: (data.index(b"movi") + data.index(b"idx1")) // 2])
    frames, notices = read(path)
    assert 5 < len(frames) < 40
    assert notices[-1].kind == "end"


def test_reading_goes_on_behind_a_place(clip_file):
    whole, _ = read(clip_file)
    frames, notices = read(clip_file, begin=2.0)
    assert frames[0].time == pytest.approx(2.0, abs=0.06)
    assert np.array_equal(frames[-1].pixels, whole[-1].pixels)
    _, notices = read(clip_file, begin=60.0)
    assert notices[-1].kind == "end"


def test_a_paced_file_takes_as_long_as_it_plays(tmp_path):
    """By the clock that the frames carry, not by a measured time."""
    write_video(tmp_path / "a.avi", bar_video("up", 0, 6), 10)
    frames, _ = read(tmp_path / "a.avi", paced=True)
    apart = np.diff([f.clock for f in frames])
    assert np.allclose(apart, 0.1, atol=1e-6)
