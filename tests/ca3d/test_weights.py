"""Weights files: round trips, atomic writing, and every kind of wrong file."""

import dataclasses
import errno
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from ca3d import files, weights
from ca3d.errors import UserError
from ca3d.models import CA3D, ca3d_tiny, create
from ca3d.weights import ModelInfo, load, load_info, save

CLASSES = ("run", "walk", "jump")


def tiny(**options: Any) -> CA3D:
    return ca3d_tiny(3, **options)


def info_of(model: nn.Module, **fields: Any) -> ModelInfo:
    return ModelInfo(str(model.name), model.options, classes=CLASSES, **fields)  # type: ignore[arg-type]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    model = tiny()
    save(path, model, info_of(model))
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"preset": "published", "frames": 8}])
def test_round_trip(tmp_path: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    model = tiny(**options).to(dtype)
    info = info_of(
        model,
        color="bgr",
        mean=(0.1, 0.2, 0.3),
        std=[1, 0.5, 0.25],
        frames=model.frames,
        stride=3,
        frames_per_second=12.5,
        size=32,
        resize=40,
        precision="float16",
        trained_on="rendered figures, ünïcödé",
        extra={"epoch": 3, "list": [1, 2.5, None]},
    )
    path = tmp_path / "model.safetensors"
    save(path, model, info)
    loaded, found = load(path)
    assert found == info == load_info(path)
    assert found.std == (1.0, 0.5, 0.25)
    assert not loaded.training
    for (name, a), b in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name
        assert a.stride() == b.stride(), name  # the channels-last weights are so again
    assert all(p.requires_grad for p in loaded.parameters())


def test_mixed_dtypes_are_kept(tmp_path: Path) -> None:
    model = tiny()
    model.classifier.half()
    path = tmp_path / "model.safetensors"
    save(path, model, info_of(model))
    loaded, _ = load(path)
    assert loaded.classifier.weight.dtype == torch.float16
    assert loaded.head.norm.weight.dtype == torch.float32


def test_missing_information_stays_missing(tmp_path: Path) -> None:
    model = tiny()
    path = tmp_path / "model.safetensors"
    save(path, model, ModelInfo("ca3d_tiny", model.options))
    info = load_info(path)
    assert (info.classes, info.mean, info.std, info.frames_per_second) == ((), None, None, None)


def test_tied_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    first, second = model.layers["spatial1"].column
    second.conv1.weight = first.conv1.weight
    path = tmp_path / "model.safetensors"
    save(path, model, info_of(model))
    loaded, _ = load(path)
    for block in loaded.layers["spatial1"].column:
        assert torch.equal(block.conv1.weight, first.conv1.weight)


def test_loading_leaves_the_random_state(file: Path) -> None:
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    load(file)
    assert torch.equal(torch.rand(3), expected)


def test_the_file_is_plain_safetensors(file: Path) -> None:
    tensors = safetensors.torch.load_file(file)
    assert tensors.keys() == tiny().state_dict().keys()
    with safetensors.safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["format"] == "pt"
    assert json.loads(metadata["ca3d.info"])["classes"] == list(CLASSES)


def test_a_full_disk_keeps_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()
    write_bytes = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        write_bytes(self, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    model = tiny()
    with pytest.raises(OSError, match="No space left"):
        save(file, model, info_of(model))
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failing_step_keeps_the_old_file(
    file: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    before = file.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files.os, step, fail)
    with pytest.raises(OSError, match="Input/output"):
        files.write_atomically(file, lambda path: path.write_bytes(b"new"))
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_a_new_file_obeys_the_umask(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    files.write_atomically(tmp_path / "atomic", lambda path: path.write_bytes(b""))
    modes = [(tmp_path / name).stat().st_mode for name in ("plain", "atomic")]
    assert modes[0] == modes[1]


def test_a_missing_folder(tmp_path: Path) -> None:
    model = tiny()
    with pytest.raises(FileNotFoundError):
        save(tmp_path / "none" / "model.safetensors", model, info_of(model))


def test_not_a_weights_file(tmp_path: Path, file: Path) -> None:
    cases: dict[str, tuple[bytes | None, str]] = {
        "missing": (None, "no such file"),
        "empty": (b"", "no safetensors file, or a damaged one"),
        "text": (b"hello, world, this is no header at all", "no safetensors file"),
        "cut": (file.read_bytes()[:5000], "no safetensors file"),
        "short": (file.read_bytes()[:-8], "no safetensors file"),
        "foreign": (safetensors.torch.save({"a": torch.ones(1)}), "not one of ca3d's"),
    }
    for name, (content, message) in cases.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        for read in (load, load_info):
            with pytest.raises(UserError, match=message) as caught:
                read(path)
            assert str(path) in str(caught.value)
            assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="not a file"):
        load(tmp_path)


def rewritten(file: Path, change: Any) -> Path:
    """A copy of a weights file with its tensors and description changed."""
    tensors = safetensors.torch.load_file(file)
    with safetensors.safe_open(file, "pt") as opened:
        metadata = dict(opened.metadata())
    description = json.loads(metadata["ca3d.info"])
    change(tensors, description, metadata)
    if metadata["ca3d.info"] != "{":
        metadata["ca3d.info"] = json.dumps(description)
    path = file.with_name("changed.safetensors")
    path.write_bytes(safetensors.torch.save(tensors, metadata))
    return path


def forget(tensors: dict[str, Any], *_: Any) -> None:
    del tensors["classifier.bias"]
    tensors["stranger"] = torch.ones(1)
    tensors["head.norm.weight"] = torch.ones(7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, i, m: m.update({"ca3d.version": "2"}), "format version 2, this ca3d reads 1"),
        (lambda t, i, m: m.update({"ca3d.info": "{"}), "description is damaged"),
        (lambda t, i, m: i.update(color="hsv"), "description is damaged: color"),
        (lambda t, i, m: i.update(future=1), "description is damaged.*future"),
        (lambda t, i, m: i.update(model="ca4d"), "can't be built: unknown model 'ca4d'"),
        (lambda t, i, m: i["options"].update(depth=2), "can't be built.*depth"),
        (lambda t, i, m: i["options"].update(frames=6), "can't be built: frames"),
        (
            lambda t, i, m: i["options"].update(widths=[8, 16, 32, 128]),
            r"does not fit.*is \(64, 8, 3, 3\) instead of \(128, 8, 3, 3\).*and \d+ more",
        ),
        (
            lambda t, i, m: t.update({"classifier.bias": t["classifier.bias"].to(torch.int32)}),
            "classifier.bias is of torch.int32",
        ),
        (
            forget,
            r"classifier.bias is missing, stranger is unknown, head.norm.weight is \(7,\) instead",
        ),
    ],
)
def test_a_file_that_does_not_fit(file: Path, change: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(rewritten(file, change))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": 3}, "model must be a string"),
        ({"options": [1]}, "options must be a dict"),
        ({"color": "RGB"}, "color must be 'rgb' or 'bgr', got 'RGB'"),
        ({"mean": (1, 2)}, "mean must be three numbers"),
        ({"mean": (1, 2, float("nan"))}, "mean must be three numbers"),
        ({"std": (1, 2, 0)}, "std must be three positive numbers"),
        ({"frames": 0}, "frames must be an integer of at least 1"),
        ({"size": 1.5}, "size must be an integer"),
        ({"frames_per_second": 0}, "frames_per_second must be positive"),
        ({"classes": "abc"}, "classes must be a sequence"),
        ({"classes": ("a", "a", "b")}, "classes must differ, got more than once: a"),
        ({"classes": ("a", "b")}, "the model has 3 classes, got 2"),
        ({"classes": ("a", "b", "")}, "non-empty strings"),
    ],
)
def test_bad_information(fields: dict[str, Any], message: str) -> None:
    good = {"model": "ca3d_tiny", "options": {"num_classes": 3}, "classes": CLASSES}
    ModelInfo(**good)
    with pytest.raises((TypeError, ValueError), match=message):
        ModelInfo(**{**good, **fields})


def test_information_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelInfo("ca3d", {}).model = "other"  # type: ignore[misc]


def test_options_that_json_does_not_know(tmp_path: Path) -> None:
    model = tiny()
    with pytest.raises(TypeError):
        save(tmp_path / "x.safetensors", model, info_of(model, extra={"a": torch.ones(1)}))
    assert list(tmp_path.iterdir()) == []


def test_predictions_survive(tmp_path: Path) -> None:
    model = create("ca3d_tiny", 3, preset="published").eval()
    path = tmp_path / "model.safetensors"
    save(path, model, info_of(model))
    loaded, _ = weights.load(path, device="cpu")
    clip = torch.randn(1, 3, 16, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(clip), model(clip))
