"""Triton kernel of the folded temporal half of a CAST block.

A program serves one head and goes through its share of the tiles; a tile holds all frames of some
positions. Everything between x and the result stays in registers: queries, keys, values and the
inputs of the temporal convolutions are rounded to x's dtype, as if they had been stored, and the
residual is kept in float32. Tiles have 32 rows, on which products stay with ``mma.sync`` on every
GPU. Every tile reads the head's weights again, from cache: with several convolutions that is more
than ten times what it moves in memory, and cache, not memory, bounds the kernel.
"""

import triton
import triton.language as tl

from ca3d_kernels.local_attention.triton_kernels import (
    matmul,
    multiplicity,
    offsets,
    softmax_weights,
    tile_rows,
    weighted_sum,
)
from ca3d_kernels.qkv_attention.triton_kernels import load_frame_bias

# Arguments whose values Triton would otherwise compile anew for: ALIGNED says what matters of them.
RUN_TIME = [
    "positions", "heads", "inner", "frames", "tiles", "kernel_size", "dilation", "before", "shift",
    "zeros", "scale", "convolutions",
]  # fmt: skip
RUN_TIME += [f"{image}_{dim}" for image in ("x", "out") for dim in ("outer", "frame", "inner")]


@triton.jit
def _load_matrix(weight, row_stride, HEAD_DIM: tl.constexpr):
    """A matrix (in, out) whose rows lie row_stride elements apart."""
    i = tl.arange(0, HEAD_DIM)[:, None]
    return tl.load(weight + i * row_stride + tl.arange(0, HEAD_DIM)[None, :])


@triton.jit
def _load_row(values, at, HEAD_DIM: tl.constexpr):
    """A number for each channel of a head, (1, HEAD_DIM)."""
    at = tl.multiple_of(at, HEAD_DIM)
    return tl.load(values + at + tl.arange(0, HEAD_DIM)[None, :]).to(tl.float32)


@triton.jit
def _frame_at(x, row, distance, exists, ROWS: tl.constexpr):
    """Rows of x (ROWS, N) `distance` further on, zeros where that frame doesn't exist."""
    source = tl.minimum(tl.maximum(row + distance, 0), ROWS - 1)
    moved = tl.gather(x, tl.broadcast_to(source, x.shape), 0)
    return tl.where(exists, moved, 0.0).to(x.dtype)


@triton.jit
def _step(x, row, before, after, weight, bias, scale, shift, at,
          ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):  # fmt: skip
    """scale relu(conv(x) + bias) + shift over three frames, (ROWS, HEAD_DIM) in float32."""
    filters = weight + tl.multiple_of(at * 3 * HEAD_DIM, HEAD_DIM)
    matrix: tl.constexpr = HEAD_DIM * HEAD_DIM
    y = matmul(_frame_at(x, row, -1, before, ROWS), _load_matrix(filters, HEAD_DIM, HEAD_DIM))
    y += matmul(x, _load_matrix(filters + matrix, HEAD_DIM, HEAD_DIM))
    y += matmul(
        _frame_at(x, row, 1, after, ROWS), _load_matrix(filters + 2 * matrix, HEAD_DIM, HEAD_DIM)
    )
    y += _load_row(bias, at, HEAD_DIM)
    # NaN passes, as in torch.
    y = tl.where(y < 0, 0.0, y)
    return y * _load_row(scale, at, HEAD_DIM) + _load_row(shift, at, HEAD_DIM)


@triton.jit(do_not_specialize=RUN_TIME)
def temporal_block_forward(
    x, qkv_weight, qkv_bias, norm_scale, norm_shift, column_weight, column_bias, column_scale,
    column_shift, out,
    x_outer: tl.int64, x_frame: tl.int64, x_inner: tl.int64,
    out_outer: tl.int64, out_frame: tl.int64, out_inner: tl.int64,
    positions: tl.int32, heads: tl.int32, inner: tl.int32, frames: tl.int32, tiles: tl.int32,
    kernel_size: tl.int32, dilation: tl.int32, before: tl.int32, shift: tl.int32,
    convolutions: tl.int32, zeros: tl.float32, scale: tl.float32,
    HEAD_DIM: tl.constexpr, ALIGNED: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
    FRAMES: tl.constexpr,
):  # fmt: skip
    """out = the temporal half of x for one head and every `programs per head`-th tile."""
    head = tl.program_id(0) % heads
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, ROWS)[None, :]
    i = tl.arange(0, HEAD_DIM)[None, :]
    # Rows of positions that don't exist are not written, so that all tiles meet alike.
    count = multiplicity(
        row, column, 0, ROWS, 1, frames, 1, kernel_size, dilation, before, shift, x,
        ROWS, FRAMES, FRAMES, 0, 0,
    )  # [ROWS, ROWS]  # fmt: skip
    maps = qkv_weight + tl.multiple_of(head * 3 * HEAD_DIM, HEAD_DIM) * HEAD_DIM
    s_norm = _load_row(norm_scale, head * HEAD_DIM, HEAD_DIM)
    for tile in range(tl.program_id(0) // heads, tiles, tl.num_programs(0) // heads):
        position, _, frame, exists = tile_rows(
            row, tile, positions, 1, frames, 1, ROWS, FRAMES, FRAMES, 0, 0
        )
        at = offsets(position, head, frame, inner, x_outer, x_inner, HEAD_DIM, x_frame, ALIGNED)
        b_x = tl.load(x + at + i, mask=exists, other=0)  # [ROWS, HEAD_DIM]
        t_q, t_k, t_v = load_frame_bias(
            qkv_bias, frames * 3 * HEAD_DIM, 3 * HEAD_DIM, head, frame, exists, HEAD_DIM
        )
        q = (matmul(b_x, _load_matrix(maps, 3 * HEAD_DIM, HEAD_DIM)) + t_q).to(x.dtype.element_ty)
        k = matmul(b_x, _load_matrix(maps + HEAD_DIM, 3 * HEAD_DIM, HEAD_DIM)) + t_k
        v = matmul(b_x, _load_matrix(maps + 2 * HEAD_DIM, 3 * HEAD_DIM, HEAD_DIM)) + t_v
        k, v = k.to(x.dtype.element_ty), v.to(x.dtype.element_ty)
        weights, _, total = softmax_weights(
            matmul(q, tl.trans(k)), count, kernel_size, zeros, scale
        )
        y = weighted_sum(weights, v, count > 0, PARTS) / total[:, None] + b_x
        moved = tl.multiple_of((head * frames + frame) * HEAD_DIM, [HEAD_DIM, HEAD_DIM])
        y = y * s_norm + tl.load(norm_shift + moved + i, mask=exists, other=0)
        has_before = exists & (frame > 0)
        has_after = exists & (frame + 1 < frames)
        for step in range(0, convolutions, 2):
            place = (step * heads + head) * HEAD_DIM
            u = _step(
                y.to(x.dtype.element_ty), row, has_before, has_after, column_weight, column_bias,
                column_scale, column_shift, place, ROWS, HEAD_DIM,
            )  # fmt: skip
            y += _step(
                u.to(x.dtype.element_ty), row, has_before, has_after, column_weight, column_bias,
                column_scale, column_shift, place + heads * HEAD_DIM, ROWS, HEAD_DIM,
            )  # fmt: skip
        at = offsets(
            position, head, frame, inner, out_outer, out_inner, HEAD_DIM, out_frame, ALIGNED
        )
        tl.store(out + at + i, y.to(out.dtype.element_ty), mask=exists)
