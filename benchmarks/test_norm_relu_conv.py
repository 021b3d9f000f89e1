"""How long ReLU + BatchNorm (+ residual) takes, forward and backward, against copies of the tensor.

The floor is about four copies: forward reads y twice and writes z, backward reads y and dz twice
and writes dy. The tensors are those of CA3D's blocks at batch 4, 16x112x112. "time / 4 clones" is
the comparison with fresh memory for each result, as our results have; "time / 4 copies" is that
with memory whose pages are there already. The peer is torch's ReLU, batch_norm and sum on the same
channels-last tensors. Ratios are medians over interleaved rounds; see interleaved.py.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from interleaved import interleave
from torch import Tensor

from ca3d_kernels import norm_relu

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
BLOCKS = {
    "spatial1": (64, 64, 56, 56),
    "spatial2": (64, 128, 28, 28),
    "spatial3": (64, 256, 14, 14),
    "temporal3": (4, 256, 8, 196),
    "spatial4": (32, 512, 7, 7),
}


def channels_last(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def candidates(
    shape: tuple[int, ...], dtype: torch.dtype, residual: bool
) -> dict[str, Callable[[], object]]:
    """What is timed: ours, torch's, and four copies or clones of a tensor."""
    y = channels_last(shape, dtype).requires_grad_()
    r = channels_last(shape, dtype).requires_grad_() if residual else None
    grad, target = channels_last(shape, dtype), channels_last(shape, dtype)
    weight, bias = (torch.rand(shape[1]).to(dtype).requires_grad_() for _ in range(2))
    wanted = [x for x in (y, weight, bias, r) if x is not None]

    def ours() -> None:
        torch.autograd.grad(norm_relu(y, weight, bias, r).z, wanted, grad)

    def torchs() -> None:
        z = F.batch_norm(F.relu(y), None, None, weight, bias, training=True)
        torch.autograd.grad(z if r is None else z + r, wanted, grad)

    source = y.detach()

    def copies() -> None:
        for _ in range(4):
            target.copy_(source)

    def clones() -> None:
        for _ in range(4):
            source.clone()

    return {"ours": ours, "torch": torchs, "copies": copies, "clones": clones}


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.benchmark(group="ReLU + BatchNorm, forward and backward")
def test_norm_relu(benchmark: Any, block: str, dtype: torch.dtype, residual: bool) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(min(2, torch.get_num_threads()))
    runs = candidates(BLOCKS[block], dtype, residual)
    timings = interleave(runs, rounds=15, budget=3)
    for what, other in (("4 copies", "copies"), ("4 clones", "clones"), ("torch", "torch")):
        benchmark.extra_info[f"time / {what}"] = round(timings.ratio("ours", other), 3)
    benchmark.pedantic(runs["ours"], rounds=5, warmup_rounds=1)
