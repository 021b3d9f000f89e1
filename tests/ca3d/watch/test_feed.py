"""The decoder in its own process: it may die, hang or grow, and the program goes on."""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rtsp_camera import RtspCamera, encoded
from tiny_videos import bar_video, write_8k, write_any

from ca3d.watch.credentials import Credentials
from ca3d.watch.feed import Feed
from ca3d.watch.messages import Frame, Notice
from ca3d.watch.process import DecoderProcess
from ca3d.watch.request import Request

QUICK = (0.05,)


def request(source: Path | str, **options) -> Request:
    fields = {"kind": "file", "resize": 32, "size": 32, "stride": 1, "frames_per_second": 10.0}
    return Request(**{**fields, "address": str(source), "timeout": 5.0, **options})


def kinds(items):
    return [item.kind for item in items if isinstance(item, Notice)]


def test_frames_cross_the_process_boundary_unchanged(clip_file):
    from ca3d.watch.decoder import read_frames

    here = [m.pixels for m in read_frames(request(clip_file)) if isinstance(m, Frame)]
    with Feed(request(clip_file)) as feed:
        there = [item.pixels for item in feed if isinstance(item, Frame)]
    assert np.array_equal(np.stack(here), np.stack(there))


@pytest.mark.parametrize("kind", ["file", "rtsp"])
def test_time_goes_on_when_the_clock_of_a_source_jumps_back(kind):
    feed = Feed(request("a", kind=kind))
    feed._began, feed._offset = time.monotonic(), 0.0 if kind == "file" else None
    frame = Frame(0.0, 0.0, np.zeros((2, 2, 3), dtype=np.uint8))
    for seconds in (5.0, 5.1, 0.5, 0.6):
        if seconds == 0.5:
            feed._hand_on(Notice("gap", values={"start": 5.1, "seconds": -4.6}))
        feed._hand_on(replace(frame, time=seconds))
    items = [feed.buffer.get() for _ in range(5)]
    times = [item.time for item in items if isinstance(item, Frame)]
    assert times == sorted(times)
    assert times[1] - times[0] == pytest.approx(0.1)
    assert times[3] - times[2] == pytest.approx(0.1)
    (gap,) = (item for item in items if isinstance(item, Notice) and item.kind == "gap")
    assert gap.values["start"] >= times[1]


def test_a_decoder_that_is_killed_is_replaced(tmp_path):
    """The new one goes on a second behind the place, and a `lost` stands in between."""
    path = tmp_path / "a.avi"
    write_any(path, bar_video("up", 0, 400), codec="mpeg4", pix_fmt="yuv420p", g="5")
    with Feed(request(path), capacity=4) as feed:
        items = []
        for item in feed:
            items.append(item)
            if len(items) == 50:
                os.kill(feed.decoder_pid, signal.SIGKILL)
    assert kinds(items).count("lost") == 1
    assert kinds(items)[-1] == "end"
    lost = next(item for item in items if isinstance(item, Notice) and item.kind == "lost")
    assert "killed by SIGKILL" in lost.text
    times = [item.time for item in items if isinstance(item, Frame)]
    assert times == sorted(times)
    assert max(np.diff(times)) == pytest.approx(1.0, abs=0.25)
    assert times[-1] == pytest.approx(39.9, abs=0.11)


def test_a_decoder_that_always_dies_is_given_up(tmp_path, clip_file, monkeypatch):
    monkeypatch.setattr(DecoderProcess, "_start", _dying(DecoderProcess._start))
    with Feed(request(clip_file)) as feed:
        items = list(feed)
    assert kinds(items)[-1] == "failed"
    assert "giving up" in items[-1].text


def _dying(start):
    def start_and_kill(self):
        process = start(self)
        process.kill()
        return process

    return start_and_kill


def test_a_decoder_that_hangs_is_killed(tmp_path, clip_file):
    process = DecoderProcess(request(clip_file), silence=1.0)

    def stop_it(message):
        if isinstance(message, Frame) and process.pid is not None:
            os.kill(process.pid, signal.SIGSTOP)

    last = process.run(stop_it)
    assert last.kind in ("lost", "end")
    if last.kind == "lost":
        assert "nothing came for 1 s" in last.text
    assert not Path(f"/proc/{process.pid}").exists()


def test_frames_too_large_for_the_memory_limit(tmp_path):
    """A small file whose frames are huge; with more memory it is read."""
    path = write_8k(tmp_path / "8k.mkv")
    last = DecoderProcess(request(path, memory_mb=32)).run(lambda message: None)
    assert last.kind == "failed"
    assert "need more than the 32 MB" in last.text
    seen = []
    assert DecoderProcess(request(path)).run(seen.append).kind == "end"
    assert any(isinstance(message, Frame) for message in seen)


def test_a_lost_camera_is_found_again():
    small, large = bar_video("up", 0, 12), np.repeat(np.repeat(bar_video("up", 0, 12), 2, 1), 2, 2)
    with RtspCamera(encoded(small), encoded(large), user_password="ann:S3cr3tWord") as camera:
        wanted = request(camera.url, kind="rtsp", credentials=Credentials("ann", "S3cr3tWord"))
        with Feed(wanted, capacity=100, back_off=QUICK) as feed:
            items = []
            for item in feed:
                items.append(item)
                if kinds(items).count("lost") == 3:
                    break
    sizes = [
        item.values["width"]
        for item in items
        if isinstance(item, Notice) and item.kind == "resized"
    ]
    assert sizes[:2] == [32, 64]
    times = [item.time for item in items if isinstance(item, Frame)]
    assert len(times) > 25
    assert times == sorted(times)
    assert "S3cr3tWord" not in repr(items)


def test_an_unreachable_camera_is_tried_so_often():
    with Feed(request("rtsp://127.0.0.1:1/a", kind="rtsp"), attempts=2, back_off=QUICK) as feed:
        items = list(feed)
    assert kinds(items) == ["lost", "lost", "failed"]
    assert [item.values.get("wait") for item in items] == [0.05, 0.05, None]
    assert "nothing listens there" in items[-1].text
    assert "tried 3 times" in items[-1].text


def test_the_decoder_ends_with_its_parent(clip_file):
    process = DecoderProcess(request(clip_file, paced=True))
    child = process._start()
    assert child.stdin is not None
    assert child.poll() is None
    child.stdin.close()
    assert child.wait(timeout=60) == 0
    for stream in (child.stdout, child.stderr):
        assert stream is not None
        stream.close()


def test_credentials_are_in_no_argument_and_no_variable(monkeypatch):
    monkeypatch.setenv("CA3D_CAMERA_PASSWORD", "S3cr3tWord")
    with RtspCamera(encoded(bar_video("up", 0, 200)), user_password="ann:S3cr3tWord") as camera:
        wanted = request(camera.url, kind="rtsp", credentials=Credentials("ann", "S3cr3tWord"))
        with Feed(wanted) as feed:
            for item in feed:
                if isinstance(item, Frame):
                    break
            for name in ("cmdline", "environ"):
                assert b"S3cr3tWord" not in Path(f"/proc/{feed.decoder_pid}/{name}").read_bytes()


def test_the_process_may_not_write_files_nor_dump_core(clip_file):
    with Feed(request(clip_file, paced=True)) as feed:
        for item in feed:
            if isinstance(item, Frame):
                break
        limits = Path(f"/proc/{feed.decoder_pid}/limits").read_text()
    lines = {line[:25].strip(): line[25:].split()[0] for line in limits.splitlines()[1:]}
    assert lines["Max core file size"] == lines["Max file size"] == "0"
    assert 1024 << 20 < int(lines["Max data size"]) < 1536 << 20
    assert lines["Max address space"] != "unlimited"


def test_leaving_ends_the_process(clip_file):
    with Feed(request(clip_file, paced=True)) as feed:
        next(iter(feed))
        pid = feed.decoder_pid
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(f"/proc/{pid}").exists()
