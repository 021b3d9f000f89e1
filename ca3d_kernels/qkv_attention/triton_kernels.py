"""Triton kernels of the projection per head with the attention after it.

A program serves one head. It keeps the head's weights and goes through its share of the tiles;
a tile holds all frames of some positions. Queries, keys and values live in registers only: the
kernel reads x once and writes the result once. Tiles have 32 rows, on which products stay with
``mma.sync`` on every GPU.
"""

import triton
import triton.language as tl

from ca3d_kernels.local_attention.triton_kernels import (
    _dot,
    _logit_gradients,
    _weighted_sum,
    _weights,
)

# Arguments whose values Triton would otherwise compile anew for: ALIGNED says what matters of them.
RUN_TIME = [
    "positions", "heads", "inner", "frames", "tiles", "kernel_size", "dilation", "before", "shift",
    "zeros", "scale",
]  # fmt: skip
RUN_TIME += [
    f"{image}_{dim}" for image in ("x", "o", "do", "dx") for dim in ("outer", "frame", "inner")
]


@triton.jit
def _multiplicity(
    row, column, frames, kernel_size, dilation, before, shift, FRAMES: tl.constexpr
):  # fmt: skip
    """(ROWS, ROWS): whether the window of a row's frame holds the frame of a column."""
    t, s = row % FRAMES, column % FRAMES
    exists = (t < frames) & (s < frames) & (row // FRAMES == column // FRAMES)
    exists &= t % dilation == s % dilation
    start = t // dilation - before
    if shift:
        length = (frames - t % dilation + dilation - 1) // dilation
        start = tl.minimum(tl.maximum(start, 0), tl.maximum(length - kernel_size, 0))
    slot = s // dilation - start
    return (exists & (slot >= 0) & (slot < kernel_size)).to(tl.float32)


@triton.jit
def _load_weight(weight, head, part: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The map to queries (part 0), keys (1) or values (2) of a head, (out, in)."""
    out = tl.arange(0, HEAD_DIM)[:, None]
    i = tl.arange(0, HEAD_DIM)[None, :]
    return tl.load(weight + ((head * 3 + part) * HEAD_DIM + out) * HEAD_DIM + i)


@triton.jit
def _load_bias(bias, head, part: tl.constexpr, HEAD_DIM: tl.constexpr, BIAS: tl.constexpr):
    i = tl.arange(0, HEAD_DIM)
    if BIAS:
        return tl.load(bias + (head * 3 + part) * HEAD_DIM + i).to(tl.float32)[None, :]
    return tl.zeros((HEAD_DIM,), tl.float32)[None, :]


@triton.jit
def _project(x, w, b):
    """x (ROWS, in) times w (out, in), rounded to x's dtype as if it had been stored."""
    return (_dot(x, tl.trans(w)) + b).to(x.dtype)


@triton.jit
def _positions(tile, row, positions, frames, inner, head, outer_stride, frame_stride, inner_stride,
               HEAD_DIM: tl.constexpr, FRAMES: tl.constexpr, ALIGNED: tl.constexpr,
               ROWS: tl.constexpr):  # fmt: skip
    """Where the rows of a tile start, in elements, and whether they exist."""
    position = tile * (ROWS // FRAMES) + row // FRAMES
    frame = row % FRAMES
    offset = (position // inner) * outer_stride + (position % inner) * inner_stride
    offset += frame * frame_stride + head * HEAD_DIM
    return tl.multiple_of(offset, [ALIGNED, ALIGNED]), (position < positions) & (frame < frames)


@triton.jit(do_not_specialize=RUN_TIME)
def qkv_attention_forward(
    x, weight, bias, o,
    x_outer: tl.int64, x_frame: tl.int64, x_inner: tl.int64,
    o_outer: tl.int64, o_frame: tl.int64, o_inner: tl.int64,
    positions: tl.int32, heads: tl.int32, inner: tl.int32, frames: tl.int32, tiles: tl.int32,
    kernel_size: tl.int32, dilation: tl.int32, before: tl.int32, shift: tl.int32,
    zeros: tl.float32, scale: tl.float32,
    HEAD_DIM: tl.constexpr, FRAMES: tl.constexpr, ROWS: tl.constexpr, ALIGNED: tl.constexpr,
    PARTS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """o = attention of (x W^T + b) for one head and every `programs per head`-th tile."""
    head = tl.program_id(0) % heads
    row = tl.arange(0, ROWS)[:, None]
    i = tl.arange(0, HEAD_DIM)[None, :]
    w_q = _load_weight(weight, head, 0, HEAD_DIM)  # [HEAD_DIM, HEAD_DIM]
    w_k = _load_weight(weight, head, 1, HEAD_DIM)
    w_v = _load_weight(weight, head, 2, HEAD_DIM)
    b_q = _load_bias(bias, head, 0, HEAD_DIM, BIAS)  # [1, HEAD_DIM]
    b_k = _load_bias(bias, head, 1, HEAD_DIM, BIAS)
    b_v = _load_bias(bias, head, 2, HEAD_DIM, BIAS)
    count = _multiplicity(
        row, tl.arange(0, ROWS)[None, :], frames, kernel_size, dilation, before, shift, FRAMES
    )  # [ROWS, ROWS]
    for tile in range(tl.program_id(0) // heads, tiles, tl.num_programs(0) // heads):
        at, exists = _positions(tile, row, positions, frames, inner, head, x_outer, x_frame,
                                x_inner, HEAD_DIM, FRAMES, ALIGNED, ROWS)  # fmt: skip
        b_x = tl.load(x + at + i, mask=exists, other=0)  # [ROWS, HEAD_DIM]
        q, k, v = _project(b_x, w_q, b_q), _project(b_x, w_k, b_k), _project(b_x, w_v, b_v)
        weights, _, total = _weights(q, k, count, kernel_size, zeros, scale)
        b_o = _weighted_sum(weights, v, count > 0, PARTS) / total[:, None]
        at, exists = _positions(tile, row, positions, frames, inner, head, o_outer, o_frame,
                                o_inner, HEAD_DIM, FRAMES, ALIGNED, ROWS)  # fmt: skip
        tl.store(o + at + i, b_o.to(o.dtype.element_ty), mask=exists)


@triton.jit
def _halves(x):
    """The left and the right half of the columns of x (ROWS, N), transposed: (N / 2, ROWS)."""
    apart = x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(2, 0, 1)
    return apart.split()


@triton.jit
def _store_half(partial, value, program, part: tl.constexpr, half: tl.constexpr,
                HEAD_DIM: tl.constexpr):  # fmt: skip
    out = half * (HEAD_DIM // 2) + tl.arange(0, HEAD_DIM // 2)[:, None]
    i = tl.arange(0, HEAD_DIM)[None, :]
    tl.store(partial + ((program * 3 + part) * HEAD_DIM + out) * HEAD_DIM + i, value)


@triton.jit(do_not_specialize=RUN_TIME)
def qkv_attention_backward(
    x, weight, bias, do, dx, partial_weight, partial_bias,
    x_outer: tl.int64, x_frame: tl.int64, x_inner: tl.int64,
    do_outer: tl.int64, do_frame: tl.int64, do_inner: tl.int64,
    dx_outer: tl.int64, dx_frame: tl.int64, dx_inner: tl.int64,
    positions: tl.int32, heads: tl.int32, inner: tl.int32, frames: tl.int32, tiles: tl.int32,
    kernel_size: tl.int32, dilation: tl.int32, before: tl.int32, shift: tl.int32,
    zeros: tl.float32, scale: tl.float32,
    HEAD_DIM: tl.constexpr, FRAMES: tl.constexpr, ROWS: tl.constexpr, ALIGNED: tl.constexpr,
    PARTS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """dx, and each program's share of the gradients of weight and bias.

    The shares are added up afterwards in a fixed order: the same bits every time. Gradients of q,
    k and v are rounded to x's dtype before they go through the map, as if they had been stored.
    """
    program = tl.program_id(0).to(tl.int64)
    head = tl.program_id(0) % heads
    row = tl.arange(0, ROWS)[:, None]
    i = tl.arange(0, HEAD_DIM)[None, :]
    b_q = _load_bias(bias, head, 0, HEAD_DIM, BIAS)  # [1, HEAD_DIM]
    b_k = _load_bias(bias, head, 1, HEAD_DIM, BIAS)
    b_v = _load_bias(bias, head, 2, HEAD_DIM, BIAS)
    count = _multiplicity(
        row, tl.arange(0, ROWS)[None, :], frames, kernel_size, dilation, before, shift, FRAMES
    )  # [ROWS, ROWS]
    meets = count > 0
    dw_q0 = tl.zeros((HEAD_DIM // 2, HEAD_DIM), tl.float32)
    dw_q1, dw_k0, dw_k1, dw_v0, dw_v1 = dw_q0, dw_q0, dw_q0, dw_q0, dw_q0
    db_q = tl.zeros((HEAD_DIM,), tl.float32)
    db_k, db_v = db_q, db_q
    for tile in range(tl.program_id(0) // heads, tiles, tl.num_programs(0) // heads):
        at, exists = _positions(tile, row, positions, frames, inner, head, x_outer, x_frame,
                                x_inner, HEAD_DIM, FRAMES, ALIGNED, ROWS)  # fmt: skip
        b_x = tl.load(x + at + i, mask=exists, other=0)  # [ROWS, HEAD_DIM]
        at, exists = _positions(tile, row, positions, frames, inner, head, do_outer, do_frame,
                                do_inner, HEAD_DIM, FRAMES, ALIGNED, ROWS)  # fmt: skip
        b_do = tl.load(do + at + i, mask=exists, other=0)  # [ROWS, HEAD_DIM]
        # Loaded for each tile, from a cache: registers have no room for the maps besides the sums.
        w_q = _load_weight(weight, head, 0, HEAD_DIM)  # [HEAD_DIM, HEAD_DIM]
        w_k = _load_weight(weight, head, 1, HEAD_DIM)
        w_v = _load_weight(weight, head, 2, HEAD_DIM)
        q, k, v = _project(b_x, w_q, b_q), _project(b_x, w_k, b_k), _project(b_x, w_v, b_v)
        weights, absent, total = _weights(q, k, count, kernel_size, zeros, scale)
        dp = tl.where(meets, _dot(b_do, tl.trans(v)), 0.0)  # [ROWS, ROWS]
        p, ds = _logit_gradients(weights, absent, total, dp, meets, scale)
        dv = _weighted_sum(tl.trans(p), b_do, tl.trans(meets), PARTS).to(b_x.dtype)
        b_dx = _dot(dv, w_v)  # [ROWS, HEAD_DIM]
        left, right = _halves(dv)  # [HEAD_DIM / 2, ROWS]
        dw_v0 += _dot(left, b_x)
        dw_v1 += _dot(right, b_x)
        dk = _weighted_sum(tl.trans(ds), q, tl.trans(meets), PARTS).to(b_x.dtype)
        b_dx += _dot(dk, w_k)
        left, right = _halves(dk)
        dw_k0 += _dot(left, b_x)
        dw_k1 += _dot(right, b_x)
        dq = _weighted_sum(ds, k, meets, PARTS).to(b_x.dtype)
        b_dx += _dot(dq, w_q)
        left, right = _halves(dq)
        dw_q0 += _dot(left, b_x)
        dw_q1 += _dot(right, b_x)
        if BIAS:
            db_q += tl.sum(dq.to(tl.float32), 0)
            db_k += tl.sum(dk.to(tl.float32), 0)
            db_v += tl.sum(dv.to(tl.float32), 0)
        at, exists = _positions(tile, row, positions, frames, inner, head, dx_outer, dx_frame,
                                dx_inner, HEAD_DIM, FRAMES, ALIGNED, ROWS)  # fmt: skip
        tl.store(dx + at + i, b_dx.to(dx.dtype.element_ty), mask=exists)
    _store_half(partial_weight, dw_q0, program, 0, 0, HEAD_DIM)
    _store_half(partial_weight, dw_q1, program, 0, 1, HEAD_DIM)
    _store_half(partial_weight, dw_k0, program, 1, 0, HEAD_DIM)
    _store_half(partial_weight, dw_k1, program, 1, 1, HEAD_DIM)
    _store_half(partial_weight, dw_v0, program, 2, 0, HEAD_DIM)
    _store_half(partial_weight, dw_v1, program, 2, 1, HEAD_DIM)
    if BIAS:
        at = program * 3 * HEAD_DIM + tl.arange(0, HEAD_DIM)
        tl.store(partial_bias + at, db_q)
        tl.store(partial_bias + at + HEAD_DIM, db_k)
        tl.store(partial_bias + at + 2 * HEAD_DIM, db_v)
