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


def _operand(x: Tensor) -> tuple[int, int, int, int, int]:
    """Address and strides of the first four dimensions, in elements."""
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
        self._forward(*_problem(q, options), *map(_operand, (q, k, v, o)), torch.get_num_threads())

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
        operands = map(_operand, (q, k, v, grad, dq, dk, dv))
        self._backward(*_problem(q, options), *operands, torch.get_num_threads())


def _problem(
    q: Tensor, options: Options
) -> tuple[str, tuple[int, ...], tuple[int, ...], float, list[int]]:
    """What the library wants to know besides the operands."""
    return (
        _DTYPES[q.dtype],
        tuple(q.shape),
        (options.kernel_size, options.dilation, options.causal, EDGES.index(options.edge)),
        q.shape[-1] ** -0.5 if options.scale is None else options.scale,
        list(options.key_table),
    )
