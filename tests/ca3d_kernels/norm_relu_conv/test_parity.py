"""ReLU + batch normalisation (+ residual) (+ convolution), every backend against float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_cases import threads
from step_cases import assert_same_bits, ulps_apart
from torch import Tensor

from ca3d_kernels import backends, norm_relu, norm_relu_conv

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
BACKENDS = ("cpu", "reference")
# (N, C, H, W): channels that fill vectors or don't, maps of one pixel, rows that don't fold.
SHAPES = ((2, 16, 4, 5), (3, 3, 7, 5), (5, 5, 1, 1), (2, 1, 3, 3), (2, 70, 3, 1), (1, 4, 1, 2))
LARGE = (8, 24, 40, 41)  # several tasks for each thread


def operands(shape: tuple[int, ...], seed: int = 0, offset: float = 0.3) -> dict[str, Tensor]:
    """y, weight, bias, residual and a gradient, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    return {
        "y": normal(*shape) + offset,
        "weight": normal(shape[1]),
        "bias": normal(shape[1]),
        "residual": normal(*shape),
        "grad": normal(*shape),
    }


def plain(x: dict[str, Tensor], relu: bool, residual: bool) -> Tensor:
    """The same in torch's own operations."""
    y = F.relu(x["y"]) if relu else x["y"]
    z = F.batch_norm(y, None, None, x["weight"], x["bias"], True, 0.0, 1e-5)
    return z + x["residual"] if residual else z


def results(
    x: dict[str, Tensor], relu: bool, residual: bool, backend: str | None
) -> dict[str, Tensor]:
    """z and all gradients; of `plain` without a backend."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in x.items() if name != "grad"}
    if backend is None:
        z = plain(leaves, relu, residual)
    else:
        summand = leaves["residual"] if residual else None
        arguments = leaves["y"], leaves["weight"], leaves["bias"], summand
        z = norm_relu(*arguments, relu=relu, backend=backend).z
    z.backward(x["grad"])
    found = {name: t.grad for name, t in leaves.items() if t.grad is not None}
    return {"z": z.detach(), **found}


def cast(x: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        name: t.to(dtype).contiguous(memory_format=torch.channels_last) if t.dim() == 4
        else t.to(dtype) for name, t in x.items()
    }  # fmt: skip


def assert_right(actual: Tensor, exact: Tensor, peer: Tensor, name: str) -> None:
    """The policy of CONTRIBUTING.md. In float64 the oracle has roundings of its own."""
    assert actual.dtype == peer.dtype, name
    largest = exact.abs().max()
    if peer.dtype == torch.float64:
        assert (actual - exact).abs().max() <= 1e-12 * largest, name
        return
    bound = 2 * (peer.double() - exact).abs().max() + 2 * torch.finfo(peer.dtype).eps * largest
    assert (actual.double() - exact).abs().max() <= bound, name
    if name == "z" and peer.dtype in (torch.float16, torch.bfloat16):
        # z is made of one rounding; near zero float32 can't tell more than this.
        near = ulps_apart(actual, exact.to(peer.dtype)) <= 1
        tiny = (actual.double() - exact).abs() <= 4 * torch.finfo(torch.float32).eps * largest
        assert (near | tiny).double().mean() >= 0.999


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_normalisation(
    backend: str, dtype: torch.dtype, shape: tuple[int, ...], relu: bool, residual: bool
) -> None:
    x = cast(operands(shape), dtype)
    exact = results(cast(x, torch.float64), relu, residual, None)
    peer, ours = results(x, relu, residual, None), results(x, relu, residual, backend)
    assert ours.keys() == exact.keys()
    for name, value in ours.items():
        assert_right(value, exact[name], peer[name], name)


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows(dtype: torch.dtype, offset: float) -> None:
    """Sums over many rows, with a mean far from 0 as well."""
    x = cast(operands(LARGE, offset=offset), dtype)
    exact = results(cast(x, torch.float64), True, True, None)
    peer, ours = results(x, True, True, None), results(x, True, True, "cpu")
    for name, value in ours.items():
        assert_right(value, exact[name], peer[name], name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bitwise_the_same_for_any_number_of_threads(dtype: torch.dtype) -> None:
    x = cast(operands(LARGE), dtype)
    with threads(1):
        one = results(x, True, True, "cpu")
    for count in (2, 3, 7):
        with threads(count):
            for name, value in results(x, True, True, "cpu").items():
                assert_same_bits(value, one[name], name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_channels_and_statistics(backend: str) -> None:
    y = torch.full((4, 3, 2, 2), -1.0)
    y[:, 1] = 2.0
    z, mean, variance = norm_relu(y, torch.ones(3), torch.zeros(3), backend=backend)
    assert torch.equal(mean, torch.tensor([0.0, 2.0, 0.0], dtype=torch.float64))
    assert torch.equal(variance, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(z, torch.zeros_like(z))


def layouts(x: Tensor) -> list[Tensor]:
    """The same values with other strides."""
    wide = torch.empty(*x.shape[:3], 2 * x.shape[3], dtype=x.dtype)[..., ::2].copy_(x)
    return [x.contiguous(), x.transpose(2, 3).contiguous().transpose(2, 3), wide]


def test_any_layout() -> None:
    x = cast(operands((2, 6, 5, 4)), torch.float32)
    expected = norm_relu(x["y"], x["weight"], x["bias"], x["residual"]).z
    for y, residual in zip(layouts(x["y"]), layouts(x["residual"]), strict=True):
        z = norm_relu(y, x["weight"], x["bias"], residual).z
        assert_same_bits(z, expected)
        assert z.is_contiguous(memory_format=torch.channels_last)


CONVOLUTIONS: tuple[tuple[tuple[int, ...], dict[str, Any]], ...] = (
    ((8, 6, 3, 3), {"padding": 1}),
    ((4, 6, 3, 3), {"stride": 2, "padding": 1}),
    ((6, 3, 3, 1), {"padding": (1, 0), "groups": 2}),
    ((5, 6, 1, 1), {}),
    ((6, 1, 2, 3), {"stride": (2, 1), "groups": 6}),
)


def convolved(
    x: dict[str, Tensor], options: dict[str, Any], residual: bool, backend: str | None
) -> dict[str, Tensor]:
    leaves = {name: t.detach().clone().requires_grad_() for name, t in x.items()}
    summand = leaves["residual"] if residual else None
    if backend is None:
        z = plain(leaves, True, residual)
        output = F.conv2d(z, leaves["conv_weight"], leaves["conv_bias"], **options)
    else:
        output, found, *_ = norm_relu_conv(
            *(leaves[name] for name in ("y", "weight", "bias", "conv_weight", "conv_bias")),
            summand,
            **options,
            return_z=True,
            backend=backend,
        )
        assert found is not None
        z = found
    wave = torch.arange(output.numel(), dtype=torch.float64).sin().view(output.shape)
    (output * wave.to(output.dtype)).sum().add((z * leaves["grad"]).sum()).backward()
    del leaves["grad"]
    found = {name: t.grad for name, t in leaves.items() if t.grad is not None}
    return {"output": output.detach(), "z": z.detach(), **found}


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("kernel", "options"), CONVOLUTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_with_a_convolution(
    backend: str,
    dtype: torch.dtype,
    kernel: tuple[int, ...],
    options: dict[str, Any],
    residual: bool,
) -> None:
    x = operands((3, 6, 5, 4))
    x["conv_weight"] = torch.randn(kernel, dtype=torch.float64)
    x["conv_bias"] = torch.randn(kernel[0], dtype=torch.float64)
    x = cast(x, dtype)
    exact = convolved(cast(x, torch.float64), options, residual, None)
    peer, ours = (convolved(x, options, residual, b) for b in (None, backend))
    assert ours.keys() == exact.keys()
    for name, value in ours.items():
        assert_right(value, exact[name], peer[name], name)


def test_every_instruction_set_agrees() -> None:
    native = backends.native()
    assert native is not None
    x = cast(operands(LARGE), torch.float32)
    exact = results(cast(x, torch.float64), True, True, None)
    peer = results(x, True, True, None)
    before = native.isa()
    try:
        for isa in native.isas():
            native.set_isa(isa)
            for name, value in results(x, True, True, "cpu").items():
                assert_right(value, exact[name], peer[name], name)
    finally:
        native.set_isa(before)
