"""Bits of floating-point numbers in Triton kernels."""

import triton
import triton.language as tl


@triton.jit
def _bits(x):
    """x as an integer of its size."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
    elif x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True)
    else:
        bits = x.to(tl.int16, bitcast=True)
    return bits


@triton.jit
def magnitude(x):
    """Bits of |x| as an integer of x's size; they are ordered as the magnitudes are."""
    if x.dtype == tl.float64:
        bits = _bits(x) & 0x7FFFFFFFFFFFFFFF
    elif x.dtype == tl.float32:
        bits = _bits(x) & 0x7FFFFFFF
    else:
        bits = _bits(x) & 0x7FFF
    return bits


@triton.jit
def is_negative(x):
    """Whether the sign bit of x is set."""
    return _bits(x) < 0


@triton.jit
def infinity(kind: tl.constexpr):
    """The `magnitude` of infinity in a dtype; that of NaN is larger."""
    if kind == tl.float64:
        bits = tl.full((), 0x7FF0000000000000, tl.int64)
    elif kind == tl.float32:
        bits = tl.full((), 0x7F800000, tl.int32)
    elif kind == tl.bfloat16:
        bits = tl.full((), 0x7F80, tl.int16)
    else:
        bits = tl.full((), 0x7C00, tl.int16)
    return bits


@triton.jit
def largest_finite(kind: tl.constexpr):
    """The largest finite number of a dtype."""
    return (infinity(kind) - 1).to(kind, bitcast=True)
