"""Registration, transforms, what is kept for the gradient, and bad input of norm_relu_conv."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ca3d_kernels import norm_relu, norm_relu_conv


def tensors(dtype: torch.dtype = torch.float64, grad: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    made = {
        "y": normal(2, 4, 3, 3).contiguous(memory_format=torch.channels_last),
        "weight": normal(4),
        "bias": normal(4),
        "conv_weight": normal(2, 4, 3, 3),
        "conv_bias": normal(2),
        "residual": normal(2, 4, 3, 3).contiguous(memory_format=torch.channels_last),
    }
    return {name: x.requires_grad_(grad) for name, x in made.items()}


def step(*x: Tensor) -> tuple[Tensor, Tensor]:
    output, z, *_ = norm_relu_conv(*x, padding=1, return_z=True)
    assert z is not None
    return output, z


def test_derivatives() -> None:
    x = tuple(tensors().values())
    assert torch.autograd.gradcheck(step, x)
    assert torch.autograd.gradgradcheck(step, x)
    assert torch.autograd.gradcheck(lambda *a: norm_relu(*a).z, x[:3], check_forward_ad=True)


def test_opcheck() -> None:
    x = tensors(torch.float32)
    options = ([1, 1], [1, 1], 1, 1e-5, True, True, "")
    op = torch.ops.ca3d.norm_relu_conv.default
    torch.library.opcheck(op, (x["y"], x["weight"], x["bias"], x["residual"],
                               x["conv_weight"], x["conv_bias"], *options))  # fmt: skip
    torch.library.opcheck(op, (x["y"], x["weight"], x["bias"], None, None, None, *options))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool) -> None:
    x = tuple(tensors(torch.float32).values())
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for results in zip(compiled(*x), step(*x), strict=True):
        torch.testing.assert_close(*results)
    sum(r.square().sum() for r in compiled(*x)).backward()
    gradients = [a.grad for a in x]
    for a in x:
        a.grad = None
    sum(r.square().sum() for r in step(*x)).backward()
    for ours, eager in zip(gradients, [a.grad for a in x], strict=True):
        torch.testing.assert_close(ours, eager)


def test_vmap_and_functional_gradient() -> None:
    x = tuple(tensors(grad=False).values())
    stacked = torch.stack([x[0], 2 * x[0] + 1])
    batched = torch.vmap(lambda y: step(y, *x[1:]))(stacked)
    for i, y in enumerate(stacked):
        for ours, expected in zip(batched, step(y, *x[1:]), strict=True):
            torch.testing.assert_close(ours[i], expected)
    gradient = torch.func.grad(lambda y: step(y, *x[1:])[0].square().sum())(x[0])
    leaf = x[0].clone().requires_grad_()
    step(leaf, *x[1:])[0].square().sum().backward()
    torch.testing.assert_close(gradient, leaf.grad)


def kept(*x: Tensor, **options: Any) -> list[Tensor]:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        norm_relu_conv(*x, padding=1, **options)
    return [t for t in saved if t.dim() == 4 and t.data_ptr() != x[3].data_ptr()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_keeps_y_and_not_what_is_convolved(dtype: torch.dtype) -> None:
    x = tuple(tensors(dtype).values())
    assert [t.data_ptr() for t in kept(*x[:5])] == [x[0].data_ptr()]
    with_residual = kept(*x)
    assert len(with_residual) == 2
    assert all(t.dtype == dtype for t in with_residual)


def test_version_of_y_is_watched() -> None:
    """Overwriting what the backward pass reads is an error, not a wrong gradient."""
    x = tensors()
    y = x["y"] * 1.0
    output = norm_relu(y, x["weight"], x["bias"]).z
    with torch.no_grad():
        y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


BAD: tuple[tuple[dict[str, Any], type[Exception], str], ...] = (
    ({"y": [1.0]}, TypeError, "y must be a tensor, got list"),
    ({"y": torch.zeros(2, 4, 3)}, ValueError, r"y must have shape \(N, C, H, W\).*got \(2, 4, 3\)"),
    ({"y": torch.zeros(0, 4, 3, 3)}, ValueError, "not be empty"),
    ({"y": torch.zeros(1, 4, 1, 1)}, ValueError, "more than 1 value per channel"),
    ({"y": torch.zeros(2, 4, 3, 3, dtype=torch.int32)}, TypeError, "y must have one of the dtypes"),
    ({"weight": torch.zeros(5)}, ValueError, r"weight must have shape \(4,\), got \(5,\)"),
    ({"bias": torch.zeros(4, device="meta")}, ValueError, "bias must be on y's device cpu"),
    ({"residual": torch.zeros(2, 4, 3, 2)}, ValueError, "residual must have shape"),
    ({"residual": torch.zeros(2, 4, 3, 3).half()}, TypeError, "residual must have y's dtype"),
    ({"conv_weight": torch.zeros(2, 3, 3, 3)}, ValueError, "conv_weight must have shape"),
    ({"conv_weight": torch.zeros(2, 4, 9, 3)}, ValueError, "must not be larger than y"),
    ({"conv_weight": torch.zeros(2, 4, 3, 3).half()}, TypeError, "conv_weight must have y's dtype"),
    ({"conv_bias": torch.zeros(3)}, ValueError, r"conv_bias must have shape \(2,\)"),
    ({"stride": 0}, ValueError, "stride must be one integer or two, at least 1, got 0"),
    ({"padding": "same"}, (TypeError, ValueError), "padding must be one integer or two"),  # type: ignore[dict-item]
    ({"groups": 3}, ValueError, "groups must divide the 4 channels of y, got 3"),
    ({"eps": -1.0}, ValueError, "eps must be finite and at least 0, got -1.0"),
    ({"relu": 1}, TypeError, "relu must be a bool, got 1"),
    ({"return_z": None}, TypeError, "return_z must be a bool, got None"),
    ({"backend": "gpu"}, ValueError, "gpu"),
)


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {**tensors(torch.float32, grad=False), "padding": 1, **change}
    with pytest.raises(error, match=message):
        norm_relu_conv(**arguments)
