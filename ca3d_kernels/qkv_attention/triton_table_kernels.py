"""Triton kernel of the projection per head with the attention after it, for a key table.

A key table mixes the heads of a position, so a program serves all heads of some positions, in
matrices with a third dimension. The projection has one for each head, (HEADS, PLACES * FRAMES,
HEAD_DIM), the attention one for each position, (PLACES, HEADS * FRAMES, HEAD_DIM). Every pixel is
read once, by one program; the weights of all heads come from the L2 cache for each program.

There is no such kernel for the backward pass: the sums for all heads' weights don't fit into the
registers of a program. It takes the kernels of the separate ops instead (see `triton`).
"""

import triton
import triton.language as tl

from ca3d_kernels.local_attention.triton_kernels import (
    matmul,
    softmax_weights,
    weighted_sum,
)

# Arguments whose values Triton would otherwise compile anew for: ALIGNED says what matters of them.
RUN_TIME = [
    "positions", "heads", "inner", "frames", "kernel_size", "before", "zeros", "scale", "bias_head",
    "bias_frame",
]  # fmt: skip
RUN_TIME += [f"{image}_{dim}" for image in ("x", "o") for dim in ("outer", "frame", "inner")]


@triton.jit
def _by_position(y, PLACES: tl.constexpr):
    """(HEADS, PLACES * FRAMES, HEAD_DIM) as (PLACES, HEADS * FRAMES, HEAD_DIM)."""
    apart = y.reshape(y.shape[0], PLACES, y.shape[1] // PLACES, y.shape[2]).permute(1, 0, 2, 3)
    return apart.reshape(PLACES, y.shape[0] * (y.shape[1] // PLACES), y.shape[2])


@triton.jit
def _project(x, weight, bias, bias_head, bias_frame, heads, exists, part: tl.constexpr,
             first, HEAD_DIM: tl.constexpr, SLICE: tl.constexpr,
             HEADS: tl.constexpr, PLACES: tl.constexpr, FRAMES: tl.constexpr):  # fmt: skip
    """SLICE elements, from the first, of queries (part 0), keys (1) or values (2), by position."""
    head = tl.arange(0, HEADS)[:, None, None]
    out = first + tl.arange(0, SLICE)[None, :, None]
    i = tl.arange(0, HEAD_DIM)[None, None, :]
    at = weight + ((head * 3 + part) * HEAD_DIM + out) * HEAD_DIM + i
    w = tl.load(at, mask=head < heads, other=0)  # [HEADS, SLICE, HEAD_DIM]
    y = matmul(x, tl.trans(w))  # [HEADS, PLACES * FRAMES, SLICE]
    frame = tl.arange(0, PLACES * FRAMES)[None, :, None] % FRAMES
    out = first + tl.arange(0, SLICE)[None, None, :]
    at = tl.multiple_of(head * bias_head + frame * bias_frame, [HEAD_DIM, HEAD_DIM, HEAD_DIM])
    y += tl.load(bias + at + part * HEAD_DIM + out, mask=exists, other=0).to(tl.float32)
    return _by_position(y.to(x.dtype), PLACES)


@triton.jit
def _offsets(position, frame, head, inner, outer_stride, frame_stride, inner_stride,
             HEAD_DIM: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    """Where rows start in an image, in elements."""
    offset = (position // inner) * outer_stride + (position % inner) * inner_stride
    offset += frame * frame_stride + head * HEAD_DIM
    return tl.multiple_of(offset, [ALIGNED, ALIGNED, ALIGNED])


@triton.jit
def _counts(key_counts, heads, frames, kernel_size, before, HEADS: tl.constexpr,
            FRAMES: tl.constexpr):  # fmt: skip
    """(1, rows, rows): in how many slots the query of a row meets the key of a column."""
    row = tl.arange(0, HEADS * FRAMES)[None, :, None]
    column = tl.arange(0, HEADS * FRAMES)[None, None, :]
    head, t = row // FRAMES, row % FRAMES
    key_head, s = column // FRAMES, column % FRAMES
    slot = s - t + before
    exists = (head < heads) & (key_head < heads) & (t < frames) & (s < frames)
    exists &= (slot >= 0) & (slot < kernel_size)
    entry = (head * heads + key_head) * kernel_size + slot
    return tl.load(key_counts + entry, mask=exists, other=0).to(tl.float32)


@triton.jit(do_not_specialize=RUN_TIME)
def qkv_attention_table_forward(
    x, weight, bias, key_counts, o,
    x_outer: tl.int64, x_frame: tl.int64, x_inner: tl.int64,
    o_outer: tl.int64, o_frame: tl.int64, o_inner: tl.int64,
    bias_head: tl.int32, bias_frame: tl.int32,
    positions: tl.int32, heads: tl.int32, inner: tl.int32, frames: tl.int32,
    kernel_size: tl.int32, before: tl.int32, zeros: tl.float32, scale: tl.float32,
    HEAD_DIM: tl.constexpr, SLICE: tl.constexpr, ALIGNED: tl.constexpr, PARTS: tl.constexpr,
    HEADS: tl.constexpr, PLACES: tl.constexpr, FRAMES: tl.constexpr,
):  # fmt: skip
    """o = attention of (x W^T + b) for all heads of PLACES positions."""
    i = tl.arange(0, HEAD_DIM)[None, None, :]
    head = tl.arange(0, HEADS)[:, None, None]
    row = tl.arange(0, PLACES * FRAMES)[None, :, None]
    position, frame = tl.program_id(0) * PLACES + row // FRAMES, row % FRAMES
    exists = (head < heads) & (position < positions) & (frame < frames)
    at = _offsets(position, frame, head, inner, x_outer, x_frame, x_inner, HEAD_DIM, ALIGNED)
    b_x = tl.load(x + at + i, mask=exists, other=0)  # [HEADS, PLACES * FRAMES, HEAD_DIM]
    products = tl.zeros((PLACES, HEADS * FRAMES, HEADS * FRAMES), tl.float32)
    for first in range(0, HEAD_DIM, SLICE):
        q = _project(b_x, weight, bias, bias_head, bias_frame, heads, exists, 0, first, HEAD_DIM,
                     SLICE, HEADS, PLACES, FRAMES)  # [PLACES, HEADS * FRAMES, SLICE]  # fmt: skip
        k = _project(b_x, weight, bias, bias_head, bias_frame, heads, exists, 1, first, HEAD_DIM,
                     SLICE, HEADS, PLACES, FRAMES)  # fmt: skip
        products += matmul(q, tl.trans(k))
    count = _counts(key_counts, heads, frames, kernel_size, before, HEADS, FRAMES)
    count = tl.broadcast_to(count, products.shape)
    weights, _, total = softmax_weights(products, count, kernel_size, zeros, scale)
    place = tl.arange(0, PLACES)[:, None, None]
    row = tl.arange(0, HEADS * FRAMES)[None, :, None]
    position, head, frame = tl.program_id(0) * PLACES + place, row // FRAMES, row % FRAMES
    kept = (head < heads) & (position < positions) & (frame < frames)
    at = _offsets(position, frame, head, inner, o_outer, o_frame, o_inner, HEAD_DIM, ALIGNED)
    for first in range(0, HEAD_DIM, SLICE):
        v = _project(b_x, weight, bias, bias_head, bias_frame, heads, exists, 2, first, HEAD_DIM,
                     SLICE, HEADS, PLACES, FRAMES)  # fmt: skip
        b_o = weighted_sum(weights, v, count > 0, PARTS) / total.expand_dims(-1)
        out = first + tl.arange(0, SLICE)[None, None, :]
        tl.store(o + at + out, b_o.to(o.dtype.element_ty), mask=kept)
