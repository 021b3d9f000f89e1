"""Every backend against the definition in float64, over shapes, values, dtypes and layouts."""

import pytest
import torch
import torch.nn.functional as F
from attention_cases import assert_rounded, errors, threads
from norm_cases import (
    DTYPES,
    EPS,
    PARAMETERS,
    Problem,
    backends_here,
    by_definition,
    check,
    operands,
    run,
)
from pairwise import pairwise_cases

from ca3d_kernels import norm_relu, norm_relu_conv
from ca3d_kernels.norm_relu_conv import reference

pytestmark = pytest.mark.parametrize("backend", backends_here())
dtype_parameter = pytest.mark.parametrize("dtype", DTYPES, ids=str)

PAIRWISE = [Problem(**case) for case in pairwise_cases(PARAMETERS)]
assert len(PAIRWISE) <= 300


@pytest.mark.parametrize("problem", PAIRWISE, ids=str)
def test_every_pair_of_options(problem: Problem, backend: str) -> None:
    check(problem, backend)


@dtype_parameter
def test_two_values_a_channel(dtype: torch.dtype, backend: str) -> None:
    """Their normalised values are -1 and 1 but for eps, and next to nothing is left of a gradient:
    its error is that of the terms that cancel."""
    problem = Problem((1, 8, 1, 2), dtype, relu=False)
    (z, _, _, gradient, *_), (y, weight, bias, _, grad) = run(problem, backend)
    exact = by_definition(problem, y, weight, bias, None, grad)
    eps = torch.finfo(dtype).eps
    assert (z - exact[0]).abs().max() <= 4 * eps * exact[0].abs().max()
    deviation = y.double().var((0, 2, 3), correction=0).add(EPS).sqrt()
    terms = (grad.abs().double() * (weight / deviation)[:, None, None]).amax((0, 2, 3))
    assert ((gradient - exact[1]).abs().amax((0, 2, 3)) <= 16 * eps * terms).all()


CONVOLUTIONS = [
    {"kernel": (3, 3), "padding": 1},
    {"kernel": (7, 7), "padding": 3, "stride": 2, "relu": False},
    {"kernel": (3, 1), "padding": (1, 0), "groups": 4, "residual": True},
    {"kernel": (1, 1), "groups": 2, "bias": False},
    {"kernel": (2, 3), "stride": (1, 2), "residual": True, "relu": False},
]


def convolution_results(
    dtype: torch.dtype, options: dict, backend: str, workers: int = 2
) -> tuple[list[torch.Tensor], list[torch.Tensor], dict]:
    """Results of a step and its operands; `z` and `output` come first, then the gradients."""
    options = dict(options)
    kernel, groups = options.pop("kernel"), options.get("groups", 1)
    with_residual, with_bias = options.pop("residual", False), options.pop("bias", True)
    problem = Problem((2, 8, 9, 8), dtype, residual=with_residual)
    y, weight, bias, residual, _ = operands(problem)
    conv_weight = torch.randn(12, 8 // groups, *kernel).to(dtype)
    conv_bias = torch.randn(12).to(dtype) if with_bias else None
    leaves = [
        None if x is None else x.detach().requires_grad_()
        for x in (y, weight, bias, conv_weight, conv_bias, residual)
    ]
    with threads(workers):
        step = norm_relu_conv(*leaves, **options, return_z=True, backend=backend)
        grads = [torch.randn_like(step.output), torch.randn_like(step.z)]
        wanted = [x for x in leaves if x is not None]
        gradients = torch.autograd.grad((step.output, step.z), wanted, grads)
    results = [step.z.detach(), step.output.detach(), *gradients]
    return results, [*leaves, *grads], options


def plain_step(operands: list, options: dict, dtype: torch.dtype) -> list[torch.Tensor]:
    """The same by torch's own operations in a dtype."""
    values = [None if x is None else x.detach().to(dtype) for x in operands]
    *leaves, grad, grad_z = values
    leaves = [None if x is None else x.requires_grad_() for x in leaves]
    y, weight, bias, conv_weight, conv_bias, residual = leaves
    options = {"relu": True, **options}
    x = F.relu(y) if options.pop("relu") else y
    z = F.batch_norm(x, None, None, weight, bias, training=True)
    z = z if residual is None else z + residual
    output = F.conv2d(z, conv_weight, conv_bias, **options)
    wanted = [x for x in leaves if x is not None]
    gradients = torch.autograd.grad((output, z), wanted, (grad, grad_z))
    return [z.detach(), output.detach(), *gradients]


@dtype_parameter
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_convolution(options: dict, dtype: torch.dtype, backend: str) -> None:
    results, inputs, rest = convolution_results(dtype, options, backend)
    exact = plain_step(inputs, rest, torch.float64)
    for i, (ours, same, truth) in enumerate(
        zip(results, plain_step(inputs, rest, dtype), exact, strict=True)
    ):
        error, torch_error, largest = errors(ours, same, truth)
        # In float64 the truth is rounded itself.
        roundings = 64 if dtype == torch.float64 else 2
        limit = 2 * torch_error + roundings * torch.finfo(dtype).eps * largest
        assert error <= limit, f"result {i}: error {error:.3g}, allowed {limit:.3g}"
    if dtype in (torch.float16, torch.bfloat16):
        # What is convolved is the rounded z.
        z, output = results[:2]
        conv_weight, conv_bias = (None if x is None else x.double() for x in inputs[3:5])
        rest.pop("relu", None)
        assert_rounded("output", output, F.conv2d(z.double(), conv_weight, conv_bias, **rest))


@dtype_parameter
def test_z_is_the_same_with_and_without_a_convolution(dtype: torch.dtype, backend: str) -> None:
    y, weight, bias, _, _ = operands(Problem((2, 8, 9, 8), dtype))
    conv_weight = torch.randn(4, 8, 3, 3).to(dtype)
    alone = norm_relu(y, weight, bias, backend=backend)
    with_z = norm_relu_conv(y, weight, bias, conv_weight, return_z=True, backend=backend)
    without = norm_relu_conv(y, weight, bias, conv_weight, backend=backend)
    assert torch.equal(alone.z, with_z.z)
    assert torch.equal(alone.mean, with_z.mean)
    assert torch.equal(without.output, with_z.output)
    assert without.z is None


@dtype_parameter
@pytest.mark.parametrize("shape", [(8, 64, 28, 28), (16, 3, 40, 41), (8, 512, 5, 5)], ids=str)
def test_same_bits_for_any_number_of_threads(
    shape: tuple[int, ...], dtype: torch.dtype, backend: str
) -> None:
    runs = []
    for workers in (1, 2, 3):
        torch.manual_seed(1)
        runs.append(run(Problem(shape, dtype, residual=True), backend, workers)[0])
    for other in runs[1:]:
        # torch's own reductions, which the reference is made of, promise no order.
        if backend == "reference":
            torch.testing.assert_close(runs[0], other)
        else:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@dtype_parameter
def test_operands_are_not_written(dtype: torch.dtype, backend: str) -> None:
    problem = Problem((2, 8, 9, 8), dtype, residual=True)
    y, weight, bias, residual, grad = operands(problem)
    before = [x.clone() for x in (y, weight, bias, residual, grad)]
    leaves = [x.requires_grad_() for x in (y, weight, bias, residual)]
    conv_weight = torch.randn(8, 8, 1, 1).to(dtype)
    step = norm_relu_conv(*leaves[:3], conv_weight, None, residual, backend=backend, return_z=True)
    last = norm_relu(step.output, weight, bias, step.z, backend=backend)
    torch.autograd.grad(last.z, leaves, grad)
    for x, y in zip((*leaves, grad), before, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("relu", [False, True])
def test_statistics_are_accurate(relu: bool, backend: str) -> None:
    """At the size of a training step's first block, where sums one by one are off by 1e-3."""
    y = torch.randn(64, 16, 56, 56).mul_(2).add_(1).contiguous(memory_format=torch.channels_last)
    one = torch.ones(16)
    with torch.no_grad():
        _, mean, variance = norm_relu(y, one, one, relu=relu, backend=backend)
    exact = y.double().relu() if relu else y.double()
    torch.testing.assert_close(mean, exact.mean((0, 2, 3)), rtol=2e-6, atol=0)
    torch.testing.assert_close(variance, exact.var((0, 2, 3), correction=0), rtol=2e-6, atol=0)


def test_statistics_survive_a_huge_mean(backend: str) -> None:
    y = (torch.randn(8, 4, 16, 16) + 1e5).contiguous(memory_format=torch.channels_last)
    one = torch.ones(4)
    _, mean, variance = norm_relu(y, one, one, backend=backend)
    exact = y.double()
    torch.testing.assert_close(mean, exact.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance, exact.var((0, 2, 3), correction=0), rtol=1e-3, atol=0)


@dtype_parameter
def test_nan_and_infinity_stay_in_their_channel(dtype: torch.dtype, backend: str) -> None:
    y = torch.randn(2, 5, 4, 4).to(dtype)
    y[0, 1, 0, 0], y[1, 3, 2, 2] = torch.nan, torch.inf
    one = torch.ones(5)
    z = norm_relu(y, one, one, backend=backend).z
    assert z.isnan().flatten(2).any(2).any(0).tolist() == [False, True, False, True, False]
    expected = reference.norm_relu(y, one, one)
    assert torch.equal(z.isnan(), expected.isnan())


def test_layout_of_the_results(backend: str) -> None:
    for shape in ((2, 8, 5, 4), (2, 1, 5, 4), (4, 8, 1, 1), (1, 8, 5, 4)):
        y = torch.randn(shape, requires_grad=True)
        one = torch.ones(shape[1])
        step = norm_relu_conv(
            y, one, one, torch.randn(4, shape[1], 1, 1), return_z=True, backend=backend
        )
        for x in (step.output, step.z):
            assert x.is_contiguous(memory_format=torch.channels_last)
        (gradient,) = torch.autograd.grad(step.output.sum(), y)
        assert gradient.is_contiguous(memory_format=torch.channels_last)
