"""UCF101 and the published protocol from the command line: check, split, train, eval, table."""

import csv
import json
from pathlib import Path

import pytest
import torch
from benchmark_folders import make_hmdb51, make_ucf101, real
from tiny_videos import TINY, flags

from ca3d import weights
from ca3d.cli import main
from ca3d.errors import UserError
from ca3d.predict import clip_spec
from ca3d.results import read, table

OPTIONS = flags({**TINY, "epochs": 1, "progress": "plain"})


@pytest.fixture(scope="module")
def ucf101(tmp_path_factory: pytest.TempPathFactory) -> Path:
    videos = make_ucf101(tmp_path_factory.mktemp("ucf101"), real, groups=8, clips=1)
    (videos / "Archery" / "v_Archery_g04_c01.avi").unlink()
    return videos


@pytest.fixture(scope="module")
def official(ucf101: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on split 1."""
    out = tmp_path_factory.mktemp("runs") / "official"
    command = ["train", str(ucf101), "--dataset", "ucf101", "--out", str(out), *OPTIONS]
    lists = str(ucf101.parent / "ucfTrainTestlist")
    assert main([*command, "--split-files", lists, "--fold", "1"]) == 0
    return out


@pytest.fixture(scope="module")
def published(ucf101: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "published"
    command = ["train", str(ucf101), "--protocol", "published", "--out", str(out)]
    assert main([*command, *OPTIONS]) == 0
    return out


def listed(run: Path, part: str) -> set[str]:
    with (run / "splits" / f"{part}.csv").open(newline="") as file:
        return {Path(row["path"]).name for row in csv.DictReader(file)}


def test_a_run_says_what_it_was_measured_on(official: Path, capsys: object) -> None:
    result = read(official)
    assert result["protocol"] == {
        "name": "official",
        "dataset": "ucf101",
        "fold": 1,
        "seed": 0,
        "val_fraction": 0.15,
    }
    assert result["videos"] == 4
    assert result["missing"] == 1
    assert listed(official, "test") == {
        f"v_{name}_g{group:02d}_c01.avi"
        for name in ("Archery", "HandStandPushups")
        for group in (1, 2)
    }
    assert listed(official, "missing") == {"v_Archery_g04_c01.avi"}
    info = weights.load_info(official / "best.safetensors")
    assert info.extra["protocol"] == result["protocol"]


def test_eval_takes_the_split_of_the_training(
    ucf101: Path, official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(official), str(ucf101), "--out", str(tmp_path), "--workers=0"]) == 0
    ours, trained = read(tmp_path), read(official)
    for name in ("top1", "loss", "videos", "protocol"):
        assert ours[name] == trained[name]
    capsys.readouterr()
    assert main(["eval", str(official), str(ucf101), "--split", "val", "--workers=0"]) == 0
    assert f"split val, 1 clips x 1 crops: {len(listed(official, 'val'))} videos" in (
        capsys.readouterr().out
    )
    assert main(["eval", str(official), str(ucf101), "--fold", "2"]) == 1
    assert "would be tested on videos that it was trained on" in capsys.readouterr().err


def test_official_splits_have_their_own_groups(
    ucf101: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", str(ucf101), "--group", "g(..)", "--out", str(tmp_path / "run"), *OPTIONS]
    assert main(command) == 1
    assert "--group g(..): official split 1 of ucf101 has its own groups" in capsys.readouterr().err


def test_ten_clips_of_three_crops(ucf101: Path, official: Path, tmp_path: Path) -> None:
    command = ["eval", str(official), str(ucf101), "--clips=10", "--crops=3", "--workers=0"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    result = read(tmp_path)
    assert (result["clips"], result["crops"], result["average"]) == (10, 3, "logits")
    with pytest.raises(UserError, match=r"clips is 10 in .* and 1 in"):
        table([result, read(official)])


def test_published_protocol(published: Path, official: Path) -> None:
    info = weights.load_info(published / "best.safetensors")
    assert info.color == "bgr"
    assert info.frames_per_second is None
    assert info.window == 10
    assert clip_spec(info).window == 10
    result = read(published)
    assert result["protocol"]["name"] == "published"
    assert result["protocol"]["seed"] == 100
    with pytest.raises(UserError, match=r"protocol is official in .* and published in"):
        table([read(official), result])


def test_published_statistics_are_of_bgr_frames(published: Path, ucf101: Path) -> None:
    """Of every training video: 10 successive frames at the centre, the middle 8 of them."""
    from ca3d.data.reader import open_video

    frames = []
    for name in sorted(listed(published, "train")):
        with open_video(next(ucf101.rglob(name))) as video:
            start = (video.num_frames - 10) // 2 + 1
            frames.append(video.frames(list(range(start, start + 8)), 32).double() / 255)
    pixels = torch.stack(frames).movedim(2, 0).flatten(1).flip(0)
    info = weights.load_info(published / "best.safetensors")
    assert info.mean == pytest.approx(pixels.mean(1).tolist(), abs=1e-9)
    assert info.std == pytest.approx(pixels.std(1, correction=0).tolist(), abs=1e-9)


def test_mean_of_three_splits(official: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = read(official)
    accuracies = {1: first["top1"], 2: 0.4, 3: 0.3}
    three = [
        {**first, "top1": accuracies[n], "protocol": {**first["protocol"], "fold": n}}
        for n in (1, 2, 3)
    ]
    rows = table(three)
    assert [row["split"] for row in rows] == [1, 2, 3, "mean of 3"]
    assert rows[-1]["top1"] == pytest.approx(sum(accuracies.values()) / 3)
    assert rows[-1]["videos"] == 12
    assert len(table(three[:2])) == 2
    with pytest.raises(UserError, match="split 1 of ca3d_tiny in float32 is given twice"):
        table([first, first])
    assert main(["results", str(official), "--format=csv"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("official,ucf101,1,ca3d_tiny,float32")
    with pytest.raises(SystemExit):
        main(["results"])


def test_data_check_and_data_split(
    ucf101: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check = ["data", "check", str(ucf101), "--frames=4", "--stride=1", "--quick"]
    assert main([*check, "--fold", "2"]) == 1
    text = capsys.readouterr().out
    assert "official split 2 of ucf101" in text
    assert "1 listed videos are missing" in text
    assert "groups lie in two splits" not in text
    assert main(["data", "split", str(ucf101), "--fold", "3", "--out", str(tmp_path)]) == 0
    lists = [tmp_path / f"{name}.csv" for name in ("train", "val", "test")]
    assert [len(file.read_text().splitlines()) - 1 for file in lists] == [10, 2, 4]
    assert "v_Archery_g05_c01.avi" in lists[2].read_text()


def test_the_leak_of_the_published_protocol_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = make_hmdb51(tmp_path, real)
    check = ["data", "check", str(videos), "--quick", "--frames=4", "--stride=1", "--json"]
    assert main([*check, "--protocol", "published"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {kind for _, _, kind, _ in report["overlaps"]} == {"group"}
    assert main(check) == 0
    assert json.loads(capsys.readouterr().out)["overlaps"] == []
