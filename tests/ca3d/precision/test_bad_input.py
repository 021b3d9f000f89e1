"""What a regime does about numbers it can't store, and dtypes and state that aren't its own."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_videos import TINY, make_folder
from torch import Tensor, nn

from ca3d import models, precision
from ca3d.errors import UserError
from ca3d.training import TrainConfig, TrainResult, train

EVERY = pytest.mark.parametrize("name", precision.names())


@pytest.fixture(scope="module")
def bars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("data") / "bars", videos=6)


def run(bars: Path, out: Path, **options: Any) -> TrainResult:
    common = {**TINY, "data": str(bars), "out": str(out), "progress": "none", "epochs": 2}
    return train(TrainConfig(**{**common, **options}))


@EVERY
def test_a_loss_that_is_not_finite_is_skipped_and_counted(
    name: str, bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    regime = type(precision.create(name))
    original, calls = regime.loss, 0

    def sometimes_infinite(self: Any, logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
        nonlocal calls
        loss = original(self, logits, labels, **options)
        if not torch.is_grad_enabled():
            return loss
        calls += 1
        return loss * math.inf if calls == 2 else loss

    monkeypatch.setattr(regime, "loss", sometimes_infinite)
    result = run(bars, tmp_path / "run", precision=name, epochs=1)
    assert result.skipped == 1
    assert result.steps + result.skipped == calls
    for value in load_file(tmp_path / "run" / "last.safetensors").values():
        assert value.isfinite().all()


@EVERY
def test_training_stops_and_names_the_layer_that_overflowed(
    name: str, bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = models.create_for_clips

    def broken(*args: Any, **options: Any) -> nn.Module:
        model = create(*args, **options)
        with torch.no_grad():
            model.get_submodule("layers.spatial2.conv").weight.fill_(math.nan)
        return model

    monkeypatch.setattr(models, "create_for_clips", broken)
    with pytest.raises(UserError, match=r"2 steps in a row .*layers.spatial2.conv overflowed"):
        run(bars, tmp_path / "run", precision=name, max_skipped=2)


def test_an_overflow_on_the_way_back_is_named(
    bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = precision.Float16.backward
    monkeypatch.setattr(
        precision.Float16, "backward", lambda self, loss: original(self, loss * 1e6)
    )
    with pytest.raises(UserError, match=r"2 steps in a row .*the gradient of classifier"):
        run(bars, tmp_path / "run", precision="float16", max_skipped=2)


@EVERY
def test_clips_of_bytes_are_refused(name: str) -> None:
    regime = precision.create(name)
    model = regime.prepare(models.create("ca3d_tiny", num_classes=2, frames=4)).eval()
    with pytest.raises(TypeError, match="must be a floating-point tensor"):
        regime.forward(model, torch.zeros(2, 3, 4, 32, 32, dtype=torch.uint8))


@EVERY
def test_weights_of_another_dtype_are_converted(name: str) -> None:
    regime = precision.create(name)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        layer = nn.Linear(2, 2).to(dtype)
        expected = layer.weight.detach().clone()
        stored = regime.prepare(layer).weight
        assert stored.dtype == precision.create(name).prepare(nn.Linear(2, 2)).weight.dtype
        assert torch.equal(stored, expected.to(stored.dtype))


def test_weights_beyond_float16_are_refused() -> None:
    layer = nn.Linear(2, 2)
    nn.init.constant_(layer.bias, 1e5)
    with pytest.raises(UserError, match=r"bias holds values up to 1e\+05, and float16 holds none"):
        precision.create("float16").prepare(layer)


def test_lazy_modules_are_named() -> None:
    with pytest.raises(UserError, match=r"1\.weight has no values yet .*precision float16"):
        precision.create("float16").prepare(nn.Sequential(nn.Flatten(), nn.LazyLinear(3)))


def optimizer(name: str) -> torch.optim.Optimizer:
    regime = precision.create(name)
    layer = regime.prepare(nn.Linear(2, 2))
    made = regime.optimizer("sgd", layer.parameters(), lr=0.1)
    regime.backward(regime.forward(layer, torch.ones(1, 2)).sum())
    assert regime.step(made, list(layer.parameters())).applied
    return made


# Regimes that store the same may go on from each other's state.
KINDS = ("float32", "float16", "raw-float16", "float16-published", "float16-sqr", "qat")


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("other", KINDS)
def test_optimizer_state_of_another_regime_is_refused(name: str, other: str) -> None:
    mine, state = optimizer(name), optimizer(other).state_dict()
    if name == other:
        mine.load_state_dict(state)
        return
    with pytest.raises(ValueError, match=r"state_dict (holds pre-parameters of|is not one of)"):
        mine.load_state_dict(state)
