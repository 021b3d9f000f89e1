"""Triton kernels of the pre-parameter SGD step.

A program steps one chunk: a stretch of one tensor. A table in device memory holds the addresses of
each chunk's w, gradient, theta and momentum and its number of elements, so that one launch serves
all tensors. Chunks move in 16-byte vectors up to a multiple of 16 elements, the rest one by one.

The arithmetic is that of `reference.stepped`, bit for bit: every operation rounds once (the launch
forbids fused multiply-adds), theta is rounded to its storage before w is computed from it.
"""

import triton
import triton.language as tl

from ca3d_kernels.triton_numbers import infinity, magnitude

# Elements that are moved one by one at the end of a chunk are fewer than these.
_STEP = tl.constexpr(16)


@triton.jit
def _address(table, field: tl.constexpr, kind: tl.constexpr, ALIGNED: tl.constexpr):
    """Address in column `field` of this program's row, as a pointer to elements of a type."""
    row = table + tl.program_id(0).to(tl.int64) * 5
    return tl.multiple_of(tl.load(row + field).to(tl.pointer_type(kind)), ALIGNED)


@triton.jit
def _rounded(x, kind: tl.constexpr, ROUNDING: tl.constexpr):
    """A computed value as it is stored: the one place that decides how values are rounded."""
    tl.static_assert(ROUNDING == "nearest")
    return x.to(kind)


@triton.jit
def _stepped(
    w, g, theta, m, i, inside, hyper,
    PARAM: tl.constexpr, PRE_PARAM: tl.constexpr, REAL: tl.constexpr,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, ROUNDING: tl.constexpr,
):  # fmt: skip
    """New w, theta and m of elements i, as they are stored; without momentum, m is theta."""
    lr = tl.load(hyper).to(REAL)
    momentum = tl.load(hyper + 1).to(REAL)
    fresh = tl.load(hyper + 2).to(REAL)  # 1 - dampening
    weight_decay = tl.load(hyper + 3).to(REAL)
    scale = tl.load(hyper + 4).to(REAL)
    gradient_scale = tl.load(hyper + 5).to(REAL)
    b_g = tl.load(g + i, mask=inside, other=0).to(REAL)
    b_theta = tl.load(theta + i, mask=inside, other=0).to(REAL)
    d = b_g * gradient_scale + b_theta * weight_decay
    update = d
    if MOMENTUM:
        b_m = tl.load(m + i, mask=inside, other=0).to(REAL)
        b_m = b_m * momentum + d * fresh
        update = d + b_m * momentum if NESTEROV else b_m
    new_theta = _rounded(b_theta - update * lr, PRE_PARAM, ROUNDING)
    new_m = _rounded(b_m, PRE_PARAM, ROUNDING) if MOMENTUM else new_theta
    if REAL == tl.float64:  # noqa: SIM300
        new_w = (new_theta.to(REAL) / scale).to(PARAM)
    else:
        new_w = tl.math.div_rn(new_theta.to(REAL), tl.zeros_like(b_theta) + scale).to(PARAM)
    return new_w, new_theta, new_m


@triton.jit
def _step_elements(
    w, g, theta, m, i, inside, hyper,
    PARAM: tl.constexpr, PRE_PARAM: tl.constexpr, REAL: tl.constexpr,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, ROUNDING: tl.constexpr,
):  # fmt: skip
    new_w, new_theta, new_m = _stepped(
        w, g, theta, m, i, inside, hyper, PARAM, PRE_PARAM, REAL, MOMENTUM, NESTEROV, ROUNDING
    )
    tl.store(w + i, new_w, mask=inside)
    tl.store(theta + i, new_theta, mask=inside)
    if MOMENTUM:
        tl.store(m + i, new_m, mask=inside)


@triton.jit
def _not_finite(
    w, g, theta, m, i, inside, hyper,
    PARAM: tl.constexpr, PRE_PARAM: tl.constexpr, REAL: tl.constexpr,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, ROUNDING: tl.constexpr,
):  # fmt: skip
    """Whether a step would store a value that isn't finite; a bad gradient makes theta so."""
    new_w, new_theta, new_m = _stepped(
        w, g, theta, m, i, inside, hyper, PARAM, PRE_PARAM, REAL, MOMENTUM, NESTEROV, ROUNDING
    )
    finite = magnitude(new_w) < infinity(PARAM)
    finite &= magnitude(new_theta) < infinity(PRE_PARAM)
    finite &= magnitude(new_m) < infinity(PRE_PARAM)
    return tl.max((inside & ~finite).to(tl.float32), 0)


@triton.jit
def preparam_sgd_step(
    chunks, hyper, found_inf,
    CHUNK: tl.constexpr, ALIGNED: tl.constexpr,
    PARAM: tl.constexpr, PRE_PARAM: tl.constexpr, REAL: tl.constexpr,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, ROUNDING: tl.constexpr,
    PREDICATED: tl.constexpr,
):  # fmt: skip
    """Writes the new theta, momentum and w of a chunk, unless PREDICATED and found_inf isn't 0."""
    # Two conditions: the compiler must not look at found_inf otherwise.
    if PREDICATED:  # noqa: SIM102
        if tl.load(found_inf) != 0:
            return
    w = _address(chunks, 0, PARAM, ALIGNED)
    g = _address(chunks, 1, PARAM, ALIGNED)
    theta = _address(chunks, 2, PRE_PARAM, ALIGNED)
    m = _address(chunks, 3, PRE_PARAM, ALIGNED)
    count = tl.load(chunks + tl.program_id(0).to(tl.int64) * 5 + 4).to(tl.int32)
    bulk = count // _STEP * _STEP
    i = tl.arange(0, CHUNK)
    _step_elements(
        w, g, theta, m, i, i < bulk, hyper,
        PARAM, PRE_PARAM, REAL, MOMENTUM, NESTEROV, ROUNDING,
    )  # fmt: skip
    if bulk < count:
        last = bulk + tl.arange(0, _STEP)
        _step_elements(
            w, g, theta, m, last, last < count, hyper,
            PARAM, PRE_PARAM, REAL, MOMENTUM, NESTEROV, ROUNDING,
        )  # fmt: skip


@triton.jit
def preparam_sgd_overflows(
    chunks, hyper, found_inf,
    CHUNK: tl.constexpr, ALIGNED: tl.constexpr,
    PARAM: tl.constexpr, PRE_PARAM: tl.constexpr, REAL: tl.constexpr,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, ROUNDING: tl.constexpr,
):  # fmt: skip
    """Sets found_inf to 1 if stepping a chunk would store a value that isn't finite."""
    g = _address(chunks, 1, PARAM, ALIGNED)
    theta = _address(chunks, 2, PRE_PARAM, ALIGNED)
    m = _address(chunks, 3, PRE_PARAM, ALIGNED)
    count = tl.load(chunks + tl.program_id(0).to(tl.int64) * 5 + 4).to(tl.int32)
    bulk = count // _STEP * _STEP
    i = tl.arange(0, CHUNK)
    found = _not_finite(
        g, g, theta, m, i, i < bulk, hyper,
        PARAM, PRE_PARAM, REAL, MOMENTUM, NESTEROV, ROUNDING,
    )  # fmt: skip
    if bulk < count:
        last = bulk + tl.arange(0, _STEP)
        found += _not_finite(
            g, g, theta, m, last, last < count, hyper,
            PARAM, PRE_PARAM, REAL, MOMENTUM, NESTEROV, ROUNDING,
        )  # fmt: skip
    if found > 0:
        # The bits of 1.0: only integers have an atomic "or".
        tl.atomic_or(found_inf, 0x3F800000)
