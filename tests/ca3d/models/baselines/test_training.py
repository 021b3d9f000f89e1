"""Every model in every regime of the comparison: two steps, an evaluation, a weights file."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ca3d import precision, weights
from ca3d.models import create, decay_groups, recipe
from ca3d.training.fine_tuning import initialize_from

FRAMES, SIZE = 8, 16

# The paper's eleven models (and its R(2+1)D of 15 million parameters), at most 64 channels wide.
MODELS: dict[str, dict[str, Any]] = {
    "ca3d": {"widths": (4, 8, 16, 32)},
    "ca3d_l": {"widths": (4, 8, 16, 32)},
    "r3d_18": {"widths": (4, 8, 16, 32)},
    "r2plus1d_18": {"widths": (4, 8, 16, 32)},
    "r2plus1d_18_15m": {"widths": (4, 8, 16, 32)},
    "i3d": {"width": 1 / 16},
    "x3d_xl": {"width": 0.6, "depth": 1.0, "head_width": 64},
    "stam_b": {"width": 24, "depth": 2, "heads": 3, "patch": 8, "temporal_depth": 1,
               "temporal_heads": 2, "temporal_hidden": 48},
    "timesformer_b": {"width": 24, "depth": 2, "heads": 3, "patch": 8},
    "vivit_2": {"width": 24, "depth": 2, "heads": 3, "patch": 8, "temporal_depth": 1,
                "temporal_heads": 2},
    "swin3d_t": {"width": 12, "depths": (2, 2), "heads": (3, 6), "window": (2, 2, 2)},
    "tubevit_b": {"width": 24, "depth": 2, "heads": 3, "patch": 8},
}  # fmt: skip


def small(name: str, num_classes: int = 3) -> nn.Module:
    size = {} if name.startswith("ca3d") else {"size": SIZE}
    return create(name, num_classes, frames=FRAMES, **size, **MODELS[name])


@pytest.mark.parametrize("regime_name", ["float32", "qat", "float16"])
@pytest.mark.parametrize("name", MODELS)
def test_trains_and_evaluates(name: str, regime_name: str) -> None:
    regime = precision.create(regime_name)
    model = regime.prepare(small(name)).train()
    clips, labels = torch.randn(2, 3, FRAMES, SIZE, SIZE), torch.tensor([0, 2])
    optimizer = regime.optimizer(
        "sgd", decay_groups(model), lr=1e-3, weight_decay=recipe(name).weight_decay
    )
    before = model.classifier.weight.detach().clone()
    for _ in range(2):
        loss = regime.loss(regime.forward(model, clips), labels)
        assert loss.isfinite()
        regime.backward(loss)
        assert all(p.grad is not None for p in model.parameters())
        assert regime.step(optimizer, list(model.parameters())).applied
    assert not torch.equal(model.classifier.weight, before)
    with torch.no_grad():
        logits = regime.forward(model.eval(), clips)
    assert logits.shape == (2, 3)
    assert logits.isfinite().all()
    assert logits.dtype == (torch.float32 if regime_name == "float32" else torch.float16)


@pytest.mark.parametrize("name", MODELS)
def test_a_weights_file_rebuilds_it(name: str, tmp_path: Path) -> None:
    model, file = small(name).eval(), tmp_path / "model.safetensors"
    info = weights.ModelInfo(model.name, model.options, classes=("a", "b", "c"), frames=FRAMES)
    weights.save(file, model, info)
    rebuilt, found = weights.load(file)
    assert found.options == model.options
    clip = torch.randn(1, 3, FRAMES, SIZE, SIZE)
    with torch.no_grad():
        assert torch.equal(rebuilt(clip), model(clip))
    # Another set of classes: all weights but the classifier's are taken over.
    other = small(name, num_classes=4)
    initialize_from(other, ("c", "x", "y", "z"), file)
    theirs = model.state_dict()
    for key, value in other.state_dict().items():
        if not key.startswith("classifier."):
            assert torch.equal(value, theirs[key]), key
    assert torch.equal(other.classifier.weight[0], model.classifier.weight[2])


@pytest.mark.parametrize("name", MODELS)
def test_weight_decay_by_the_published_recipe(name: str) -> None:
    model = small(name)
    tokens = {"stam_b": 4, "timesformer_b": 3, "vivit_2": 4, "tubevit_b": 1}
    groups = decay_groups(model)
    apart = [len(group["params"]) for group in groups if group.get("weight_decay") == 0]
    assert sum(apart) == tokens.get(name, 0)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    high = ("ca3d", "r3d", "r2plus1d", "x3d")
    assert recipe(name).weight_decay == (5e-3 if name.startswith(high) else 5e-4)


def test_a_frozen_parameter_is_in_no_group() -> None:
    model = small("vivit_2")
    for parameter in model.features.parameters():
        parameter.requires_grad_(False)
    assert [len(group["params"]) for group in decay_groups(model)] == [2]
