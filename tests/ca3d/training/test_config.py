import math

import pytest

from ca3d.errors import UserError
from ca3d.training import TrainConfig


def test_defaults_are_the_published_recipe() -> None:
    config = TrainConfig(data="d", out="o")
    config.validate()
    assert (config.model, config.optimizer, config.schedule) == ("ca3d", "sgd", "published")
    assert (config.epochs, config.batch_size, config.lr) == (50, 20, 1e-3)
    # The weight decay is the model's: see test_weight_decay_is_that_of_the_model.
    assert (config.momentum, config.weight_decay) == (0.9, None)
    assert (config.frames, config.stride, config.size) == (16, 2, 112)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", math.nan),
        ("lr", math.inf),
        ("lr", -1.0),
        ("lr", 0.0),
        ("weight_decay", math.nan),
        ("weight_decay", -1e-3),
        ("momentum", 1.0),
        ("momentum", math.nan),
        ("epochs", 0),
        ("batch_size", 1),
        ("batch_size", 0),
        ("accumulate", 0),
        ("frames", 0),
        ("stride", 0),
        ("size", 0),
        ("size", 100_000),
        ("resize", 5000),
        ("fps", 0.0),
        ("fps", math.inf),
        ("clip_norm", 0.0),
        ("max_steps", 0),
        ("early_stopping", 0),
        ("workers", -1),
        ("warmup_epochs", -1.0),
        ("warmup_epochs", 51.0),
        ("label_smoothing", 1.0),
        ("val_fraction", 1.0),
        ("seed", -1),
        ("mean", [0.5, 0.5]),
        ("mean", [0.5, 0.5, math.nan]),
        ("milestones", [30, 20]),
        ("checkpoint_steps", -1),
        ("log_steps", 0),
        ("max_skipped", 0),
    ],
)
def test_bad_values_are_named(name: str, value: object) -> None:
    flag = "--" + name.replace("_", "-")
    with pytest.raises(UserError, match=flag) as caught:
        TrainConfig(data="d", out="o", **{name: value}).validate()  # type: ignore[arg-type]
    assert repr(value) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_options_that_contradict_each_other() -> None:
    with pytest.raises(UserError, match="leave nothing to train on"):
        TrainConfig(data="d", out="o", val_fraction=0.5, test_fraction=0.5).validate()
    with pytest.raises(UserError, match="--resize 20 must be at least --size 32"):
        TrainConfig(data="d", out="o", size=32, resize=20).validate()
    with pytest.raises(UserError, match="together"):
        TrainConfig(data="d", out="o", mean=[0.5, 0.5, 0.5]).validate()
    with pytest.raises(UserError, match="--milestones are those of --schedule published, not con"):
        TrainConfig(data="d", out="o", schedule="constant", milestones=[3]).validate()
