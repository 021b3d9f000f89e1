"""Launches the Triton kernels of the pre-parameter step."""

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ca3d_kernels import triton_launch
from ca3d_kernels.backends import UnsupportedInputError
from ca3d_kernels.preparam_step import triton_kernels
from ca3d_kernels.preparam_step.cpu import is_dense
from ca3d_kernels.preparam_step.op import Batch
from ca3d_kernels.triton_launch import Launch

CHUNK = 4096  # elements that a program steps
_TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}
_MIXED = {(torch.float16, torch.float32), (torch.bfloat16, torch.float32)}


def chunk_table(
    columns: Sequence[Sequence[Tensor]], sizes: Sequence[int], device: torch.device
) -> Tensor:
    """Table of all chunks: an address for each column and the number of elements, int64.

    Args:
        columns: lists of tensors, one tensor for each size; an empty list gives addresses 0.
        sizes: numbers of elements.
        device: where the table is wanted; a copy to a GPU doesn't wait for it.

    Returns:
        (chunks, 5).

    Example:
        >>> w = [torch.zeros(5000), torch.zeros(3)]
        >>> chunk_table([w] * 4, [5000, 3], torch.device("cpu"))[:, 4].tolist()
        [4096, 904, 3]
    """
    size = torch.tensor(sizes, dtype=torch.int64)
    chunks = (size + CHUNK - 1) // CHUNK
    tensor = torch.repeat_interleave(torch.arange(len(sizes)), chunks)
    first = (torch.arange(len(tensor)) - (chunks.cumsum(0) - chunks)[tensor]) * CHUNK
    table = torch.zeros(len(tensor), 5, dtype=torch.int64, pin_memory=device.type == "cuda")
    for column, tensors in enumerate(columns):
        if tensors:
            start = torch.tensor([x.data_ptr() for x in tensors], dtype=torch.int64)
            table[:, column] = start[tensor] + first * tensors[0].element_size()
    table[:, 4] = (size[tensor] - first).clamp(max=CHUNK)
    return table.to(device, non_blocking=True)


def _tables(batch: Batch) -> list[tuple[int, Tensor]]:
    """Tables of chunks by the alignment of their addresses, in bytes.

    They are made anew when an address has changed since they were last used.
    """
    columns = [batch.params, batch.grads, batch.pre_params, batch.momenta]
    addresses = [[x.data_ptr() for x in column] for column in columns]
    cache = {} if batch.cache is None else batch.cache
    if cache.get("chunk addresses") != addresses:
        for w in batch.params:
            if not is_dense(w):
                raise UnsupportedInputError(f"a parameter of strides {w.stride()} has gaps")
        tables = []
        for aligned in (True, False):
            chosen = [
                i
                for i, w in enumerate(batch.params)
                if w.numel() and aligned == all(a[i] % 16 == 0 for a in addresses if a)
            ]
            if chosen:
                picked = [[x[i] for i in chosen] if x else [] for x in columns]
                sizes = [batch.params[i].numel() for i in chosen]
                table = chunk_table(picked, sizes, batch.params[0].device)
                tables.append((16 if aligned else 1, table))
        cache.update({"chunk addresses": addresses, "chunks": tables})
    return cache["chunks"]


def _numbers(batch: Batch) -> Tensor:
    """lr, momentum, 1 - dampening, weight decay, c and k on the device, float64.

    They are copied only when one has changed: a captured step reads what is there when it runs.
    """
    hyper = batch.hyper
    rest = (1 - hyper.dampening, hyper.weight_decay, batch.scale, batch.gradient_scale)
    values = (hyper.lr, hyper.momentum, *rest)
    cache = {} if batch.cache is None else batch.cache
    if cache.get("numbers") != values:
        device = batch.params[0].device
        new = torch.tensor(values, dtype=torch.float64, pin_memory=device.type == "cuda")
        old = cache.get("device numbers")
        if old is None:
            cache["device numbers"] = new.to(device, non_blocking=True)
        else:
            old.copy_(new, non_blocking=True)
        cache["numbers"] = values
    return cache["device numbers"]


def _constants(batch: Batch) -> dict[str, Any]:
    dtype, wide = batch.params[0].dtype, batch.pre_params[0].dtype
    if dtype not in _TYPES or (dtype != wide and (dtype, wide) not in _MIXED):
        raise UnsupportedInputError(f"pre-parameters of {wide} with parameters of {dtype}")
    if batch.applied != "nearest":
        raise UnsupportedInputError(f"rounding {batch.rounding!r}")
    return {
        "PARAM": _TYPES[dtype],
        "PRE_PARAM": _TYPES[wide],
        "REAL": tl.float64 if wide == torch.float64 else tl.float32,
        "MOMENTUM": bool(batch.momenta),
        "NESTEROV": batch.hyper.nesterov,
        "ROUNDING": batch.applied,
    }


def launches(batch: Batch, found_inf: Tensor | None, *, overflows: bool = False) -> list[Launch]:
    """The launches of a step, or of the search for values that aren't finite.

    Args:
        batch: see `op.Batch`.
        found_inf: float32 with one element: written by the search; a step does nothing if it isn't
            0 when the kernel runs. None for a step without condition.
        overflows: whether to describe the search.

    Returns:
        At most two launches: one for the tensors that are aligned to 16 bytes, one for the others.

    Raises:
        UnsupportedInputError: naming the limit of the kernels.

    Example:
        >>> from ca3d_kernels.preparam_step.reference import Hyperparameters
        >>> w = [torch.zeros(5000), torch.zeros(3)]
        >>> batch = Batch(w, w, w, [], Hyperparameters(lr=0.1), 128.0, 128.0)
        >>> [launch.programs for launch in launches(batch, None)]
        [3]
    """
    constants = _constants(batch)
    numbers = _numbers(batch)
    kernel = triton_kernels.preparam_sgd_step
    if overflows:
        assert found_inf is not None
        kernel, found_inf = triton_kernels.preparam_sgd_overflows, found_inf.view(torch.int32)
    else:
        constants["PREDICATED"] = found_inf is not None
    return [
        Launch(
            kernel,
            len(table),
            {
                "chunks": table,
                "hyper": numbers,
                "found_inf": numbers if found_inf is None else found_inf,
            },
            {"CHUNK": CHUNK, "ALIGNED": aligned, **constants},
            num_warps=4,
            reached=(*batch.params, *batch.grads, *batch.pre_params, *batch.momenta),
            options={"enable_fp_fusion": False},
        )
        for aligned, table in _tables(batch)
    ]


class TritonKernels:
    """Runs the Triton kernels; see `op.Kernels`."""

    asynchronous = True

    def step(self, batch: Batch, found_inf: Tensor | None = None) -> None:
        """Writes the new theta, momentum and w of every tensor, on the device alone."""
        for launch in launches(batch, found_inf):
            triton_launch.run(launch)

    def overflows(self, batch: Batch) -> Tensor:
        """Whether a step would store a value that isn't finite: a float32 scalar on the device."""
        found = torch.zeros((), device=batch.params[0].device)
        for launch in launches(batch, found, overflows=True):
            triton_launch.run(launch)
        return found
