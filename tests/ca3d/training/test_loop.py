"""What a training run leaves behind, and how it treats trouble."""

import csv
import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from tiny_videos import TINY, bar_video, make_folder, write_video

from ca3d import models, precision, weights
from ca3d.errors import UserError
from ca3d.training import TrainConfig, TrainResult, loop, train
from ca3d.training.checkpoint import load_resume_state
from ca3d.training.loader import epoch_batches


def run(data: Path, out: Path, **options: Any) -> TrainResult:
    return train(
        TrainConfig(**{**TINY, "data": str(data), "out": str(out), "progress": "none", **options})
    )


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def done(bars: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("loop") / "run"
    run(bars, out, epochs=6, class_weights="balanced")
    return out


def test_learns_and_remembers_how_to_use_the_model(bars: Path, done: Path) -> None:
    info = weights.load_info(done / "best.safetensors")
    assert info.classes == ("down", "up")
    assert (info.frames, info.stride, info.size, info.resize) == (8, 1, 32, 32)
    assert info.frames_per_second == 10.0
    assert info.color == "rgb"
    assert info.mean is not None
    assert all(0 < m < 1 for m in info.mean)
    assert info.trained_on == "bars"
    losses = [float(row["train_loss"]) for row in rows(done)]
    assert losses[-1] < losses[0]


def test_run_folder_holds_all_that_is_needed_to_repeat_it(bars: Path, done: Path) -> None:
    config = yaml.safe_load((done / "config.yaml").read_text())
    assert config["lr"] == 0.01
    assert config["model_options"]["widths"] == [4, 4, 8, 8]
    environment = json.loads((done / "environment.json").read_text())
    assert torch.__version__.startswith(environment["packages"]["torch"])
    listed = [
        line.split(",")[0]
        for split in ("train", "val", "test")
        for line in (done / "splits" / f"{split}.csv").read_text().splitlines()[1:]
    ]
    assert sorted(listed) == sorted(str(p.relative_to(bars)) for p in bars.glob("*/*.avi"))
    assert {"mean", "std", "frames_per_second"} <= json.loads(
        (done / "data.json").read_text()
    ).keys()
    assert (done / "curves.png").read_bytes().startswith(b"\x89PNG")
    for name in ("results.json", "predictions.csv", "confusion.csv", "confusion.png"):
        assert (done / "test" / name).is_file()
    assert len((done / "metrics.jsonl").read_text().splitlines()) == 6
    assert not list(done.glob(".*.tmp"))


def test_best_is_the_first_epoch_of_highest_validation_accuracy(done: Path) -> None:
    accuracy = [float(row["val_accuracy"]) for row in rows(done)]
    best = accuracy.index(max(accuracy))
    assert weights.load_info(done / "best.safetensors").extra["epoch"] == best
    assert json.loads((done / "test" / "results.json").read_text())["epoch"] == best


def test_one_step_equals_plain_torch(bars: Path, tmp_path: Path) -> None:
    result = run(
        bars,
        tmp_path / "run",
        epochs=1,
        max_steps=1,
        model_options={"widths": [4, 4, 8, 8], "dropout": 0.0},
        flip=False,
        seed=5,
    )
    assert result.steps == 1
    config = TrainConfig(**yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()))
    (tmp_path / "data").mkdir()
    data = loop.prepare_data(config, tmp_path / "data", lambda text: None)
    torch.manual_seed(5)
    model = models.create("ca3d_tiny", num_classes=2, frames=8, **config.model_options)
    sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-3)
    batch = epoch_batches(len(data.train), 5, seed=5, epoch=0)[0]
    data.train.set_epoch(0)
    items = [data.train[i] for i in batch]
    clips = torch.stack([item[0] for item in items if item is not None])
    labels = torch.tensor([item[1] for item in items if item is not None])
    F.cross_entropy(model(clips), labels).backward()
    sgd.step()
    trained = load_file(tmp_path / "run" / "last.safetensors")
    for key, value in model.state_dict().items():
        torch.testing.assert_close(trained[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "decay"), [({}, 5e-4), ({"weight_decay": 0.25}, 0.25)], ids=["default", "given"]
)
def test_weight_decay_is_that_of_the_model(
    options: dict[str, Any], decay: float, bars: Path, tmp_path: Path
) -> None:
    tiny = {"model": "i3d_tiny", "model_options": {}, "max_steps": 1, "epochs": 1}
    run(bars, tmp_path / "run", **tiny, **options)
    state = load_resume_state(tmp_path / "run" / "resume.pt")
    assert models.recipe("i3d_tiny").weight_decay == 5e-4
    assert {group["weight_decay"] for group in state["optimizer"]["param_groups"]} == {decay}


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    inputs, labels = torch.randn(6, 3), torch.randint(0, 2, (6,))
    F.cross_entropy(model(inputs), labels).backward()
    whole = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    regime = precision.create("float32")
    for part in (slice(0, 4), slice(4, 6)):
        loss = F.cross_entropy(regime.forward(model, inputs[part]), labels[part])
        regime.backward(loss * (len(labels[part]) / 6))
    for parameter, gradient in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_accumulation_makes_fewer_steps(bars: Path, tmp_path: Path) -> None:
    result = run(bars, tmp_path / "run", epochs=1, accumulate=3, val_fraction=0.1)
    batches = len(epoch_batches(len(rows_of_split(tmp_path / "run", "train")), 5, 0, 0))
    assert result.steps == math.ceil(batches / 3)


def rows_of_split(folder: Path, split: str) -> list[str]:
    return (folder / "splits" / f"{split}.csv").read_text().splitlines()[1:]


def test_steps_that_are_not_finite_change_nothing(
    bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = precision.Float32.forward
    calls = 0

    def sometimes_nan(self: Any, model: Any, clips: Any) -> Any:
        nonlocal calls
        if not model.training:
            return original(self, model, clips)
        calls += 1
        bad = calls in (2, 3)
        return original(self, model, clips * math.nan if bad else clips)

    monkeypatch.setattr(precision.Float32, "forward", sometimes_nan)
    result = run(bars, tmp_path / "run", epochs=2)
    assert result.skipped == 2
    assert rows(tmp_path / "run")[-1]["skipped"] == "2"
    assert result.steps + result.skipped == calls
    for value in load_file(tmp_path / "run" / "last.safetensors").values():
        assert value.isfinite().all()


def test_too_many_such_steps_stop_the_run_and_name_the_layer(
    bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = models.create_for_clips

    def broken(*args: Any, **options: Any) -> Any:
        model = create(*args, **options)
        with torch.no_grad():
            model.classifier.weight.fill_(math.inf)
        return model

    monkeypatch.setattr(models, "create_for_clips", broken)
    with pytest.raises(UserError, match=r"3 steps in a row .*classifier.*lower --lr"):
        run(bars, tmp_path / "run", max_skipped=3)


def test_full_disk_leaves_the_previous_checkpoint(
    bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    original = Path.write_bytes
    written = 0

    def full(self: Path, data: bytes) -> int:
        nonlocal written
        written += "last.safetensors" in self.name
        if written < 2:
            return original(self, data)
        original(self, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"last.safetensors: No space left on device.*intact"):
        run(bars, out, epochs=3)
    monkeypatch.undo()
    assert weights.load_info(out / "last.safetensors").extra["epoch"] == 0
    assert not list(out.glob(".*.tmp"))
    result = run(bars, out, epochs=3, resume="auto")
    assert weights.load_info(out / "last.safetensors").extra["epoch"] == 2
    assert result.steps == 3 * len(epoch_batches(len(rows_of_split(out, "train")), 5, 0, 0))


def test_early_stopping(bars: Path, tmp_path: Path) -> None:
    # Without a step worth the name validation stays as it is after the first epoch.
    run(bars, tmp_path / "run", epochs=9, lr=1e-12, weight_decay=0.0, early_stopping=2)
    assert len(rows(tmp_path / "run")) <= 5
    with pytest.raises(UserError, match="--early-stopping needs a validation split"):
        run(bars, tmp_path / "other", early_stopping=2, val_fraction=0.0)


def test_a_batch_of_one_that_is_left_out_is_counted(bars: Path, tmp_path: Path) -> None:
    run(bars, tmp_path / "run", epochs=1)
    count = len(rows_of_split(tmp_path / "run", "train"))
    run(bars, tmp_path / "other", epochs=1, batch_size=count - 1)
    (row,) = rows(tmp_path / "other")
    assert row["dropped_batches"] == "1"


def test_max_steps(bars: Path, tmp_path: Path) -> None:
    result = run(bars, tmp_path / "run", epochs=9, max_steps=4)
    assert result.steps == 4
    assert len(rows(tmp_path / "run")) == 2


def test_broken_videos_are_survived_and_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = make_folder(tmp_path / "data", videos=6)
    for name in ("down/00.avi", "up/03.avi"):
        (data / name).write_bytes((data / name).read_bytes()[:300])
    result = run(data, tmp_path / "run", epochs=2)
    assert result.steps > 0
    lines = [record.getMessage() for record in caplog.records]
    told = [line.split(":")[0] for line in lines if "not a readable video" in line]
    assert len(told) == len(set(told)) == result.unreadable == 2


def test_frame_rate_is_the_usual_one(tmp_path: Path) -> None:
    data = make_folder(tmp_path / "data", videos=5)
    write_video(data / "up" / "fast.avi", bar_video("up", 7), rate=30)
    run(data, tmp_path / "run", epochs=1, max_steps=1)
    assert weights.load_info(tmp_path / "run" / "last.safetensors").frames_per_second == 10.0


def test_no_validation_split_takes_the_last_epoch(bars: Path, tmp_path: Path) -> None:
    result = run(bars, tmp_path / "run", val_fraction=0.0)
    assert result.best_epoch == 1
    assert math.isnan(result.best_accuracy)


def test_lists_instead_of_splits(bars: Path, tmp_path: Path) -> None:
    train_list, val_list = tmp_path / "a.csv", tmp_path / "b.jsonl"
    names = [f"{c}/{n:02d}.avi" for n in range(6) for c in ("down", "up")]
    train_list.write_text("path,label\n" + "".join(f"{n},{n.split('/')[0]}\n" for n in names[:8]))
    val_list.write_text(
        "".join(json.dumps({"path": n, "label": n.split("/")[0]}) + "\n" for n in names[8:])
    )
    options = {"train_list": str(train_list), "val_list": str(val_list), "epochs": 1}
    result = run(bars, tmp_path / "run", **options)
    assert result.test is None
    assert len(rows_of_split(tmp_path / "run", "val")) == 4
    with pytest.raises(UserError, match="two splits"):
        run(bars, tmp_path / "twice", **{**options, "val_list": str(train_list)})


@pytest.mark.parametrize("name", ["bfloat16"])
def test_other_precisions_train(bars: Path, tmp_path: Path, name: str) -> None:
    result = run(bars, tmp_path / "run", precision=name, epochs=1, optimizer="adamw")
    assert result.skipped == 0
    state = load_file(tmp_path / "run" / "last.safetensors")
    assert all(v.dtype in (torch.float32, torch.int64) for v in state.values())
    assert weights.load_info(tmp_path / "run" / "last.safetensors").precision == name
