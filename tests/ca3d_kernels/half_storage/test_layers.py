"""Ordinary layers of torch train in float16 on a CPU under `HalfStorage`, as in float32."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ca3d_kernels.half_storage import HalfStorage

VIDEO, IMAGE, TOKENS = (2, 8, 4, 6, 6), (3, 8, 6, 6), (2, 6, 8)


class Function(nn.Module):
    """A function as a layer, with a weight in front of it to train."""

    def __init__(self, function: Callable[[Tensor], Tensor], size: int = 8) -> None:
        super().__init__()
        self.function = function
        self.scale = nn.Parameter(torch.rand(size) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(
            x * self.scale.view(-1, *[1] * (x.dim() - 2)) if x.dim() > 3 else x * self.scale
        )


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention` of a sequence to itself."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, **self.options)[0]


class PlainAttention(nn.Module):
    """Softmax attention spelled out, as models write it."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = self.product(q, k) * q.shape[-1] ** -0.5
        return scores.softmax(-1) @ v


def empty(q: Tensor) -> Tensor:
    return q.new_zeros(1, 1, 1)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Conv3d": (lambda: nn.Conv3d(8, 6, 3, stride=(1, 2, 2), padding=1), VIDEO),
    "Conv3d, depthwise": (lambda: nn.Conv3d(8, 8, (3, 1, 1), padding=(1, 0, 0), groups=8), VIDEO),
    "Conv3d, reflected": (lambda: nn.Conv3d(8, 6, 3, padding=1, padding_mode="reflect"), VIDEO),
    "Conv3d, same": (lambda: nn.Conv3d(8, 6, 3, padding="same"), VIDEO),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(8, 4, 2, stride=2), VIDEO),
    "Conv3d, then ReLU in place": (
        lambda: nn.Sequential(
            nn.Conv3d(8, 5, 3, bias=False), nn.BatchNorm3d(5), nn.ReLU(inplace=True)
        ),
        VIDEO,
    ),
    "Linear": (lambda: nn.Linear(8, 5), TOKENS),
    "Bilinear": (lambda: Function(lambda x: F.bilinear(x, x, torch.ones(3, 8, 8).to(x))), TOKENS),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(8), VIDEO),
    "InstanceNorm3d": (
        lambda: nn.InstanceNorm3d(8, affine=True, track_running_stats=True), VIDEO
    ),
    "LayerNorm": (lambda: nn.LayerNorm(8), TOKENS),
    "GroupNorm": (lambda: nn.GroupNorm(2, 8), VIDEO),
    "RMSNorm": (lambda: nn.RMSNorm(8), TOKENS),
    "LocalResponseNorm": (lambda: Function(nn.LocalResponseNorm(3)), IMAGE),
    "GELU": (lambda: Function(nn.GELU()), TOKENS),
    "GELU, tanh": (lambda: Function(lambda x: F.gelu(x, approximate="tanh")), TOKENS),
    "SiLU, in place": (lambda: Function(lambda x: F.silu(x * 1, inplace=True)), TOKENS),
    "Hardswish": (lambda: Function(nn.Hardswish()), TOKENS),
    "ReLU, in place": (lambda: nn.Sequential(nn.Linear(8, 5), nn.ReLU(inplace=True)), TOKENS),
    "PReLU": (lambda: nn.PReLU(8), IMAGE),
    "MultiheadAttention": (SelfAttention, TOKENS),
    "MultiheadAttention, no weights": (lambda: SelfAttention(need_weights=False), TOKENS),
    "TransformerEncoderLayer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 12, 0.0, "gelu", batch_first=True), TOKENS
    ),
    "attention, @": (lambda: PlainAttention(lambda q, k: q @ k.mT), TOKENS),
    "attention, matmul": (lambda: PlainAttention(lambda q, k: q.matmul(k.mT)), TOKENS),
    "attention, bmm": (lambda: PlainAttention(lambda q, k: q.bmm(k.transpose(1, 2))), TOKENS),
    "attention, einsum": (
        lambda: PlainAttention(lambda q, k: torch.einsum("bqc,bkc->bqk", q, k)), TOKENS
    ),
    "attention, baddbmm": (
        lambda: PlainAttention(lambda q, k: torch.baddbmm(empty(q), q, k.mT, beta=0)), TOKENS
    ),
    "attention, masked": (
        lambda: PlainAttention(
            lambda q, k: (q @ k.mT).masked_fill(
                torch.ones(6, 6).tril() == 0, torch.finfo(q.dtype).min
            )
        ),
        TOKENS,
    ),
    "scaled_dot_product_attention": (
        lambda: Function(lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True)), TOKENS
    ),
    "cdist": (lambda: Function(lambda x: torch.cdist(x, 2 * x + 1)), TOKENS),
    "MaxPool3d": (lambda: Function(nn.MaxPool3d(3, 2, 1)), VIDEO),
    "AvgPool3d": (lambda: Function(nn.AvgPool3d(2)), VIDEO),
    "AdaptiveAvgPool3d": (lambda: Function(nn.AdaptiveAvgPool3d((2, 3, 4))), VIDEO),
    "AdaptiveAvgPool3d, 1": (lambda: Function(nn.AdaptiveAvgPool3d(1)), VIDEO),
    "AdaptiveMaxPool3d": (lambda: Function(nn.AdaptiveMaxPool3d((2, 3, 4))), VIDEO),
    "AdaptiveAvgPool2d": (lambda: Function(nn.AdaptiveAvgPool2d(4)), IMAGE),
    "interpolate, trilinear": (
        lambda: Function(lambda x: F.interpolate(x, scale_factor=2, mode="trilinear")), VIDEO
    ),
    "interpolate, area": (
        lambda: Function(lambda x: F.interpolate(x, (2, 3, 4), mode="area")), VIDEO
    ),
    "interpolate, bicubic": (
        lambda: Function(lambda x: F.interpolate(x, (4, 9), mode="bicubic")), IMAGE
    ),
    "interpolate, antialias": (
        lambda: Function(lambda x: F.interpolate(x, (4, 3), mode="bilinear", antialias=True)), IMAGE
    ),
    "grid_sample": (
        lambda: Function(
            lambda x: F.grid_sample(x, torch.zeros(2, 2, 3, 3, 3).to(x), align_corners=False)
        ),
        VIDEO,
    ),
    "LSTM": (lambda: Function(Recurrent(nn.LSTM)), TOKENS),
    "GRU": (lambda: Function(Recurrent(nn.GRU)), TOKENS),
    "mean": (lambda: Function(lambda x: x.mean((2, 3, 4))), VIDEO),
    "roll and windows": (
        lambda: Function(lambda x: x.roll(1, 2).unfold(2, 2, 2).flatten(2).logsumexp(-1)), VIDEO
    ),
}  # fmt: skip


class Recurrent(nn.Module):
    """The sequence that a recurrent layer gives."""

    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.layer = kind(8, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def evaluated(
    layer: nn.Module, x: Tensor, grad: Tensor | None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output, a gradient of it, and the gradients of x and all parameters."""
    x = x.clone().requires_grad_()
    output = layer(x)
    if grad is None:
        grad = torch.randn(output.shape).half()
    inputs = [x, *layer.parameters()]
    return output, grad, list(torch.autograd.grad(output, inputs, grad.to(output.dtype)))


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_trains_as_in_float32(name: str) -> None:
    make, shape = LAYERS[name]
    half = make().half().train()
    wide = copy.deepcopy(half).float()
    x = torch.randn(shape).half()
    exact, grad, exact_gradients = evaluated(wide, x.float(), None)
    with HalfStorage():
        ours, _, gradients = evaluated(half, x, grad)
    for mine, truth in zip((ours, *gradients), (exact, *exact_gradients), strict=True):
        assert mine.dtype == torch.float16
        # Layers of several functions round between them.
        assert (mine.float() - truth).abs().max() <= 2**-7 * truth.abs().max() + 2**-12
    for mine, truth in zip(half.buffers(), wide.buffers(), strict=True):
        torch.testing.assert_close(mine.to(truth.dtype), truth, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_keeps_nothing_wider(name: str) -> None:
    make, shape = LAYERS[name]
    layer = make().half().train()
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    x = torch.randn(shape).half().requires_grad_()
    with HalfStorage(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        output = layer(x)
    output.sum().backward()
    for saved in kept:
        pool_index = "MaxPool" in name and saved.dtype == torch.int64
        assert saved.element_size() <= 2 or pool_index, (saved.dtype, saved.shape)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_infers_as_it_trains(name: str) -> None:
    make, shape = LAYERS[name]
    layer = make().half().eval()
    x = torch.randn(shape).half()
    with HalfStorage(), torch.no_grad():
        ours = layer(x)
    exact = layer.float()(x.float())
    assert ours.dtype == torch.float16
    assert (ours.float() - exact).abs().max() <= 2**-8 * exact.abs().max()


def test_what_is_asked_for_is_given() -> None:
    x, y = torch.randn(3, 4).half(), torch.randn(4, 2).half()
    out = torch.empty(3, 2).half()
    with HalfStorage():
        assert torch.matmul(x, y, out=out) is out
        assert torch.linalg.vector_norm(x, dtype=torch.float32).dtype == torch.float32
        assert x.softmax(-1, dtype=torch.float32).dtype == torch.float32
    torch.testing.assert_close(out.float(), x.float() @ y.float(), rtol=1e-2, atol=1e-2)


def test_products_that_broadcast() -> None:
    for left, right in (((2, 3, 4), (4, 5)), ((1, 3, 4), (2, 4, 5)), ((3, 4), (2, 4, 5))):
        half = [torch.randn(shape).half().requires_grad_() for shape in (left, right)]
        wide = [x.detach().float().requires_grad_() for x in half]
        exact = wide[0] @ wide[1]
        with HalfStorage():
            ours = half[0] @ half[1]
        grad = torch.randn(exact.shape).half()
        for mine, truth in zip(
            (ours, *torch.autograd.grad(ours, half, grad)),
            (exact, *torch.autograd.grad(exact, wide, grad.float())),
            strict=True,
        ):
            torch.testing.assert_close(mine.float(), truth, rtol=2**-10, atol=2**-9)


def test_long_matrices_go_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ca3d_kernels.half_storage.products._CHUNK_BYTES", 100)
    half = nn.Linear(8, 5).half()
    wide = copy.deepcopy(half).float()
    x = torch.randn(2, 7, 8).half()
    exact, grad, exact_gradients = evaluated(wide, x.float(), None)
    with HalfStorage():
        ours, _, gradients = evaluated(half, x, grad)
    for mine, truth in zip((ours, *gradients), (exact, *exact_gradients), strict=True):
        torch.testing.assert_close(mine.float(), truth, rtol=2**-10, atol=2**-10)
