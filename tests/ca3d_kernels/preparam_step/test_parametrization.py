"""Weights computed from pre-parameters in the autograd graph."""

import pytest
import torch
from step_cases import DTYPES, parameters, set_gradients
from torch import nn
from torch.nn.utils import parametrize

from ca3d_kernels import (
    LinearMapping,
    PreParametrization,
    PreParamMapping,
    PreParamSGD,
    parametrize_with_pre_parameters,
    pre_parameter,
    published_mapping,
)

MAPPINGS = [LinearMapping(), LinearMapping(100.0, 0.1)] + [
    published_mapping(name) for name in ("f16", "f16-sqr", "f16-root")
]


@pytest.mark.parametrize("mapping", MAPPINGS, ids=repr)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_backward_are_the_two_equations(
    mapping: PreParamMapping, dtype: torch.dtype
) -> None:
    theta = torch.randn(50).to(dtype).requires_grad_()
    w = pre_parameter(theta, mapping)
    assert torch.equal(w, mapping.to_param(theta.detach()))
    grad = torch.randn(50).to(dtype)
    w.backward(grad)
    assert torch.equal(theta.grad, mapping.map_grad(grad, w.detach()))


def test_linear_map_is_not_the_chain_rule() -> None:
    theta = torch.tensor([32.0], requires_grad=True)
    pre_parameter(theta, LinearMapping(128.0)).sum().backward()
    assert theta.grad.item() == 128.0  # the chain rule would give 1 / 128


def test_default_map() -> None:
    assert pre_parameter(torch.tensor(256.0)).item() == 2.0


def test_compile() -> None:
    def loss(theta: torch.Tensor) -> torch.Tensor:
        return pre_parameter(theta, LinearMapping(64.0)).square().sum()

    theta = torch.randn(8, requires_grad=True)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (actual,) = torch.autograd.grad(compiled(theta), theta)
    (expected,) = torch.autograd.grad(loss(theta), theta)
    torch.testing.assert_close(actual, expected)


def test_functional_transforms() -> None:
    mapping = LinearMapping(64.0)

    def loss(theta: torch.Tensor) -> torch.Tensor:
        return (pre_parameter(theta, mapping) ** 3).sum()

    theta = torch.randn(4, 5)
    expected = mapping.map_grad(3 * (theta / 64) ** 2, theta)
    torch.testing.assert_close(torch.func.grad(loss)(theta), expected)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(theta), expected)
    torch.testing.assert_close(
        torch.func.vmap(lambda x: pre_parameter(x, mapping), in_dims=1)(theta), theta.t() / 64
    )


def test_double_backward_is_refused() -> None:
    theta = torch.randn(3, requires_grad=True)
    loss = pre_parameter(theta).square().sum()
    (grad,) = torch.autograd.grad(loss, theta, create_graph=True)
    with pytest.raises(RuntimeError, match="can't be differentiated twice"):
        grad.sum().backward()


def test_forward_mode_is_refused() -> None:
    theta = torch.randn(3)
    with pytest.raises(NotImplementedError):
        torch.func.jvp(pre_parameter, (theta,), (theta,))


def test_parametrization() -> None:
    layer = nn.Linear(3, 2).half()
    before = layer.weight.detach().clone()
    parametrize.register_parametrization(layer, "weight", PreParametrization())
    theta = layer.parametrizations.weight.original
    assert torch.equal(theta, before * 128)
    assert torch.equal(layer.weight, before)
    assert "LinearMapping(scale=128.0" in repr(layer)
    layer.weight = torch.full((2, 3), 0.5, dtype=torch.float16)
    assert (theta == 64).all()
    parametrize.remove_parametrizations(layer, "weight")
    assert (layer.weight == 0.5).all()


def test_whole_module() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    expected = model(x)
    count = len(list(model.parameters()))
    assert parametrize_with_pre_parameters(model) is model
    torch.testing.assert_close(model(x), expected)
    assert len(list(model.parameters())) == count
    assert all("original" in name for name, _ in model.named_parameters())
    model(x).sum().backward()
    assert all(theta.grad is not None for theta in model.parameters())


@pytest.mark.parametrize("mapping", MAPPINGS, ids=repr)
@pytest.mark.parametrize("nesterov", [False, True])
def test_both_ways_agree(mapping: PreParamMapping, nesterov: bool) -> None:
    # Autograd function + torch.optim.SGD on theta, and PreParamSGD on w: the same sequence of
    # weights up to rounding, here in float64.
    options = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-3, "nesterov": nesterov}
    (w,) = parameters(torch.float64, [200])
    theta = nn.Parameter(mapping.to_pre_param(w.detach()))
    ours = PreParamSGD([w], mapping=mapping, **options)
    torch_sgd = torch.optim.SGD([theta], **options)
    for step in range(5):
        set_gradients([w], seed=step, scale=0.1)
        ours.step()
        torch_sgd.zero_grad()
        pre_parameter(theta, mapping).backward(w.grad)
        torch_sgd.step()
        torch.testing.assert_close(w, mapping.to_param(theta), atol=1e-9, rtol=1e-9)


def test_bad_input() -> None:
    with pytest.raises(TypeError, match="pre_param must be a tensor, got list"):
        pre_parameter([1.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"floating-point dtype, got torch\.int64"):
        pre_parameter(torch.ones(2, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"mapping must be a PreParamMapping.*got 128"):
        pre_parameter(torch.ones(2), 128)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="mapping must be a PreParamMapping"):
        PreParametrization("f16")  # type: ignore[arg-type]
