"""The registered op under every transform that torch has for a function, and what it keeps."""

from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from norm_cases import backends_here
from torch import Tensor
from torch.export import Dim

from ca3d_kernels import backends, norm_relu, norm_relu_conv, use_backend
from ca3d_kernels.norm_relu_conv import op, reference

backend_parameter = pytest.mark.parametrize("backend", backends_here())
residual_parameter = pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])


def away_from_zero(x: Tensor) -> Tensor:
    """The same numbers, but none where ReLU has no derivative."""
    return torch.where(x.abs() < 0.1, 0.5, x)


def leaves(residual: bool = True) -> list[Tensor | None]:
    """y, weight, bias, conv_weight, conv_bias, residual."""
    shapes = [(3, 2, 2, 2), (2,), (2,), (2, 1, 2, 1), (2,), (3, 2, 2, 2)]
    made = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    made[0] = away_from_zero(made[0])
    operands: list[Tensor | None] = [x.requires_grad_() for x in made]
    if not residual:
        operands[5] = None
    return operands


OPTIONS: dict[str, Any] = {"padding": (1, 0), "stride": (2, 1), "groups": 2}


def step(*x: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    result = norm_relu_conv(*x, **{**OPTIONS, **options}, return_z=True)
    assert result.z is not None
    return result.output, result.z


def definition(*x: Tensor) -> tuple[Tensor, Tensor]:
    y, weight, bias, conv_weight, conv_bias, *residual = x
    return reference.norm_relu_conv(
        y, weight, bias, residual[0] if residual else None, conv_weight, conv_bias, **OPTIONS
    )


def present(operands: list[Tensor | None]) -> list[Tensor]:
    return [x for x in operands if x is not None]


@backend_parameter
@residual_parameter
@pytest.mark.parametrize("relu", [False, True])
def test_gradcheck(relu: bool, residual: bool, backend: str) -> None:
    def run(*x: Tensor) -> tuple[Tensor, Tensor]:
        return step(*x, relu=relu, backend=backend)

    assert torch.autograd.gradcheck(
        run, present(leaves(residual)), check_forward_ad=True, check_batched_grad=True
    )


@backend_parameter
@residual_parameter
def test_gradgradcheck(residual: bool, backend: str) -> None:
    def run(*x: Tensor) -> tuple[Tensor, Tensor]:
        return step(*x, backend=backend)

    assert torch.autograd.gradgradcheck(run, present(leaves(residual)))


@backend_parameter
@residual_parameter
def test_normalisation_alone(residual: bool, backend: str) -> None:
    def run(*x: Tensor) -> Tensor:
        return norm_relu(*x, backend=backend).z

    y, weight, bias, _, _, r = leaves(residual)
    operands = present([y, weight, bias, r])
    assert torch.autograd.gradcheck(run, operands, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, operands)


@backend_parameter
def test_one_output_alone_has_its_gradient(backend: str) -> None:
    operands = leaves()
    for use in (0, 1):
        ours = step(*operands, backend=backend)[use]
        expected = definition(*operands)[use]
        torch.testing.assert_close(ours, expected)
        gradients = [
            torch.autograd.grad(x.sin().sum(), operands, allow_unused=True, materialize_grads=True)
            for x in (ours, expected)
        ]
        torch.testing.assert_close(*gradients)


@backend_parameter
@pytest.mark.parametrize(
    ("needed", "residual"), [*((i, True) for i in range(6)), *((i, False) for i in range(5))]
)
def test_gradient_of_one_operand(needed: int, residual: bool, backend: str) -> None:
    operands = leaves(residual)
    gradients = []
    for run in (step, definition):
        inputs = [None if x is None else x.detach() for x in operands]
        inputs[needed].requires_grad_()
        options = {"backend": backend} if run is step else {}
        output, z = run(*present(inputs), **options)
        loss = output.sin().sum() + z.cos().sum()
        gradients.append(torch.autograd.grad(loss, inputs[needed]))
    torch.testing.assert_close(*gradients)


@backend_parameter
@residual_parameter
@pytest.mark.parametrize("convolve", [False, True])
def test_opcheck(convolve: bool, residual: bool, backend: str) -> None:
    y, weight, bias, conv_weight, conv_bias, r = leaves(residual)
    keep = not convolve or residual
    options = op.Options((2, 1), (1, 0), 2, 1e-5, True, keep and convolve, backend)
    if not convolve:
        conv_weight = conv_bias = None
    operands = (y, weight, bias, r, conv_weight, conv_bias)
    checked = torch.library.opcheck(op._op, (*operands, *options))
    assert set(checked.values()) == {"SUCCESS"}
    with torch.no_grad():
        output, z, mean, variance = op._op(*operands, *options)
    grad = torch.randn_like(output).requires_grad_() if convolve else None
    grad_z = torch.randn_like(y).requires_grad_() if keep else None
    kept = z.requires_grad_() if convolve and residual else None
    inputs = (grad, grad_z, y, kept, mean, variance, weight, bias, conv_weight)
    checked = torch.library.opcheck(op._backward_op, (*inputs, residual, True, *options))
    assert set(checked.values()) == {"SUCCESS"}


@backend_parameter
@residual_parameter
def test_forward_mode(residual: bool, backend: str) -> None:
    primals = [x.detach() for x in present(leaves(residual))]
    tangents = [torch.randn_like(x) for x in primals]
    expected = torch.func.jvp(definition, (*primals,), (*tangents,))[1]

    def run(*x: Tensor) -> tuple[Tensor, Tensor]:
        return step(*x, backend=backend)

    torch.testing.assert_close(torch.func.jvp(run, (*primals,), (*tangents,))[1], expected)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(primals, tangents, strict=True)]
        found = [forward_ad.unpack_dual(x).tangent for x in run(*duals)]
    torch.testing.assert_close(found, list(expected))


@backend_parameter
def test_vmap_and_func_grad(backend: str) -> None:
    primals = [x.detach() for x in present(leaves())]
    batch = torch.stack([primals[0], primals[0] + 1])

    def loss(y: Tensor, run: Any = step) -> Tensor:
        options = {"backend": backend} if run is step else {}
        output, z = run(y, *primals[1:], **options)
        return output.sin().sum() + z.cos().sum()

    expected = [torch.func.grad(lambda y: loss(y, definition))(y) for y in batch]
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(batch), torch.stack(expected))
    raw = torch.vmap(
        lambda y: op._op(y, primals[1], primals[2], None, None, None, *op.Options(backend=backend))[
            1
        ]
    )(batch)
    torch.testing.assert_close(raw[1], norm_relu(batch[1], *primals[1:3]).z)


@backend_parameter
@residual_parameter
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(dynamic: bool, residual: bool, backend: str) -> None:
    operands = present(leaves(residual))

    def loss(*x: Tensor) -> Tensor:
        output, z = step(*x, backend=backend)
        return output.sin().sum() + norm_relu(z, x[1], x[2], backend=backend).z.cos().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    gradients = [torch.autograd.grad(run(*operands), operands) for run in (compiled, loss)]
    torch.testing.assert_close(*gradients)


def test_export_with_a_free_batch() -> None:
    class Step(torch.nn.Module):
        def forward(self, y: Tensor, one: Tensor, weight: Tensor) -> Tensor:
            return norm_relu_conv(y, one, one, weight, padding=1).output

    operands = (torch.randn(3, 4, 5, 6), torch.ones(4), torch.randn(2, 4, 3, 3))
    shapes = ({0: Dim("batch", min=2, max=64)}, None, None)
    program = torch.export.export(Step(), operands, dynamic_shapes=shapes)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert op._op in targets
    other = (torch.randn(7, 4, 5, 6), *operands[1:])
    torch.testing.assert_close(program.module()(*other), Step()(*other))


def test_statistics_have_no_gradient() -> None:
    y, one = torch.randn(2, 3, 4, 4, requires_grad=True), torch.ones(3)
    result = norm_relu(y, one, one)
    assert result.z.requires_grad
    assert not result.mean.requires_grad
    assert not result.variance.requires_grad


@backend_parameter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_what_is_kept(dtype: torch.dtype, backend: str) -> None:
    """y and the parameters themselves, O(channels) numbers, and with a residual the sum."""
    y = torch.randn(2, 4, 9, 8).to(dtype).contiguous(memory_format=torch.channels_last)
    y.requires_grad_()
    weight, residual = torch.randn(6, 4, 3, 3).to(dtype), torch.randn_like(y)
    one = torch.ones(4, dtype=dtype)
    kept: list[Tensor] = []
    for added in (None, residual):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            result = norm_relu_conv(
                y, one, one, weight, None, added, return_z=True, backend=backend
            )
        assert result.z is not None
        expected = [y] if added is None else [y, result.z]
        found = [x.data_ptr() for x in kept if x.dim() == 4]
        assert found == [x.data_ptr() for x in (*expected, weight)]
        assert all(x.numel() <= 4 for x in kept if x.dim() != 4)


@backend_parameter
def test_changed_operands_are_noticed(backend: str) -> None:
    y, one = torch.randn(2, 3, 4, 4, requires_grad=True), torch.ones(3)
    shifted = y * 2
    z = norm_relu(shifted, one, one, backend=backend).z
    shifted.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_backward_keeps_the_backend_of_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    run = backends.run
    monkeypatch.setattr(backends, "run", lambda *a: (used.append(a[2]), run(*a))[1])
    operands = leaves()
    with use_backend("reference"):
        output, _ = step(*operands)
    output.sum().backward()
    assert set(used) == {"reference"}


@backend_parameter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, backend: str) -> None:
    y, weight = torch.randn(2, 4, 6, 6, requires_grad=True), torch.randn(3, 4, 3, 3)
    one = torch.ones(4, requires_grad=True)
    with torch.autocast("cpu", dtype):
        result = norm_relu_conv(y, one, one, weight, backend=backend)
        alone = norm_relu(y, one, one, backend=backend).z
        result.output.float().sum().backward()
    assert result.output.dtype == alone.dtype == dtype
    assert y.grad is not None
    assert one.grad is not None
    assert y.grad.dtype == one.grad.dtype == torch.float32
    expected = norm_relu_conv(y, one, one, weight).output
    torch.testing.assert_close(result.output.float(), expected, rtol=0.1, atol=0.2)


def test_meta_tensors() -> None:
    y, one = torch.empty(2, 4, 6, 6, device="meta"), torch.empty(4, device="meta")
    step = norm_relu_conv(y, one, one, torch.empty(3, 4, 3, 3, device="meta"), stride=2)
    assert step.output.shape == (2, 3, 2, 2)
    assert norm_relu(y, one, one).z.shape == y.shape


def test_activation_checkpointing() -> None:
    operands = present(leaves())
    plain = torch.autograd.grad(step(*operands)[0].sin().sum(), operands)
    output, _ = torch.utils.checkpoint.checkpoint(step, *operands, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(output.sin().sum(), operands), plain)


def test_inference_mode() -> None:
    operands = present(leaves())
    with torch.inference_mode():
        output, _ = step(*operands)
    assert torch.equal(output, step(*operands)[0])
