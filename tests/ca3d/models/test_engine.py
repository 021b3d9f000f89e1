"""CA3D's engine under other models: the same results, in training and folded for inference."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ca3d import precision
from ca3d.models import create
from ca3d.models.engine import ClipConv, ClipNorm, folded, is_convolutional, same_engine

SMALL: dict[str, dict[str, Any]] = {
    "r3d_tiny": {"depths": (1, 1, 1, 1)},
    "r2plus1d_tiny": {"depths": (1, 1, 1, 1)},
    "i3d_tiny": {"width": 1 / 16, "dropout": 0.0},
    "x3d_tiny": {"depth": 1.0, "dropout": 0.0},
}


def channels_last(clip: Tensor) -> Tensor:
    return clip.contiguous(memory_format=torch.channels_last_3d)


def trained(name: str) -> nn.Module:
    """With running statistics and affine parameters that are not those of the start."""
    model = create(name, 3, frames=8, **SMALL[name])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.double()


@pytest.mark.parametrize("name", SMALL)
def test_same_results(name: str) -> None:
    model = trained(name)
    ours = same_engine(copy.deepcopy(model))
    assert ours.state_dict().keys() == model.state_dict().keys()
    clip = torch.randn(2, 3, 8, 32, 32, dtype=torch.float64)
    results = []
    for network, x in ((model, clip), (ours, channels_last(clip))):
        logits = network.train()(x)
        gradients = torch.autograd.grad(logits.square().sum(), list(network.parameters()))
        with torch.no_grad():
            results.append([logits, *gradients, network.eval()(x), *network.buffers()])
    for theirs, mine in zip(*results, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-6, atol=1e-8)
    kinds = {type(m) for m in ours.modules()}
    assert ClipNorm in kinds
    assert not kinds & {nn.BatchNorm3d, nn.Conv3d}


@pytest.mark.parametrize("name", SMALL)
def test_folding(name: str) -> None:
    model = same_engine(trained(name).float())
    clip = channels_last(torch.randn(2, 3, 8, 32, 32))
    ours = folded(model)
    assert model.training
    assert not any(isinstance(m, ClipNorm) for m in ours.modules())
    with torch.no_grad():
        expected = model.eval()(clip)
        assert torch.allclose(ours(clip), expected, rtol=1e-3, atol=1e-4 * expected.abs().max())


def test_half_precision() -> None:
    regime = precision.create("float16")
    model = regime.prepare(same_engine(create("r2plus1d_tiny", 3, frames=8)))
    clip = channels_last(torch.randn(2, 3, 8, 32, 32))
    regime.backward(regime.loss(regime.forward(model, clip), torch.tensor([0, 1])))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        logits = regime.forward(folded(model), clip)
    assert logits.dtype == torch.float16
    assert torch.allclose(logits, regime.forward(model.eval(), clip), atol=0.02)


def test_ca3d_is_left_as_it_is() -> None:
    model = create("ca3d_tiny", 3).eval()
    clip = torch.randn(1, 3, 16, 32, 32)
    with torch.no_grad():
        expected = model(clip)
        assert torch.equal(same_engine(model)(clip), expected)
        assert torch.equal(folded(model)(clip), expected)


@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        ((1, 3, 3), {"stride": (1, 2, 2), "padding": (0, 1, 1), "bias": False}),
        ((3, 1, 1), {"stride": (2, 1, 1), "padding": (1, 0, 0), "groups": 2}),
        ((1, 1, 1), {"stride": 2}),
        ((1, 3, 3), {"padding": "same"}),
        ((3, 3, 3), {"padding": 1, "padding_mode": "circular"}),
    ],
)
def test_convolutions(kernel: tuple[int, int, int], options: dict[str, Any]) -> None:
    ours = ClipConv(4, 6, kernel, **options)
    plain = nn.Conv3d(4, 6, kernel, **options)
    plain.load_state_dict(ours.state_dict())
    clip = torch.randn(2, 4, 6, 9, 8)
    expected = plain(clip)
    for x in (clip, channels_last(clip)):
        assert torch.allclose(ours(x), expected, atol=1e-6)


def test_what_is_convolutional() -> None:
    assert is_convolutional(create("x3d_tiny", 3))
    assert not is_convolutional(create("swin3d_tiny", 3))
