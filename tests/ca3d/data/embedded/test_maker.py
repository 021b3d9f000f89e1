import csv
import hashlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from ca3d.data import embedded
from ca3d.data.embedded.intervals import INTERVALS, SPLITS, YAW, draw
from ca3d.data.embedded.motion_order import SPRITE_INTERVALS
from ca3d.data.embedded.recipe import HONESTY, Recipe
from ca3d.data.embedded.worker import Job, to_json
from ca3d.errors import UserError
from tests.ca3d.data.embedded.conftest import CLIPS

TINY = {"train": 15, "val": 0, "test": 0}


def digest(folder: Path) -> dict[str, str]:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as handle:
        return list(csv.DictReader(handle))


def decode(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_names_and_descriptions() -> None:
    assert embedded.names() == [
        "mocap15",
        "mocap30",
        "mocap15-untrimmed",
        "mocap30-untrimmed",
        "motion-order",
    ]
    for name in ("mocap15", "mocap30"):
        assert HONESTY in embedded.describe(name)
    assert HONESTY.startswith("rendered figures driven by motion capture, one performer")
    assert HONESTY.endswith("never over people")
    with pytest.raises(ValueError, match=r"name is 'kinetics', expected one of 'mocap15'"):
        embedded.describe("kinetics")


def test_every_file_has_the_same_length_rate_size_codec_and_bytes(made: Path) -> None:
    seen = set()
    for file in made.glob("*/*.avi"):
        with av.open(str(file)) as container:
            stream = container.streams.video[0]
            context = stream.codec_context
            frames = sum(1 for _ in container.decode(video=0))
            seen.add(
                (
                    *(frames, stream.frames, stream.average_rate, stream.duration),
                    *(context.name, context.width, context.height, context.pix_fmt),
                    file.stat().st_size,
                )
            )
    assert len(seen) == 1
    assert seen.pop()[:2] == (8, 8)


def test_split_files_and_folders_agree(made: Path) -> None:
    classes = Recipe("mocap30", 32, 8, 16, 0.0, 0).classes
    assert sorted(p.name for p in made.iterdir() if p.is_dir()) == sorted(classes)
    listed = []
    for split in SPLITS:
        table = rows(made / f"{split}.csv")
        assert len(table) == CLIPS[split]
        assert all(row["path"].split("/")[0] == row["label"] for row in table)
        counts = [sum(row["label"] == name for row in table) for name in classes]
        assert set(counts) == {CLIPS[split] // 30}
        listed += [row["path"] for row in table]
    assert len(listed) == len(set(listed))
    assert sorted(listed) == sorted(str(p.relative_to(made)) for p in made.glob("*/*.avi"))
    about = json.loads((made / "dataset.json").read_text())
    assert about["classes"] == list(classes)
    assert about["horizontal_flip"] is False
    assert about["reverse"] is False
    assert about["frames_per_second"] == 16
    assert HONESTY in about["description"]
    assert HONESTY in about["trained_on"]


def test_splits_draw_from_the_named_disjoint_intervals(made: Path) -> None:
    about = json.loads((made / "dataset.json").read_text())
    table = rows(made / "clips.csv")
    for quantity in ("yaw", "tempo", "leg_length", "arm_length", "build"):
        assert quantity in about["intervals"]
    for row, (quantity, splits) in itertools.product(table, about["intervals"].items()):
        # Angles went through radians and back: that costs the last digits.
        inside = [low - 1e-9 <= float(row[quantity]) < high for low, high in splits[row["split"]]]
        assert any(inside), (quantity, row)


@pytest.mark.parametrize("table", [INTERVALS, SPRITE_INTERVALS, YAW])
def test_intervals_are_disjoint(
    table: dict[str, dict[str, tuple[tuple[float, float], ...]]],
) -> None:
    for splits in table.values():
        assert set(splits) == set(SPLITS)
        ordered = sorted(itertools.chain.from_iterable(splits.values()))
        assert all(low < high for low, high in ordered)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(ordered))


def test_draw_is_uniform_over_all_intervals() -> None:
    table = {"x": {"train": ((0.0, 1.0), (5.0, 8.0))}}
    rng = np.random.default_rng(0)
    values = np.array([draw(rng, "x", "train", table) for _ in range(4000)])
    assert (((values >= 0) & (values < 1)) | ((values >= 5) & (values < 8))).all()
    assert (values < 1).mean() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("name", ["mocap15", "motion-order"])
def test_the_number_of_workers_changes_nothing(name: str, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    options: dict[str, Any] = {
        "size": {"train": 17, "val": 2, "test": 3},
        "frames": 16,
        "resolution": 32,
        "clutter": 0.3,
    }
    folders = [
        embedded.make(
            name,
            tmp_path / str(workers),
            workers=workers,
            progress=lambda done, total: calls.append((done, total)),
            **options,
        )
        for workers in (1, 3)
    ]
    assert digest(folders[0]) == digest(folders[1])
    assert calls == [(i + 1, 22) for i in range(22)] * 2
    other = embedded.make(name, tmp_path / "other", workers=1, seed=1, **options)
    different = {k for k, v in digest(other).items() if digest(folders[0])[k] != v}
    assert sum(path.endswith(".avi") for path in different) == 22


def test_a_clip_depends_on_seed_split_and_index_only() -> None:
    recipe = Recipe("mocap30", 32, 4, 16, 0.0, 3)
    video, varied = recipe.render("val", 11)
    again, _ = recipe.render("val", 11)
    np.testing.assert_array_equal(video, again)
    assert not np.array_equal(video, recipe.render("val", 41)[0])
    assert not np.array_equal(video, recipe.render("test", 11)[0])
    assert varied["tempo"] != recipe.render("val", 41)[1]["tempo"]


def test_decoded_videos_show_what_was_rendered(made: Path) -> None:
    recipe = Recipe("mocap30", 32, 8, 16, 0.0, 5)
    row = rows(made / "train.csv")[7]
    video, _ = recipe.render("train", 7)
    difference = decode(made / row["path"]).astype(float) - video
    # Limits of 4:2:0 colour at 32 pixels; brightness is much closer.
    assert 20 * np.log10(255 / np.sqrt((difference**2).mean())) > 26
    luma = difference @ [0.299, 0.587, 0.114]
    assert 20 * np.log10(255 / np.sqrt((luma**2).mean())) > 33


def test_h264(tmp_path: Path) -> None:
    folder = embedded.make(
        "mocap15", tmp_path / "h", size=TINY, codec="h264", workers=1, frames=4, resolution=32
    )
    files = sorted(folder.glob("*/*.mp4"))
    assert len(files) == 15
    assert len({file.stat().st_size for file in files}) == 1
    assert decode(files[0]).shape == (4, 32, 32, 3)
    with av.open(str(files[0])) as container:
        assert container.streams.video[0].codec_context.name == "h264"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file.x: (Not a directory|File exists)"):
        embedded.make("mocap15", tmp_path / "file" / "x")


def test_existing_folders_are_respected(tmp_path: Path) -> None:
    options: dict[str, Any] = {"size": TINY, "workers": 1, "frames": 2, "resolution": 32}
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "holiday.mp4").write_text("precious")
    for force in (False, True):
        with pytest.raises(UserError, match="mine"):
            embedded.make("mocap15", mine, force=force, **options)
    assert (mine / "holiday.mp4").read_text() == "precious"
    out = tmp_path / "set"
    out.mkdir()
    embedded.make("mocap15", out, **options)
    before = digest(out)
    with pytest.raises(UserError, match="exists already"):
        embedded.make("mocap15", out, **options)
    assert digest(out) == before
    embedded.make("mocap15", out, force=True, seed=9, **options)
    assert digest(out) != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "set"]


def test_a_worker_that_cannot_write_says_why():
    recipe = Recipe("motion-order", 16, 2, 16, 0.0, 0)
    job = Job(recipe, "mpeg4", {"train": 1, "val": 0, "test": 0}, "/dev/null/folder", 0, 1)
    command = [sys.executable, "-m", "ca3d.data.embedded.worker"]
    done = subprocess.run(command, input=to_json(job), capture_output=True, text=True)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)
    assert json.loads(done.stdout) == "Not a directory"


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_run_leaves_nothing(tmp_path: Path, workers: int) -> None:
    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embedded.make(
            "mocap15",
            tmp_path / "set",
            size=TINY,
            workers=workers,
            frames=2,
            resolution=32,
            progress=stop,
        )
    assert list(tmp_path.iterdir()) == []


def test_a_failing_worker_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A folder in front of the search path whose `av` can't be imported breaks the workers alone.
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "av.py").write_text("raise ImportError('broken on purpose')")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "broken"), *sys.path])
    with pytest.raises(RuntimeError, match="broken on purpose"):
        embedded.make("mocap15", tmp_path / "set", size=TINY, workers=2, frames=2, resolution=32)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"size": "huge"}, ValueError, "size is 'huge'"),
        ({"size": {"train": 3}}, ValueError, r"size\['train'\] is 3"),
        ({"size": {"train": 30, "dev": 3}}, ValueError, "size has the keys"),
        ({"size": {"train": 30, "val": -1}}, ValueError, r"size\['val'\] is -1"),
        ({"clutter": 1.5}, ValueError, "clutter is 1.5"),
        ({"clutter": float("nan")}, ValueError, "clutter is nan"),
        ({"codec": "vp9"}, ValueError, "codec is 'vp9'"),
        ({"seed": -1}, ValueError, "seed is -1"),
        ({"workers": 0}, ValueError, "workers is 0"),
        ({"workers": 1.5}, TypeError, "workers is 1.5"),
        ({"resolution": 33}, ValueError, "resolution is 33"),
        ({"resolution": 8}, ValueError, "resolution is 8"),
        ({"frames": 1}, ValueError, "frames is 1"),
        ({"frames": True}, TypeError, "frames is True"),
        ({"frames_per_second": 0}, ValueError, "frames_per_second is 0"),
        ({"views": "above"}, ValueError, "views is 'above'"),
        ({"segments": 4}, ValueError, "segments is 4"),
        ({"name": "motion-order", "frames": 15}, ValueError, "frames is 15"),
        ({"name": "imagenet"}, ValueError, "name is 'imagenet'"),
    ],
)
def test_bad_input(
    options: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    name = options.pop("name", "mocap15")
    with pytest.raises(error, match=words):
        embedded.make(name, tmp_path / "set", **options)
    assert list(tmp_path.iterdir()) == []


def test_rendering_needs_no_torch() -> None:
    """Workers start fast and share the cores: they must not load torch."""
    code = "import sys, ca3d.data.embedded.worker; print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
