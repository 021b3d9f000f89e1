"""Problems and tolerances for tests of `norm_relu` and `norm_relu_conv` on any backend."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attention_cases import assert_rounded, errors, threads
from torch import Tensor

from ca3d_kernels import backends, norm_relu
from ca3d_kernels.norm_relu_conv import reference

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
EPS = 1e-5


@dataclass(frozen=True)
class Problem:
    """One normalisation; its tensors are drawn from the random state."""

    shape: tuple[int, ...] = (2, 16, 5, 4)
    dtype: torch.dtype = torch.float32
    relu: bool = True
    residual: bool = False
    values: str = "normal"
    layout: str = "channels-last"
    grad_layout: str = "channels-last"

    def __str__(self) -> str:
        default = Problem()
        changed = {
            name: value
            for name, value in vars(self).items()
            if value != getattr(default, name) or name == "dtype"
        }
        text = ",".join(f"{name}={value}" for name, value in changed.items())
        return text.replace("torch.", "").replace(" ", "")


PARAMETERS = {
    "shape": (
        (2, 1, 3, 3),
        (2, 3, 7, 5),
        (3, 5, 1, 1),
        (1, 8, 1, 5),
        (4, 16, 9, 9),
        (2, 24, 6, 7),
        (2, 33, 5, 5),
        (2, 64, 28, 28),
        (3, 200, 4, 4),
    ),
    "dtype": DTYPES,
    "relu": (True, False),
    "residual": (True, False),
    "values": ("normal", "shifted", "constant", "dead"),
    "layout": ("channels-last", "contiguous", "sliced", "expanded"),
    "grad_layout": ("channels-last", "contiguous", "sliced", "expanded"),
}


def backends_here() -> list:
    """The backends that can run CPU tensors in this process, as pytest parameters."""
    reasons = backends.explain("norm_relu_conv", "cpu")
    return [
        pytest.param(name, marks=pytest.mark.skipif(bool(reason), reason=f"{name}: {reason}"))
        for name, reason in reasons.items()
    ]


def with_layout(x: Tensor, layout: str) -> Tensor:
    """The values of x, (N, C, H, W), in the named strides.

    ``expanded`` repeats the first channel, so it changes the values.
    """
    if layout == "channels-last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "contiguous":
        return x.contiguous()
    if layout == "sliced":
        wide = torch.full([n + 3 for n in x.shape], torch.nan, dtype=x.dtype)
        view = wide.contiguous(memory_format=torch.channels_last)
        return view[tuple(slice(1, n + 1) for n in x.shape)].copy_(x)
    if layout == "expanded":
        return x[:, :1].contiguous().expand_as(x)
    raise ValueError(layout)


def operands(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """y, weight, bias, residual and the incoming gradient."""
    y = torch.randn(problem.shape, dtype=torch.float64)
    if problem.values == "shifted":
        y = y + (1e4 if problem.dtype == torch.float64 else 1e2)
    elif problem.values == "constant":
        y[:, ::2] = torch.randn(problem.shape[1], 1, 1, dtype=torch.float64)[::2]
    elif problem.values == "dead":
        y[:, ::2] = -y[:, ::2].abs()
    y = with_layout(y.to(problem.dtype), problem.layout)
    channels = problem.shape[1]
    weight, bias = torch.rand(channels).add(0.5), torch.randn(channels)
    residual = torch.randn(problem.shape).to(problem.dtype) if problem.residual else None
    if residual is not None:
        residual = with_layout(residual, problem.layout)
    grad = with_layout(torch.randn(problem.shape).to(problem.dtype), problem.grad_layout)
    return y, weight.to(problem.dtype), bias.to(problem.dtype), residual, grad


def run(problem: Problem, backend: str, workers: int = 2) -> tuple[list[Tensor], tuple]:
    """z, the statistics and the gradients of a backend, and the operands that they belong to."""
    inputs = operands(problem)
    *tensors, grad = inputs
    leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
    with threads(workers):
        result = norm_relu(*leaves, eps=EPS, relu=problem.relu, backend=backend)
        wanted = [x for x in leaves if x is not None]
        gradients = torch.autograd.grad(result.z, wanted, grad)
    return [result.z.detach(), result.mean, result.variance, *gradients], inputs


def by_torch(problem: Problem, *inputs: Tensor | None) -> list[Tensor]:
    """z and the gradients by torch's own operations, in the dtype of the operands."""
    *tensors, grad = inputs
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in tensors]
    y, weight, bias, residual = leaves
    x = F.relu(y) if problem.relu else y
    z = F.batch_norm(x, None, None, weight, bias, training=True, eps=EPS)
    z = z if residual is None else z + residual
    gradients = torch.autograd.grad(z, [x for x in leaves if x is not None], grad)
    return [z.detach(), *gradients]


def by_definition(problem: Problem, *inputs: Tensor | None) -> list[Tensor]:
    """z and the gradients by the reference in float64."""
    *tensors, grad = (None if x is None else x.detach().double() for x in inputs)
    leaves = [None if x is None else x.requires_grad_() for x in tensors]
    z = reference.norm_relu(*leaves, eps=EPS, relu=problem.relu)
    gradients = torch.autograd.grad(z, [x for x in leaves if x is not None], grad)
    return [z.detach(), *gradients]


def extended(problem: Problem, *inputs: Tensor | None) -> list[np.ndarray]:
    """z and the gradients in numpy's long double: the truth for float64 results."""
    values = [None if x is None else x.detach().numpy().astype(np.longdouble) for x in inputs]
    y, weight, bias, residual, grad = values
    x = np.maximum(y, 0) if problem.relu else y
    axes, count = (0, 2, 3), y.size // y.shape[1]
    centred = x - x.mean(axes, keepdims=True)
    deviation = np.sqrt(np.square(centred).mean(axes, keepdims=True) + np.longdouble(EPS))
    normalised, scale = centred / deviation, weight[:, None, None] / deviation
    z = normalised * weight[:, None, None] + bias[:, None, None]
    product = (grad * normalised).sum(axes, keepdims=True)
    inner = grad - grad.sum(axes, keepdims=True) / count - normalised * product / count
    dy = scale * inner * ((y > 0) if problem.relu else 1)
    gradients = [dy, product.ravel(), grad.sum(axes)]
    if residual is None:
        return [z, *gradients]
    return [z + residual, *gradients, grad]


def check(problem: Problem, backend: str) -> None:
    """Runs a problem, forward and backward, and holds the results to the project's policy."""
    results, inputs = run(problem, backend)
    del results[1:3]
    exact = (extended if problem.dtype == torch.float64 else by_definition)(problem, *inputs)
    names = ("z", "gradient of y", "of weight", "of bias", "of residual")
    for name, ours, same_dtype, truth in zip(
        names, results, by_torch(problem, *inputs), exact, strict=False
    ):
        error, torch_error, largest = errors(ours, same_dtype, truth)
        limit = 2 * torch_error + 2 * torch.finfo(ours.dtype).eps * largest
        assert error <= limit, f"{name}: error {error:.3g}, allowed {limit:.3g}"
        if problem.dtype in (torch.float16, torch.bfloat16):
            assert_rounded(name, ours, truth)
