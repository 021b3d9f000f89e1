"""The compiled CPU kernels of the folded temporal half."""

import torch
from torch import Tensor

from ca3d_kernels import backends, pages
from ca3d_kernels.backends import UnsupportedInputError
from ca3d_kernels.local_attention.op import EDGES, Options
from ca3d_kernels.temporal_block.op import Weights

_DTYPES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


class NativeKernels:
    """Calls the compiled library with addresses and strides; see `op.Kernels`."""

    def __init__(self) -> None:
        native = backends.native()
        assert native is not None
        self._native = native

    def forward(self, x: Tensor, weights: Weights, out: Tensor, options: Options) -> None:
        """Writes the output into out."""
        if x.dtype not in _DTYPES:
            raise UnsupportedInputError(f"dtype {x.dtype} is not float32, float16 or bfloat16")
        heads, head_dim, _ = weights.qkv_weight.shape
        pages.prepare(self._native, out)
        self._native.temporal_block(
            _DTYPES[x.dtype],
            (x.shape[0], x.shape[2], heads, x.shape[1], head_dim),
            (options.kernel_size, options.dilation, options.causal, EDGES.index(options.edge)),
            head_dim**-0.5 if options.scale is None else options.scale,
            list(options.key_table),
            len(weights.column_weight),
            tuple(t.data_ptr() for t in weights),
            (x.data_ptr(), *x.stride()[:3]),
            (out.data_ptr(), *out.stride()[:3]),
            torch.get_num_threads(),
        )
