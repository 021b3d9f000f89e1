"""Convolutions of float16 tensors in float32, a part of the batch at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ca3d_kernels.half_storage.recomputed import is_half, must_be_plain, recomputed

# float32 copies of a convolution's input and output together, of as many items of the batch as fit.
# Parts of 8 MB are large enough for the convolution and small beside what a model keeps.
_CHUNK_BYTES = 8 << 20


def _chunks(x: Tensor, weight: Tensor, options: tuple[Any, ...]) -> Iterator[slice]:
    """Slices of the batch, by the size of an output without padding and dilation."""
    transposed, groups, steps = options[3], options[5], math.prod(options[0])
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    pixels = x[0, 0].numel()
    made = channels * (pixels * steps if transposed else pixels // steps)
    items = max(_CHUNK_BYTES // (4 * (x.shape[1] * pixels + made)), 1)
    return (slice(i, i + items) for i in range(0, len(x), items))


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, options: tuple[Any, ...]) -> Tensor:
    """`torch.convolution` of half tensors in float32, a part of the batch at a time.

    Args:
        x: (N, C, ...), N at least 1, any dtype; likewise weight and bias.
        options: stride, padding, dilation, transposed, output_padding and groups.

    Returns:
        The output in x's dtype, in the layout that the convolution chooses.

    Example:
        >>> x, weight = torch.ones(2, 1, 3, 3).half(), torch.ones(1, 1, 3, 3).half()
        >>> convolve(x, weight, None, ([1] * 2, [0] * 2, [1] * 2, False, [0] * 2, 1)).flatten()
        tensor([9., 9.], dtype=torch.float16)
    """
    wide_weight, wide_bias = weight.float(), None if bias is None else bias.float()
    output = None
    for part in _chunks(x, weight, options):
        made = torch.convolution(x[part].float(), wide_weight, wide_bias, *options)
        if output is None:
            if len(made) == len(x):
                return made.to(x.dtype)
            formats = {4: torch.channels_last, 5: torch.channels_last_3d}
            last = formats.get(made.dim(), torch.contiguous_format)
            layout = last if made.is_contiguous(memory_format=last) else torch.contiguous_format
            shape = (len(x), *made.shape[1:])
            output = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
        output[part] = made
    assert output is not None
    return output


def convolution_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    options: tuple[Any, ...],
    mask: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `convolve`: that of x in x's dtype, those of weight and bias in float32.

    Args:
        grad: of the output.
        x, weight, options: as they were.
        mask: which of the gradients of x, weight and bias are wanted; others are None.

    Example:
        >>> x = torch.ones(2, 1, 3, 3).half()
        >>> options = ([1] * 2, [0] * 2, [1] * 2, False, [0] * 2, 1)
        >>> one = torch.ones(1, 1, 1, 1).half()
        >>> convolution_gradients(x, x, one, options, (False, True, False))[1].item()
        18.0
    """
    transposed, groups = options[3], options[5]
    outputs = [weight.shape[1] * groups if transposed else weight.shape[0]]
    wide_weight = weight.float()
    dx = torch.empty_like(x) if mask[0] else None
    dweight = dbias = None
    for part in _chunks(x, weight, options):
        wide_grad = grad[part].float()
        dpart, more_weight, more_bias = torch.ops.aten.convolution_backward(
            wide_grad, x[part].float(), wide_weight, outputs, *options, list(mask)
        )
        if dx is not None and len(dpart) == len(x):
            dx = dpart.to(x.dtype)
        elif dx is not None:
            dx[part] = dpart
        dweight = more_weight if dweight is None else dweight.add_(more_weight)
        dbias = more_bias if dbias is None else dbias.add_(more_bias)
    return dx, dweight, dbias


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, options: tuple[Any, ...]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options = options
        return convolve(x, weight, bias, options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        mask = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # create_graph: nothing may be written in place
            transposed, groups = ctx.options[3], ctx.options[5]
            outputs = weight.shape[1] * groups if transposed else weight.shape[0]
            found = torch.ops.aten.convolution_backward(
                grad.float(), x.float(), weight.float(), [outputs], *ctx.options, list(mask)
            )
        else:
            found = convolution_gradients(grad, x, weight, ctx.options, mask)
        return *(d.half() if wanted else None for d, wanted in zip(found, mask, strict=True)), None


def rule(dimensions: int, *, transposed: bool) -> Callable[..., Tensor]:
    """How `torch.nn.functional.conv1d` and its likes run on half tensors."""

    def numbers(value: Any) -> list[int]:
        return [value] * dimensions if isinstance(value, int) else list(value)

    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        x, weight, bias, stride, padding, dilation, output_padding, groups = (
            _transposed_arguments if transposed else _arguments
        )(*args, **kwargs)
        known = x.dim() == dimensions + 2 and len(x) > 0 and not isinstance(padding, str)
        if must_be_plain() or not (known and is_half(x) and is_half(weight)):
            return recomputed(function, *args, **kwargs)
        options = (*map(numbers, (stride, padding, dilation)), transposed, numbers(output_padding))
        return _Convolution.apply(x, weight, bias, (*options, groups))

    return run


def _arguments(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> tuple[Any, ...]:
    return input, weight, bias, stride, padding, dilation, 0, groups


def _transposed_arguments(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> tuple[Any, ...]:
    return input, weight, bias, stride, padding, dilation, output_padding, groups
