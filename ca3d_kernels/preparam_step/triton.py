"""Launches the Triton kernels of the pre-parameter step."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ca3d_kernels import triton_launch
from ca3d_kernels.backends import UnsupportedInputError
from ca3d_kernels.preparam_step import remembered, triton_kernels
from ca3d_kernels.preparam_step.cpu import is_dense
from ca3d_kernels.preparam_step.op import Batch, uploaded_numbers
from ca3d_kernels.preparam_step.remembered import unknown_largest
from ca3d_kernels.triton_launch import Launch
from ca3d_kernels.uploads import Uploads

CHUNK = 4096  # elements that a program steps
WARPS = 8  # of a program: a thread with more than 16 elements spills registers on some GPUs
_TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}
_MIXED = {(torch.float16, torch.float32), (torch.bfloat16, torch.float32)}

Tables = list[tuple[int, Tensor]]


def chunk_table(
    columns: Sequence[Sequence[Tensor]], sizes: Sequence[int], numbers: Sequence[int]
) -> Tensor:
    """Table of all chunks, int64: four addresses, how many elements, another address, where in the
    tensor the chunk begins, and the number of the tensor.

    Args:
        columns: five lists of tensors, one tensor for each size; an empty list gives addresses 0.
        sizes: numbers of elements.
        numbers: of the tensors.

    Returns:
        (chunks, 8).

    Example:
        >>> w = [torch.zeros(5000), torch.zeros(3)]
        >>> chunk_table([w] * 5, [5000, 3], [7, 8])[:, [4, 6, 7]].tolist()
        [[4096, 0, 7], [904, 4096, 7], [3, 0, 8]]
    """
    size = torch.tensor(sizes, dtype=torch.int64, device="cpu")
    chunks = (size + CHUNK - 1) // CHUNK
    tensor = torch.repeat_interleave(torch.arange(len(sizes), device="cpu"), chunks)
    first = (torch.arange(len(tensor), device="cpu") - (chunks.cumsum(0) - chunks)[tensor]) * CHUNK
    table = torch.zeros(len(tensor), 8, dtype=torch.int64, device="cpu")
    for column, tensors in zip((0, 1, 2, 3, 5), columns, strict=True):
        if tensors:
            addresses = [x.data_ptr() for x in tensors]
            start = torch.tensor(addresses, dtype=torch.int64, device="cpu")
            table[:, column] = start[tensor] + first * tensors[0].element_size()
    table[:, 4] = (size[tensor] - first).clamp(max=CHUNK)
    table[:, 6] = first
    table[:, 7] = torch.tensor(numbers, dtype=torch.int64, device="cpu")[tensor]
    return table


def _uploads(batch: Batch) -> Uploads:
    cache = {} if batch.cache is None else batch.cache
    return cache.setdefault("uploads", Uploads())


def _tables(batch: Batch) -> Tables:
    """Tables of chunks by the alignment of their addresses, in bytes.

    They are made anew when an address has changed since they were last used.
    """
    columns = [
        *(batch.params, batch.grads, batch.pre_params, batch.momenta),
        list(batch.compensations),
    ]
    addresses = [[x.data_ptr() for x in column] for column in columns]
    numbers = list(batch.numbers) or list(range(len(batch.params)))
    cache = {} if batch.cache is None else batch.cache
    if cache.get("addresses") != addresses:
        for w in batch.params:
            if not is_dense(w):
                raise UnsupportedInputError(f"a parameter of strides {w.stride()} has gaps")
        chosen: dict[int, list[int]] = {16: [], 1: []}
        for i, w in enumerate(batch.params):
            if w.numel():
                chosen[16 if all(a[i] % 16 == 0 for a in addresses if a) else 1].append(i)
        cache.update({"addresses": addresses, "chosen": chosen})

    def table(chosen: list[int]) -> Tensor:
        picked = [[x[i] for i in chosen] if x else [] for x in columns]
        sizes = [batch.params[i].numel() for i in chosen]
        return chunk_table(picked, sizes, [numbers[i] for i in chosen])

    return [
        (
            alignment,
            _uploads(batch).get(
                f"chunks aligned to {alignment}",
                (addresses, numbers),
                functools.partial(table, chosen),
                batch.params[0].device,
            ),
        )
        for alignment, chosen in cache["chosen"].items()
        if chosen
    ]


def _layout(batch: Batch) -> Any:
    """How `_tables` has cut the batch's tensors into chunks."""
    return None if batch.cache is None else batch.cache["chosen"]


def _numbers(batch: Batch) -> Tensor:
    """lr, momentum, 1 - dampening, weight decay, c and k on the device, float64."""
    if batch.device_numbers is not None:
        return batch.device_numbers
    return uploaded_numbers(batch, _uploads(batch))


def _constants(batch: Batch) -> dict[str, Any]:
    dtype, wide = batch.params[0].dtype, batch.pre_params[0].dtype
    if dtype not in _TYPES or (dtype != wide and (dtype, wide) not in _MIXED):
        raise UnsupportedInputError(f"pre-parameters of {wide} with parameters of {dtype}")
    return {
        "PARAM": _TYPES[dtype],
        "PRE_PARAM": _TYPES[wide],
        "REAL": tl.float64 if wide == torch.float64 else tl.float32,
        "MOMENTUM": bool(batch.momenta),
        "NESTEROV": batch.hyper.nesterov,
        "ROUNDING": batch.applied,
    }


def launches(
    batch: Batch,
    found_inf: Tensor | None,
    *,
    overflows: bool = False,
    tables: Tables | None = None,
    largest: Tensor | None = None,
) -> list[Launch]:
    """The launches of a step, or of the search for values that aren't finite.

    Args:
        batch: see `op.Batch`.
        found_inf: float32 with one element: written by the search; a step does nothing if it isn't
            0 when the kernel runs. None for a step without condition.
        overflows: whether to describe the search.
        tables: the batch's tables of chunks, if they are there already.
        largest: what a step leaves for the next search, and where the search finds it; see
            `remembered.unknown_largest`.

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
    arguments = {"hyper": numbers}
    kernel = triton_kernels.preparam_sgd_step
    if overflows:
        assert found_inf is not None
        kernel, found_inf = triton_kernels.preparam_sgd_overflows, found_inf.view(torch.int32)
        if batch.applied == "stochastic":
            constants["ROUNDING"] = "bound"
    else:
        constants["PREDICATED"] = found_inf is not None
        if batch.applied == "stochastic":
            seed_and_steps = (batch.seed, batch.steps)
            arguments["random"] = _uploads(batch).get(
                "random",
                seed_and_steps,
                lambda: torch.tensor(seed_and_steps, dtype=torch.int64, device="cpu"),
                batch.params[0].device,
            )
        else:
            constants["random"] = None
    if largest is None:
        constants["largest"] = None
    tables = _tables(batch) if tables is None else tables
    ends = itertools.accumulate(len(table) for _, table in tables)
    return [
        Launch(
            kernel,
            len(table),
            {
                "chunks": table,
                **arguments,
                "found_inf": numbers if found_inf is None else found_inf,
                **({} if largest is None else {"largest": largest[2 * (end - len(table)) :]}),
            },
            {"CHUNK": CHUNK, "ALIGNED": aligned, "THREADS": 32 * WARPS, **constants},
            num_warps=WARPS,
            reached=(
                *batch.params,
                *batch.grads,
                *batch.pre_params,
                *batch.momenta,
                *batch.compensations,
            ),
            options={"enable_fp_fusion": False},
        )
        for (aligned, table), end in zip(tables, ends, strict=True)
    ]


class TritonKernels:
    """Runs the Triton kernels; see `op.Kernels`."""

    asynchronous = True

    def step(self, batch: Batch, found_inf: Tensor | None = None) -> None:
        """Writes the new theta, momentum and w of every tensor, on the device alone.

        A step that obeys a flag notes how large theta and momentum became, for the next search.
        """
        tables = _tables(batch)
        if found_inf is None:
            self._run(launches(batch, None, tables=tables))
            return
        with remembered.leaving(
            batch, lambda: unknown_largest(batch, CHUNK), _layout(batch)
        ) as largest:
            if largest is None:
                # Nobody will read it, but this is the kernel that a warm-up has loaded: none can be
                # loaded while a CUDA graph is captured.
                largest = unknown_largest(batch, CHUNK)
            self._run(launches(batch, found_inf, tables=tables, largest=largest))

    def overflows(self, batch: Batch) -> Tensor:
        """Whether a step would store a value that isn't finite: a float32 scalar on the device.

        After a `step` of the same tensors, untouched since, gradients alone mostly tell.
        """
        found = torch.zeros((), dtype=torch.float32, device=batch.params[0].device)
        tables = _tables(batch)
        largest = remembered.known(batch, _layout(batch))
        self._run(launches(batch, found, overflows=True, tables=tables, largest=largest))
        return found

    def _run(self, planned: list[Launch]) -> None:
        for launch in planned:
            triton_launch.run(launch)
