"""Linear maps and matrix products of float16 tensors, whose gradients need no second evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ca3d_kernels.half_storage.recomputed import is_half, must_be_plain, recomputed

# float32 copies of a linear map's input and output together, of as many rows as fit.
_CHUNK_BYTES = 8 << 20


def linear(
    function: Callable[..., Any], input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """`torch.nn.functional.linear` in float32, some rows at a time."""
    if must_be_plain() or weight.dim() != 2 or not (is_half(input) and is_half(weight)):
        return recomputed(function, input, weight, bias)
    return _Linear.apply(input, weight, bias)


def matmul(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
    """`torch.matmul`, `mm` and `bmm` in float32."""
    known = len(args) == 2 and not kwargs and all(is_half(x) and x.dim() >= 2 for x in args)
    if must_be_plain() or not known:
        return recomputed(function, *args, **kwargs)
    return _Matmul.apply(function, *args)


def _matrix(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _parts(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """The rows of a matrix in parts of `_CHUNK_BYTES`, as views."""
    return x.split(max(_CHUNK_BYTES // (4 * max(sum(weight.shape), 1)), 1))


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        wide_weight, wide_bias = weight.float(), None if bias is None else bias.float()
        # Not a view of joined parts: an activation may overwrite it.
        output = x.new_empty(*x.shape[:-1], len(weight))
        for part, made in zip(
            _parts(_matrix(x), weight), _parts(_matrix(output), weight), strict=True
        ):
            made.copy_(F.linear(part.float(), wide_weight, wide_bias))
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        wide_weight = weight.float()
        dx: list[Tensor] = []
        dweight, dbias = torch.zeros_like(wide_weight), wide_weight.new_zeros(len(weight))
        for part, grad_part in zip(
            _parts(_matrix(x), weight), _parts(_matrix(grad), weight), strict=True
        ):
            wide = grad_part.float()
            if needs_x:
                dx.append((wide @ wide_weight).half())
            if needs_weight:
                dweight = dweight + wide.T @ part.float()
            if needs_bias:
                dbias = dbias + wide.sum(0)
        return (
            _joined(dx).view(x.shape) if needs_x else None,
            dweight.half() if needs_weight else None,
            dbias.half() if needs_bias else None,
        )


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return function(a.float(), b.float()).half()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        a, b = ctx.saved_tensors
        wide = grad.float()
        da = db = None
        if ctx.needs_input_grad[1]:
            da = (wide @ b.float().mT).sum_to_size(a.shape).half()
        if ctx.needs_input_grad[2]:
            if b.dim() == 2:  # one product instead of a sum of them
                db = (_matrix(a).float().T @ _matrix(wide)).half()
            else:
                db = (a.float().mT @ wide).sum_to_size(b.shape).half()
        return None, da, db
