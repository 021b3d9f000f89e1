"""Long videos: made, annotated, watched and compared with the annotations."""

import csv
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from untrained import save_model

from ca3d import models, weights
from ca3d.cli import main
from ca3d.data import embedded
from ca3d.data.reader import open_video
from ca3d.errors import UserError
from ca3d.evaluate import EvalConfig
from ca3d.watch import untrimmed
from ca3d.watch.classifier import Classifier


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two test videos of half a minute, in which mocap15's actions come and go."""
    folder = tmp_path_factory.mktemp("untrimmed") / "long"
    clips = {"val": 0, "test": 2}
    return embedded.make(
        "mocap15-untrimmed", folder, size=clips, frames=480, resolution=32, workers=1
    )


def rows(made: Path) -> list[dict[str, str]]:
    with (made / "annotations.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_annotations_fit_the_videos(made):
    about = json.loads((made / "dataset.json").read_text())
    assert len(about["classes"]) == 15
    found = rows(made)
    assert {row["path"] for row in found} == {"test/0000.avi", "test/0001.avi"}
    assert {row["label"] for row in found} <= set(about["classes"])
    for name in ("test/0000.avi", "test/0001.avi"):
        with open_video(made / name) as video:
            assert video.num_frames == 480
            assert video.frames_per_second == 16
        own = [(float(r["start"]), float(r["end"])) for r in found if r["path"] == name]
        assert own == sorted(own)
        assert own[0][0] >= 2
        assert own[-1][1] <= 28
        assert all(2.5 - 0.1 <= end - start <= 5.1 for start, end in own)
        assert all(a[1] <= b[0] for a, b in pairwise(own))


def test_pauses_are_still_and_actions_move(made):
    """By the mean difference of neighbouring frames, at least a quarter second from an edge."""
    for name in ("test/0000.avi", "test/0001.avi"):
        with open_video(made / name) as video:
            frames = video.frames(range(480)).float()
        moves = (frames[1:] - frames[:-1]).abs().mean(dim=(1, 2, 3))
        acting = torch.zeros(479, dtype=torch.bool)
        pausing = torch.ones(479, dtype=torch.bool)
        for row in rows(made):
            if row["path"] == name:
                start, end = round(16 * float(row["start"])), round(16 * float(row["end"]))
                acting[start + 4 : end - 4] = True
                pausing[max(0, start - 4) : end + 4] = False
        assert moves[pausing].mean() < 0.7 * moves[acting].mean()


def test_the_class_background_is_one_of_a_mocap_set(tmp_path):
    clips = {"train": 16, "val": 0, "test": 0}
    options = {"size": clips, "frames": 4, "resolution": 32, "workers": 1}
    plain = embedded.make("mocap15", tmp_path / "plain", **{**options, "size": {"train": 15}})
    folder = embedded.make("mocap15", tmp_path / "data", background=True, **options)
    assert len(list((folder / "background").iterdir())) == 1
    # The other classes are what they are without it.
    assert (folder / "run/0000.avi").exists()
    with open_video(folder / "walk/0000.avi") as a, open_video(plain / "walk/0000.avi") as b:
        assert torch.equal(a.frames([0, 3]), b.frames([0, 3]))


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("motion-order", {"background": True}, "background is for the mocap sets"),
        ("mocap15", {"segments": 3}, "segments is for motion-order, not for 'mocap15'"),
        ("mocap15-untrimmed", {"background": True}, "background is for the mocap sets"),
        ("mocap15-untrimmed", {"size": {"train": 1}}, "expected of val, test"),
        ("mocap15-untrimmed", {"size": {"test": 0}}, "asks for no video"),
        ("mocap15-untrimmed", {"size": "huge"}, "expected 'small'"),
        ("mocap15-untrimmed", {"frames": 10**6}, "frames is 1000000"),
    ],
)
def test_bad_options_of_the_maker(tmp_path, name, options, said):
    with pytest.raises(ValueError, match=said):
        embedded.make(name, tmp_path / "data", **options)


@pytest.fixture
def long_model(tmp_path: Path, made: Path) -> Path:
    classes = ("background", *json.loads((made / "dataset.json").read_text())["classes"])
    path = tmp_path / "model.safetensors"
    model = models.create("ca3d_tiny", num_classes=16, frames=8, widths=[4, 4, 8, 8])
    info = weights.ModelInfo(
        model.name, model.options, classes, mean=(0.3,) * 3, std=(0.2,) * 3, frames=8, stride=2,
        frames_per_second=16.0, size=32, resize=32,
    )  # fmt: skip
    weights.save(path, model, info)
    return path


class Oracle(Classifier):
    """Knows the annotations: its logits are those of the class at the middle of its window."""

    truth: tuple[list[tuple[float, float, int]], ...] = ()

    def reset(self) -> None:
        super().reset()
        self.count = 0
        self.video = getattr(self, "video", -1) + 1

    def push(self, picture):
        self.count += 1
        if self.count < 8 or self.count % 4:
            return None
        middle = (self.count - 1 - 3.5) / 8
        logits = torch.zeros(16)
        logits[0] = 9.0
        for start, end, place in self.truth[self.video]:
            if start <= middle < end:
                logits[0], logits[place] = 0.0, 9.0
        return logits


def test_a_model_that_knows_everything_gets_full_marks(made, long_model, monkeypatch):
    classes = weights.load_info(long_model).classes
    Oracle.truth = tuple(
        [
            (float(r["start"]), float(r["end"]), classes.index(r["label"]))
            for r in rows(made)
            if r["path"] == name
        ]
        for name in ("test/0000.avi", "test/0001.avi")
    )
    monkeypatch.setattr(untrimmed, "Classifier", Oracle)
    result = untrimmed.evaluate_untrimmed(EvalConfig(str(long_model), str(made)))
    assert result.annotated == len(rows(made)) == len(result.events)
    assert [a.f1 for a in result.agreements.values()] == [1.0, 1.0, 1.0]
    assert result.accuracy == 1.0
    assert result.false_alarms == 0.0
    # Half a window, the least duration of half a second, and up to two steps of half a second.
    assert all(0.9 <= delay <= 2.0 for delay in result.delays)
    assert result.hours == pytest.approx(60 / 3600, rel=0.01)
    assert result.error_before < 0.01


def test_the_command_prints_and_saves_figures(capsys, made, long_model, tmp_path):
    out = tmp_path / "results"
    arguments = ["eval", str(long_model), str(made), "--untrimmed", "--out", str(out)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "overlap 0.5: F1" in printed
    assert "false alarms:" in printed
    figures = json.loads((out / "untrimmed.json").read_text())
    assert figures["annotated"] == len(rows(made))
    assert figures["hours"] == pytest.approx(60 / 3600, rel=0.01)
    assert set(figures["events"]) == {"0.3", "0.5", "0.7"}
    assert main(arguments) == 1
    assert "exist already; --force replaces them" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0


def test_eval_finds_what_watch_finds(capsys, made, tmp_path, long_model):
    """The same events, from the decoder in this process and in its own."""
    model, info = weights.load(long_model)
    with torch.no_grad():
        model.classifier.weight.mul_(20)
    weights.save(long_model, model, info)
    result = untrimmed.evaluate_untrimmed(EvalConfig(str(long_model), str(made)))
    assert main(["watch", str(made / "test"), "--weights", str(long_model)]) == 0
    seen = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(seen) > 3
    assert [(e["label"], e["start"], e["end"]) for e in seen] == [
        (e["label"], e["start"], e["end"]) for e in result.events
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("path,label\na,b\n", "first line must be"),
        ("path,label,start,end\na.avi,sleep,0,1\n", "line 2: the model has no class 'sleep'"),
        ("path,label,start,end\na.avi,down,1,1\n", "line 2: start 1.0 and end 1.0"),
        (
            "path,label,start,end\na.avi,down,x,1\n",
            "line 2: start and end must be seconds",
        ),
    ],
)
def test_bad_annotations(tmp_path, text, said):
    file = tmp_path / "annotations.csv"
    file.write_text(text)
    with pytest.raises(UserError, match=said):
        untrimmed.read_annotations(file, ["background", "down"])


def test_annotations_that_fit_no_video_are_refused(tmp_path):
    (tmp_path / "annotations.csv").write_text("path,label,start,end\n0000.avi,down,1,2\n")
    model = save_model(tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=r"0000.avi is not there; paths count from"):
        untrimmed.evaluate_untrimmed(EvalConfig(str(model), str(tmp_path)))


def test_a_split_that_is_not_there_is_refused(tmp_path):
    (tmp_path / "annotations.csv").write_text("path,label,start,end\n")
    (tmp_path / "val").mkdir()
    model = save_model(tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="has no split test, only val"):
        untrimmed.evaluate_untrimmed(EvalConfig(str(model), str(tmp_path)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"clips": 3}, "--clips 3"),
        ({"list_file": "a.csv"}, "--list-file a.csv"),
        ({"protocol": "published"}, "--protocol published"),
        ({"fold": 2}, "--fold 2"),
    ],
)
def test_options_without_a_meaning_are_refused(options, said):
    with pytest.raises(UserError, match=f"{said} has no meaning with --untrimmed"):
        EvalConfig("model", "videos", untrimmed=True, **options).validate()


def test_all_splits_are_watched_on_request(made, long_model):
    one = untrimmed.evaluate_untrimmed(EvalConfig(str(long_model), str(made)))
    every = untrimmed.evaluate_untrimmed(EvalConfig(str(long_model), str(made), split="all"))
    assert every.hours == one.hours  # there are test videos only


def test_annotations_of_background_are_left_out(tmp_path):
    file = tmp_path / "annotations.csv"
    file.write_text("path,label,start,end\na.avi,down,5,6\na.avi,Background,1,2\na.avi,down,1,2\n")
    (events,) = untrimmed.read_annotations(file, ["background", "down"]).values()
    assert [e.start for e in events] == [1.0, 5.0]


def test_without_videos(tmp_path):
    (tmp_path / "annotations.csv").write_text("path,label,start,end\n")
    model = save_model(tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="no video in this folder"):
        untrimmed.evaluate_untrimmed(EvalConfig(str(model), str(tmp_path)))
