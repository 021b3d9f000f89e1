"""Triton kernels of the pre-parameter SGD step.

A program steps one chunk: a stretch of one tensor. A table in device memory holds the addresses of
each chunk's w, gradient, theta, momentum and compensation, its number of elements, and where in
which tensor it begins, so that one launch serves all tensors. Chunks move in 16-byte vectors up to
a multiple of 16 elements, the rest one by one.

The arithmetic is that of `reference.stepped`, bit for bit: every operation rounds once (the launch
forbids fused multiply-adds), theta is rounded to its storage before w is computed from it.
`ROUNDING` is "nearest", "stochastic" or "compensated", or "bound" in the search for overflows: that
is "stochastic" with the largest number drawn everywhere, which bounds what any draw would store.

A step may leave the largest magnitudes that it stored of each chunk. The next search then reads
only the gradients of a chunk from which nothing so large can overflow.
"""

import triton
import triton.language as tl

from ca3d_kernels.triton_numbers import infinity, largest_finite, magnitude

# Elements that are moved one by one at the end of a chunk are fewer than these.
_STEP = tl.constexpr(16)
# Columns of the table of chunks, and those of them that aren't addresses of w, gradient, theta and
# momentum.
COLUMNS = tl.constexpr(8)
_COUNT, _COMPENSATION = tl.constexpr(4), tl.constexpr(5)
_FIRST, _NUMBER = tl.constexpr(6), tl.constexpr(7)


@triton.jit
def _read_once(numbers, COUNT: tl.constexpr, WIDTH: tl.constexpr, THREADS: tl.constexpr):
    """(WIDTH,): COUNT numbers from memory, and zeros behind them, known to all threads.

    One thread reads each. A scalar `tl.load` is one of every thread: 256 of them would ask for two
    kilobytes to learn eight bytes.
    """
    i = tl.arange(0, THREADS)
    x = tl.load(numbers + i, mask=i < COUNT, other=0)
    return tl.sum(tl.reshape(x, (THREADS // WIDTH, WIDTH)), 0)


@triton.jit
def _entry(numbers, i: tl.constexpr):
    """Entry i of `_read_once`'s numbers, as a scalar."""
    return tl.sum(tl.where(tl.arange(0, numbers.shape[0]) == i, numbers, 0), 0)


@triton.jit
def _row(chunks, THREADS: tl.constexpr):
    """This program's row of the table of chunks."""
    first = chunks + tl.program_id(0).to(tl.int64) * COLUMNS
    return _read_once(first, COLUMNS, COLUMNS, THREADS)


@triton.jit
def _address(row, field: tl.constexpr, kind: tl.constexpr, ALIGNED: tl.constexpr):
    """Address in column `field` of a row, as a pointer to elements of a type."""
    return tl.multiple_of(_entry(row, field).to(tl.pointer_type(kind)), ALIGNED)


@triton.jit
def _hyperparameters(hyper, REAL: tl.constexpr, THREADS: tl.constexpr):
    """lr, momentum, 1 - dampening, weight decay, c and k."""
    x = _read_once(hyper, 6, 8, THREADS).to(REAL)
    return _entry(x, 0), _entry(x, 1), _entry(x, 2), _entry(x, 3), _entry(x, 4), _entry(x, 5)


@triton.jit
def _elements(CHUNK: tl.constexpr, PARAM: tl.constexpr, PRE_PARAM: tl.constexpr):
    """0 .. CHUNK - 1, of which a thread takes 16 bytes of theta at a time.

    Left to itself the compiler takes 16 bytes of w: of a wider theta each access would then reach
    half of every sector.
    """
    i = tl.arange(0, CHUNK)
    if PARAM != PRE_PARAM:
        i = tl.max_contiguous(i, 4)
    return i


@triton.jit
def _words(row, random, at, COUNT: tl.constexpr):
    """Random words of the elements `at` .. `at` + COUNT - 1 of a row's chunk.

    Theta takes the low half of a word, the momentum the high one; see `philox.Draws`. COUNT is a
    multiple of 32, or 16; `at` is a multiple of 16, and of 32 if COUNT is.
    """
    place = _entry(row, _FIRST) + at
    HALVES: tl.constexpr = 2 if COUNT > 16 else 1  # of a group of 32 elements
    GROUPS: tl.constexpr = COUNT // (16 * HALVES)
    block = (place // 32) * 4 + tl.arange(0, 4 * GROUPS)
    zero = tl.zeros_like(block).to(tl.uint32)
    number = zero + _entry(row, _NUMBER).to(tl.uint32)
    step = zero + _entry(random, 1).to(tl.uint32)
    low, high = (block & 0xFFFFFFFF).to(tl.uint32), (block >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(_entry(random, 0), low, high, number, step)
    shared = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (GROUPS, 16))
    swapped = (shared << 16) | (shared >> 16)
    if HALVES == 2:
        words = tl.permute(tl.join(shared, swapped), (0, 2, 1))
    else:
        words = tl.where(place % 32 < 16, shared, swapped)
    return tl.reshape(words, (COUNT,))


@triton.jit
def _stochastic(x, kind: tl.constexpr, random):
    """float32 rounded to one of the two neighbours in float16 or bfloat16.

    `random` are 16 bits; see `stochastic.round_stochastically`.
    """
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    if kind == tl.float16:
        # Adding 2^-14 puts the last bit of a subnormal result where that of a normal one is.
        lifted = (magnitude.to(tl.float32, bitcast=True) + 6.103515625e-05).to(
            tl.int32, bitcast=True
        ) - (1 << 23)
        kept = tl.where(magnitude < (113 << 23), lifted, magnitude)
        rounded = ((kept + (random >> 3)) >> 13) - (112 << 10)
        rounded = tl.minimum(rounded, 0x7BFF)
        beyond = magnitude >= 0x477FF000  # 65520
    else:
        rounded = tl.minimum((magnitude + random) >> 16, 0x7F7F)
        beyond = magnitude >= 0x7F7F8000
    rounded |= (bits >> 16) & 0x8000
    nearest = x.to(kind).to(tl.int16, bitcast=True)
    return tl.where(beyond, nearest, rounded.to(tl.int16)).to(kind, bitcast=True)


@triton.jit
def _rounded(x, kind: tl.constexpr, ROUNDING: tl.constexpr, random):
    """A computed value as it is stored: the one place that decides how values are rounded."""
    if ROUNDING == "stochastic" or ROUNDING == "bound":
        rounded = _stochastic(x, kind, random)
    else:
        rounded = x.to(kind)
    return rounded


@triton.jit
def _stepped(
    w, g, theta, m, r, words, i, inside, hyper,
    PARAM: tl.constexpr, PRE_PARAM: tl.constexpr, REAL: tl.constexpr,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, ROUNDING: tl.constexpr,
):  # fmt: skip
    """New w, theta, m and r of elements i, as they are stored; one that isn't stored is theta."""
    lr, momentum, fresh, weight_decay, scale, gradient_scale = hyper
    b_g = tl.load(g + i, mask=inside, other=0).to(REAL)
    b_theta = tl.load(theta + i, mask=inside, other=0).to(REAL)
    total = b_theta
    if ROUNDING == "compensated":
        b_r = tl.load(r + i, mask=inside, other=0).to(REAL)
        total = b_theta + b_r
    d = b_g * gradient_scale + total * weight_decay
    update = d
    if MOMENTUM:
        b_m = tl.load(m + i, mask=inside, other=0).to(REAL)
        b_m = b_m * momentum + d * fresh
        update = d + b_m * momentum if NESTEROV else b_m
    low = words
    high = words
    if ROUNDING == "stochastic":
        low = (words & 0xFFFF).to(tl.int32)
        high = (words >> 16).to(tl.int32)
    if ROUNDING == "compensated":
        change = b_r - update * lr
        new_theta = (b_theta + change).to(PRE_PARAM)
        new_r = (change - (new_theta.to(REAL) - b_theta)).to(PRE_PARAM)
    else:
        new_theta = _rounded(b_theta - update * lr, PRE_PARAM, ROUNDING, low)
        new_r = new_theta
    new_m = _rounded(b_m, PRE_PARAM, ROUNDING, high) if MOMENTUM else new_theta
    if REAL == tl.float64:  # noqa: SIM300
        new_w = (new_theta.to(REAL) / scale).to(PARAM)
    else:
        new_w = tl.math.div_rn(new_theta.to(REAL), tl.zeros_like(b_theta) + scale).to(PARAM)
    return new_w, new_theta, new_m, new_r


@triton.jit
def _step_elements(
    w, g, theta, m, r, words, i, inside, hyper,
    PARAM: tl.constexpr, PRE_PARAM: tl.constexpr, REAL: tl.constexpr,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, ROUNDING: tl.constexpr,
):  # fmt: skip
    """Steps elements i; returns the largest magnitudes of theta and m as they are stored."""
    new_w, new_theta, new_m, new_r = _stepped(
        w, g, theta, m, r, words, i, inside, hyper,
        PARAM, PRE_PARAM, REAL, MOMENTUM, NESTEROV, ROUNDING,
    )  # fmt: skip
    if i.shape[0] == _STEP:
        # Every warp holds these few elements: none may read them after another has written.
        tl.debug_barrier()
    tl.store(w + i, new_w, mask=inside)
    tl.store(theta + i, new_theta, mask=inside)
    if MOMENTUM:
        tl.store(m + i, new_m, mask=inside)
    if ROUNDING == "compensated":
        tl.store(r + i, new_r, mask=inside)
    return _largest_magnitude(new_theta, REAL), _largest_magnitude(new_m, REAL)


@triton.jit
def _largest_magnitude(x, REAL: tl.constexpr):
    """The largest |x|; infinity if one is NaN."""
    size = tl.abs(x.to(REAL))
    return tl.max(tl.where(size < float("inf"), size, float("inf")), 0)


@triton.jit
def _gradients_suffice(
    largest, g, i, bulk, count, hyper,
    PARAM: tl.constexpr, PRE_PARAM: tl.constexpr, REAL: tl.constexpr,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Whether the gradients, and the magnitudes that the last step left of this program's chunk,
    tell that nothing can overflow, on the way or at the end.

    Every term of these sums is a magnitude, and the factor covers their rounding. If one isn't
    finite, a comparison fails.
    """
    most = _largest_magnitude(tl.load(g + i, mask=i < bulk, other=0), REAL)
    if bulk < count:
        last = bulk + tl.arange(0, _STEP)
        most = tl.maximum(
            most, _largest_magnitude(tl.load(g + last, mask=last < count, other=0), REAL)
        )
    lr, momentum, fresh, weight_decay, scale, gradient_scale = hyper
    known = _read_once(largest + 2 * tl.program_id(0).to(tl.int64), 2, 2, THREADS)
    # A compensation is at most half an ulp of theta: 2^-8 of it in bfloat16.
    theta = _entry(known, 0) * (1 + 1 / 256)
    d = most * tl.abs(gradient_scale) + theta * tl.abs(weight_decay)
    m = d
    if MOMENTUM:
        m = _entry(known, 1) * tl.abs(momentum) + d * tl.abs(fresh)
    update = d + m * tl.abs(momentum) if NESTEROV else m
    stepped = (theta + update * tl.abs(lr)) * 1.01
    return (
        (update * 1.01 < float("inf"))
        & (m * 1.01 < largest_finite(PRE_PARAM).to(REAL))
        & (stepped < largest_finite(PRE_PARAM).to(REAL))
        & (stepped < largest_finite(PARAM).to(REAL) * tl.abs(scale))
    )


@triton.jit
def _not_finite(
    w, g, theta, m, r, i, inside, hyper,
    PARAM: tl.constexpr, PRE_PARAM: tl.constexpr, REAL: tl.constexpr,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, ROUNDING: tl.constexpr,
):  # fmt: skip
    """Whether a step would store a value that isn't finite; a bad gradient makes theta so."""
    new_w, new_theta, new_m, _ = _stepped(
        w, g, theta, m, r, 0xFFFF, i, inside, hyper,
        PARAM, PRE_PARAM, REAL, MOMENTUM, NESTEROV, ROUNDING,
    )  # fmt: skip
    finite = magnitude(new_w) < infinity(PARAM)
    finite &= magnitude(new_theta) < infinity(PRE_PARAM)
    finite &= magnitude(new_m) < infinity(PRE_PARAM)
    return tl.max((inside & ~finite).to(tl.float32), 0)


@triton.jit
def preparam_sgd_step(
    chunks, hyper, random, found_inf, largest,
    CHUNK: tl.constexpr, ALIGNED: tl.constexpr, THREADS: tl.constexpr,
    PARAM: tl.constexpr, PRE_PARAM: tl.constexpr, REAL: tl.constexpr,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, ROUNDING: tl.constexpr,
    PREDICATED: tl.constexpr,
):  # fmt: skip
    """Writes the new theta, momentum and w of a chunk, unless PREDICATED and found_inf isn't 0.

    Leaves the largest magnitudes of theta and momentum in `largest`, two for each chunk, or None.
    """
    # Two conditions: the compiler must not look at found_inf otherwise.
    if PREDICATED:  # noqa: SIM102
        if tl.load(found_inf) != 0:
            return
    row = _row(chunks, THREADS)
    w = _address(row, 0, PARAM, ALIGNED)
    g = _address(row, 1, PARAM, ALIGNED)
    theta = _address(row, 2, PRE_PARAM, ALIGNED)
    m = _address(row, 3, PRE_PARAM, ALIGNED)
    r = _address(row, _COMPENSATION, PRE_PARAM, ALIGNED)
    count = _entry(row, _COUNT).to(tl.int32)
    hyper = _hyperparameters(hyper, REAL, THREADS)
    bulk = count // _STEP * _STEP
    i = _elements(CHUNK, PARAM, PRE_PARAM)
    if ROUNDING == "stochastic":
        random = _read_once(random, 2, 2, THREADS)
    words = _words(row, random, 0, CHUNK) if ROUNDING == "stochastic" else 0
    most_theta, most_m = _step_elements(
        w, g, theta, m, r, words, i, i < bulk, hyper,
        PARAM, PRE_PARAM, REAL, MOMENTUM, NESTEROV, ROUNDING,
    )  # fmt: skip
    if bulk < count:
        last = bulk + tl.arange(0, _STEP)
        last_words = _words(row, random, bulk, _STEP) if ROUNDING == "stochastic" else 0
        last_theta, last_m = _step_elements(
            w, g, theta, m, r, last_words, last, last < count, hyper,
            PARAM, PRE_PARAM, REAL, MOMENTUM, NESTEROV, ROUNDING,
        )  # fmt: skip
        most_theta = tl.maximum(most_theta, last_theta)
        most_m = tl.maximum(most_m, last_m)
    if largest is not None:
        largest += 2 * tl.program_id(0).to(tl.int64)
        tl.store(largest, most_theta)
        tl.store(largest + 1, most_m)


@triton.jit
def preparam_sgd_overflows(
    chunks, hyper, found_inf, largest,
    CHUNK: tl.constexpr, ALIGNED: tl.constexpr, THREADS: tl.constexpr,
    PARAM: tl.constexpr, PRE_PARAM: tl.constexpr, REAL: tl.constexpr,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, ROUNDING: tl.constexpr,
):  # fmt: skip
    """Sets found_inf to 1 if stepping a chunk would store a value that isn't finite.

    `largest` is what the last step left there: true, or NaN. None if nothing is known.
    """
    row = _row(chunks, THREADS)
    g = _address(row, 1, PARAM, ALIGNED)
    count = _entry(row, _COUNT).to(tl.int32)
    hyper = _hyperparameters(hyper, REAL, THREADS)
    bulk = count // _STEP * _STEP
    i = _elements(CHUNK, PARAM, PRE_PARAM)
    if largest is not None:  # noqa: SIM102
        if _gradients_suffice(
            largest, g, i, bulk, count, hyper, PARAM, PRE_PARAM, REAL, MOMENTUM, NESTEROV, THREADS
        ):
            return
    theta = _address(row, 2, PRE_PARAM, ALIGNED)
    m = _address(row, 3, PRE_PARAM, ALIGNED)
    r = _address(row, _COMPENSATION, PRE_PARAM, ALIGNED)
    found = _not_finite(
        g, g, theta, m, r, i, i < bulk, hyper,
        PARAM, PRE_PARAM, REAL, MOMENTUM, NESTEROV, ROUNDING,
    )  # fmt: skip
    if bulk < count:
        last = bulk + tl.arange(0, _STEP)
        found += _not_finite(
            g, g, theta, m, r, last, last < count, hyper,
            PARAM, PRE_PARAM, REAL, MOMENTUM, NESTEROV, ROUNDING,
        )  # fmt: skip
    if found > 0:
        # The bits of 1.0: only integers have an atomic "or".
        tl.atomic_or(found_inf, 0x3F800000)
