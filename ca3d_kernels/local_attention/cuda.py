"""The compiled CUDA kernels of local temporal attention."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor

from ca3d_kernels import cuda
from ca3d_kernels.local_attention.cpu import operand, problem
from ca3d_kernels.local_attention.op import Options


class CudaKernels:
    """Queues the kernels on the current stream of the tensors' device; see `op.Kernels`.

    Args:
        library: the module `ca3d_kernels._cuda`.
    """

    def __init__(self, library: ModuleType) -> None:
        self._library = library

    def forward(self, q: Tensor, k: Tensor, v: Tensor, o: Tensor, options: Options) -> None:
        """Writes the attention output into o."""
        self._call(self._library.local_attention_forward, (q, k, v, o), options)

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
        self._call(self._library.local_attention_backward, (q, k, v, grad, dq, dk, dv), options)

    def _call(
        self, function: Callable[..., Any], tensors: tuple[Tensor, ...], options: Options
    ) -> None:
        arguments = (*problem(tensors[0], options), *map(operand, tensors))
        cuda.call(self._library, function, arguments, tensors[0])
