"""The published model to rounding: outputs, features, loss and gradient norms of three models."""

import copy
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from published_weights import MODELS, config, golden, golden_model, state_dict
from torch import Tensor, nn

from ca3d.models import CA3D
from ca3d.models.norm import BatchNorm
from ca3d.models.published import entries, from_published

# The default run has CA3D throughout and the paper's pools in evaluation.
CASES = [pytest.param(case, marks=[pytest.mark.slow] * (case == "ca3d_l")) for case in MODELS]
STEPS = [pytest.param(case, marks=[pytest.mark.slow] * (case != "ca3d")) for case in MODELS]


@cache
def converted(case: str) -> tuple[CA3D, dict[str, Tensor]]:
    model = golden_model(case)
    return model, from_published(state_dict(model, config(case)["seed"]), model)


def loaded(case: str, dtype: torch.dtype) -> CA3D:
    model, state = converted(case)
    model = copy.deepcopy(model)
    model.load_state_dict(state)
    return model.to(dtype)


def clips(case: str, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(golden(case)["x"]).to(dtype)


def error(value: Tensor | np.ndarray, expected: np.ndarray) -> float:
    """Largest difference relative to the largest value."""
    return float(np.abs(np.asarray(value) - expected).max() / np.abs(expected).max())


def published_order(features: Tensor) -> Tensor:
    """Our features (B, C, ...) with the channels in the published order."""
    channels = features.shape[1]
    heads = {256: (0, 1, 2, 3), 512: (0, 4, 1, 5, 2, 6, 3, 7)}.get(channels, (0,))
    width = channels // len(heads)
    order = torch.tensor([i * len(heads) + head for head in heads for i in range(width)])
    return torch.empty_like(features).index_copy_(1, order, features)


def features(model: CA3D, clip: Tensor) -> list[Tensor]:
    """What leaves each item of the published model's list of layers."""
    found: list[Tensor] = []
    for name, layer in model.layers.items():
        # A dropout that never drops follows the positional table there.
        times = 2 if name == "position" else 1
        layer.register_forward_hook(lambda _, __, y, times=times: found.extend([y] * times))
    pooled: list[Tensor] = []
    model.head.norm.register_forward_hook(lambda _, x, y: pooled.extend([x[0], y, y]))
    with torch.no_grad():
        model(clip)
    return found + [x[:, :, None, None, None] for x in pooled]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("case", CASES)
def test_evaluation(case: str, dtype: torch.dtype, bound: float) -> None:
    model, expected = loaded(case, dtype).eval(), golden(case)
    found = features(model, clips(case, dtype))
    assert len(found) == len(expected["eval_feat_shape"]) == 13
    for i, feature in enumerate(found):
        assert str(tuple(feature.shape)) == expected["eval_feat_shape"][i]
        scale = np.abs(expected["eval_feat_head"][i]).max()
        head = published_order(feature).flatten()[:64].numpy()
        wanted = expected["eval_feat_head"][i][: len(head)]
        assert np.abs(head - wanted).max() < bound * scale, i
        assert abs(feature.mean().item() - expected["eval_feat_mean"][i]) < bound * scale, i
        std = feature.std().item()
        assert abs(std - expected["eval_feat_std"][i]) < bound * scale, i
    with torch.no_grad():
        assert error(model(clips(case, dtype)), expected["eval_logits"]) < bound


class Step:
    """Logits, loss and gradient norms of one training step, with their errors."""

    def __init__(self, case: str, dtype: torch.dtype, noise: float = 0.0) -> None:
        expected, model = golden(case), loaded(case, dtype).train()
        x = clips(case, dtype)
        logits = model(x * (1 + noise * torch.randn_like(x)))
        loss = F.cross_entropy(logits, torch.from_numpy(expected["labels"]))
        loss.backward()
        parameters = dict(model.named_parameters())
        norms = {
            e.published: parameters[e.ours].grad.norm().item()
            for e in entries(model)
            if e.ours in parameters
        }
        assert set(norms) == set(expected["param_names"])
        found = np.array([norms[name] for name in expected["param_names"]])
        wanted = expected["train_grad_norm"]
        # The shift of a normalisation whose only reader is another normalisation has no gradient.
        zero = wanted < 1e-9 * wanted.max()
        assert zero.sum() == 6
        self.logits = error(logits.detach(), expected["train_logits"])
        self.loss = abs(loss.item() / float(expected["train_loss"]) - 1)
        self.gradients = np.abs(found / wanted - 1)[~zero].max()
        self.zeros = found[zero].max() / wanted.max()


def torch_norm(self: BatchNorm, x: Tensor, relu: bool = False) -> Tensor:
    """Batch normalisation by torch's kernel for contiguous tensors, which made the golden file."""
    y = nn.BatchNorm2d.forward(self, (F.relu(x) if relu else x).contiguous())
    return y.contiguous(memory_format=torch.channels_last)


def use_torch_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BatchNorm, "forward", torch_norm)
    monkeypatch.setattr(BatchNorm, "by_kernel", lambda self, x: False)


@pytest.mark.parametrize("case", STEPS)
def test_training_step_with_the_same_normalisation_kernel(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The head normalises over a batch of two clips, which enlarges a rounding error of the features
    # a million times in the gradients: 1e-9 can be asked for only where the same kernel sums.
    use_torch_norm(monkeypatch)
    step = Step(case, torch.float64)
    assert max(step.logits, step.loss, step.gradients, step.zeros) < 1e-9


@pytest.mark.parametrize("case", STEPS)
def test_training_step(case: str) -> None:
    step = Step(case, torch.float64)
    assert max(step.logits, step.loss, step.zeros) < 1e-9
    if case == "ca3d":
        assert step.gradients < 1e-9


@pytest.mark.parametrize("case", STEPS)
def test_training_step_in_float32(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Step(case, torch.float32)
    assert max(ours.loss, ours.zeros) < 1e-4
    # Logits and gradients are as exact as the arithmetic of a batch of two allows: compared with
    # torch's own kernel at a few roundings of the input.
    use_torch_norm(monkeypatch)
    peers = [Step(case, torch.float32, noise) for noise in (0.0, 1e-7, 1e-7)]
    assert ours.logits < 2 * max(step.logits for step in peers) + 1e-4
    assert ours.gradients < 2 * max(step.gradients for step in peers) + 1e-4
