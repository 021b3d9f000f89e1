"""Memory layouts of attention operands: what the results look like, what the kernels see."""

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def empty_dense(like: Tensor) -> Tensor:
    """Uninitialised tensor of the same shape, dense, in the same order of dimensions.

    The last dimension is the fastest, the others keep the order of their strides. A slice of a
    channels-last projection therefore gets a channels-last result. Expanded input (stride 0) has
    no order of its own and gets a contiguous result.

    Args:
        like: tensor with at least one dimension.

    Returns:
        Tensor of the same shape, dtype and device.

    Example:
        >>> qkv = torch.randn(2, 8, 3, 4, 16)             # batch, T, (q, k, v), heads, head_dim
        >>> q = qkv.permute(0, 3, 2, 1, 4)[:, :, 0]       # batch, heads, T, head_dim
        >>> empty_dense(q).stride()
        (512, 16, 64, 1)
    """
    if like.is_contiguous():
        return torch.empty_like(like, memory_format=torch.contiguous_format)
    order = list(range(like.dim() - 1))
    strides = like.stride()
    if not any(strides[i] == 0 and like.shape[i] != 1 for i in order):
        order.sort(key=lambda i: strides[i], reverse=True)
    dense, step = [1] * like.dim(), like.shape[-1]
    for i in reversed(order):
        dense[i] = step
        step = step * like.shape[i]
    return torch.empty_strided(like.shape, dense, dtype=like.dtype, device=like.device)


def _mergeable(x: Tensor, dims: Sequence[int]) -> bool:
    """Whether dimensions of a tensor, slowest first, can be walked with one stride."""
    return all(x.stride(a) == x.stride(b) * x.shape[b] for a, b in itertools.pairwise(dims))


@contextlib.contextmanager
def collapse_leading(
    inputs: Sequence[Tensor], outputs: Sequence[Tensor]
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Views of all operands with exactly two leading dimensions and a contiguous last one.

    Operands whose strides allow no such view are copied once: inputs on entry, outputs on exit.

    Args:
        inputs: tensors of one shape (..., heads, T, head_dim), any strides.
        outputs: tensors of that shape with a contiguous last dimension.

    Yields:
        The inputs and the outputs as (outer, inner, heads, T, head_dim).

    Example:
        >>> x = torch.zeros(2, 3, 5, 4, 8, 16)
        >>> with collapse_leading([x[:, :, 1:]], [torch.empty(2, 3, 4, 4, 8, 16)]) as (ins, outs):
        ...     ins[0].shape, ins[0].data_ptr() == x[:, :, 1:].data_ptr()
        (torch.Size([6, 4, 4, 8, 16]), True)
    """
    first = outputs[0]
    if first.dim() <= 5 and all(x.stride(-1) == 1 for x in (*inputs, *outputs)):
        ones = (1,) * (5 - first.dim())
        yield [x.view(*ones, *x.shape) for x in inputs], [x.view(*ones, *x.shape) for x in outputs]
        return
    # In the order of the result's memory, so that permuted dimensions merge, too.
    lead = sorted(range(first.dim() - 3), key=first.stride, reverse=True)
    lead = [i for i in lead if first.shape[i] != 1]
    order = [i for i in range(first.dim() - 3) if i not in lead] + lead

    def fits(x: Tensor, cut: int) -> bool:
        contiguous = x.stride(-1) == 1 or x.shape[-1] == 1
        return contiguous and _mergeable(x, lead[:cut]) and _mergeable(x, lead[cut:])

    def misfits(cut: int) -> int:
        return sum(not fits(x, cut) for x in (*inputs, *outputs))

    cut = min(range(len(lead) + 1), key=misfits) if len(lead) > 2 else min(1, len(lead))
    halves = lead[:cut], lead[cut:]
    shape = (*(math.prod(first.shape[i] for i in half) for half in halves), *first.shape[-3:])

    def view(x: Tensor) -> Tensor:
        steps = (x.stride(half[-1]) if half else 0 for half in halves)
        return x.as_strided(shape, (*steps, x.stride(-3), x.stride(-2), 1))

    def permuted(x: Tensor) -> Tensor:
        return x.permute(*order, -3, -2, -1)

    sources = [view(x) if fits(x, cut) else permuted(x).contiguous().view(shape) for x in inputs]
    targets = [view(x) if fits(x, cut) else x.new_empty(shape) for x in outputs]
    yield sources, targets
    for x, target in zip(outputs, targets, strict=True):
        if not fits(x, cut):
            permuted(x).copy_(target.view(permuted(x).shape))
