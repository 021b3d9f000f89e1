"""Triton kernels of local temporal attention for clips that are longer than a tile.

A program goes along a clip, or along a part of a very long one. The queries of a step begin as many
frames after a tile of keys as a window reaches back: all keys that they meet lie in that tile (old)
and in the next (new). After the step the old tile has met all of its queries, and the new one takes
its place. So every frame is read once and written once, and there is no halo.

A clip with dilation is as many clips as the dilation, interleaved; frames are numbered within one.
With a key table a tile holds all heads of a position, one after the other. Scores of a query lie in
columns that alternate between the old and the new tile, as `tl.join` leaves them.
"""

import triton
import triton.language as tl

from ca3d_kernels.local_attention.triton_kernels import (
    logit_gradients,
    matmul,
    slots,
    softmax_weights,
    weighted_sum,
)

# Arguments whose values Triton would otherwise compile anew for: ALIGNED says what matters of them.
RUN_TIME = [
    "back", "parts", "part_tiles", "heads", "inner", "frames", "kernel_size", "dilation", "before",
    "shift", "zeros", "scale",
]  # fmt: skip
RUN_TIME += [
    f"{operand}_{dim}"
    for operand in ("q", "k", "v", "o", "do", "dq", "dk", "dv")
    for dim in ("outer", "inner", "head", "frame")
]


@triton.jit
def _part_of_a_clip(program, heads, frames, dilation, parts, TABLE_HEADS: tl.constexpr):
    """Position, head, number of the part, first frame and length of a program's clip."""
    part = program % parts
    start = program // parts % dilation
    position = program // parts // dilation
    head = 0
    if TABLE_HEADS == 0:
        head = position % heads
        position = position // heads
    return position, head, part, start, (frames - start + dilation - 1) // dilation


@triton.jit
def _first_row(position, start, inner, outer_stride, inner_stride, frame_stride,
               ALIGNED: tl.constexpr):  # fmt: skip
    """Where an operand's head 0 of a clip starts, in elements."""
    offset = (position // inner) * outer_stride + (position % inner) * inner_stride
    return tl.multiple_of(offset + start * frame_stride, ALIGNED)


@triton.jit
def _rows(row, first, head, heads, length, FRAMES: tl.constexpr):
    """Head and frame of rows of a tile that begins with a frame, and whether they exist."""
    head += row // FRAMES  # other than 0 with a key table only
    frame = first + row % FRAMES
    return head, frame, (head < heads) & (frame >= 0) & (frame < length)


@triton.jit
def _elements(row, first, head, heads, length, head_stride, frame_stride,
              HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr,
              FRAMES: tl.constexpr):  # fmt: skip
    """Where the elements of a tile lie, counted from `_first_row`, and whether they exist."""
    i = tl.arange(0, COLUMNS)[None, :]  # element of a row
    head, frame, exists = _rows(row, first, head, heads, length, FRAMES)
    at = tl.multiple_of(head * head_stride + frame * frame_stride, [ALIGNED, ALIGNED])
    return at + i, exists & (i < HEAD_DIM)  # [ROWS, COLUMNS]


@triton.jit
def _load(x, row, first, head, heads, length, head_stride, frame_stride,
          HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr,
          PARTS: tl.constexpr, FRAMES: tl.constexpr):  # fmt: skip
    """A tile of an operand, (ROWS, COLUMNS)."""
    at, exists = _elements(
        row, first, head, heads, length, head_stride, frame_stride,
        HEAD_DIM, COLUMNS, ALIGNED, FRAMES,
    )  # fmt: skip
    values = tl.load(x + at, mask=exists, other=0)
    if PARTS == 1:
        values = values.to(tl.float32)
    return values


@triton.jit
def _store(x, values, kept, row, first, head, heads, length, head_stride, frame_stride,
           HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr,
           FRAMES: tl.constexpr):  # fmt: skip
    """Writes a tile of a result, (ROWS, COLUMNS), if it is `kept`."""
    at, exists = _elements(
        row, first, head, heads, length, head_stride, frame_stride,
        HEAD_DIM, COLUMNS, ALIGNED, FRAMES,
    )  # fmt: skip
    tl.store(x + at, values.to(x.dtype.element_ty), mask=exists & kept)


@triton.jit
def _multiplicity(
    row, column, first, back, head, length, heads, kernel_size, before, shift, key_counts,
    FRAMES: tl.constexpr, TABLE_HEADS: tl.constexpr,
):  # fmt: skip
    """(ROWS, 2 ROWS): in how many slots the query of a row meets the key of a column."""
    query_head, t, queries = _rows(row, first + back, head, heads, length, FRAMES)
    tile = first + column % 2 * FRAMES
    key_head, s, keys = _rows(column // 2, tile, head, heads, length, FRAMES)
    return slots(
        t, s, query_head, key_head, queries & keys, length, heads, kernel_size, before, shift,
        key_counts, TABLE_HEADS,
    )  # fmt: skip


@triton.jit
def _joined(old, new):
    """Columns of both (ROWS, ROWS), alternating: (ROWS, 2 ROWS)."""
    return tl.join(old, new).reshape(old.shape[0], 2 * old.shape[1])


@triton.jit
def _apart(x):
    """The inverse of `_joined`."""
    return x.reshape(x.shape[0], x.shape[1] // 2, 2).split()


@triton.jit(do_not_specialize=RUN_TIME)
def attention_rolling_forward(
    q, k, v, o, key_counts,
    q_outer: tl.int64, q_inner: tl.int64, q_head: tl.int64, q_frame: tl.int64,
    k_outer: tl.int64, k_inner: tl.int64, k_head: tl.int64, k_frame: tl.int64,
    v_outer: tl.int64, v_inner: tl.int64, v_head: tl.int64, v_frame: tl.int64,
    o_outer: tl.int64, o_inner: tl.int64, o_head: tl.int64, o_frame: tl.int64,
    back: tl.int32, parts: tl.int32, part_tiles: tl.int32, heads: tl.int32, inner: tl.int32,
    frames: tl.int32, kernel_size: tl.int32, dilation: tl.int32, before: tl.int32, shift: tl.int32,
    zeros: tl.float32, scale: tl.float32,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, FRAMES: tl.constexpr, TABLE_HEADS: tl.constexpr,
):  # fmt: skip
    """o = softmax(scale q k^T) v over the window of each frame."""
    position, head, part, start, length = _part_of_a_clip(
        tl.program_id(0), heads, frames, dilation, parts, TABLE_HEADS
    )
    q += _first_row(position, start, inner, q_outer, q_inner, q_frame, ALIGNED)
    k += _first_row(position, start, inner, k_outer, k_inner, k_frame, ALIGNED)
    v += _first_row(position, start, inner, v_outer, v_inner, v_frame, ALIGNED)
    o += _first_row(position, start, inner, o_outer, o_inner, o_frame, ALIGNED)
    q_frame *= dilation
    k_frame *= dilation
    v_frame *= dilation
    o_frame *= dilation
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, 2 * ROWS)[None, :]
    # The first queries of the clip lie before the first step of others.
    begin = part * part_tiles - (part == 0).to(tl.int32)
    end = tl.minimum((part + 1) * part_tiles, (length + FRAMES - 1) // FRAMES)
    old_k = _load(
        k, row, begin * FRAMES, head, heads, length, k_head, k_frame,
        HEAD_DIM, COLUMNS, ALIGNED, PARTS, FRAMES,
    )  # fmt: skip
    old_v = _load(
        v, row, begin * FRAMES, head, heads, length, v_head, v_frame,
        HEAD_DIM, COLUMNS, ALIGNED, PARTS, FRAMES,
    )  # fmt: skip
    for tile in tl.range(begin, end, num_stages=1):
        first = tile * FRAMES
        new_k = _load(
            k, row, first + FRAMES, head, heads, length, k_head, k_frame,
            HEAD_DIM, COLUMNS, ALIGNED, PARTS, FRAMES,
        )  # fmt: skip
        new_v = _load(
            v, row, first + FRAMES, head, heads, length, v_head, v_frame,
            HEAD_DIM, COLUMNS, ALIGNED, PARTS, FRAMES,
        )  # fmt: skip
        b_q = _load(
            q, row, first + back, head, heads, length, q_head, q_frame,
            HEAD_DIM, COLUMNS, ALIGNED, PARTS, FRAMES,
        )  # fmt: skip
        count = _multiplicity(
            row, column, first, back, head, length, heads, kernel_size, before, shift, key_counts,
            FRAMES, TABLE_HEADS,
        )  # [ROWS, 2 ROWS]  # fmt: skip
        products = _joined(matmul(b_q, tl.trans(old_k)), matmul(b_q, tl.trans(new_k)))
        weights, _, total = softmax_weights(products, count, kernel_size, zeros, scale)
        old_weights, new_weights = _apart(weights)
        old_meets, new_meets = _apart(count > 0)
        b_o = weighted_sum(old_weights, old_v, old_meets, PARTS)
        b_o += weighted_sum(new_weights, new_v, new_meets, PARTS)
        _store(
            o, b_o / total[:, None], True, row, first + back, head, heads, length,
            o_head, o_frame, HEAD_DIM, COLUMNS, ALIGNED, FRAMES,
        )  # fmt: skip
        old_k, old_v = new_k, new_v


@triton.jit(do_not_specialize=RUN_TIME)
def attention_rolling_backward(
    q, k, v, do, dq, dk, dv, key_counts,
    q_outer: tl.int64, q_inner: tl.int64, q_head: tl.int64, q_frame: tl.int64,
    k_outer: tl.int64, k_inner: tl.int64, k_head: tl.int64, k_frame: tl.int64,
    v_outer: tl.int64, v_inner: tl.int64, v_head: tl.int64, v_frame: tl.int64,
    do_outer: tl.int64, do_inner: tl.int64, do_head: tl.int64, do_frame: tl.int64,
    dq_outer: tl.int64, dq_inner: tl.int64, dq_head: tl.int64, dq_frame: tl.int64,
    dk_outer: tl.int64, dk_inner: tl.int64, dk_head: tl.int64, dk_frame: tl.int64,
    dv_outer: tl.int64, dv_inner: tl.int64, dv_head: tl.int64, dv_frame: tl.int64,
    back: tl.int32, parts: tl.int32, part_tiles: tl.int32, heads: tl.int32, inner: tl.int32,
    frames: tl.int32, kernel_size: tl.int32, dilation: tl.int32, before: tl.int32, shift: tl.int32,
    zeros: tl.float32, scale: tl.float32,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, FRAMES: tl.constexpr, TABLE_HEADS: tl.constexpr,
):  # fmt: skip
    """Gradients of `attention_rolling_forward`; the probabilities are computed again.

    dk and dv of a tile are summed over two steps, in registers: no atomics, the same bits every
    time. The first step of a part is the last one of the part before: both do it.
    """
    position, head, part, start, length = _part_of_a_clip(
        tl.program_id(0), heads, frames, dilation, parts, TABLE_HEADS
    )
    q += _first_row(position, start, inner, q_outer, q_inner, q_frame, ALIGNED)
    k += _first_row(position, start, inner, k_outer, k_inner, k_frame, ALIGNED)
    v += _first_row(position, start, inner, v_outer, v_inner, v_frame, ALIGNED)
    do += _first_row(position, start, inner, do_outer, do_inner, do_frame, ALIGNED)
    dq += _first_row(position, start, inner, dq_outer, dq_inner, dq_frame, ALIGNED)
    dk += _first_row(position, start, inner, dk_outer, dk_inner, dk_frame, ALIGNED)
    dv += _first_row(position, start, inner, dv_outer, dv_inner, dv_frame, ALIGNED)
    q_frame *= dilation
    k_frame *= dilation
    v_frame *= dilation
    do_frame *= dilation
    dq_frame *= dilation
    dk_frame *= dilation
    dv_frame *= dilation
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, 2 * ROWS)[None, :]
    begin = part * part_tiles
    end = tl.minimum((part + 1) * part_tiles, (length + FRAMES - 1) // FRAMES)
    old_k = _load(
        k, row, (begin - 1) * FRAMES, head, heads, length, k_head, k_frame,
        HEAD_DIM, COLUMNS, ALIGNED, PARTS, FRAMES,
    )  # fmt: skip
    old_v = _load(
        v, row, (begin - 1) * FRAMES, head, heads, length, v_head, v_frame,
        HEAD_DIM, COLUMNS, ALIGNED, PARTS, FRAMES,
    )  # fmt: skip
    old_dk = tl.zeros((ROWS, COLUMNS), tl.float32)
    old_dv = old_dk
    for tile in tl.range(begin - 1, end, num_stages=1):
        first = tile * FRAMES
        new_k = _load(
            k, row, first + FRAMES, head, heads, length, k_head, k_frame,
            HEAD_DIM, COLUMNS, ALIGNED, PARTS, FRAMES,
        )  # fmt: skip
        b_q = _load(
            q, row, first + back, head, heads, length, q_head, q_frame,
            HEAD_DIM, COLUMNS, ALIGNED, PARTS, FRAMES,
        )  # fmt: skip
        count = _multiplicity(
            row, column, first, back, head, length, heads, kernel_size, before, shift, key_counts,
            FRAMES, TABLE_HEADS,
        )  # [ROWS, 2 ROWS]  # fmt: skip
        meets = count > 0
        old_meets, new_meets = _apart(meets)
        products = _joined(matmul(b_q, tl.trans(old_k)), matmul(b_q, tl.trans(new_k)))
        weights, absent, total = softmax_weights(products, count, kernel_size, zeros, scale)
        new_v = _load(
            v, row, first + FRAMES, head, heads, length, v_head, v_frame,
            HEAD_DIM, COLUMNS, ALIGNED, PARTS, FRAMES,
        )  # fmt: skip
        b_do = _load(
            do, row, first + back, head, heads, length, do_head, do_frame,
            HEAD_DIM, COLUMNS, ALIGNED, PARTS, FRAMES,
        )  # fmt: skip
        dp = _joined(matmul(b_do, tl.trans(old_v)), matmul(b_do, tl.trans(new_v)))
        dp = tl.where(meets, dp, 0.0)  # [ROWS, 2 ROWS]
        p, ds = logit_gradients(weights, absent, total, dp, meets, scale)
        old_ds, new_ds = _apart(ds)
        old_dk += weighted_sum(tl.trans(old_ds), b_q, tl.trans(old_meets), PARTS)
        _store(
            dk, old_dk, tile >= begin, row, first, head, heads, length,
            dk_head, dk_frame, HEAD_DIM, COLUMNS, ALIGNED, FRAMES,
        )  # fmt: skip
        old_dk = weighted_sum(tl.trans(new_ds), b_q, tl.trans(new_meets), PARTS)
        old_p, new_p = _apart(p)
        old_dv += weighted_sum(tl.trans(old_p), b_do, tl.trans(old_meets), PARTS)
        _store(
            dv, old_dv, tile >= begin, row, first, head, heads, length,
            dv_head, dv_frame, HEAD_DIM, COLUMNS, ALIGNED, FRAMES,
        )  # fmt: skip
        old_dv = weighted_sum(tl.trans(new_p), b_do, tl.trans(new_meets), PARTS)
        b_dq = weighted_sum(old_ds, old_k, old_meets, PARTS)
        b_dq += weighted_sum(new_ds, new_k, new_meets, PARTS)
        _store(
            dq, b_dq, (tile >= begin) | (part == 0), row, first + back, head, heads, length,
            dq_head, dq_frame, HEAD_DIM, COLUMNS, ALIGNED, FRAMES,
        )  # fmt: skip
        old_k, old_v = new_k, new_v
