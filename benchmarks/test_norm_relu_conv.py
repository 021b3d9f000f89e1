"""How long ReLU + BatchNorm + residual takes, forward and backward, against torch and copies.

The tensors are those between the convolutions of CA3D's four blocks at batch 4, 16x112x112. The
ratios are medians over interleaved rounds (see interleaved.py), with settled memory (see
allocator.py).
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from allocator import settled_memory
from interleaved import Timings, interleave
from torch import Tensor

from ca3d_kernels import norm_relu

# (N, C, H, W) of the spatial halves of the blocks.
BLOCKS = {
    "block 1": (64, 64, 56, 56),
    "block 2": (64, 128, 28, 28),
    "block 3": (32, 256, 14, 14),
    "block 4": (16, 512, 7, 7),
}
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def torchs(y: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return F.batch_norm(F.relu(y), None, None, weight, bias, True, 0.0, 1e-5) + residual


def ours(y: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return norm_relu(y, weight, bias, residual).z


@cache
def candidates(block: str, dtype: str) -> dict[str, Callable[[], object]]:
    shape = BLOCKS[block]

    def images() -> Tensor:
        x = torch.randn(shape).to(DTYPES[dtype])
        return x.contiguous(memory_format=torch.channels_last)

    leaves = images().requires_grad_(), images().requires_grad_()
    weight, bias = (torch.rand(shape[1]).to(DTYPES[dtype]).requires_grad_() for _ in range(2))
    grad, target = images(), images()

    def both_ways(way: Callable[..., Tensor]) -> None:
        y, residual = leaves
        inputs = (y, weight, bias, residual)
        torch.autograd.grad(way(*inputs), inputs, grad)

    def copies() -> None:
        for _ in range(4):
            target.copy_(grad)

    return {
        "ours": lambda: both_ways(ours),
        "torch": lambda: both_ways(torchs),
        "four copies": copies,
    }


@cache
def timings(block: str, dtype: str) -> Timings:
    torch.set_num_threads(min(2, torch.get_num_threads()))
    with settled_memory():
        return interleave(candidates(block, dtype), rounds=20, budget=2.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", BLOCKS)
def test_norm_relu(benchmark: Any, block: str, dtype: str) -> None:
    measured = timings(block, dtype)
    benchmark.extra_info.update(
        {
            "time / four copies": round(measured.ratio("ours", "four copies"), 3),
            "torch / time": round(measured.ratio("torch", "ours"), 2),
        }
    )
    benchmark.pedantic(candidates(block, dtype)["ours"], rounds=3, warmup_rounds=1)
