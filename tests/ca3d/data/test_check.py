import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from ca3d.data.check import check
from ca3d.data.sampling import ClipSpec
from ca3d.data.splits import split_dataset
from ca3d.errors import UserError

CLIP = ClipSpec(frames=8, stride=2, size=32, resize=36)
SHARES = {"train": 0.34, "val": 0.33, "test": 0.33}


@pytest.fixture
def root(dataset, tmp_path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "videos"))


def test_a_sound_data_set(root):
    split_dataset(root, SHARES, group=r"(p\d)_")
    seen = []
    report = check(root, clip=CLIP, progress=lambda *now: seen.append(now[:2]))
    assert report.ok
    assert report.exit_status == 0
    assert report.classes == {"jump": 6, "walk": 6}
    assert report.splits["val"] == {"jump": 2, "walk": 2}
    assert report.ranges()["frames"] == (24, 28, 32)
    assert report.ranges()["width"] == (64, 64, 64)
    assert report.clips_per_second is not None
    assert report.clips_per_second > 0
    assert sorted(seen) == [(i, 12) for i in range(1, 13)]
    assert "no faults found" in str(report)


def test_everything_that_can_be_wrong(root, write_video):
    split_dataset(root, SHARES, group=r"(p\d)_")
    broken = root / "walk" / "p1_t0.avi"
    broken.write_bytes(broken.read_bytes()[:200])
    gone = root / "jump" / "p2_t1.avi"
    gone.unlink()
    write_video(root / "walk" / "p0_t0.avi", 5)
    train = (root / "train.csv").read_text().splitlines()
    val = (root / "val.csv").read_text()
    (root / "val.csv").write_text(val + (train[1] + "\n") * 2 + "sit/a.avi,sit,p9\n")
    write_video(root / "sit" / "a.avi", 20)
    report = check(root, clip=CLIP)
    assert not report.ok
    assert report.exit_status == 1
    assert report.missing == [gone]
    assert report.repeated == [root / train[1].split(",")[0]]
    assert list(report.unreadable) == [broken]
    assert report.short == [root / "walk" / "p0_t0.avi"]
    assert ("train", "val") in {o[:2] for o in report.overlaps}
    text = str(report)
    for part in ("1 listed videos are missing", "p1_t0.avi", "lie in two splits", "will be looped",
                 "1 videos are listed more than once",
                 "no videos of: sit", "FAULT", "groups lie in two splits"):  # fmt: skip
        assert part in text


def test_quick_decodes_no_clips(root):
    report = check(root, clip=CLIP, quick=True)
    assert report.clips_per_second is None
    assert report.ranges()["height"] == (48, 48, 48)


def test_single_class(root):
    shutil.rmtree(root / "walk")
    assert "a single class" in check(root, clip=CLIP).faults[0]


def test_notes_on_mirroring_and_rates(root, write_video):
    write_video(root / "turn_left" / "a.avi", 30, rate=10)
    notes = " ".join(check(root, clip=CLIP).notes)
    assert "no mirroring in training: the class name 'turn_left'" in notes
    assert "frame rates differ" in notes
    (root / "dataset.json").write_text('{"horizontal_flip": true}')
    assert "dataset.json allows mirroring" in " ".join(check(root, clip=CLIP).notes)


def test_json_and_rich(root):
    report = check(root, clip=CLIP)
    content = json.loads(json.dumps(report.to_dict()))
    assert content["ok"] is True
    assert content["videos"] == 12
    out = io.StringIO()
    Console(file=out, width=200).print(report)
    for line in ("frames per second", "reading", "no faults found"):
        assert line in out.getvalue()


def test_bad_arguments(root, tmp_path):
    with pytest.raises(ValueError, match="workers"):
        check(root, workers=0)
    with pytest.raises(UserError, match="no such folder"):
        check(tmp_path / "nowhere")
