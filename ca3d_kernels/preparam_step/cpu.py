"""The compiled CPU kernels of the pre-parameter step."""

from array import array
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ca3d_kernels import backends
from ca3d_kernels.preparam_step.op import Batch

_DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
_MIXED = {(torch.float16, torch.float32), (torch.bfloat16, torch.float32)}


class NativeKernels:
    """Calls the compiled library with a table of addresses; see `op.Kernels`."""

    def __init__(self) -> None:
        native = backends.native()
        assert native is not None
        self._step = native.preparam_sgd_step
        self._overflows = native.preparam_sgd_step_overflows

    def step(self, batch: Batch, found_inf: Tensor | None = None) -> None:
        """See `op.Kernels`."""
        if found_inf is None or not bool(found_inf):
            _call(self._step, batch)

    def overflows(self, batch: Batch) -> bool:
        """See `op.Kernels`."""
        return _call(self._overflows, batch)


def _call(function: Callable[..., Any], batch: Batch) -> Any:
    return function(*library_arguments(batch), torch.get_num_threads())


def library_arguments(batch: Batch) -> tuple[Any, ...]:
    """What a compiled library wants to know of a batch: the table of addresses, then the numbers.

    Raises:
        UnsupportedInputError: of dtypes or strides that no library takes.

    Example:
        >>> from ca3d_kernels.preparam_step.reference import Hyperparameters
        >>> x = [torch.ones(3)]
        >>> library_arguments(Batch(x, x, x, [], Hyperparameters(lr=0.5), 128.0, 1.0))[1:4]
        ('float32', 'float32', (0.5, 0.0, 0.0, 0.0, 128.0, 1.0))
    """
    dtype, wide = batch.params[0].dtype, batch.pre_params[0].dtype
    if dtype not in _DTYPES or (dtype != wide and (dtype, wide) not in _MIXED):
        raise backends.UnsupportedInputError(f"pre-parameters of {wide} with parameters of {dtype}")
    table = _table(batch)
    table[1::5] = array("q", [grad.data_ptr() for grad in batch.grads])
    hyper = batch.hyper
    numbers = (hyper.lr, hyper.momentum, hyper.dampening, hyper.weight_decay)
    return (
        table,
        _DTYPES[dtype],
        _DTYPES[wide],
        (*numbers, batch.scale, batch.gradient_scale),
        hyper.nesterov,
        batch.rounding,
    )


def _table(batch: Batch) -> "array[int]":
    """Rows of addresses (w, gradient, theta, momentum) and size; gradients are filled in later."""
    kept = [*batch.params, *batch.pre_params, *batch.momenta]
    addresses = [x.data_ptr() for x in kept]
    cache = {} if batch.cache is None else batch.cache
    if cache.get("addresses") != addresses:
        for w in batch.params:
            if not (w.is_contiguous() or _is_dense(w)):
                raise backends.UnsupportedInputError(
                    f"a parameter of strides {w.stride()} has gaps"
                )
        count = len(batch.params)
        table = array("q", bytes(8 * 5 * count))
        columns = (addresses[:count], addresses[count : 2 * count], addresses[2 * count :])
        for column, values in zip((0, 2, 3), columns, strict=True):
            table[column::5] = array("q", values or [0] * count)
        table[4::5] = array("q", [w.numel() for w in batch.params])
        cache.update(addresses=addresses, table=table)
    return cache["table"]


def _is_dense(x: Tensor) -> bool:
    """Whether the elements fill a stretch of memory without gaps or overlaps, in any order."""
    expected = 1
    for stride, size in sorted((s, n) for n, s in zip(x.shape, x.stride(), strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True
