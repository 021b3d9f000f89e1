"""Batch normalisation: torch's results, better statistics, the same derivatives of every order."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ca3d.models.norm import BatchNorm, channel_statistics, relu_norm

SHAPES = [(4, 6, 8, 8), (3, 5, 7, 3), (1, 4, 1, 2), (2, 3, 1, 1), (16, 1, 5, 5), (2, 64, 16, 16)]


def channels_last(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(*shape, dtype=dtype) * 2 + 1
    return x.contiguous(memory_format=torch.channels_last)


def pair(channels: int, **options: float | None) -> tuple[BatchNorm, nn.BatchNorm2d]:
    ours = BatchNorm(channels, **options).double()  # type: ignore[arg-type]
    with torch.no_grad():
        ours.weight.uniform_(0.5, 1.5)
        ours.bias.normal_()
    torchs = nn.BatchNorm2d(channels, **options).double()  # type: ignore[arg-type]
    torchs.load_state_dict(ours.state_dict())
    return ours, torchs


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("relu", [False, True])
def test_equals_torch(shape: tuple[int, ...], relu: bool) -> None:
    ours, torchs = pair(shape[1])
    x = channels_last(*shape)
    assert ours._accurate(x)
    results = []
    for norm in (ours, torchs):
        # The product stands for the convolution whose output is overwritten.
        leaf = x.clone().requires_grad_()
        before = leaf * 1.0
        if norm is ours:
            y = relu_norm(before, ours) if relu else ours(before)
        else:
            y = norm(F.relu(before) if relu else before)
        y.mul(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        assert y.is_contiguous(memory_format=torch.channels_last)
        results.append([y.detach(), leaf.grad, norm.weight.grad, norm.bias.grad, *norm.buffers()])
    for ours_value, torchs_value in zip(*results, strict=True):
        torch.testing.assert_close(ours_value, torchs_value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("momentum", [0.3, None, 0.0, 1.0])
def test_running_statistics(momentum: float | None) -> None:
    ours, torchs = pair(3, momentum=momentum)
    for _ in range(3):
        x = channels_last(2, 3, 4, 4)
        ours(x), torchs(x)
    for a, b in zip(ours.buffers(), torchs.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(ours.eval()(x), torchs.eval()(x))


def test_without_running_statistics() -> None:
    ours, torchs = (
        BatchNorm(3, track_running_stats=False),
        nn.BatchNorm2d(3, track_running_stats=False),
    )
    x = channels_last(2, 3, 4, 4, dtype=torch.float32)
    for training in (True, False):
        torch.testing.assert_close(ours.train(training)(x), torchs.train(training)(x))


def test_statistics_are_accurate() -> None:
    """At the size of a training step's first block, where torch's kernel is off by 1e-3."""
    x = channels_last(64, 16, 56, 56, dtype=torch.float32).relu_()
    mean, variance = channel_statistics(x)
    exact = x.double()
    expected = exact.mean((0, 2, 3)), exact.var((0, 2, 3), correction=0)
    torch.testing.assert_close(mean, expected[0], rtol=2e-6, atol=0)
    torch.testing.assert_close(variance, expected[1], rtol=2e-6, atol=0)


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_statistics_survive_a_large_mean(offset: float) -> None:
    x = channels_last(8, 4, 16, 16, dtype=torch.float32) + offset
    mean, variance = channel_statistics(x)
    exact = x.double()
    torch.testing.assert_close(mean, exact.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance, exact.var((0, 2, 3), correction=0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("relu", [False, True])
def test_derivatives(relu: bool) -> None:
    norm = BatchNorm(2, track_running_stats=False).double()

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        step = partial(relu_norm, norm=norm) if relu else norm
        parameters = {"weight": weight, "bias": bias}
        with nn.utils.stateless._reparametrize_module(norm, parameters):
            return step(x * 1.0)

    x = channels_last(2, 2, 2, 2)
    x = torch.where(x.abs() < 0.1, 0.5, x).contiguous(memory_format=torch.channels_last)
    operands = [x, torch.rand(2).double() + 0.5, torch.randn(2).double()]
    operands = [operand.requires_grad_() for operand in operands]
    assert torch.autograd.gradcheck(run, operands)
    assert torch.autograd.gradgradcheck(run, operands)


def test_transforms_fall_back_to_torch() -> None:
    norm = BatchNorm(3, track_running_stats=False)
    x = channels_last(2, 3, 4, 4, dtype=torch.float32)
    _, tangent = torch.func.jvp(norm, (x,), (torch.ones_like(x),))
    assert tangent.abs().max() < 1e-4  # a shift of all values is normalised away
    per_sample = torch.func.vmap(norm)(torch.stack([x, x + 1]))
    torch.testing.assert_close(per_sample[1], norm(x), rtol=1e-4, atol=1e-4)
    gradient = torch.func.grad(lambda x: norm(x).square().sum())(x)
    assert gradient.shape == x.shape


def test_one_value_per_channel_is_an_error() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        BatchNorm(3)(torch.randn(1, 3, 1, 1))


def test_other_layouts_and_dtypes() -> None:
    ours = BatchNorm(3)
    torchs = copy.deepcopy(nn.BatchNorm2d(3))
    for x in (torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5).bfloat16()):
        torch.testing.assert_close(ours(x), torchs(x))


def test_it_is_torchs_class_for_others() -> None:
    norm = BatchNorm(4)
    assert isinstance(norm, nn.BatchNorm2d)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(norm))[0]
    assert isinstance(converted, nn.SyncBatchNorm)
    x = channels_last(2, 4, 3, 3, dtype=torch.float32)
    expected = nn.BatchNorm2d(4)(F.relu(x))
    torch.testing.assert_close(relu_norm(x.clone(), nn.BatchNorm2d(4)), expected)


def test_frozen_normalisation() -> None:
    norm = BatchNorm(4).eval()
    before = copy.deepcopy(norm.state_dict())
    y = relu_norm(channels_last(2, 4, 3, 3, dtype=torch.float32).requires_grad_() * 1.0, norm)
    y.sum().backward()
    assert all(torch.equal(before[k], v) for k, v in norm.state_dict().items())
