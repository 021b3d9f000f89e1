"""Batch normalisation: torch's results, better statistics, the same derivatives of every order."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ca3d.models.norm import BatchNorm, fuses, normalise, normalise_and_convolve

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
    assert ours.by_kernel(x)
    results = []
    for norm in (ours, torchs):
        # The product stands for the convolution whose output is overwritten.
        leaf = x.clone().requires_grad_()
        before = leaf * 1.0
        if norm is ours:
            y = normalise(before, ours) if relu else ours(before)
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


def test_running_statistics_are_accurate() -> None:
    """At the size of a training step's first block, where torch's kernel is off by 1e-3."""
    x = channels_last(64, 16, 56, 56, dtype=torch.float32)
    norm = BatchNorm(16, momentum=1.0)
    norm(x, relu=True)
    exact = x.double().relu()
    expected = exact.mean((0, 2, 3)).float(), exact.var((0, 2, 3)).float()
    torch.testing.assert_close(norm.running_mean, expected[0], rtol=2e-6, atol=0)
    torch.testing.assert_close(norm.running_var, expected[1], rtol=2e-6, atol=0)


@pytest.mark.parametrize("relu", [False, True])
def test_derivatives(relu: bool) -> None:
    norm = BatchNorm(2, track_running_stats=False).double()

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        step = partial(normalise, norm=norm) if relu else norm
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
    torch.testing.assert_close(normalise(x.clone(), nn.BatchNorm2d(4)), expected)


def test_frozen_normalisation() -> None:
    norm = BatchNorm(4).eval()
    before = copy.deepcopy(norm.state_dict())
    y = normalise(channels_last(2, 4, 3, 3, dtype=torch.float32).requires_grad_() * 1.0, norm)
    y.sum().backward()
    assert all(torch.equal(before[k], v) for k, v in norm.state_dict().items())


def conv_and_norm(dtype: torch.dtype = torch.float64) -> tuple[nn.Conv2d, BatchNorm]:
    conv = nn.Conv2d(4, 6, 3, 2, 1, groups=2).to(memory_format=torch.channels_last)
    return conv.to(dtype), BatchNorm(4).to(dtype)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("return_z", [False, True])
def test_fused_step_equals_the_modules(relu: bool, residual: bool, return_z: bool) -> None:
    conv, norm = conv_and_norm()
    twins = copy.deepcopy((conv, norm))
    twins[1].register_forward_hook(lambda *_: None)  # a hook makes it run module by module
    inputs = [channels_last(2, 4, 5, 6), channels_last(2, 4, 5, 6)]
    results = []
    for c, n in ((conv, norm), twins):
        y, x = (i.clone().requires_grad_() for i in inputs)
        assert fuses(y, n, c) == (n is norm)
        output, z = normalise_and_convolve(
            y * 1.0, n, c, x if residual else None, relu=relu, return_z=return_z
        )
        assert (z is not None) == return_z
        loss = output.sin().sum() + (0 if z is None else z.cos().sum())
        loss.backward()
        gradients = [y.grad, x.grad, *(p.grad for m in (n, c) for p in m.parameters())]
        buffers = [b.double() for b in n.buffers()]
        results.append([output, z, *gradients, *buffers])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_what_a_fused_step_keeps() -> None:
    conv, norm = conv_and_norm(torch.float32)
    y = channels_last(2, 4, 9, 8, dtype=torch.float32).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        normalise_and_convolve(y, norm, conv)
    assert [x.data_ptr() for x in kept if x.dim() == 4] == [y.data_ptr(), conv.weight.data_ptr()]
    assert all(x.numel() <= 4 for x in kept if x.dim() < 4)


def test_only_plain_modules_are_fused() -> None:
    conv, norm = conv_and_norm(torch.float32)
    y = channels_last(2, 4, 9, 8, dtype=torch.float32)
    assert fuses(y, norm, conv)
    others = [
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, dilation=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 4, 3).double(),
        nn.Identity(),
    ]
    assert not any(fuses(y, norm, other) for other in others)
    assert not fuses(y, copy.deepcopy(norm).eval(), conv)
    assert not fuses(y, nn.BatchNorm2d(4), conv)
    assert not fuses(y.contiguous(), norm, conv)
    conv.register_forward_hook(lambda *_: None)
    assert not fuses(y, norm, conv)
    assert fuses(y, norm)
