"""The compiled CPU kernels of the folded temporal half."""

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

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
    """Calls the compiled library with addresses and strides; see `op.Kernels`.

    What it makes of `column_weight` is kept as long as that tensor lives and isn't written.
    """

    def __init__(self) -> None:
        native = backends.native()
        assert native is not None
        self._native = native
        self._filters: MutableMapping[Tensor, tuple[Any, Tensor]] = WeakIdKeyDictionary()

    def forward(self, x: Tensor, weights: Weights, out: Tensor, options: Options) -> None:
        """Writes the output into out."""
        if x.dtype not in _DTYPES:
            raise UnsupportedInputError(f"dtype {x.dtype} is not float32, float16 or bfloat16")
        pages.prepare(self._native, out)
        problem = _problem(x, weights, options)
        filters = self._prepared(problem, weights.column_weight)
        self._native.temporal_block(
            problem,
            tuple(t.data_ptr() for t in weights._replace(column_weight=filters)),
            (x.data_ptr(), *x.stride()[:3]),
            (out.data_ptr(), *out.stride()[:3]),
            torch.get_num_threads(),
        )

    def _prepared(self, problem: tuple[Any, ...], weight: Tensor) -> Tensor:
        """The filters of a column in the form that the kernels read."""
        count = self._native.temporal_block_filter_count(problem)
        # Tensors made in inference mode have no version that would tell of a change.
        version = None if weight.is_inference() else (weight._version, weight.data_ptr(), count)
        found = self._filters.get(weight)
        if found is not None and version is not None and found[0] == version:
            return found[1]
        filters = torch.empty(count, device="cpu")
        self._native.temporal_block_filters(
            problem, weight.data_ptr(), filters.data_ptr(), torch.get_num_threads()
        )
        if version is not None:
            self._filters[weight] = (version, filters)
        return filters


def _problem(x: Tensor, weights: Weights, options: Options) -> tuple[Any, ...]:
    heads, head_dim, _ = weights.qkv_weight.shape
    return (
        _DTYPES[x.dtype],
        (x.shape[0], x.shape[2], heads, x.shape[1], head_dim),
        (options.kernel_size, options.dilation, options.causal, EDGES.index(options.edge)),
        head_dim**-0.5 if options.scale is None else options.scale,
        list(options.key_table),
        len(weights.column_weight),
    )
