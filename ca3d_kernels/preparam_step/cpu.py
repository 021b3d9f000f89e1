"""The compiled CPU kernels of the pre-parameter step."""

from array import array
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ca3d_kernels import backends
from ca3d_kernels.preparam_step import remembered
from ca3d_kernels.preparam_step.op import Batch

_DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
_MIXED = {(torch.float16, torch.float32), (torch.bfloat16, torch.float32)}
_COLUMNS = 7  # of the table of addresses


class NativeKernels:
    """Calls the compiled library with a table of addresses; see `op.Kernels`."""

    def __init__(self) -> None:
        native = backends.native()
        assert native is not None
        self._step = native.preparam_sgd_step
        self._overflows = native.preparam_sgd_step_overflows
        self._run = native.preparam_run

    def step(self, batch: Batch, found_inf: Tensor | None = None) -> None:
        """See `op.Kernels`.

        With a cache, notes how large theta and momentum became, for the next `overflows`.
        """
        if found_inf is not None and bool(found_inf):
            return
        with remembered.leaving(batch, lambda: self._unknown(batch)) as largest:
            _call(self._step, batch, largest)

    def overflows(self, batch: Batch) -> bool:
        """See `op.Kernels`.

        After a `step` of the same tensors, untouched since, it need not read theta and momentum.
        """
        return _call(self._overflows, batch, remembered.known(batch))

    def _unknown(self, batch: Batch) -> NDArray[np.float64]:
        pieces = sum(-(-w.numel() // self._run) for w in batch.params)
        return np.full(2 * pieces, np.nan)


def _call(
    function: Callable[..., Any], batch: Batch, largest: NDArray[np.float64] | None = None
) -> Any:
    return function(*library_arguments(batch), torch.get_num_threads(), largest)


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
    table[1::_COLUMNS] = array("q", [grad.data_ptr() for grad in batch.grads])
    hyper = batch.hyper
    numbers = (hyper.lr, hyper.momentum, hyper.dampening, hyper.weight_decay)
    return (
        table,
        _DTYPES[dtype],
        _DTYPES[wide],
        (*numbers, batch.scale, batch.gradient_scale),
        hyper.nesterov,
        batch.applied,
        (batch.seed, batch.steps & 0xFFFFFFFF),
    )


def _table(batch: Batch) -> "array[int]":
    """Rows of addresses (w, gradient, theta, momentum, compensation), size and number of a tensor.

    Gradients are filled in later.
    """
    addresses = [x.data_ptr() for x in batch.written()]
    numbers = list(batch.numbers)
    cache = {} if batch.cache is None else batch.cache
    if cache.get("addresses") != addresses or cache.get("tensors") != numbers:
        for w in batch.params:
            if not is_dense(w):
                raise backends.UnsupportedInputError(
                    f"a parameter of strides {w.stride()} has gaps"
                )
        count = len(batch.params)
        table = array("q", bytes(8 * _COLUMNS * count))
        columns = {
            0: batch.params,
            2: batch.pre_params,
            3: batch.momenta,
            4: batch.compensations,
        }
        for column, tensors in columns.items():
            if tensors:
                table[column::_COLUMNS] = array("q", [x.data_ptr() for x in tensors])
        table[5::_COLUMNS] = array("q", [w.numel() for w in batch.params])
        table[6::_COLUMNS] = array("q", numbers or range(count))
        cache.update(addresses=addresses, tensors=numbers, table=table)
    return cache["table"]


def is_dense(x: Tensor) -> bool:
    """Whether the elements fill a stretch of memory without gaps or overlaps, in any order.

    Example:
        >>> is_dense(torch.empty(2, 3).t()), is_dense(torch.empty(2, 4)[:, ::2])
        (True, False)
    """
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((s, n) for n, s in zip(x.shape, x.stride(), strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True
