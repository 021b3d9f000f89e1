from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_videos import TINY

from ca3d import models, weights
from ca3d.errors import UserError
from ca3d.training import TrainConfig, fine_tuning, train

OPTIONS: dict[str, Any] = {"widths": [4, 4, 8, 8], "frames": 8}


def saved(path: Path, classes: tuple[str, ...], **options: Any) -> torch.nn.Module:
    torch.manual_seed(3)
    model = models.create("ca3d_tiny", num_classes=len(classes), **{**OPTIONS, **options})
    weights.save(path, model, weights.ModelInfo("ca3d_tiny", model.options, classes))
    return model


def test_same_classes_load_everything(tmp_path: Path) -> None:
    source = saved(tmp_path / "a.safetensors", ("down", "up"))
    model = models.create("ca3d_tiny", num_classes=2, **OPTIONS)
    report = fine_tuning.initialize_from(model, ["down", "up"], tmp_path / "a.safetensors")
    assert report == []
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)


def test_other_classes_replace_the_classifier_and_say_so(tmp_path: Path) -> None:
    source = saved(tmp_path / "a.safetensors", ("jump", "up", "walk"))
    model = models.create("ca3d_tiny", num_classes=2, **OPTIONS)
    before = model.classifier.weight.clone()
    report = fine_tuning.initialize_from(model, ["down", "up"], tmp_path / "a.safetensors")
    assert report == ["classifier replaced: 3 classes -> 2 (1 of the same name kept their weights)"]
    assert torch.equal(model.classifier.weight[0], before[0])
    assert torch.equal(model.classifier.weight[1], source.classifier.weight[1])
    for key, value in source.state_dict().items():
        if not key.startswith("classifier"):
            assert torch.equal(model.state_dict()[key], value)


def test_what_fits_and_yet_computes_something_else_is_listed(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    saved(file, ("down", "up"), edge="zero", dropout=0.1)
    model = models.create("ca3d_tiny", num_classes=2, **OPTIONS)
    clips = {"color": "bgr", "stride": 2}
    assert fine_tuning.initialize_from(model, ["down", "up"], file, clips) == [
        "option edge differs: 'zero' in the weights, None now",
        "color differs: 'rgb' in the weights, 'bgr' now",
    ]


def test_another_shape_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    saved(tmp_path / "a.safetensors", ("down", "up"), widths=[4, 4, 8, 16])
    model = models.create("ca3d_tiny", num_classes=2, **OPTIONS)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError, match="does not fit"):
        fine_tuning.initialize_from(model, ["down", "up"], tmp_path / "a.safetensors")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_frozen_parts_stay_as_they_are(bars: Path, tmp_path: Path) -> None:
    saved(tmp_path / "a.safetensors", ("jump", "walk"))
    train(
        TrainConfig(
            **{
                **TINY,
                "data": str(bars),
                "out": str(tmp_path / "run"),
                "progress": "none",
                "init_from": str(tmp_path / "a.safetensors"),
                "freeze": "(?!classifier)",
                "freeze_bn": True,
                "model_options": {"widths": [4, 4, 8, 8]},
                "epochs": 1,
            }
        )
    )
    before = load_file(tmp_path / "a.safetensors")
    after = load_file(tmp_path / "run" / "last.safetensors")
    assert not torch.equal(after["classifier.weight"], before["classifier.weight"])
    for key, value in after.items():
        if not key.startswith("classifier"):
            assert torch.equal(value, before[key]), key


def test_freeze_names_what_is_wrong() -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="no parameter"):
        fine_tuning.freeze(model, "layers")
    with pytest.raises(UserError, match="every parameter"):
        fine_tuning.freeze(model, "")
    with pytest.raises(UserError, match="no regular expression"):
        fine_tuning.freeze(model, "(")
