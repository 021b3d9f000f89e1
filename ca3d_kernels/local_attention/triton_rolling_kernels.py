"""Triton kernels of local temporal attention for clips that are longer than a tile.

A program goes along a clip, or along a stretch of a very long one. The queries of a step begin as
many frames after a tile of keys as a window reaches back: all keys that they meet lie in that tile
(old) and in the next (new). After the step the old tile has met all of its queries, and the new one
takes its place. So there is no halo: every frame is read once, but where one stretch ends and
another begins.

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
    "back", "stretches", "stretch_tiles", "heads", "inner", "frames", "kernel_size", "dilation",
    "before", "shift", "zeros", "scale",
]  # fmt: skip
RUN_TIME += [
    f"{operand}_{dim}"
    for operand in ("q", "k", "v", "o", "do", "dq", "dk", "dv")
    for dim in ("outer", "inner", "head", "frame")
]


@triton.jit
def _stretch_of_a_clip(program, heads, frames, dilation, stretches, TABLE_HEADS: tl.constexpr):
    """Position, number of the stretch, length of the clip, and the clip: head, first frame, length,
    dilation, and the number of all heads.
    """
    stretch = program % stretches
    start = program // stretches % dilation
    position = program // stretches // dilation
    head = 0
    if TABLE_HEADS == 0:
        head = position % heads
        position = position // heads
    length = (frames - start + dilation - 1) // dilation
    return position, stretch, length, (head, start, length, dilation, heads)


@triton.jit
def _operand(x, position, inner, outer_stride, inner_stride, head_stride, frame_stride,
             ALIGNED: tl.constexpr):  # fmt: skip
    """Where frame 0 of head 0 of a position lies, and how far heads and frames are apart."""
    offset = (position // inner) * outer_stride + (position % inner) * inner_stride
    return x + tl.multiple_of(offset, ALIGNED), head_stride, frame_stride


@triton.jit
def _rows(row, first, clip, FRAMES: tl.constexpr):
    """Head and frame of rows of a tile that begins with a frame, and whether they exist."""
    head, _, length, _, heads = clip
    head += row // FRAMES  # other than 0 with a key table only
    frame = first + row % FRAMES
    return head, frame, (head < heads) & (frame >= 0) & (frame < length)


@triton.jit
def _elements(x, row, first, clip, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr,
              ALIGNED: tl.constexpr, FRAMES: tl.constexpr):  # fmt: skip
    """Addresses of the elements of a tile, and whether they exist: (ROWS, COLUMNS)."""
    i = tl.arange(0, COLUMNS)[None, :]  # element of a row
    head, frame, exists = _rows(row, first, clip, FRAMES)
    _, start, _, dilation, _ = clip
    origin, head_stride, frame_stride = x
    at = head * head_stride + (start + frame * dilation) * frame_stride
    at = tl.multiple_of(at, [ALIGNED, ALIGNED])
    if COLUMNS > HEAD_DIM:
        exists = exists & (i < HEAD_DIM)
    return origin + (at + i), exists


@triton.jit
def _load(x, row, first, clip, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr,
          ALIGNED: tl.constexpr, PARTS: tl.constexpr, FRAMES: tl.constexpr):  # fmt: skip
    """A tile of an operand, (ROWS, COLUMNS)."""
    at, exists = _elements(x, row, first, clip, HEAD_DIM, COLUMNS, ALIGNED, FRAMES)
    values = tl.load(at, mask=exists, other=0)
    if PARTS == 1:
        values = values.to(tl.float32)
    return values


@triton.jit
def _store(x, values, kept, row, first, clip, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr,
           ALIGNED: tl.constexpr, FRAMES: tl.constexpr):  # fmt: skip
    """Writes a tile of a result, (ROWS, COLUMNS), if it is `kept`."""
    at, exists = _elements(x, row, first, clip, HEAD_DIM, COLUMNS, ALIGNED, FRAMES)
    tl.store(at, values.to(at.dtype.element_ty), mask=exists & kept)


@triton.jit
def _multiplicity(
    row, column, first, back, clip, kernel_size, before, shift, key_counts,
    FRAMES: tl.constexpr, TABLE_HEADS: tl.constexpr,
):  # fmt: skip
    """(ROWS, 2 ROWS): in how many slots the query of a row meets the key of a column."""
    query_head, t, queries = _rows(row, first + back, clip, FRAMES)
    tile = first + column % 2 * FRAMES
    key_head, s, keys = _rows(column // 2, tile, clip, FRAMES)
    _, _, length, _, heads = clip
    return slots(
        t, s, query_head, key_head, queries & keys, length, heads, kernel_size, before, shift,
        key_counts, TABLE_HEADS,
    )  # fmt: skip


@triton.jit
def _paired(old, new):
    """Rows of both (ROWS, N), alternating: (2 ROWS, N)."""
    return tl.join(old, new).permute(0, 2, 1).reshape(2 * old.shape[0], old.shape[1])


@triton.jit
def _apart(x):
    """Columns of the old and of the new tile, of those of `_paired`'s rows: (ROWS, ROWS) each."""
    return x.reshape(x.shape[0], x.shape[1] // 2, 2).split()


@triton.jit(do_not_specialize=RUN_TIME)
def attention_rolling_forward(
    q, k, v, o, key_counts,
    q_outer: tl.int64, q_inner: tl.int64, q_head: tl.int64, q_frame: tl.int64,
    k_outer: tl.int64, k_inner: tl.int64, k_head: tl.int64, k_frame: tl.int64,
    v_outer: tl.int64, v_inner: tl.int64, v_head: tl.int64, v_frame: tl.int64,
    o_outer: tl.int64, o_inner: tl.int64, o_head: tl.int64, o_frame: tl.int64,
    back: tl.int32, stretches: tl.int32, stretch_tiles: tl.int32, heads: tl.int32, inner: tl.int32,
    frames: tl.int32, kernel_size: tl.int32, dilation: tl.int32, before: tl.int32, shift: tl.int32,
    zeros: tl.float32, scale: tl.float32,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, FRAMES: tl.constexpr, TABLE_HEADS: tl.constexpr,
):  # fmt: skip
    """o = softmax(scale q k^T) v over the window of each frame."""
    position, stretch, length, clip = _stretch_of_a_clip(
        tl.program_id(0), heads, frames, dilation, stretches, TABLE_HEADS
    )
    q = _operand(q, position, inner, q_outer, q_inner, q_head, q_frame, ALIGNED)
    k = _operand(k, position, inner, k_outer, k_inner, k_head, k_frame, ALIGNED)
    v = _operand(v, position, inner, v_outer, v_inner, v_head, v_frame, ALIGNED)
    o = _operand(o, position, inner, o_outer, o_inner, o_head, o_frame, ALIGNED)
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, 2 * ROWS)[None, :]
    # The first queries of the clip lie before the first step of others.
    begin = stretch * stretch_tiles - (stretch == 0).to(tl.int32)
    end = tl.minimum((stretch + 1) * stretch_tiles, (length + FRAMES - 1) // FRAMES)
    old_k = _load(k, row, begin * FRAMES, clip, HEAD_DIM, COLUMNS, ALIGNED, PARTS, FRAMES)
    old_v = _load(v, row, begin * FRAMES, clip, HEAD_DIM, COLUMNS, ALIGNED, PARTS, FRAMES)
    for tile in tl.range(begin, end, num_stages=1):
        first = tile * FRAMES
        new_k = _load(k, row, first + FRAMES, clip, HEAD_DIM, COLUMNS, ALIGNED, PARTS, FRAMES)
        b_q = _load(q, row, first + back, clip, HEAD_DIM, COLUMNS, ALIGNED, PARTS, FRAMES)
        count = _multiplicity(
            row, column, first, back, clip, kernel_size, before, shift, key_counts,
            FRAMES, TABLE_HEADS,
        )  # [ROWS, 2 ROWS]  # fmt: skip
        products = matmul(b_q, tl.trans(_paired(old_k, new_k)))
        weights, _, total = softmax_weights(products, count, kernel_size, zeros, scale)
        new_v = _load(v, row, first + FRAMES, clip, HEAD_DIM, COLUMNS, ALIGNED, PARTS, FRAMES)
        b_o = weighted_sum(weights, _paired(old_v, new_v), count > 0, PARTS)
        _store(
            o, b_o / total[:, None], True, row, first + back, clip,
            HEAD_DIM, COLUMNS, ALIGNED, FRAMES,
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
    back: tl.int32, stretches: tl.int32, stretch_tiles: tl.int32, heads: tl.int32, inner: tl.int32,
    frames: tl.int32, kernel_size: tl.int32, dilation: tl.int32, before: tl.int32, shift: tl.int32,
    zeros: tl.float32, scale: tl.float32,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, FRAMES: tl.constexpr, TABLE_HEADS: tl.constexpr,
):  # fmt: skip
    """Gradients of `attention_rolling_forward`; the probabilities are computed again.

    dk and dv of a tile are summed over two steps, in registers: no atomics, the same bits every
    time. The first step of a stretch is the last one of the stretch before: both do it. Operands
    are loaded as late, and sums stored as early, as keeps every step within the registers.
    """
    position, stretch, length, clip = _stretch_of_a_clip(
        tl.program_id(0), heads, frames, dilation, stretches, TABLE_HEADS
    )
    q = _operand(q, position, inner, q_outer, q_inner, q_head, q_frame, ALIGNED)
    k = _operand(k, position, inner, k_outer, k_inner, k_head, k_frame, ALIGNED)
    v = _operand(v, position, inner, v_outer, v_inner, v_head, v_frame, ALIGNED)
    do = _operand(do, position, inner, do_outer, do_inner, do_head, do_frame, ALIGNED)
    dq = _operand(dq, position, inner, dq_outer, dq_inner, dq_head, dq_frame, ALIGNED)
    dk = _operand(dk, position, inner, dk_outer, dk_inner, dk_head, dk_frame, ALIGNED)
    dv = _operand(dv, position, inner, dv_outer, dv_inner, dv_head, dv_frame, ALIGNED)
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, 2 * ROWS)[None, :]
    begin = stretch * stretch_tiles
    end = tl.minimum((stretch + 1) * stretch_tiles, (length + FRAMES - 1) // FRAMES)
    old_k = _load(k, row, (begin - 1) * FRAMES, clip, HEAD_DIM, COLUMNS, ALIGNED, PARTS, FRAMES)
    old_v = _load(v, row, (begin - 1) * FRAMES, clip, HEAD_DIM, COLUMNS, ALIGNED, PARTS, FRAMES)
    old_dk = tl.zeros((ROWS, COLUMNS), tl.float32)
    old_dv = old_dk
    for tile in tl.range(begin - 1, end, num_stages=1):
        first = tile * FRAMES
        new_k = _load(k, row, first + FRAMES, clip, HEAD_DIM, COLUMNS, ALIGNED, PARTS, FRAMES)
        b_q = _load(q, row, first + back, clip, HEAD_DIM, COLUMNS, ALIGNED, PARTS, FRAMES)
        count = _multiplicity(
            row, column, first, back, clip, kernel_size, before, shift, key_counts,
            FRAMES, TABLE_HEADS,
        )  # [ROWS, 2 ROWS]  # fmt: skip
        meets = count > 0
        old_meets, new_meets = _apart(meets)
        b_k = _paired(old_k, new_k)  # [2 ROWS, COLUMNS]
        products = matmul(b_q, tl.trans(b_k))
        weights, absent, total = softmax_weights(products, count, kernel_size, zeros, scale)
        new_v = _load(v, row, first + FRAMES, clip, HEAD_DIM, COLUMNS, ALIGNED, PARTS, FRAMES)
        b_do = _load(do, row, first + back, clip, HEAD_DIM, COLUMNS, ALIGNED, PARTS, FRAMES)
        dp = matmul(b_do, tl.trans(_paired(old_v, new_v)))
        dp = tl.where(meets, dp, 0.0)  # [ROWS, 2 ROWS]
        p, ds = logit_gradients(weights, absent, total, dp, meets, scale)
        old_ds, new_ds = _apart(ds)
        old_dk += weighted_sum(tl.trans(old_ds), b_q, tl.trans(old_meets), PARTS)
        _store(dk, old_dk, tile >= begin, row, first, clip, HEAD_DIM, COLUMNS, ALIGNED, FRAMES)
        old_dk = weighted_sum(tl.trans(new_ds), b_q, tl.trans(new_meets), PARTS)
        old_p, new_p = _apart(p)
        old_dv += weighted_sum(tl.trans(old_p), b_do, tl.trans(old_meets), PARTS)
        _store(dv, old_dv, tile >= begin, row, first, clip, HEAD_DIM, COLUMNS, ALIGNED, FRAMES)
        old_dv = weighted_sum(tl.trans(new_p), b_do, tl.trans(new_meets), PARTS)
        b_dq = weighted_sum(ds, b_k, meets, PARTS)
        _store(
            dq, b_dq, (tile >= begin) | (stretch == 0), row, first + back, clip,
            HEAD_DIM, COLUMNS, ALIGNED, FRAMES,
        )  # fmt: skip
        old_k, old_v = new_k, new_v
