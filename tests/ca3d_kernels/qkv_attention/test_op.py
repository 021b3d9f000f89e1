"""The fused op's registration, on the CPU through the reference and on fake CUDA tensors."""

import pytest
import torch
from qkv_cases import CASES, Case, check
from torch._subclasses.fake_tensor import FakeTensorMode

from ca3d_kernels import LocalTemporalAttention, triton_launch, use_backend
from ca3d_kernels.local_attention.op import Options
from ca3d_kernels.qkv_attention import op, reference


def operands(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    case = Case(frames=4, heads=2, head_dim=4, positions=3, batch=1)
    x, weight, bias, grad = case.tensors(dtype)
    assert bias is not None
    return [x, weight, bias, grad]


def leaves(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return [t.requires_grad_() for t in operands(dtype)]


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, *, tensor_cores: bool = True) -> None:
    monkeypatch.setattr(triton_launch, "_missing", lambda: None)
    monkeypatch.setattr(triton_launch, "_no_gpu", lambda: None)
    monkeypatch.setattr(triton_launch, "has_tensor_cores", lambda device: tensor_cores)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_backend_against_float64(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype, "reference")


@pytest.mark.parametrize("bias", ["none", "head", "frame"])
def test_opcheck(bias: str) -> None:
    x, weight, shift, grad = leaves(torch.float32)
    table = torch.randn(2, 4, 12).requires_grad_()
    tensors = (x, weight, {"none": None, "head": shift, "frame": table}[bias])
    torch.library.opcheck(torch.ops.ca3d.qkv_attention, (*tensors, *Options()))
    torch.library.opcheck(torch.ops.ca3d.qkv_attention_backward, (grad, *tensors, *Options()))


def test_gradients_of_first_and_second_order() -> None:
    x, weight, bias, _ = leaves()

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        return op.qkv_attention(*tensors, Options(kernel_size=3))

    assert torch.autograd.gradcheck(run, (x, weight, bias))
    assert torch.autograd.gradgradcheck(run, (x, weight, bias))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool) -> None:
    x, weight, bias, grad = leaves(torch.float32)
    torch._dynamo.reset()

    def attend(*tensors: torch.Tensor) -> torch.Tensor:
        return op.qkv_attention(*tensors, Options())

    compiled = torch.compile(attend, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    output = compiled(x, weight, bias)
    expected = reference.qkv_attention(x, weight, bias)
    torch.testing.assert_close(output, expected)
    for a, b in zip(
        torch.autograd.grad(output, (x, weight, bias), grad),
        torch.autograd.grad(expected, (x, weight, bias), grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_a_layer_on_the_cpu_takes_the_separate_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "qkv_attention", None)
    layer = LocalTemporalAttention(32, 2, dtype=torch.float16)
    assert layer(torch.randn(1, 32, 4, 2, 2).half()).shape == (1, 32, 4, 2, 2)


@pytest.mark.parametrize(
    ("changes", "fused"),
    [
        ({}, True),
        ({"dtype": torch.float32}, False),
        ({"edge": "zero", "dilation": 2}, True),
        ({"preset": "published"}, True),
        ({"preset": "published", "heads": 8}, False),
        ({"dense_qkv": True}, False),
        ({"backend": "reference"}, False),
        ({"heads": 1}, False),
    ],
)
def test_a_layer_on_a_gpu_takes_the_fused_op_when_it_can(
    changes: dict, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_gpu(monkeypatch)
    calls = []
    run = op.qkv_attention
    monkeypatch.setattr(op, "qkv_attention", lambda *a: (calls.append(a), run(*a))[1])
    arguments = {"channels": 128, "heads": 2, "dtype": torch.float16, **changes}
    with FakeTensorMode():
        layer = LocalTemporalAttention(device="cuda", **arguments)
        x = torch.empty(2, 128, 8, 7, 7, device="cuda", dtype=arguments["dtype"])
        output = layer(x.requires_grad_())
        assert output.shape == x.shape
        assert output.is_contiguous(memory_format=torch.channels_last_3d)
    assert len(calls) == fused


def test_a_layer_on_an_older_gpu_takes_the_separate_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, tensor_cores=False)
    with FakeTensorMode():
        x = torch.empty(2, 8, 49, 128, device="cuda", dtype=torch.float16)
        weight = torch.empty(2, 192, 64, device="cuda", dtype=torch.float16)
        assert not op.is_fused(x, weight, None, Options())
        pretend_gpu(monkeypatch)
        assert op.is_fused(x, weight, None, Options())


@pytest.mark.parametrize(("name", "fused"), [("cuda", 0), ("triton", 1), ("reference", 0), ("", 1)])
@pytest.mark.parametrize("variable", [False, True])
def test_a_demanded_backend_runs_the_layer(
    name: str, fused: bool, variable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_gpu(monkeypatch)
    monkeypatch.setenv("CA3D_BACKEND", name if variable else "")
    with FakeTensorMode():
        x = torch.empty(2, 8, 49, 128, device="cuda", dtype=torch.float16)
        weight = torch.empty(2, 192, 64, device="cuda", dtype=torch.float16)
        options = Options(backend="" if variable else name)
        assert op.is_fused(x, weight, None, options) == fused
        layer = LocalTemporalAttention(128, 2, device="cuda", dtype=torch.float16)
        image = torch.empty(2, 128, 8, 7, 7, device="cuda", dtype=torch.float16)
        with use_backend(options.backend or "auto"):
            assert layer(image).shape == image.shape


def test_a_folded_layer_on_a_gpu_is_fused_for_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch)
    calls = []
    run = op.qkv_attention
    monkeypatch.setattr(op, "qkv_attention", lambda *a: (calls.append(a), run(*a))[1])
    with FakeTensorMode():
        layer = LocalTemporalAttention(128, 2, device="cuda", dtype=torch.float16)
        one, position = torch.empty(128, device="cuda"), torch.empty(128, 8, device="cuda")
        folded = layer.fold(one, one, position)
        x = torch.empty(2, 128, 8, 7, 7, device="cuda", dtype=torch.float16)
        assert folded(x).shape == x.shape
        assert len(calls) == 1
        # No backward kernel takes a bias of every frame.
        folded(x.requires_grad_())
        assert len(calls) == 1


@pytest.mark.parametrize("how", ["compile", "export"])
@pytest.mark.parametrize("preset", [None, "published"])
def test_a_layer_on_a_gpu_in_graphs(
    how: str, preset: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_gpu(monkeypatch)
    graphs = []

    def keep(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(module.graph)
        return module.forward

    torch._dynamo.reset()
    with FakeTensorMode():
        layer = LocalTemporalAttention(128, 2, preset=preset, device="cuda", dtype=torch.float16)
        x = torch.empty(2, 128, 8, 7, 7, device="cuda", dtype=torch.float16)
        if how == "compile":
            assert torch.compile(layer, fullgraph=True, backend=keep)(x).shape == x.shape
        else:
            graphs.append(torch.export.export(layer, (x,)).graph)
    assert any("ca3d.qkv_attention" in str(node.target) for node in graphs[0].nodes)
