"""The registered ops under every transform that torch has for a function."""

import copy
import itertools
import socket
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.multiprocessing
from attention_cases import backends_here
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

from ca3d_kernels import (
    LocalTemporalAttention,
    backends,
    local_temporal_attention,
    local_temporal_attention_packed,
    use_backend,
)
from ca3d_kernels.local_attention import op, reference

backend_parameter = pytest.mark.parametrize("backend", backends_here())
WINDOWS = [
    {"kernel_size": 3},
    {"kernel_size": 4, "edge": "zero", "scale": 0.4},
    {"kernel_size": 3, "edge": "shift", "dilation": 2},
    {"kernel_size": 2, "causal": True},
    {"kernel_size": 2, "edge": "zero", "key_table": (((1, 0), (0, 1)), ((1, 1), (1, 1)))},
]
window_parameter = pytest.mark.parametrize("window", WINDOWS, ids=str)


def leaves(*shape: int, count: int = 3) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(count)]


def values(*shape: int, count: int = 3) -> list[Tensor]:
    return [x.detach() for x in leaves(*shape, count=count)]


def definition(q: Tensor, k: Tensor, v: Tensor, **window: Any) -> Tensor:
    if "key_table" in window:
        window["key_table"] = [x for row in window["key_table"] for pair in row for x in pair]
    return reference.attention(q, k, v, **window)


@backend_parameter
@window_parameter
def test_gradcheck(window: dict, backend: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return local_temporal_attention(q, k, v, **window, backend=backend)

    assert torch.autograd.gradcheck(
        attend, leaves(2, 4, 3), check_forward_ad=True, check_batched_grad=True,
        check_batched_forward_grad=True,
    )  # fmt: skip


@backend_parameter
def test_gradgradcheck(backend: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return local_temporal_attention(q, k, v, kernel_size=3, backend=backend)

    assert torch.autograd.gradgradcheck(
        attend, leaves(2, 1, 4, 2), check_fwd_over_rev=True, check_rev_over_rev=True
    )


@backend_parameter
@window_parameter
def test_packed_gradcheck_and_gradgradcheck(window: dict, backend: str) -> None:
    def attend(qkv: Tensor) -> Tensor:
        return local_temporal_attention_packed(qkv, **window, backend=backend)

    inputs = leaves(2, 3, 3, 2, count=1)
    assert torch.autograd.gradcheck(attend, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(attend, inputs, check_fwd_over_rev=True)


@backend_parameter
def test_packed_equals_separate(backend: str) -> None:
    (qkv,) = leaves(2, 5, 2, 3, 4, 8, count=1)
    parts = [x.detach().requires_grad_() for x in qkv.unbind(-3)]
    packed = local_temporal_attention_packed(qkv, backend=backend)
    separate = local_temporal_attention(*parts, backend=backend)
    assert torch.equal(packed, separate)
    grad = torch.randn_like(packed)
    (gradient,) = torch.autograd.grad(packed, qkv, grad)
    expected = torch.autograd.grad(separate, parts, grad)
    assert torch.equal(gradient, torch.stack(expected, -3))


@backend_parameter
@pytest.mark.parametrize("name", ["attention", "attention_packed"])
def test_opcheck(name: str, backend: str) -> None:
    options = op.Options(3, 1, False, None, "zero", (1, 0, 0, 0, 0, 1, 0, 2, 1, 2, 1, 1), backend)
    packed = name == "attention_packed"
    inputs = leaves(2, 2, 3, 4, 8, count=1) if packed else leaves(2, 2, 4, 8)
    inputs = [x.detach().transpose(0, -2).contiguous().transpose(0, -2) for x in inputs]
    operands = [x.requires_grad_() for x in inputs]
    grad = torch.randn(2, 2, 4, 8, dtype=torch.float64, requires_grad=True)
    forward = getattr(torch.ops.ca3d, "local_" + name).default
    suffix = "_packed_backward" if packed else "_backward"
    backward = getattr(torch.ops.ca3d, "local_attention" + suffix).default
    assert set(torch.library.opcheck(forward, (*operands, *options)).values()) == {"SUCCESS"}
    arguments = (grad, *operands, *options)
    assert set(torch.library.opcheck(backward, arguments).values()) == {"SUCCESS"}


@backend_parameter
@window_parameter
def test_forward_mode(window: dict, backend: str) -> None:
    primals, tangents = values(2, 4, 3), values(2, 4, 3)

    def attend(*x: Tensor) -> Tensor:
        return local_temporal_attention(*x, **window, backend=backend)

    expected = torch.func.jvp(lambda *x: definition(*x, **window), (*primals,), (*tangents,))[1]
    assert expected.abs().max() > 0
    torch.testing.assert_close(torch.func.jvp(attend, (*primals,), (*tangents,))[1], expected)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(primals, tangents, strict=True)]
        torch.testing.assert_close(forward_ad.unpack_dual(attend(*duals)).tangent, expected)


@backend_parameter
def test_forward_mode_through_an_earlier_reverse_graph(backend: str) -> None:
    inputs = leaves(2, 4, 3)
    output = local_temporal_attention(*inputs, kernel_size=3, backend=backend)
    direction = torch.randn_like(output)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones_like(output), direction)
        gradients = torch.autograd.grad(output, inputs, dual)
        tangents = [forward_ad.unpack_dual(x).tangent for x in gradients]
    expected = reference.attention_backward(direction, *inputs, kernel_size=3)
    torch.testing.assert_close(tangents, list(expected))


@backend_parameter
@pytest.mark.parametrize("dims", [(0, 0, 0), (0, None, 1), (None, 2, 0)], ids=str)
def test_vmap(dims: tuple, backend: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return local_temporal_attention(q, k, v, kernel_size=3, backend=backend)

    stacked = values(5, 2, 4, 3)
    inputs = [
        x[0] if dim is None else x.movedim(0, dim) for x, dim in zip(stacked, dims, strict=True)
    ]
    expected = torch.stack([
        attend(*(x if d is None else x.select(d, i) for x, d in zip(inputs, dims, strict=True)))
        for i in range(5)
    ])  # fmt: skip
    torch.testing.assert_close(torch.func.vmap(attend, dims)(*inputs), expected)


@backend_parameter
def test_vmap_of_grad_is_the_gradient_of_each_sample(backend: str) -> None:
    q, k, v = values(5, 2, 4, 3)

    def loss(attend: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, kernel_size=3).sin().sum()

    def ours(*x: Tensor, **window: Any) -> Tensor:
        return local_temporal_attention(*x, **window, backend=backend)

    per_sample = torch.func.vmap(torch.func.grad(lambda *x: loss(ours, *x), (0, 1, 2)))(q, k, v)
    for i in range(5):
        expected = torch.func.grad(lambda *x: loss(definition, *x), (0, 1, 2))(q[i], k[i], v[i])
        torch.testing.assert_close([x[i] for x in per_sample], list(expected))


@backend_parameter
def test_second_derivatives_in_every_order_of_modes(backend: str) -> None:
    q, k, v = values(1, 4, 2)

    def loss(attend: Any, x: Tensor) -> Tensor:
        return attend(x, k * x, v - x, kernel_size=3).sin().sum()

    def ours(*x: Tensor, **window: Any) -> Tensor:
        return local_temporal_attention(*x, **window, backend=backend)

    expected = torch.func.hessian(lambda x: loss(definition, x))(q)
    for outer, inner in itertools.product((torch.func.jacrev, torch.func.jacfwd), repeat=2):
        torch.testing.assert_close(outer(inner(lambda x: loss(ours, x)))(q), expected)


def compiled(function: Any, *, compiler: str = "aot_eager", dynamic: bool | None = None) -> Any:
    """The function compiled from scratch; by default only traced, which takes less time."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=compiler, dynamic=dynamic)


def check_compiled(compiler: str, dynamic: bool, backend: str | None) -> None:
    def loss(attend: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q.sin(), k, v, kernel_size=3).cos().sum()

    def ours(*x: Tensor, **window: Any) -> Tensor:
        return local_temporal_attention(*x, **window, backend=backend)

    function = compiled(lambda *x: loss(ours, *x), compiler=compiler, dynamic=dynamic)
    for batch, frames in ((2, 4), (3, 6), (5, 7)):
        inputs = leaves(batch, 2, frames, 3)
        expected = torch.autograd.grad(loss(definition, *inputs), inputs)
        gradients = torch.autograd.grad(function(*inputs), inputs)
        torch.testing.assert_close(gradients, expected)


@backend_parameter
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(dynamic: bool, backend: str) -> None:
    check_compiled("aot_eager", dynamic, backend)


def test_compile_with_inductor() -> None:
    check_compiled("inductor", True, None)


def test_compiled_graphs_hold_the_ops() -> None:
    calls = []

    class Count(op.ReferenceKernels):
        def forward(self, *arguments: Any) -> None:
            calls.append("forward")
            super().forward(*arguments)

        def backward(self, *arguments: Any) -> None:
            calls.append("backward")
            super().backward(*arguments)

    before = backends._implementations["local_attention"]["reference"]
    backends.register(
        "local_attention", backends.Implementation("reference", Count, lambda device: None)
    )
    try:
        layer = LocalTemporalAttention(8, 2, backend="reference")
        function = compiled(layer)
        function(torch.randn(1, 8, 3, 2, 2)).sum().backward()
        function(torch.randn(1, 8, 3, 2, 2)).sum().backward()
    finally:
        backends.register("local_attention", before)
    assert calls == ["forward", "backward"] * 2


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_compiled_transforms(transform: str) -> None:
    q, k, v = values(3, 2, 4, 3)

    def loss(q: Tensor) -> Tensor:
        return local_temporal_attention(q, k, v, kernel_size=3).sin().sum()

    functions = {
        "grad": torch.func.grad(loss),
        "vmap": torch.func.vmap(lambda q: local_temporal_attention(q, k[0], v[0]).sin()),
        "jvp": lambda q: torch.func.jvp(loss, (q,), (k,))[1],
    }
    function = functions[transform]
    torch.testing.assert_close(compiled(function)(q), function(q))


def test_export() -> None:
    layer = LocalTemporalAttention(8, 2).double()
    batch, frames = Dim("batch"), Dim("frames")
    example = torch.randn(2, 8, 4, 3, 3, dtype=torch.float64)
    program = torch.export.export(layer, (example,), dynamic_shapes={"x": {0: batch, 2: frames}})
    targets = [str(node.target) for node in program.graph.nodes]
    assert "ca3d.local_attention_packed.default" in targets
    for x in (example, torch.randn(5, 8, 9, 3, 3, dtype=torch.float64)):
        torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize("packed", [False, True])
def test_fake_tensors_of_a_gpu(packed: bool) -> None:
    # The engine of autograd asks for a device: its formulas are in the tests on the CPU.
    name = "local_attention_packed" if packed else "local_attention"
    shape = (2, 49, 4, 3, 8, 64) if packed else (2, 49, 4, 8, 64)
    with FakeTensorMode():
        x = torch.empty(shape, dtype=torch.float16, device="cuda")
        inputs = [x] if packed else [x, x, x]
        o = getattr(torch.ops.ca3d, name)(*inputs, *op.Options())
        assert (o.shape, o.dtype, o.device.type) == ((2, 49, 4, 8, 64), torch.float16, "cuda")
        gradients = getattr(torch.ops.ca3d, f"{name}_backward")(o, *inputs, *op.Options())
        for y in [gradients] if packed else gradients:
            assert (y.shape, y.dtype, y.device.type) == (shape, torch.float16, "cuda")


def test_fake_results_have_the_strides_of_real_ones() -> None:
    qkv = torch.randn(2, 4, 3, 8, 5, 16).permute(0, 4, 1, 2, 3, 5)
    for x in (qkv, qkv.contiguous(), qkv.expand(2, -1, -1, -1, -1, -1)):
        real = local_temporal_attention_packed(x)
        fake = local_temporal_attention_packed(x.to("meta"))
        assert fake.stride() == real.stride()


@backend_parameter
def test_activation_checkpointing(backend: str) -> None:
    layer = LocalTemporalAttention(8, 2, backend=backend).double()
    x = torch.randn(2, 8, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    plain = torch.autograd.grad(layer(x).sin().sum(), (x, layer.qkv_weight))
    for reentrant in (False, True):
        output = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)
        layer.zero_grad()
        x.grad = None
        output.sin().sum().backward()
        torch.testing.assert_close((x.grad, layer.qkv_weight.grad), plain)


def test_backward_keeps_the_backend_of_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    run = backends.run
    monkeypatch.setattr(backends, "run", lambda *a: (used.append(a[2]), run(*a))[1])
    inputs = leaves(2, 4, 3)
    with use_backend("reference"):
        output = local_temporal_attention(*inputs)
    output.sum().backward()
    assert used == ["reference", "reference"]


def test_changed_operands_are_noticed() -> None:
    q, k, v = leaves(2, 4, 3)
    shifted = q * 2
    output = local_temporal_attention(shifted, k, v)
    shifted.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_inference_mode_and_deepcopy() -> None:
    layer = LocalTemporalAttention(8, 2)
    x = torch.randn(2, 8, 4, 3, 3)
    with torch.inference_mode():
        output = copy.deepcopy(layer)(x)
    assert torch.equal(output, layer(x))


def _train_replica(rank: int, port: int, results: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    layer = nn.parallel.DistributedDataParallel(LocalTemporalAttention(8, 2).double())
    x = torch.randn(2, 8, 4, 3, 3, dtype=torch.float64)
    layer(x[rank : rank + 1]).sin().sum().backward()
    results.put((rank, layer.module.qkv_weight.grad.tolist()))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = torch.multiprocessing.get_context("spawn").Queue()
    torch.multiprocessing.spawn(_train_replica, (port, results), nprocs=2)
    gradients = [torch.tensor(results.get()[1], dtype=torch.float64) for _ in range(2)]
    assert torch.equal(*gradients)
    torch.manual_seed(0)
    layer = LocalTemporalAttention(8, 2).double()
    x = torch.randn(2, 8, 4, 3, 3, dtype=torch.float64)
    (layer(x).sin().sum() / 2).backward()
    torch.testing.assert_close(gradients[0], layer.qkv_weight.grad)
