"""The compiled CPU kernels of local temporal attention."""

import torch
from torch import Tensor

from ca3d_kernels import backends, pages
from ca3d_kernels.local_attention.op import EDGES, Options

_DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


def operand(x: Tensor) -> tuple[int, int, int, int, int]:
    """Address and strides of the first four dimensions, in elements.

    Example:
        >>> operand(torch.zeros(2, 3, 4, 8, 16))[1:]
        (1536, 512, 128, 16)
    """
    return (x.data_ptr(), *x.stride()[:4])  # type: ignore[return-value]


class NativeKernels:
    """Calls the compiled library with addresses and strides; see `op.Kernels`."""

    def __init__(self) -> None:
        native = backends.native()
        assert native is not None
        self._forward = native.local_attention_forward
        self._backward = native.local_attention_backward
        self._native = native

    def forward(self, q: Tensor, k: Tensor, v: Tensor, o: Tensor, options: Options) -> None:
        """Writes the attention output into o."""
        pages.prepare(self._native, o)
        self._forward(*problem(q, options), *map(operand, (q, k, v, o)), torch.get_num_threads())

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        options: Options,
    ) -> None:
        """Writes the gradients of q, k and v into dq, dk and dv."""
        pages.prepare(self._native, dq, dk, dv)
        operands = map(operand, (q, k, v, grad, dq, dk, dv))
        self._backward(*problem(q, options), *operands, torch.get_num_threads())


def problem(
    q: Tensor, options: Options
) -> tuple[str, tuple[int, ...], tuple[int, ...], float, list[int]]:
    """What a compiled library wants to know besides the operands.

    Example:
        >>> problem(torch.zeros(2, 3, 4, 8, 16), Options())
        ('float32', (2, 3, 4, 8, 16), (5, 1, False, 0), 0.25, [])
    """
    return (
        _DTYPES[q.dtype],
        tuple(q.shape),
        (options.kernel_size, options.dilation, options.causal, EDGES.index(options.edge)),
        q.shape[-1] ** -0.5 if options.scale is None else options.scale,
        list(options.key_table),
    )
