"""Long runs: memory stays, frames are dropped rather than late, signals end it."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny_videos import bar_video, write_video

from ca3d import weights
from ca3d.watch.calibration import Calibration
from ca3d.watch.classifier import Classifier
from ca3d.watch.display import Display
from ca3d.watch.events import EventDetector
from ca3d.watch.feed import Feed
from ca3d.watch.records import EventLog
from ca3d.watch.request import Request
from ca3d.watch.statistics import resident_mb
from ca3d.watch.watcher import Watcher


def watcher(feed: Feed, model_file: Path, kind: type[Classifier] = Classifier) -> Watcher:
    model, info = weights.load(model_file)
    calibration = Calibration.default(len(info.classes))
    detector = EventDetector(info.classes, calibration)
    return Watcher(feed, kind(model, info, 4), detector, EventLog(), Display(io.StringIO()))


def request(path: Path, **options) -> Request:
    fields = {"resize": 32, "size": 32, "stride": 1, "frames_per_second": 10.0}
    return Request("file", str(path), **{**fields, **options})


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length_of_a_file(tmp_path, model_file):
    """Ten minutes of video: the second half takes no more memory than the first."""
    path = tmp_path / "long.avi"
    write_video(path, np.tile(bar_video("up", 0, 600), (10, 1, 1, 1)))
    own, decoder = [], []
    with Feed(request(path)) as feed:
        watching = watcher(feed, model_file)
        count = watching._count

        def measured() -> None:
            count()
            if watching.statistics.frames % 100 == 0:
                own.append(resident_mb())
                decoder.append(resident_mb(feed.decoder_pid))

        watching._count = measured  # type: ignore[method-assign]
        watching.run()
    assert watching.failure == ""
    assert watching.statistics.frames == 6000
    assert watching.statistics.windows == (6000 - 8) // 4 + 1
    assert watching.statistics.dropped == watching.statistics.gaps == 0
    for memory in (own, decoder):
        half = len(memory) // 2
        # The decoder may already have gone at the last measurement.
        assert max(memory[half:]) - max(memory[:half]) < 5


class Slow(Classifier):
    """A model that takes half a second for a window, of which two or three come in that time."""

    def push(self, picture):
        logits = super().push(picture)
        if logits is not None:
            time.sleep(0.5)
        return logits


def test_a_model_that_is_too_slow_drops_frames_and_goes_on(tmp_path, model_file):
    path = tmp_path / "fast.avi"
    write_video(path, bar_video("up", 0, 160), 20)
    with Feed(request(path, frames_per_second=20.0, paced=True), capacity=8) as feed:
        watching = watcher(feed, model_file, Slow)
        watching.run()
    statistics = watching.statistics
    assert watching.failure == ""
    assert statistics.dropped > 20
    assert statistics.frames + statistics.dropped == 160
    assert statistics.gaps >= 1
    assert statistics.windows >= 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_program_and_its_decoder(tmp_path, model_file, number):
    path = tmp_path / "long.avi"
    write_video(path, bar_video("up", 0, 600))
    command = [sys.executable, "-m", "ca3d", "watch", str(path), "--weights", str(model_file)]
    process = subprocess.Popen(
        [*command, "--realtime"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "the model sees 32x32" in line:
            break
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    threads = Path(f"/proc/{process.pid}/task").iterdir()
    decoders = [int(pid) for t in threads for pid in (t / "children").read_text().split()]
    assert children.exists()
    assert decoders
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in err
    assert not any(Path(f"/proc/{pid}").exists() for pid in decoders)
