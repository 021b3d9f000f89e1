import os
import time

import numpy as np
import pytest

from ca3d.errors import UserError
from ca3d.watch.clips import ClipSaver
from ca3d.watch.events import Event


def old(folder, name, days, size=1000):
    file = folder / name
    file.write_bytes(b"x" * size)
    when = time.time() - 86400 * days
    os.utime(file, (when, when))
    return file


def ours(number):
    return f"ca3d-20200101-120000-77-{number:04d}-fall.avi"


def test_old_clips_go_and_other_files_stay(tmp_path):
    others = [old(tmp_path, name, 400) for name in ("holiday.avi", "ca3d-holiday.avi")]
    (tmp_path / ours(3)).mkdir()
    os.utime(tmp_path / ours(3), (0, 0))
    gone = old(tmp_path, ours(1), 8)
    kept = old(tmp_path, ours(2), 6)
    ClipSaver(tmp_path, keep_days=7)
    assert all(other.exists() for other in [*others, tmp_path / ours(3)])
    assert kept.exists()
    assert not gone.exists()


def test_the_oldest_go_first_when_there_is_no_room(tmp_path):
    files = [old(tmp_path, ours(i), 10 - i, 40_000) for i in range(5)]
    ClipSaver(tmp_path, max_gb=0.0001)
    assert [file.exists() for file in files] == [False, False, False, True, True]


def test_a_clip_that_is_too_large_alone_is_not_named(tmp_path):
    saver = ClipSaver(tmp_path, max_gb=1e-9)
    saver.begin(period=0.1)
    for number in range(30):
        saver.add(0.1 * number, np.zeros((32, 32, 3), dtype=np.uint8))
    assert saver.save(Event("fall", 1.0, 2.0, 0.9, 1.5)) is None
    assert list(tmp_path.iterdir()) == []


def test_without_bounds_nothing_is_deleted(tmp_path):
    file = old(tmp_path, ours(1), 4000)
    assert ClipSaver(tmp_path).tidy() == []
    assert file.exists()


def test_a_clip_shows_the_event_with_a_second_on_both_sides(tmp_path):
    from ca3d.data.reader import open_video

    saver = ClipSaver(tmp_path)
    saver.begin(period=0.1)
    for number in range(100):
        saver.add(0.1 * number, np.full((33, 33, 3), 2 * number, dtype=np.uint8))
    path = saver.save(Event("a/b c", 3.0, 5.0, 0.9, 4.0))
    assert path.name.endswith("-a_b_c.avi")
    with open_video(path) as video:
        assert video.num_frames == 41
        frames = video.frames([0, 40]).float().mean(dim=(1, 2, 3))
    assert frames.tolist() == pytest.approx([40, 120], abs=4)


def test_what_is_remembered_is_bounded(tmp_path):
    saver = ClipSaver(tmp_path)
    saver.begin(period=0.1)
    for number in range(1000):
        saver.add(0.1 * number, np.zeros((32, 32, 3), dtype=np.uint8))
    assert saver.save(Event("fall", 0.0, 2.0, 0.9, 1.0)) is None
    assert len(saver._frames) < 330


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--save-clips"):
        ClipSaver(tmp_path / "file" / "clips")
