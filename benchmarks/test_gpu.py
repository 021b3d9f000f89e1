"""How long local temporal attention takes on a GPU, against other ways and against a copy.

The same question as test_local_attention.py, on a CUDA device. Peers that can't be imported are
left out. A candidate's time includes waiting for the device.
"""

import importlib.util
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import peers
import pytest
import torch
from interleaved import Timings, interleave
from torch import Tensor

from ca3d_kernels import backends, local_temporal_attention_packed

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("there is no CUDA device", allow_module_level=True)

# Heads and (B, 3C, T, H, W) of the attention of CA3D's third and fourth block, at batch 20.
STAGES = {"stage 1": (4, (20, 768, 8, 14, 14)), "stage 2": (8, (20, 1536, 4, 7, 7))}
MOVED = {"forward": 4, "forward+backward": 11}


def flex(qkv: Tensor, heads: int, kernel_size: int = 5) -> Tensor:
    """FlexAttention with the window as its mask."""
    attend, mask = _flex_attention(qkv.shape[2], kernel_size)
    q, k, v = (x.flatten(0, 1).contiguous() for x in peers.sequences(qkv, heads).unbind(3))
    o = attend(q, k, v, block_mask=mask).unflatten(0, (len(qkv), -1))
    return peers.features(o, (qkv.shape[3], qkv.shape[4]))


@cache
def _flex_attention(frames: int, kernel_size: int) -> tuple[Callable[..., Tensor], Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def window(batch: Tensor, head: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return (s - t).abs() <= kernel_size // 2

    mask = create_block_mask(window, None, None, frames, frames, device="cuda")
    return torch.compile(flex_attention), mask


def natten(qkv: Tensor, heads: int, kernel_size: int = 5) -> Tensor:
    """NATTEN's one-dimensional attention; its windows are moved inwards at the ends."""
    from natten.functional import na1d

    q, k, v = (x.flatten(0, 1).movedim(1, 2) for x in peers.sequences(qkv, heads).unbind(3))
    o = na1d(q.contiguous(), k.contiguous(), v.contiguous(), kernel_size=kernel_size)
    o = o.movedim(2, 1).unflatten(0, (len(qkv), -1))
    return peers.features(o, (qkv.shape[3], qkv.shape[4]))


def ours(backend: str, qkv: Tensor, heads: int) -> Tensor:
    o = local_temporal_attention_packed(peers.sequences(qkv, heads), backend=backend)
    return peers.features(o, (qkv.shape[3], qkv.shape[4]))


def ways(frames: int) -> dict[str, Callable[[Tensor, int], Tensor]]:
    """The candidates that can run here."""
    serving = backends.explain("local_attention", "cuda")
    usable = [name for name, obstacle in serving.items() if obstacle is None]
    made: dict[str, Callable[[Tensor, int], Tensor]] = {
        name: partial(ours, name) for name in usable if name != "reference"
    }
    made |= {"sdpa with a band mask": peers.sdpa, "flex attention": flex}
    # NATTEN has no window that is wider than the clip.
    if importlib.util.find_spec("natten") is not None and frames >= 5:
        made["natten"] = natten
    return made


def waiting(run: Callable[[], object]) -> None:
    run()
    torch.cuda.synchronize()


def forward_backward(way: Callable[..., Tensor], qkv: Tensor, heads: int, grad: Tensor) -> None:
    qkv.grad = None
    way(qkv, heads).backward(grad)


@torch.no_grad()
def forward(way: Callable[..., Tensor], qkv: Tensor, heads: int) -> None:
    way(qkv, heads)


@cache
def candidates(stage: str, direction: str) -> dict[str, Callable[[], object]]:
    heads, shape = STAGES[stage]
    x = torch.randn(shape, dtype=torch.float16, device="cuda")
    qkv = x.contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    with torch.no_grad():
        grad = torch.randn_like(peers.sdpa(qkv, heads))
    made: dict[str, Callable[[], object]] = {}
    for name, way in ways(shape[2]).items():
        if direction == "forward":
            made[name] = partial(waiting, partial(forward, way, qkv, heads))
        else:
            made[name] = partial(waiting, partial(forward_backward, way, qkv, heads, grad))
    source = torch.ones(grad.numel() * MOVED[direction] // 2, dtype=grad.dtype, device="cuda")
    made["copy"] = partial(waiting, partial(torch.empty_like(source).copy_, source))
    return made


@cache
def timings(stage: str, direction: str) -> Timings:
    return interleave(candidates(stage, direction), rounds=200, warmup=10, budget=5.0)


@pytest.mark.parametrize("direction", MOVED)
@pytest.mark.parametrize("stage", STAGES)
def test_attention(benchmark: Any, stage: str, direction: str) -> None:
    measured = timings(stage, direction)
    first = next(iter(candidates(stage, direction)))
    for name in candidates(stage, direction):
        if name != first:
            benchmark.extra_info[f"{name} / {first}"] = round(measured.ratio(name, first), 3)
    benchmark.pedantic(candidates(stage, direction)[first], rounds=50, warmup_rounds=5)
