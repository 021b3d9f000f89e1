"""The PTX that Triton makes of the kernels, run on the CPU: results, thread orders, traffic."""

import importlib.util
import re
from typing import Any

import ptx_runner
import pytest
import torch
from attention_cases import assert_rounded
from exhaustive import often
from ptx_runner import ORDERS, needs_ptx_runner, races, run
from step_cases import assert_same_bits
from torch import Tensor

from ca3d_kernels.local_attention import reference

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from ca3d_kernels import problems
from ca3d_kernels.local_attention import triton as attention
from ca3d_kernels.preparam_step import triton as step
from ca3d_kernels.preparam_step.op import Batch, ReferenceKernels
from ca3d_kernels.preparam_step.remembered import unknown_largest
from ca3d_kernels.qkv_attention import reference as qkv_reference
from ca3d_kernels.qkv_attention import triton as qkv
from ca3d_kernels.temporal_block import reference as block_reference
from ca3d_kernels.temporal_block import triton as block
from ca3d_kernels.triton_launch import Launch

pytestmark = [pytest.mark.slow, needs_ptx_runner]
ARCHS = ("sm_80", "sm_90", "sm_120")


def shared(x: Tensor) -> Tensor:
    """x in memory that a forked process shares, in its strides."""
    storage = torch.UntypedStorage._new_shared(x.untyped_storage().nbytes())
    y = torch.empty(0, dtype=x.dtype).set_(storage, x.storage_offset(), x.shape, x.stride())
    return y.copy_(x)


def share(launches: list[Launch]) -> None:
    """Moves what launches work on to memory that a forked process shares; views stay views."""
    storages: dict[int, torch.UntypedStorage] = {}
    for launch in launches:
        for name, x in launch.arguments.items():
            if not isinstance(x, Tensor) or x.is_shared():
                continue
            storage = x.untyped_storage()
            if storage.data_ptr() not in storages:
                moved = torch.UntypedStorage._new_shared(storage.nbytes())
                storages[storage.data_ptr()] = moved.copy_(storage)
            moved = storages[storage.data_ptr()]
            y = torch.empty(0, dtype=x.dtype)
            launch.arguments[name] = y.set_(moved, x.storage_offset(), x.shape, x.stride())


def assert_close(ours: Tensor, exact: Tensor, same_dtype: Tensor, name: str) -> None:
    error = (ours.double() - exact).abs().max()
    torch_error = (same_dtype.double() - exact).abs().max()
    limit = 2 * torch_error + 2 * torch.finfo(ours.dtype).eps * exact.abs().max()
    assert error <= limit, f"{name}: error {error:.3g}, allowed {limit:.3g}"


def attention_tensors(values: dict[str, Any]) -> tuple[Tensor, ...]:
    q, _, _, o, gradient = problems.attention_operands(values, torch.device("cpu"))
    packed = shared(torch.randn((*q.shape[:3], 3, *q.shape[3:])).to(q.dtype))
    packed = shared(packed.permute(0, 4, 1, 2, 3, 5).contiguous().permute(0, 2, 3, 4, 1, 5))
    gradient = shared(torch.full_like(gradient, torch.nan))
    grad = shared(torch.empty_like(o).copy_(torch.randn(o.shape)))
    return *packed.unbind(-3), shared(torch.full_like(o, torch.nan)), grad, *gradient.unbind(-3)


ATTENTION = {
    "stage 1": {},
    "stage 2": {"heads": 8, "frames": 4},
    "published": {"edge": "zero", "published": True},
    "one frame": {"frames": 1, "heads": 3},
    "16 frames, dilated, shifted": {"frames": 16, "dilation": 2, "edge": "shift"},
    "64 frames": {"frames": 64, "heads": 1},
    "64 frames, head_dim 128": {"frames": 64, "heads": 1, "head_dim": 128},
    "100 frames, causal": {"frames": 100, "heads": 1, "causal": True, "dilation": 2},
    "80 frames, published": {"frames": 80, "edge": "zero", "published": True},
    "60 frames, head_dim 20": {"frames": 60, "heads": 1, "head_dim": 20, "edge": "zero"},
    "bfloat16": {"dtype": "bfloat16"},
    "float32": {"dtype": "float32", "frames": 5},
    "head_dim 128": {"head_dim": 128, "causal": True},
    "head_dim 20": {"head_dim": 20, "kernel_size": 4},
}


PAIRS = [(name, "sm_90") for name in ATTENTION]
PAIRS += [(name, arch) for name in ("stage 1", "bfloat16") for arch in ("sm_80", "sm_120")]


OFTEN = ("stage 1", "published", "64 frames", "float32", "100 frames, causal")


@pytest.mark.parametrize(
    ("name", "arch"),
    often(PAIRS, lambda name, arch: name in OFTEN if arch == "sm_90" else name == "stage 1"),
)
def test_local_attention(name: str, arch: str) -> None:
    values = {**problems.DEFAULTS["local_attention"], "batch": 1, "positions": 3, **ATTENTION[name]}
    q, k, v, o, grad, dq, dk, dv = attention_tensors(values)
    options = problems.options(values)
    definition = options.definition()
    forward = attention.forward_launch(q, k, v, o, options)
    backward = attention.backward_launch(grad, q, k, v, dq, dk, dv, options)
    if values["published"]:
        for launch in (forward, backward):
            counts = launch.arguments["key_counts"]
            assert isinstance(counts, Tensor)
            launch.arguments["key_counts"] = shared(counts)
    exact, same = [
        (
            reference.attention(*operands, **definition),
            *reference.attention_backward(do, *operands, **definition),
        )
        for *operands, do in ([t.double() for t in (q, k, v, grad)], (q, k, v, grad))
    ]
    results = []
    for order in ORDERS:
        run(forward, arch, order)
        run(backward, arch, order)
        results.append([x.clone() for x in (o, dq, dk, dv)])
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))
    for what, x, y, z in zip(("o", "dq", "dk", "dv"), results[0], exact, same, strict=True):
        assert x.isfinite().all()
        assert_close(x, y, z, what)
        if x.dtype != torch.float32:
            assert_rounded(what, x, y)


PUBLISHED = {"edge": "zero", "published": True}
QKV = {
    "7 frames": {"frames": 7},
    "bfloat16": {"frames": 7, "dtype": "bfloat16"},
    "published": {**PUBLISHED, "heads": 4},
    "published, 3 heads, 5 frames": {**PUBLISHED, "heads": 3, "frames": 5, "head_dim": 32},
    "published, bfloat16": {**PUBLISHED, "heads": 4, "dtype": "bfloat16"},
    "one table": {"bias": "frame"},
    "published, one table": {**PUBLISHED, "heads": 8, "frames": 4, "bias": "frame"},
    "40 frames": {"frames": 40, "head_dim": 32, "bias": "none"},
}


@pytest.mark.parametrize(
    ("name", "arch"),
    often(
        [*((name, "sm_90") for name in QKV), ("7 frames", "sm_80"), ("7 frames", "sm_120")],
        lambda name, arch: name in ("7 frames", "published", "one table"),
    ),
)
def test_qkv_attention(name: str, arch: str) -> None:
    values = {**problems.DEFAULTS["qkv_attention"], "heads": 2, **QKV[name]}
    heads, head_dim = values["heads"], values["head_dim"]
    kind, per_frame = problems.DTYPES[values["dtype"]], values["bias"] == "frame"
    shape = (1, values["frames"], 11, heads * head_dim)
    x, grad = (shared(torch.randn(shape).to(kind)) for _ in range(2))
    weight = shared((torch.randn(heads, 3 * head_dim, head_dim) * head_dim**-0.5).to(kind))
    table = (heads, values["frames"], 3 * head_dim) if per_frame else (heads, 3 * head_dim)
    bias = None if values["bias"] == "none" else shared(torch.randn(table).to(kind))
    o, dx = (shared(torch.full_like(x, torch.nan)) for _ in range(2))
    options = problems.options(values)
    launches = [qkv.forward_launch(x, weight, bias, o, options)]
    if not per_frame:
        launches += qkv.backward_launches(grad, x, weight, bias, dx, options).launches
    share(launches)
    results = []
    for order in ORDERS:
        for launch in launches:
            run(launch, arch, order)
        shares = [launches[-1].arguments.get(f"partial_{name}") for name in ("weight", "bias")]
        totals = [t.sum(0).to(kind) for t in shares if isinstance(t, Tensor)]
        results.append([t.clone() for t in (o, dx, *totals)])
    # Without a kernel of the backward pass, or without a bias, the rest is not written.
    results = [result[: 1 if per_frame else 3 if bias is None else 4] for result in results]
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))

    def define(*operands: Tensor | None) -> list[Tensor]:
        *leaves, do = [None if t is None else t.clone().requires_grad_() for t in operands]
        output = qkv_reference.qkv_attention(*leaves, **options.definition())
        given = [t for t in leaves if t is not None]
        return [output.detach(), *torch.autograd.grad(output, given, do)]

    operands = (x, weight, bias, grad)
    exact = define(*(None if t is None else t.double() for t in operands))
    same = define(*operands)
    for what, a, b, c in zip(("o", "dx", "dw", "db"), results[0], exact, same, strict=False):
        assert a.isfinite().all(), what
        assert_close(a, b, c, what)


BLOCKS = {
    "7 frames": {"frames": 7},
    "bfloat16": {"frames": 4, "dtype": "bfloat16"},
    "16 frames, shifted": {"frames": 16, "edge": "shift", "head_dim": 32},
}


@pytest.mark.parametrize(
    ("name", "arch"),
    [*((name, "sm_90") for name in BLOCKS), ("7 frames", "sm_80"), ("7 frames", "sm_120")],
)
def test_temporal_block(name: str, arch: str) -> None:
    values = {**problems.DEFAULTS["temporal_block"], "heads": 2, "residual_blocks": 1}
    values |= {"batch": 1, "positions": 11, **BLOCKS[name]}
    x, weights, _ = problems.block_operands(values, torch.device("cpu"))
    operands = [shared(torch.randn(x.shape).to(x.dtype))]
    for field, weight in weights._asdict().items():
        spread = weight.shape[-2] ** -0.5 if field.endswith("weight") else 1
        operands.append(shared((torch.randn(weight.shape) * spread).to(x.dtype)))
    out = shared(torch.full_like(x, torch.nan))
    options = problems.options(values)
    launch = block.launch(operands[0], block.Weights(*operands[1:]), out, options)
    results = []
    for order in ORDERS:
        run(launch, arch, order)
        results.append(out.clone())
    assert all(torch.equal(x, results[0]) for x in results[1:])
    definition = options.definition()
    exact = block_reference.temporal_block(*(t.double() for t in operands), **definition)
    same = block_reference.temporal_block(*operands, **definition)
    assert results[0].isfinite().all()
    assert_close(results[0], exact, same, "out")


def shared_step(values: dict[str, Any]) -> Batch:
    """A batch of random numbers in memory that a forked process shares."""
    batch = problems.step_batch(values, torch.device("cpu"))
    for tensors in (batch.params, batch.grads, batch.pre_params, batch.momenta):
        tensors[:] = [shared(torch.randn(x.shape).to(x.dtype)) for x in tensors]
    rests = [shared((torch.randn(x.shape) * 1e-3).to(x.dtype)) for x in batch.compensations]
    return batch._replace(compensations=rests, seed=3, steps=7, cache={})


STEPS = [("float16", "nearest", arch) for arch in ARCHS]
STEPS += [("bfloat16", "nearest", "sm_90"), ("float32", "nearest", "sm_90")]
STEPS += [
    (dtype, rounding, arch)
    for dtype, arch in (("float16", "sm_90"), ("float16", "sm_120"), ("bfloat16", "sm_80"))
    for rounding in ("stochastic", "compensated")
]


@pytest.mark.parametrize(
    ("dtype", "rounding", "arch"),
    often(
        STEPS,
        lambda dtype, rounding, arch: (
            (dtype, rounding) == ("float16", "nearest") or (dtype != "float32" and arch != "sm_90")
        ),
    ),
)
def test_preparam_step(dtype: str, rounding: str, arch: str) -> None:
    values = {**problems.DEFAULTS["preparam_step"], "dtype": dtype, "pre_param_dtype": dtype}
    values |= {"small_tensors": 3, "small_size": 37, "large_tensors": 1, "large_size": 5001}
    batch = shared_step({**values, "rounding": rounding})
    found = shared(torch.zeros(()))
    written = ("params", "pre_params", "momenta", "compensations")
    before, expected = (
        batch._replace(**{name: [x.clone() for x in getattr(batch, name)] for name in written})
        for _ in range(2)
    )
    ReferenceKernels().step(expected)
    largest = shared(unknown_largest(batch, step.CHUNK))
    (search,) = step.launches(batch, found, overflows=True, largest=largest)
    (launch,) = step.launches(batch, found, largest=largest)
    share([search, launch])
    for order in ORDERS:
        for ours, initial in zip(batch.written(), before.written(), strict=True):
            ours.copy_(initial)
        largest.fill_(torch.nan)
        run(search, arch, order)
        assert found.item() == 0
        run(launch, arch, order)
        assert largest.view(-1, 2).amax(0).tolist() == [
            max(x.abs().max().item() for x in state) for state in (batch.pre_params, batch.momenta)
        ]
        run(search, arch, order)
        assert found.item() == 0
        for ours, theirs in zip(batch.written(), expected.written(), strict=True):
            assert_same_bits(ours, theirs)
    # With a gradient that isn't finite, the search finds it and the step writes nothing.
    batch.grads[1][36] = torch.inf
    run(search, arch)
    assert found.item() == 1
    run(launch, arch)
    for ours, theirs in zip(batch.params, expected.params, strict=True):
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize(
    ("frames", "arch"),
    often(
        [(frames, arch) for frames in (8, 90) for arch in ARCHS], lambda _, arch: arch == "sm_90"
    ),
)
def test_no_races(frames: int, arch: str) -> None:
    values = {**problems.DEFAULTS["local_attention"], "batch": 1, "positions": 1, "heads": 2}
    values["frames"] = frames
    q, k, v, o, grad, dq, dk, dv = attention_tensors(values)
    options = problems.options(values)
    assert races(attention.forward_launch(q, k, v, o, options), arch) == ""
    backward = attention.backward_launch(grad, q, k, v, dq, dk, dv, options)
    assert races(backward, arch) == ""


@pytest.mark.parametrize(
    ("rounding", "arch"),
    often(
        [
            (rounding, arch)
            for rounding in ("nearest", "stochastic", "compensated")
            for arch in ARCHS
        ],
        lambda rounding, arch: (rounding, arch) == ("nearest", "sm_90"),
    ),
)
def test_no_races_in_a_step(rounding: str, arch: str) -> None:
    values = {**problems.DEFAULTS["preparam_step"], "rounding": rounding}
    values |= {"small_tensors": 2, "small_size": 37, "large_tensors": 1, "large_size": 4100}
    batch = shared_step(values)
    found = torch.zeros(())
    largest = unknown_largest(batch, step.CHUNK)
    for launch in (
        *step.launches(batch, found, overflows=True, largest=largest),
        *step.launches(batch, found, largest=largest),
    ):
        assert races(launch, arch, replicated_stores=True) == "", launch.kernel.__name__


@pytest.mark.parametrize(
    ("op", "published", "arch"),
    often(
        [
            (op, published, arch)
            for op, published in (
                ("qkv_attention", False),
                ("qkv_attention", True),
                ("temporal_block", False),
            )
            for arch in ARCHS
        ],
        lambda *case: False,
    ),
)
def test_no_races_in_fused_kernels(op: str, published: bool, arch: str) -> None:
    sizes = {"batch": 1, "positions": 5, "heads": 4 if published else 2}
    changes = {**sizes, **(PUBLISHED if published else {})}
    case = problems.Case(op, "", {**problems.DEFAULTS[op], **changes})
    for launch in problems.launches(case, arch, "cpu"):
        found = races(launch, arch, replicated_stores=True)
        assert found == "", launch.kernel.__name__


@pytest.mark.exhaustive
def test_dropped_barriers_are_races(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ptx_runner.spelled_out
    monkeypatch.setattr(
        ptx_runner, "spelled_out", lambda ptx: re.sub(r"bar\.sync\s+0;", "", whole(ptx))
    )
    sizes = {"batch": 1, "positions": 5, "heads": 2}
    case = problems.Case("qkv_attention", "", {**problems.DEFAULTS["qkv_attention"], **sizes})
    for launch in problems.launches(case, "sm_90", "cpu"):
        assert "data race" in races(launch, "sm_90", replicated_stores=True)


@pytest.mark.parametrize("frames", [8, 64, 200])
def test_traffic_of_attention(frames: int) -> None:
    """Each operand is read once, in full sectors, and each result written once."""
    values = {**problems.DEFAULTS["local_attention"], "batch": 1, "positions": 8, "frames": frames}
    q, k, v, o, grad, dq, dk, dv = attention_tensors(values)
    options = problems.options(values)
    size = q.numel() * q.element_size()
    for launch, tensors in (
        (attention.forward_launch(q, k, v, o, options), 4),
        (attention.backward_launch(grad, q, k, v, dq, dk, dv, options), 7),
    ):
        traffic = run(launch, "sm_90")
        assert traffic.bytes <= 1.05 * tensors * size
        assert 32 * traffic.sectors <= 1.1 * traffic.bytes


def test_traffic_of_the_projection() -> None:
    """With every further position the pixels are read once and the results written once."""
    values = {**problems.DEFAULTS["qkv_attention"], "batch": 1}
    options, few, many = problems.options(values), 16, 32
    found = []
    for positions in (few, many):
        x, o = (shared(torch.randn(1, 8, positions, 256).half()) for _ in range(2))
        weight = shared(torch.randn(4, 192, 64).half())
        launch = qkv.forward_launch(x, weight, None, o, options)
        # One program for each head, which reads its weights once, goes through all tiles.
        found.append(run(launch._replace(programs=4), "sm_90"))
    least = 2 * (many - few) * 8 * 256 * 2
    assert found[1].bytes - found[0].bytes <= 1.05 * least
    assert 32 * (found[1].sectors - found[0].sectors) <= 1.1 * least


@pytest.mark.parametrize("wide", ["float16", "float32"])
def test_traffic_of_the_step(wide: str) -> None:
    values = {**problems.DEFAULTS["preparam_step"], "small_tensors": 0, "large_tensors": 1}
    batch = shared_step({**values, "large_size": 16384, "pre_param_dtype": wide})
    found = shared(torch.zeros(()))
    size = batch.pre_params[0].element_size()
    largest = shared(torch.zeros(8))
    for overflows, remembered, least in (
        (True, None, 2 + 2 * size),
        (False, largest, 4 + 4 * size),
        (True, largest, 2),
    ):
        (launch,) = step.launches(batch, found, overflows=overflows, largest=remembered)
        share([launch])
        traffic = run(launch, "sm_90")
        assert traffic.bytes <= 1.05 * least * 16384
        assert 32 * traffic.sectors <= 1.1 * traffic.bytes
