"""Triton's interpreter with what 3.8 lacks: right bfloat16, and a check of every address.

Its bfloat16 is wrong in three ways: casts truncate, products of matrices and all other arithmetic
work on bit patterns. `install` makes casts round to nearest even and products multiply values, and
forbids other arithmetic (the kernels cast to float32 first).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from ca3d_kernels import triton_launch
from ca3d_kernels.triton_launch import Launch

_FORBIDDEN = (
    "create_fadd", "create_fsub", "create_fmul", "create_fdiv", "create_fcmpOLT", "create_fcmpOGT",
    "create_fcmpOEQ", "create_maximumf", "create_minimumf", "create_maxnumf", "create_minnumf",
)  # fmt: skip

# Addresses [start, end) that the running launch may touch.
_allowed: list[tuple[int, int]] = []
_convert = interpreter._convert_float
_dot = interpreter.InterpreterBuilder.create_dot


def _round_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Bit patterns of float32 values rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(x).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FFF, rounded).astype(np.uint16)


def _widen_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(bits).view(np.uint16).astype(np.uint32) << 16).reshape(bits.shape)


def _convert_float(x: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
    toward_zero = rounding is not None and rounding == interpreter._ir.ROUNDING_MODE.RTZ
    if source == tl.float32 and target == tl.bfloat16 and not toward_zero:
        return _round_to_bfloat16(x).reshape(x.shape)
    if source == tl.bfloat16 and target == tl.float32:
        return _widen_bfloat16(x)
    return _convert(x, source, target, rounding)


def _values(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    wide = _widen_bfloat16(handle.data).view(np.float32)
    return interpreter.TensorHandle(wide, tl.float32)


def _create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    return _dot(self, _values(a), _values(b), *rest)


def _without_bfloat16(operation: Callable[..., Any]) -> Callable[..., Any]:
    def checked(self: Any, left: Any, right: Any, *rest: Any, **options: Any) -> Any:
        if left.dtype.scalar == tl.bfloat16:
            raise TypeError("arithmetic on bfloat16 in the interpreter: cast to float32 first")
        return operation(self, left, right, *rest, **options)

    return checked


def _check_addresses(pointers: Any, mask: Any, what: str) -> None:
    """Raises an IndexError unless every active lane lies in memory that the launch may touch."""
    addresses = pointers.data.astype(np.int64)
    if mask is not None:
        addresses = addresses[np.broadcast_to(mask.data, addresses.shape).astype(bool)]
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    inside = np.zeros(addresses.shape, bool)
    for start, end in _allowed:
        inside |= (addresses >= start) & (addresses + size <= end)
    if not inside.all():
        raise IndexError(f"{what}: {int((~inside).sum())} of {inside.size} lanes out of bounds")


def _bounded(name: str, pointer_at: int, mask_at: int) -> Callable[..., Any]:
    operation = getattr(interpreter.InterpreterBuilder, name)

    def checked(self: Any, *arguments: Any, **options: Any) -> Any:
        _check_addresses(arguments[pointer_at], arguments[mask_at], name)
        return operation(self, *arguments, **options)

    return checked


def _memory(x: Tensor) -> tuple[int, int]:
    """First and last address of a tensor's elements, not of its storage: gaps are checked by NaN
    in the tests, memory outside by this."""
    if not x.numel():
        return x.data_ptr(), x.data_ptr()
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def install() -> None:
    """Changes the interpreter of this process; call it once, before any kernel runs."""
    builder = interpreter.InterpreterBuilder
    interpreter._convert_float = _convert_float
    builder.create_dot = _create_dot
    for name in _FORBIDDEN:
        setattr(builder, name, _without_bfloat16(getattr(builder, name)))
    for name, pointer_at, mask_at in (
        ("create_masked_load", 0, 1),
        ("create_masked_store", 0, 2),
    ):
        setattr(builder, name, _bounded(name, pointer_at, mask_at))
    run = triton_launch.run

    def bounded_run(launch: Launch) -> None:
        tensors = [x for x in launch.arguments.values() if isinstance(x, Tensor)]
        _allowed[:] = map(_memory, [*tensors, *launch.reached])
        try:
            run(launch)
        finally:
            _allowed.clear()

    triton_launch.run = bounded_run
