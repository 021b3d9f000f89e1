"""Ops on CPU tensors do not care which device new tensors are made on by default."""

from collections.abc import Callable
from typing import Any

import block_cases
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ca3d_kernels import (
    PreParamSGD,
    folded_conv,
    local_temporal_attention,
    norm_relu,
    norm_relu_conv,
    temporal_block,
)
from ca3d_kernels.half_storage import half_storage


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu")


def with_gradients(run: Callable[..., Tensor], *operands: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in operands]
    output = run(*leaves)
    return [output, *torch.autograd.grad(output, leaves, draw(*output.shape).to(output.dtype))]


def attention(backend: str) -> list[Tensor]:
    table = torch.tensor([[[0, 0], [1, 1], [0, 2]], [[1, 0], [0, 1], [1, 1]]], device="cpu")
    results = []
    for options in ({}, {"key_table": table, "edge": "zero"}):
        arguments: dict[str, Any] = {"kernel_size": 3, "backend": backend, **options}
        results += with_gradients(
            lambda *x, a=arguments: local_temporal_attention(*x, **a), *draw(3, 2, 2, 6, 8).unbind()
        )
    return results


def convolution() -> list[Tensor]:
    x = draw(2, 32, 6, 6).contiguous(memory_format=torch.channels_last)
    weight, rows = draw(32, 32, 3, 3), draw(2, 32)
    return [
        folded_conv(x, weight, *rows, padding=(1, 1)),
        folded_conv(x, weight[..., :1, :1], *rows),
    ]


def block() -> list[Tensor]:
    with torch.device("cpu"):
        operands = block_cases.Case(head_dim=16).tensors(torch.float32)
    return [temporal_block(*operands)]


def norm() -> list[Tensor]:
    y = draw(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    weight, filters = draw(8), draw(8, 8, 3, 3)
    return [
        *with_gradients(lambda *x: norm_relu(*x).z, y, weight, weight, y),
        *with_gradients(
            lambda *x: norm_relu_conv(*x, padding=1).output, y, weight, weight, filters
        ),
    ]


def step() -> list[Tensor]:
    results = []
    for rounding in ("nearest", "stochastic", "compensated", "published"):
        param = torch.nn.Parameter(draw(5000).half())
        optimizer = PreParamSGD(
            [param], lr=0.1, momentum=0.9, rounding=rounding, skip_nonfinite=True
        )
        param.grad = draw(5000).half()
        optimizer.step()
        results += [param.detach(), *optimizer.state[param].values()]
    return results


JOBS: dict[str, Callable[[], list[Tensor]]] = {
    "attention": lambda: attention("cpu"),
    "reference attention": lambda: attention("reference"),
    "folded_conv": convolution,
    "temporal_block": block,
    "half_storage": lambda: with_gradients(
        half_storage(F.conv2d), draw(2, 8, 5, 5).half(), draw(8, 8, 3, 3).half()
    ),
    "norm_relu_conv": norm,
    "preparam_step": step,
}


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS.keys())
def test_results_are_the_same(job: Callable[[], list[Tensor]]) -> None:
    torch.manual_seed(0)
    expected = job()
    torch.manual_seed(0)
    with torch.device("meta"):
        found = job()
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.device.type == "cpu"
        assert torch.equal(ours, theirs)


def test_tables_of_the_gpu_kernels_are_made_on_the_cpu() -> None:
    launcher = pytest.importorskip("ca3d_kernels.preparam_step.triton")
    attention_launcher = pytest.importorskip("ca3d_kernels.local_attention.triton")
    w = [draw(5000)]
    with torch.device("meta"):
        table = launcher.chunk_table([w] * 5, [5000], [0])
        counts = attention_launcher.key_counts((0, 0, 0, 1), 1, 2, torch.device("cpu"))
    assert (table.device.type, counts.device.type) == ("cpu", "cpu")
