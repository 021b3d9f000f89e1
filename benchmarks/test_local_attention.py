"""How long local temporal attention takes, against other ways and against a copy of its bytes.

From a channels-last projection output to a channels-last result, and back to the gradient of the
projection output. The ratios are medians over interleaved rounds (see interleaved.py), with settled
memory (see allocator.py).
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import peers
import pytest
import torch
from allocator import settled_memory
from interleaved import Timings, interleave
from torch import Tensor

from ca3d_kernels import local_temporal_attention_packed

DTYPES = {"float32": torch.float32, "float16": torch.float16}
# Heads and (B, 3C, T, H, W) of the attention of CA3D's third and fourth block, at batch 20.
STAGES = {"stage 1": (4, (20, 768, 8, 14, 14)), "stage 2": (8, (20, 1536, 4, 7, 7))}
WAYS = {"ours": peers.ours, "sdpa": peers.sdpa, "unfold": peers.unfold}
# Tensors of q's size that have to be read or written: q, k, v, o, and q, k, v, do, dq, dk, dv.
MOVED = {"forward": 4, "forward+backward": 11}


def projection(stage: str, dtype: str) -> Tensor:
    _, shape = STAGES[stage]
    x = torch.randn(shape).to(DTYPES[dtype]).contiguous(memory_format=torch.channels_last_3d)
    return x.requires_grad_()


@torch.no_grad()
def forward(way: Callable[..., Tensor], qkv: Tensor, heads: int) -> None:
    way(qkv, heads)


def forward_backward(way: Callable[..., Tensor], qkv: Tensor, heads: int, grad: Tensor) -> None:
    qkv.grad = None
    way(qkv, heads).backward(grad)


@cache
def candidates(stage: str, dtype: str, direction: str) -> dict[str, Callable[[], object]]:
    heads, _ = STAGES[stage]
    qkv = projection(stage, dtype)
    with torch.no_grad():
        grad = torch.randn_like(peers.ours(qkv, heads))
    made: dict[str, Callable[[], object]] = {}
    for name, way in WAYS.items():
        if direction == "forward":
            made[name] = partial(forward, way, qkv, heads)
        else:
            made[name] = partial(forward_backward, way, qkv, heads, grad)
    source = torch.ones(grad.numel() * MOVED[direction] // 2, dtype=grad.dtype)
    made["copy"] = partial(torch.empty_like(source).copy_, source)
    return made


@cache
def timings(stage: str, dtype: str, direction: str) -> Timings:
    torch.set_num_threads(min(2, torch.get_num_threads()))
    with settled_memory():
        return interleave(candidates(stage, dtype, direction), rounds=30, budget=3.0)


@pytest.mark.parametrize("direction", MOVED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stage", STAGES)
def test_attention(benchmark: Any, stage: str, dtype: str, direction: str) -> None:
    measured = timings(stage, dtype, direction)
    benchmark.extra_info.update(
        {
            "time / copy of the same bytes": round(measured.ratio("ours", "copy"), 3),
            "sdpa with a band mask / time": round(measured.ratio("sdpa", "ours"), 2),
            "unfold / time": round(measured.ratio("unfold", "ours"), 1),
        }
    )
    benchmark.pedantic(candidates(stage, dtype, direction)["ours"], rounds=10, warmup_rounds=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stage", STAGES)
def test_all_ways_compute_the_same(stage: str, dtype: str) -> None:
    heads, (_, channels, frames, *_) = STAGES[stage]
    qkv = torch.randn(2, channels, frames, 3, 3).to(DTYPES[dtype])
    qkv = qkv.contiguous(memory_format=torch.channels_last_3d)
    tolerance = 1e-5 if dtype == "float32" else 4e-3
    ours, dense, windows = (way(qkv, heads) for way in WAYS.values())
    torch.testing.assert_close(dense, ours, rtol=0, atol=tolerance)
    padded = local_temporal_attention_packed(peers.sequences(qkv, heads), edge="zero")
    padded = peers.features(padded, (3, 3))
    torch.testing.assert_close(windows, padded, rtol=0, atol=tolerance)
    assert ours.is_contiguous(memory_format=torch.channels_last_3d)
