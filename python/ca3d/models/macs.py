"""Counting a model's multiply-adds with torch's flop counter, local attention included.

Importing this module (as `ca3d.models` does) teaches `torch.utils.flop_counter` the ops of
`ca3d_kernels`, which it would otherwise count as nothing.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, register_flop_formula

import ca3d_kernels  # noqa: F401  (registers the ops)

__all__ = ["count_macs"]

# Every query meets every slot of its window, whether or not the slot lies in the clip, twice: in
# q·k and in the weighted sum of v. Backward makes the scores again, and four products of that size.
_FORWARD, _BACKWARD = 2, 5


def _products(shape: Sequence[int], kernel_size: int, count: int) -> int:
    return 2 * count * kernel_size * torch.Size(shape).numel()


@register_flop_formula(torch.ops.ca3d.local_attention)
def _attention(q: Any, k: Any, v: Any, kernel_size: int, *rest: Any, **kwargs: Any) -> int:
    return _products(q, kernel_size, _FORWARD)


@register_flop_formula(torch.ops.ca3d.local_attention_backward)
def _attention_backward(
    grad: Any, q: Any, k: Any, v: Any, kernel_size: int, *rest: Any, **kwargs: Any
) -> int:
    return _products(q, kernel_size, _BACKWARD)


@register_flop_formula(torch.ops.ca3d.local_attention_packed)
def _packed(qkv: Any, kernel_size: int, *rest: Any, **kwargs: Any) -> int:
    return _products(qkv, kernel_size, _FORWARD) // 3


@register_flop_formula(torch.ops.ca3d.local_attention_packed_backward)
def _packed_backward(grad: Any, qkv: Any, kernel_size: int, *rest: Any, **kwargs: Any) -> int:
    return _products(qkv, kernel_size, _BACKWARD) // 3


@register_flop_formula(torch.ops.ca3d.norm_relu_conv)
def _norm_relu_conv(
    y: Any, weight: Any, bias: Any, residual: Any, conv_weight: Any, *rest: Any, **kwargs: Any
) -> int:
    if conv_weight is None:
        return 0
    return conv_flop_count(y, conv_weight, kwargs["out_shape"][0])


@register_flop_formula(torch.ops.ca3d.norm_relu_conv_backward)
def _norm_relu_conv_backward(grad: Any, grad_z: Any, y: Any, *rest: Any, **kwargs: Any) -> int:
    conv_weight = rest[5]
    if grad is None or conv_weight is None:
        return 0
    # Gradients of the input and of the weight, each as much as the convolution itself.
    return 2 * conv_flop_count(y, conv_weight, grad)


@contextmanager
def _only_counted_ops() -> Iterator[None]:
    """torch's counter has no formula for the CPU's fused attention, nor for what `nn.Transformer`
    and `nn.MultiheadAttention` run in evaluation."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@torch.no_grad()
def count_macs(model: nn.Module, clip: Sequence[int] = (1, 3, 16, 112, 112)) -> dict[str, int]:
    """Multiply-adds of one forward pass in evaluation mode, by kind of operation.

    One multiply-add is one MAC, half of what torch's counter calls flops. Convolutions, matrix
    products and attention of any kind are counted; normalisations, activations, pools, sums and
    the softmax are not.

    Args:
        model: any model; it is run once, on zeros, where its parameters are.
        clip: shape of the input, (B, 3, T, H, W).

    Returns:
        MACs by the name of the op, and their sum as ``"total"``.

    Example:
        >>> from ca3d.models import ca3d_tiny
        >>> count_macs(ca3d_tiny(5), (1, 3, 16, 32, 32))["total"]
        31508800
    """
    training = model.training
    like = next(model.parameters())
    try:
        model.eval()
        with _only_counted_ops(), FlopCounterMode(display=False) as counter:
            model(torch.zeros(tuple(clip), dtype=like.dtype, device=like.device))
    finally:
        model.train(training)
    found = counter.get_flop_counts()["Global"]
    counts = {str(op).split(".")[-1]: flops // 2 for op, flops in found.items()}
    return {**counts, "total": sum(counts.values())}
