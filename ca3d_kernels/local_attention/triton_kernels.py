"""Triton kernels of local temporal attention, and what the kernels of other ops share with them.

A program holds a tile of rows of head_dim elements: all frames of some sequences. A sequence is
one head of one position. Every operand is read once, in vectors along head_dim. The window is then
not a loop over slots but a matrix over pairs of rows (`multiplicity`): how often the query in one
row meets the key in another. It holds every option of the op (edge, dilation, causal, key table),
all of them run-time data, and is 0 between sequences. The products with it cost little: tensor
cores do them, and the kernel waits for memory.

Sums over keys must keep the float32 precision of their weights, but tensor cores take half
precision: `weighted_sum` splits the weights into parts. A tile of 64 rows takes its queries, and
the sums for its keys, in two parts: no product has 64 rows, and Triton multiplies with ``mma.sync``
on every GPU.

Clips that are longer than a tile have kernels of their own: `triton_rolling_kernels`.
"""

import triton
import triton.language as tl

from ca3d_kernels.triton_numbers import infinity, is_negative, magnitude

# Arguments whose values Triton would otherwise compile anew for: ALIGNED says what matters of them.
RUN_TIME = [
    "sequences", "heads", "inner", "frames", "kernel_size", "dilation", "before", "shift", "zeros",
    "scale",
]  # fmt: skip
RUN_TIME += [
    f"{operand}_{dim}"
    for operand in ("q", "k", "v", "o", "do", "dq", "dk", "dv")
    for dim in ("outer", "inner", "head", "frame")
]


@triton.jit
def matmul(a, b):
    """a @ b in float32: (M, K) and (K, N), or as many of them as the first dimension says."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def weighted_sum(weights, x, meets, PARTS: tl.constexpr):
    """weights @ x, with float32 weights (M, K) and x (K, N) of any dtype.

    Each row of weights is scaled to at most 1 and split into PARTS numbers of x's dtype, whose
    products with x are exact: 2 keep 22 bits in float16, 3 keep 24 in bfloat16. A row of x that
    isn't finite reaches only the rows that it `meets`, and these even with a weight that has become
    0: products with 0 would spread it over the tile.
    """
    finite = magnitude(x) < infinity(x.dtype)
    clean = tl.where(finite, x, 0.0)  # [K, N]
    if PARTS == 1:
        total = matmul(weights, clean)
    else:
        unit = tl.maximum(tl.max(tl.abs(weights), -1), 1e-30).expand_dims(-1)
        rest = weights / unit  # [M, K]
        part = rest.to(x.dtype)
        total = matmul(part, clean)  # [M, N]
        for _ in tl.static_range(PARTS - 1):
            rest -= part.to(tl.float32)
            part = rest.to(x.dtype)
            total += matmul(part, clean)
        total *= unit
    if tl.min(finite.to(tl.float32)) == 0:
        # NaN counts as both infinities, whose sum is NaN.
        nan = magnitude(x) > infinity(x.dtype)
        negative = is_negative(x)
        high = matmul(meets.to(x.dtype), (~finite & (nan | ~negative)).to(x.dtype))
        low = matmul(meets.to(x.dtype), (~finite & (nan | negative)).to(x.dtype))
        total += tl.where(high > 0, float("inf"), 0.0) - tl.where(low > 0, float("inf"), 0.0)
    return total


@triton.jit
def tile_rows(
    row, tile, sequences, heads, frames, blocks,
    ROWS: tl.constexpr, FRAMES: tl.constexpr, OWNED: tl.constexpr, FRONT: tl.constexpr,
    TABLE_HEADS: tl.constexpr,
):  # fmt: skip
    """Position, head and frame of rows of a tile, and whether they exist.

    Row i is frame ``i % FRAMES``, counted from the halo, of the tile's sequence ``i // FRAMES``.
    With a key table all heads of a position are in one tile, TABLE_HEADS sequences for each.
    """
    group, block = tile // blocks, tile % blocks
    place = row // FRAMES
    frame = block * OWNED - FRONT + row % FRAMES
    exists = (frame >= 0) & (frame < frames)
    if TABLE_HEADS > 0:
        head = place % TABLE_HEADS
        position = group * (ROWS // FRAMES // TABLE_HEADS) + place // TABLE_HEADS
        exists &= (head < heads) & (position < sequences // heads)
    else:
        sequence = group * (ROWS // FRAMES) + place
        head = sequence % heads
        position = sequence // heads
        exists &= sequence < sequences
    return position, head, frame, exists


@triton.jit
def slots(
    t, s, head, key_head, meets, length, heads, kernel_size, before, shift, key_counts,
    TABLE_HEADS: tl.constexpr,
):  # fmt: skip
    """In how many slots the query of frame t meets the key of frame s, where `meets`.

    Frames are numbered within their dilation class of that length.
    """
    if TABLE_HEADS > 0:
        slot = s - t + before
        meets &= (slot >= 0) & (slot < kernel_size)
        entry = (head * heads + key_head) * kernel_size + slot
        return tl.load(key_counts + entry, mask=meets, other=0).to(tl.float32)
    start = t - before
    if shift:
        start = tl.minimum(tl.maximum(start, 0), tl.maximum(length - kernel_size, 0))
    slot = s - start
    return (meets & (slot >= 0) & (slot < kernel_size)).to(tl.float32)


@triton.jit
def multiplicity(
    row, column, tile, sequences, heads, frames, blocks, kernel_size, dilation, before, shift,
    key_counts,
    ROWS: tl.constexpr, FRAMES: tl.constexpr, OWNED: tl.constexpr, FRONT: tl.constexpr,
    TABLE_HEADS: tl.constexpr,
):  # fmt: skip
    """(rows, columns): in how many slots the query of a row meets the key of a column."""
    position, head, t, queries = tile_rows(
        row, tile, sequences, heads, frames, blocks, ROWS, FRAMES, OWNED, FRONT, TABLE_HEADS
    )
    key_position, key_head, s, keys = tile_rows(
        column, tile, sequences, heads, frames, blocks, ROWS, FRAMES, OWNED, FRONT, TABLE_HEADS
    )
    meets = queries & keys & (position == key_position)  # [ROWS, ROWS]
    if TABLE_HEADS == 0:
        meets &= (head == key_head) & (t % dilation == s % dilation)
    # Frames of one dilation class are numbered 0, 1, ...: t is frame t // dilation of its class.
    length = (frames - t % dilation + dilation - 1) // dilation
    return slots(
        t // dilation, s // dilation, head, key_head, meets, length, heads, kernel_size, before,
        shift, key_counts, TABLE_HEADS,
    )  # fmt: skip


@triton.jit
def halves(x):
    """The left and the right half of the columns of x (ROWS, N), transposed: (N / 2, ROWS)."""
    apart = x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(2, 0, 1)
    return apart.split()


@triton.jit
def _gather(upper, lower, weights, x, count, PARTS: tl.constexpr):
    """Adds weights^T @ x to the sums of the upper and of the lower half of the keys.

    A tile of 32 rows has no lower half.
    """
    if weights.shape[1] == upper.shape[0]:
        upper += weighted_sum(tl.trans(weights), x, tl.trans(count > 0), PARTS)
    else:
        left, right = halves(weights)
        left_count, right_count = halves(count)
        upper += weighted_sum(left, x, left_count > 0, PARTS)
        lower += weighted_sum(right, x, right_count > 0, PARTS)
    return upper, lower


@triton.jit
def offsets(position, head, frame, inner, outer_stride, inner_stride, head_stride, frame_stride,
             ALIGNED: tl.constexpr):  # fmt: skip
    """Where rows of an operand start, in elements; strides are multiples of ALIGNED."""
    offset = (position // inner) * outer_stride + (position % inner) * inner_stride
    offset += head * head_stride + frame * frame_stride
    return tl.multiple_of(offset, [ALIGNED, ALIGNED])


@triton.jit
def softmax_weights(products, count, kernel_size, zeros, scale):
    """exp(logit - largest) times count, shaped like it; the same of the slots that have no key, and
    the sum of both, without the last dimension. Products are those of queries with keys."""
    logits = tl.where(count > 0, scale * products, float("-inf"))
    # Slots without a key take part with logit 0 if zeros is 1, and don't if it is 0.
    absent = zeros * (kernel_size - tl.sum(count, -1))
    largest = tl.max(logits, -1)
    largest = tl.where((absent > 0) & (largest < 0), 0.0, largest)
    # A row that doesn't exist has no key.
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    weights = count * tl.exp(logits - largest.expand_dims(-1))
    # Where slots have no key, largest is at least 0; elsewhere exp(-largest) may be infinite.
    absent *= tl.exp(-tl.maximum(largest, 0.0))
    total = tl.sum(weights, -1) + absent
    # One that has keys but no weight, all its logits being -inf, is NaN, as it is everywhere else.
    return weights, absent, tl.where((total == 0) & (tl.sum(count, -1) == 0), 1.0, total)


@triton.jit
def logit_gradients(weights, absent, total, dp, meets, scale):
    """p, and the gradients of the logits times scale, from those of p; all of one shape."""
    # A query that isn't finite must not reach the keys that it doesn't meet.
    p = tl.where(meets, weights / total.expand_dims(-1), 0.0)
    # The mean is subtracted twice: where one key takes nearly all the weight, its difference from
    # the mean is smaller than the mean's rounding error. Slots without a key have dp = 0.
    mean = tl.sum(weights * dp, -1) / total
    dp -= mean.expand_dims(-1)
    mean = (tl.sum(weights * dp, -1) - absent * mean) / total
    return p, tl.where(meets, scale * p * (dp - mean.expand_dims(-1)), 0.0)


@triton.jit(do_not_specialize=RUN_TIME)
def attention_forward(
    q, k, v, o, key_counts,
    q_outer: tl.int64, q_inner: tl.int64, q_head: tl.int64, q_frame: tl.int64,
    k_outer: tl.int64, k_inner: tl.int64, k_head: tl.int64, k_frame: tl.int64,
    v_outer: tl.int64, v_inner: tl.int64, v_head: tl.int64, v_frame: tl.int64,
    o_outer: tl.int64, o_inner: tl.int64, o_head: tl.int64, o_frame: tl.int64,
    sequences: tl.int32, heads: tl.int32, inner: tl.int32, frames: tl.int32, kernel_size: tl.int32,
    dilation: tl.int32, before: tl.int32, shift: tl.int32, zeros: tl.float32, scale: tl.float32,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, QUERIES: tl.constexpr, FRAMES: tl.constexpr, TABLE_HEADS: tl.constexpr,
):  # fmt: skip
    """o = softmax(scale q k^T) v over the window of each frame."""
    tile = tl.program_id(0)
    row_k = tl.arange(0, ROWS)[:, None]
    i = tl.arange(0, COLUMNS)[None, :]  # element of a row
    position_k, head_k, frame_k, exists_k = tile_rows(
        row_k, tile, sequences, heads, frames, 1, ROWS, FRAMES, FRAMES, 0, TABLE_HEADS
    )
    inside_k = exists_k & (i < HEAD_DIM)  # [ROWS, COLUMNS]
    at_k = offsets(position_k, head_k, frame_k, inner, k_outer, k_inner, k_head, k_frame, ALIGNED)
    b_k = tl.load(k + at_k + i, mask=inside_k, other=0)  # [ROWS, COLUMNS]
    at_v = offsets(position_k, head_k, frame_k, inner, v_outer, v_inner, v_head, v_frame, ALIGNED)
    b_v = tl.load(v + at_v + i, mask=inside_k, other=0)  # [ROWS, COLUMNS]
    if PARTS == 1:
        b_k, b_v = b_k.to(tl.float32), b_v.to(tl.float32)
    column = tl.arange(0, ROWS)[None, :]
    for first in tl.range(0, ROWS, QUERIES, num_stages=1):
        row = first + tl.arange(0, QUERIES)[:, None]
        position, head, frame, exists = tile_rows(
            row, tile, sequences, heads, frames, 1, ROWS, FRAMES, FRAMES, 0, TABLE_HEADS
        )
        exists &= i < HEAD_DIM  # [QUERIES, COLUMNS]
        at = offsets(position, head, frame, inner, q_outer, q_inner, q_head, q_frame, ALIGNED)
        b_q = tl.load(q + at + i, mask=exists, other=0)  # [QUERIES, COLUMNS]
        if PARTS == 1:
            b_q = b_q.to(tl.float32)
        count = multiplicity(
            row, column, tile, sequences, heads, frames, 1, kernel_size, dilation, before, shift,
            key_counts, ROWS, FRAMES, FRAMES, 0, TABLE_HEADS,
        )  # [QUERIES, ROWS]  # fmt: skip
        products = matmul(b_q, tl.trans(b_k))
        weights, _, total = softmax_weights(products, count, kernel_size, zeros, scale)
        b_o = weighted_sum(weights, b_v, count > 0, PARTS) / total[:, None]
        at = offsets(position, head, frame, inner, o_outer, o_inner, o_head, o_frame, ALIGNED)
        tl.store(o + at + i, b_o.to(o.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=RUN_TIME)
def attention_backward(
    q, k, v, do, dq, dk, dv, key_counts,
    q_outer: tl.int64, q_inner: tl.int64, q_head: tl.int64, q_frame: tl.int64,
    k_outer: tl.int64, k_inner: tl.int64, k_head: tl.int64, k_frame: tl.int64,
    v_outer: tl.int64, v_inner: tl.int64, v_head: tl.int64, v_frame: tl.int64,
    do_outer: tl.int64, do_inner: tl.int64, do_head: tl.int64, do_frame: tl.int64,
    dq_outer: tl.int64, dq_inner: tl.int64, dq_head: tl.int64, dq_frame: tl.int64,
    dk_outer: tl.int64, dk_inner: tl.int64, dk_head: tl.int64, dk_frame: tl.int64,
    dv_outer: tl.int64, dv_inner: tl.int64, dv_head: tl.int64, dv_frame: tl.int64,
    sequences: tl.int32, heads: tl.int32, inner: tl.int32, frames: tl.int32, kernel_size: tl.int32,
    dilation: tl.int32, before: tl.int32, shift: tl.int32, zeros: tl.float32, scale: tl.float32,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, QUERIES: tl.constexpr, FRAMES: tl.constexpr, TABLE_HEADS: tl.constexpr,
):  # fmt: skip
    """Gradients of `attention_forward`; the probabilities are computed again.

    Every row gathers its own dq, dk and dv from the tile: no atomics, the same bits every time.
    """
    tile = tl.program_id(0)
    row_k = tl.arange(0, ROWS)[:, None]
    i = tl.arange(0, COLUMNS)[None, :]  # element of a row
    position_k, head_k, frame_k, exists_k = tile_rows(
        row_k, tile, sequences, heads, frames, 1, ROWS, FRAMES, FRAMES, 0, TABLE_HEADS
    )
    inside_k = exists_k & (i < HEAD_DIM)  # [ROWS, COLUMNS]
    at_k = offsets(position_k, head_k, frame_k, inner, k_outer, k_inner, k_head, k_frame, ALIGNED)
    b_k = tl.load(k + at_k + i, mask=inside_k, other=0)  # [ROWS, COLUMNS]
    at_v = offsets(position_k, head_k, frame_k, inner, v_outer, v_inner, v_head, v_frame, ALIGNED)
    b_v = tl.load(v + at_v + i, mask=inside_k, other=0)  # [ROWS, COLUMNS]
    if PARTS == 1:
        b_k, b_v = b_k.to(tl.float32), b_v.to(tl.float32)
    column = tl.arange(0, ROWS)[None, :]
    dk_0 = tl.zeros((QUERIES, COLUMNS), tl.float32)
    dk_1, dv_0, dv_1 = dk_0, dk_0, dk_0
    for first in tl.range(0, ROWS, QUERIES, num_stages=1):
        row = first + tl.arange(0, QUERIES)[:, None]
        position, head, frame, exists = tile_rows(
            row, tile, sequences, heads, frames, 1, ROWS, FRAMES, FRAMES, 0, TABLE_HEADS
        )
        exists &= i < HEAD_DIM  # [QUERIES, COLUMNS]
        at = offsets(position, head, frame, inner, q_outer, q_inner, q_head, q_frame, ALIGNED)
        b_q = tl.load(q + at + i, mask=exists, other=0)  # [QUERIES, COLUMNS]
        at = offsets(position, head, frame, inner, do_outer, do_inner, do_head, do_frame, ALIGNED)
        b_do = tl.load(do + at + i, mask=exists, other=0)  # [QUERIES, COLUMNS]
        if PARTS == 1:
            b_q, b_do = b_q.to(tl.float32), b_do.to(tl.float32)
        count = multiplicity(
            row, column, tile, sequences, heads, frames, 1, kernel_size, dilation, before, shift,
            key_counts, ROWS, FRAMES, FRAMES, 0, TABLE_HEADS,
        )  # [QUERIES, ROWS]  # fmt: skip
        meets = count > 0
        products = matmul(b_q, tl.trans(b_k))
        weights, absent, total = softmax_weights(products, count, kernel_size, zeros, scale)
        dp = tl.where(meets, matmul(b_do, tl.trans(b_v)), 0.0)  # [QUERIES, ROWS]
        p, ds = logit_gradients(weights, absent, total, dp, meets, scale)
        dv_0, dv_1 = _gather(dv_0, dv_1, p, b_do, count, PARTS)
        b_dq = weighted_sum(ds, b_k, meets, PARTS)
        at = offsets(position, head, frame, inner, dq_outer, dq_inner, dq_head, dq_frame, ALIGNED)
        tl.store(dq + at + i, b_dq.to(dq.dtype.element_ty), mask=exists)
        dk_0, dk_1 = _gather(dk_0, dk_1, ds, b_q, count, PARTS)
    for half in tl.static_range(ROWS // QUERIES):
        row = half * QUERIES + tl.arange(0, QUERIES)[:, None]
        position, head, frame, exists = tile_rows(
            row, tile, sequences, heads, frames, 1, ROWS, FRAMES, FRAMES, 0, TABLE_HEADS
        )
        exists &= i < HEAD_DIM
        b_dv, b_dk = (dv_0, dk_0) if half == 0 else (dv_1, dk_1)
        at = offsets(position, head, frame, inner, dv_outer, dv_inner, dv_head, dv_frame, ALIGNED)
        tl.store(dv + at + i, b_dv.to(dv.dtype.element_ty), mask=exists)
        at = offsets(position, head, frame, inner, dk_outer, dk_inner, dk_head, dk_frame, ALIGNED)
        tl.store(dk + at + i, b_dk.to(dk.dtype.element_ty), mask=exists)
