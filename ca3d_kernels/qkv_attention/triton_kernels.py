"""Triton kernels of the projection per head with the attention after it.

A program serves one head. It keeps the head's weights and goes through its share of the tiles;
a tile holds all frames of some positions, or a block of a long clip with its halo (see
`local_attention.triton_kernels`). Queries, keys and values live in registers only: the kernel reads
x once and writes the result once. Tiles have at most 32 rows, on which products stay with
``mma.sync`` on every GPU.
"""

import triton
import triton.language as tl

from ca3d_kernels.local_attention.triton_kernels import (
    halves,
    logit_gradients,
    matmul,
    multiplicity,
    offsets,
    softmax_weights,
    tile_rows,
    weighted_sum,
)

# Arguments whose values Triton would otherwise compile anew for: ALIGNED says what matters of them.
RUN_TIME = [
    "positions", "heads", "inner", "frames", "blocks", "tiles", "kernel_size", "dilation", "before",
    "shift", "zeros", "scale", "bias_head", "bias_frame", "pixels",
]  # fmt: skip
RUN_TIME += [
    f"{image}_{dim}"
    for image in ("x", "o", "do", "dx", "dqkv")
    for dim in ("outer", "frame", "inner")
]


@triton.jit
def _load_weight(weight, head, part: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The map to queries (part 0), keys (1) or values (2) of a head, (out, in)."""
    out = tl.arange(0, HEAD_DIM)[:, None]
    i = tl.arange(0, HEAD_DIM)[None, :]
    return tl.load(weight + ((head * 3 + part) * HEAD_DIM + out) * HEAD_DIM + i)


@triton.jit
def _load_bias(bias, bias_head, head, BIAS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """What is added to queries, keys and values in every frame, (1, HEAD_DIM) each."""
    b_q = tl.zeros((1, HEAD_DIM), tl.float32)
    b_k, b_v = b_q, b_q
    if BIAS == "head":
        at = bias + tl.multiple_of(head * bias_head, HEAD_DIM) + tl.arange(0, HEAD_DIM)[None, :]
        b_q = tl.load(at).to(tl.float32)
        b_k = tl.load(at + HEAD_DIM).to(tl.float32)
        b_v = tl.load(at + 2 * HEAD_DIM).to(tl.float32)
    return b_q, b_k, b_v


@triton.jit
def load_frame_bias(bias, bias_head, bias_frame, head, frame, exists, HEAD_DIM: tl.constexpr):
    """The same for the frames of a tile's rows, (ROWS, HEAD_DIM) each."""
    at = tl.multiple_of(head * bias_head + frame * bias_frame, [HEAD_DIM, HEAD_DIM])
    at = bias + at + tl.arange(0, HEAD_DIM)[None, :]
    b_q = tl.load(at, mask=exists, other=0).to(tl.float32)
    b_k = tl.load(at + HEAD_DIM, mask=exists, other=0).to(tl.float32)
    b_v = tl.load(at + 2 * HEAD_DIM, mask=exists, other=0).to(tl.float32)
    return b_q, b_k, b_v


@triton.jit
def _project(x, w, b):
    """x (ROWS, in) times w (out, in), rounded to x's dtype as if it had been stored."""
    return (matmul(x, tl.trans(w)) + b).to(x.dtype)


@triton.jit(do_not_specialize=RUN_TIME)
def qkv_attention_forward(
    x, weight, bias, o,
    x_outer: tl.int64, x_frame: tl.int64, x_inner: tl.int64,
    o_outer: tl.int64, o_frame: tl.int64, o_inner: tl.int64,
    bias_head: tl.int32, bias_frame: tl.int32,
    positions: tl.int32, heads: tl.int32, inner: tl.int32, frames: tl.int32, blocks: tl.int32,
    tiles: tl.int32, kernel_size: tl.int32, dilation: tl.int32, before: tl.int32, shift: tl.int32,
    zeros: tl.float32, scale: tl.float32,
    HEAD_DIM: tl.constexpr, ALIGNED: tl.constexpr, PARTS: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, FRAMES: tl.constexpr, OWNED: tl.constexpr, FRONT: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """o = attention of (x W^T + b) for one head and every `programs per head`-th tile."""
    head = tl.program_id(0) % heads
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, ROWS)[None, :]
    i = tl.arange(0, HEAD_DIM)[None, :]
    w_q = _load_weight(weight, head, 0, HEAD_DIM)  # [HEAD_DIM, HEAD_DIM]
    w_k = _load_weight(weight, head, 1, HEAD_DIM)
    w_v = _load_weight(weight, head, 2, HEAD_DIM)
    b_q, b_k, b_v = _load_bias(bias, bias_head, head, BIAS, HEAD_DIM)
    if WHOLE:
        # The same for all tiles: rows of positions that don't exist are not written.
        count = multiplicity(
            row, column, 0, ROWS, 1, frames, 1, kernel_size, dilation, before, shift, weight,
            ROWS, FRAMES, OWNED, FRONT, 0,
        )  # [ROWS, ROWS]  # fmt: skip
    for tile in range(tl.program_id(0) // heads, tiles, tl.num_programs(0) // heads):
        position, _, frame, exists = tile_rows(
            row, tile, positions, 1, frames, blocks, ROWS, FRAMES, OWNED, FRONT, 0
        )
        at = offsets(position, head, frame, inner, x_outer, x_inner, HEAD_DIM, x_frame, ALIGNED)
        b_x = tl.load(x + at + i, mask=exists, other=0)  # [ROWS, HEAD_DIM]
        if BIAS == "frame":
            t_q, t_k, t_v = load_frame_bias(
                bias, bias_head, bias_frame, head, frame, exists, HEAD_DIM
            )
        else:
            t_q, t_k, t_v = b_q, b_k, b_v
        q, k, v = _project(b_x, w_q, t_q), _project(b_x, w_k, t_k), _project(b_x, w_v, t_v)
        if not WHOLE:
            count = multiplicity(
                row, column, tile, positions, 1, frames, blocks, kernel_size, dilation, before,
                shift, weight, ROWS, FRAMES, OWNED, FRONT, 0,
            )  # fmt: skip
        weights, _, total = softmax_weights(
            matmul(q, tl.trans(k)), count, kernel_size, zeros, scale
        )
        b_o = weighted_sum(weights, v, count > 0, PARTS) / total[:, None]
        kept = exists & (row % FRAMES >= FRONT) & (row % FRAMES < FRONT + OWNED)
        at = offsets(position, head, frame, inner, o_outer, o_inner, HEAD_DIM, o_frame, ALIGNED)
        tl.store(o + at + i, b_o.to(o.dtype.element_ty), mask=kept)


@triton.jit
def _own(gradient, kept, WHOLE: tl.constexpr):
    """Nothing from the rows of a halo, whose gradients are not complete."""
    return gradient if WHOLE else tl.where(kept, gradient, 0.0)


@triton.jit
def _store_half(partial, value, program, part: tl.constexpr, half: tl.constexpr,
                HEAD_DIM: tl.constexpr):  # fmt: skip
    out = half * (HEAD_DIM // 2) + tl.arange(0, HEAD_DIM // 2)[:, None]
    i = tl.arange(0, HEAD_DIM)[None, :]
    tl.store(partial + ((program * 3 + part) * HEAD_DIM + out) * HEAD_DIM + i, value)


@triton.jit
def _store_shares(partial_weight, partial_bias, program, dw_q0, dw_q1, dw_k0, dw_k1, dw_v0, dw_v1,
                  db_q, db_k, db_v, HEAD_DIM: tl.constexpr):  # fmt: skip
    _store_half(partial_weight, dw_q0, program, 0, 0, HEAD_DIM)
    _store_half(partial_weight, dw_q1, program, 0, 1, HEAD_DIM)
    _store_half(partial_weight, dw_k0, program, 1, 0, HEAD_DIM)
    _store_half(partial_weight, dw_k1, program, 1, 1, HEAD_DIM)
    _store_half(partial_weight, dw_v0, program, 2, 0, HEAD_DIM)
    _store_half(partial_weight, dw_v1, program, 2, 1, HEAD_DIM)
    at = program * 3 * HEAD_DIM + tl.arange(0, HEAD_DIM)
    tl.store(partial_bias + at, db_q)
    tl.store(partial_bias + at + HEAD_DIM, db_k)
    tl.store(partial_bias + at + 2 * HEAD_DIM, db_v)


@triton.jit(do_not_specialize=RUN_TIME)
def qkv_attention_backward(
    x, weight, bias, do, dx, partial_weight, partial_bias,
    x_outer: tl.int64, x_frame: tl.int64, x_inner: tl.int64,
    do_outer: tl.int64, do_frame: tl.int64, do_inner: tl.int64,
    dx_outer: tl.int64, dx_frame: tl.int64, dx_inner: tl.int64,
    bias_head: tl.int32, bias_frame: tl.int32,
    positions: tl.int32, heads: tl.int32, inner: tl.int32, frames: tl.int32, blocks: tl.int32,
    tiles: tl.int32, kernel_size: tl.int32, dilation: tl.int32, before: tl.int32, shift: tl.int32,
    zeros: tl.float32, scale: tl.float32,
    HEAD_DIM: tl.constexpr, ALIGNED: tl.constexpr, PARTS: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, FRAMES: tl.constexpr, OWNED: tl.constexpr, FRONT: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """dx, and each program's share of the gradients of weight and bias.

    The shares are added up afterwards in a fixed order: the same bits every time. Gradients of q,
    k and v are rounded to x's dtype before they go through the map, as if they had been stored.
    """
    program = tl.program_id(0).to(tl.int64)
    head = tl.program_id(0) % heads
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, ROWS)[None, :]
    i = tl.arange(0, HEAD_DIM)[None, :]
    b_q, b_k, b_v = _load_bias(bias, bias_head, head, BIAS, HEAD_DIM)
    if WHOLE:
        count = multiplicity(
            row, column, 0, ROWS, 1, frames, 1, kernel_size, dilation, before, shift, weight,
            ROWS, FRAMES, OWNED, FRONT, 0,
        )  # [ROWS, ROWS]  # fmt: skip
    dw_q0 = tl.zeros((HEAD_DIM // 2, HEAD_DIM), tl.float32)
    dw_q1, dw_k0, dw_k1, dw_v0, dw_v1 = dw_q0, dw_q0, dw_q0, dw_q0, dw_q0
    db_q = tl.zeros((HEAD_DIM,), tl.float32)
    db_k, db_v = db_q, db_q
    for tile in range(tl.program_id(0) // heads, tiles, tl.num_programs(0) // heads):
        position, _, frame, exists = tile_rows(
            row, tile, positions, 1, frames, blocks, ROWS, FRAMES, OWNED, FRONT, 0
        )
        at = offsets(position, head, frame, inner, x_outer, x_inner, HEAD_DIM, x_frame, ALIGNED)
        b_x = tl.load(x + at + i, mask=exists, other=0)  # [ROWS, HEAD_DIM]
        at = offsets(position, head, frame, inner, do_outer, do_inner, HEAD_DIM, do_frame, ALIGNED)
        b_do = tl.load(do + at + i, mask=exists, other=0)  # [ROWS, HEAD_DIM]
        # Loaded for each tile, from a cache: registers have no room for the maps besides the sums.
        w_q = _load_weight(weight, head, 0, HEAD_DIM)  # [HEAD_DIM, HEAD_DIM]
        w_k = _load_weight(weight, head, 1, HEAD_DIM)
        w_v = _load_weight(weight, head, 2, HEAD_DIM)
        q, k, v = _project(b_x, w_q, b_q), _project(b_x, w_k, b_k), _project(b_x, w_v, b_v)
        if not WHOLE:
            count = multiplicity(
                row, column, tile, positions, 1, frames, blocks, kernel_size, dilation, before,
                shift, weight, ROWS, FRAMES, OWNED, FRONT, 0,
            )  # fmt: skip
        meets = count > 0
        kept = exists & (row % FRAMES >= FRONT) & (row % FRAMES < FRONT + OWNED)
        weights, absent, total = softmax_weights(
            matmul(q, tl.trans(k)), count, kernel_size, zeros, scale
        )
        dp = tl.where(meets, matmul(b_do, tl.trans(v)), 0.0)  # [ROWS, ROWS]
        p, ds = logit_gradients(weights, absent, total, dp, meets, scale)
        dv = weighted_sum(tl.trans(p), b_do, tl.trans(meets), PARTS)
        dv = _own(dv, kept, WHOLE).to(b_x.dtype)
        b_dx = matmul(dv, w_v)  # [ROWS, HEAD_DIM]
        left, right = halves(dv)  # [HEAD_DIM / 2, ROWS]
        dw_v0 += matmul(left, b_x)
        dw_v1 += matmul(right, b_x)
        dk = weighted_sum(tl.trans(ds), q, tl.trans(meets), PARTS)
        dk = _own(dk, kept, WHOLE).to(b_x.dtype)
        b_dx += matmul(dk, w_k)
        left, right = halves(dk)
        dw_k0 += matmul(left, b_x)
        dw_k1 += matmul(right, b_x)
        dq = weighted_sum(ds, k, meets, PARTS)
        dq = _own(dq, kept, WHOLE).to(b_x.dtype)
        b_dx += matmul(dq, w_q)
        left, right = halves(dq)
        dw_q0 += matmul(left, b_x)
        dw_q1 += matmul(right, b_x)
        db_q += tl.sum(dq.to(tl.float32), 0)
        db_k += tl.sum(dk.to(tl.float32), 0)
        db_v += tl.sum(dv.to(tl.float32), 0)
        at = offsets(position, head, frame, inner, dx_outer, dx_inner, HEAD_DIM, dx_frame, ALIGNED)
        tl.store(dx + at + i, b_dx.to(dx.dtype.element_ty), mask=kept)
    _store_shares(partial_weight, partial_bias, program, dw_q0, dw_q1, dw_k0, dw_k1, dw_v0, dw_v1,
                  db_q, db_k, db_v, HEAD_DIM)  # fmt: skip


@triton.jit(do_not_specialize=RUN_TIME)
def qkv_projection_backward(
    x, weight, dqkv, dx, partial_weight, partial_bias,
    x_outer: tl.int64, x_frame: tl.int64, x_inner: tl.int64,
    dqkv_outer: tl.int64, dqkv_frame: tl.int64, dqkv_inner: tl.int64,
    dx_outer: tl.int64, dx_frame: tl.int64, dx_inner: tl.int64,
    pixels: tl.int32, heads: tl.int32, inner: tl.int32, frames: tl.int32, tiles: tl.int32,
    HEAD_DIM: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dx, and each program's share of the gradients of weight and bias, from those of q, k and v.

    The shares are added up afterwards in a fixed order: the same bits every time.
    """
    program = tl.program_id(0).to(tl.int64)
    head = tl.program_id(0) % heads
    i = tl.arange(0, HEAD_DIM)[None, :]
    dw_q0 = tl.zeros((HEAD_DIM // 2, HEAD_DIM), tl.float32)
    dw_q1, dw_k0, dw_k1, dw_v0, dw_v1 = dw_q0, dw_q0, dw_q0, dw_q0, dw_q0
    db_q = tl.zeros((HEAD_DIM,), tl.float32)
    db_k, db_v = db_q, db_q
    for tile in range(tl.program_id(0) // heads, tiles, tl.num_programs(0) // heads):
        row = tile * ROWS + tl.arange(0, ROWS)[:, None]
        exists = row < pixels
        position = row // (frames * inner) * inner + row % inner
        frame = row // inner % frames
        at = offsets(position, head, frame, inner, x_outer, x_inner, HEAD_DIM, x_frame, ALIGNED)
        b_x = tl.load(x + at + i, mask=exists, other=0)  # [ROWS, HEAD_DIM]
        at = offsets(
            position, head * 3, frame, inner, dqkv_outer, dqkv_inner, HEAD_DIM, dqkv_frame, ALIGNED
        )
        dq = tl.load(dqkv + at + i, mask=exists, other=0)  # [ROWS, HEAD_DIM]
        b_dx = matmul(dq, _load_weight(weight, head, 0, HEAD_DIM))
        left, right = halves(dq)  # [HEAD_DIM / 2, ROWS]
        dw_q0 += matmul(left, b_x)
        dw_q1 += matmul(right, b_x)
        dk = tl.load(dqkv + at + HEAD_DIM + i, mask=exists, other=0)
        b_dx += matmul(dk, _load_weight(weight, head, 1, HEAD_DIM))
        left, right = halves(dk)
        dw_k0 += matmul(left, b_x)
        dw_k1 += matmul(right, b_x)
        dv = tl.load(dqkv + at + 2 * HEAD_DIM + i, mask=exists, other=0)
        b_dx += matmul(dv, _load_weight(weight, head, 2, HEAD_DIM))
        left, right = halves(dv)
        dw_v0 += matmul(left, b_x)
        dw_v1 += matmul(right, b_x)
        db_q += tl.sum(dq.to(tl.float32), 0)
        db_k += tl.sum(dk.to(tl.float32), 0)
        db_v += tl.sum(dv.to(tl.float32), 0)
        at = offsets(position, head, frame, inner, dx_outer, dx_inner, HEAD_DIM, dx_frame, ALIGNED)
        tl.store(dx + at + i, b_dx.to(dx.dtype.element_ty), mask=exists)
    _store_shares(partial_weight, partial_bias, program, dw_q0, dw_q1, dw_k0, dw_k1, dw_v0, dw_v1,
                  db_q, db_k, db_v, HEAD_DIM)  # fmt: skip
