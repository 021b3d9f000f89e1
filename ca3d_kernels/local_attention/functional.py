"""Local temporal attention as a function, and the key table of the published model."""

import operator
import sys
from collections.abc import Sequence
from typing import SupportsIndex

import torch
from torch import Tensor

from ca3d_kernels import backends
from ca3d_kernels.local_attention import op

KeyTable = Tensor | Sequence[Sequence[Sequence[int]]]

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_DEVICES = ("cpu", "cuda")


def local_temporal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel_size: int = 5,
    dilation: int = 1,
    causal: bool = False,
    scale: float | None = None,
    edge: str = "truncate",
    key_table: KeyTable | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of every frame to the few frames around it, fused into one kernel.

    ``o[t] = sum_n p[t, n] v[s(t, n)]`` with ``p[t] = softmax_n(scale * q[t] . k[s(t, n)])``. Slot n
    of frame t is frame ``s(t, n) = t + (n - kernel_size // 2) * dilation``, or
    ``t - (kernel_size - 1 - n) * dilation`` when causal. It is the local temporal attention of
    CA3D (arXiv 2505.19928). Nothing but the operands is kept for the backward pass; results are
    bitwise the same for any number of threads. Higher derivatives, forward mode, vmap,
    torch.compile and torch.export work. Under autocast the operands are cast to its dtype.

    Args:
        q: queries, (..., heads, T, head_dim) with any number of leading dimensions; float32,
            float64, float16 or bfloat16, on a CPU or a CUDA device. T may be 1, and smaller than
            the window. Strides are free: no copy is made as long as head_dim is contiguous and the
            leading dimensions merge into two. Half precision is accumulated in float32.
        k, v: keys and values, of q's shape, dtype and device.
        kernel_size: number of frames K in the window, odd or even, at least 1.
        dilation: distance of neighbouring frames of the window, at least 1.
        causal: whether the window ends at its own frame instead of being centred on it.
        scale: factor of the logits, finite; None is ``head_dim ** -0.5``.
        edge: what a window does at the ends of the clip. ``"truncate"``: frames outside the clip
            don't take part. ``"zero"``: they take part in the softmax with logit 0 and value 0, as
            in the published CA3D code. ``"shift"``: the window moves inwards and keeps its size as
            long as the clip (of frames congruent to t modulo the dilation) is long enough, as in
            neighborhood attention; a causal window is truncated, for it must not see the future.
        key_table: (heads, kernel_size, 2) integers, nested sequences or a tensor: the head and the
            window slot whose key and value slot n of head h meets. None is each head's own. It
            needs ``edge="zero"``, dilation 1 and no causal window. See `published_key_table`.
        backend: ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``; None chooses (see
            `ca3d_kernels.backends`).

    Returns:
        (..., heads, T, head_dim), dense, its dimensions in the order of q's strides with head_dim
        last: queries from a channels-last projection give a channels-last result.

    Raises:
        TypeError: an argument has a wrong type; dtypes are not floating or not the same.
        ValueError: shapes or devices differ, an option is out of range, or the backend can't run
            on this device.

    Example:
        >>> q, k, v = torch.randn(3, 2, 4, 8, 16)         # batch 2, 4 heads, T = 8, head_dim 16
        >>> local_temporal_attention(q, k, v, kernel_size=3).shape
        torch.Size([2, 4, 8, 16])
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_tensor(name, x, 3, "(..., heads, T, head_dim)")
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape:
            raise ValueError(f"{name} must have q's shape {tuple(q.shape)}, got {tuple(x.shape)}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")
    q, k, v = (_autocast(x) for x in (q, k, v))
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, got {x.dtype}")
    options = check_options(
        q.shape[-3], kernel_size, dilation, causal, scale, edge, key_table, backend
    )
    return op.attention(q, k, v, *with_context(options))


def local_temporal_attention_packed(
    qkv: Tensor,
    *,
    kernel_size: int = 5,
    dilation: int = 1,
    causal: bool = False,
    scale: float | None = None,
    edge: str = "truncate",
    key_table: KeyTable | None = None,
    backend: str | None = None,
) -> Tensor:
    """`local_temporal_attention` of the three slices of one projection output.

    The backward pass writes one gradient of the whole projection output, in its layout, where
    three separate operands would need their gradients to be put together by a copy.

    Args:
        qkv: (..., heads, 3, T, head_dim): queries, keys and values stacked in dimension -3; any
            strides, as in `local_temporal_attention`.
        kernel_size, dilation, causal, scale, edge, key_table, backend: as in
            `local_temporal_attention`.

    Returns:
        (..., heads, T, head_dim), laid out as in `local_temporal_attention`.

    Raises:
        TypeError, ValueError: as in `local_temporal_attention`.

    Example:
        >>> y = torch.randn(2, 8, 4, 3, 16)               # batch, T, heads, (q, k, v), head_dim
        >>> out = local_temporal_attention_packed(y.permute(0, 2, 3, 1, 4))
        >>> out.shape, out.permute(0, 2, 1, 3).is_contiguous()
        (torch.Size([2, 4, 8, 16]), True)
    """
    _check_tensor("qkv", qkv, 4, "(..., heads, 3, T, head_dim)")
    if qkv.shape[-3] != 3:
        raise ValueError(
            f"qkv must have size 3 in dimension -3 (q, k, v), got shape {tuple(qkv.shape)}"
        )
    options = check_options(
        qkv.shape[-4], kernel_size, dilation, causal, scale, edge, key_table, backend
    )
    return op.attention_packed(_autocast(qkv), *with_context(options))


def published_key_table(
    heads: int, kernel_size: int, head_order: Sequence[int] | None = None
) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Which key each query head meets in the published CA3D code.

    There, slot m of query head j reads head ``(m * heads + j) // kernel_size`` at window slot
    ``(m * heads + j) % kernel_size``: the heads mix, unlike in the paper. Checkpoints of that code
    need it.

    Args:
        heads: number of heads.
        kernel_size: window size K.
        head_order: the published head that each of our heads is, a permutation of
            ``range(heads)``; None when the orders agree.

    Returns:
        Nested tuples (heads, kernel_size, 2) for the ``key_table`` argument.

    Raises:
        ValueError: heads or kernel_size below 1, or head_order not a permutation.
        TypeError: not integers.

    Example:
        >>> published_key_table(2, 3)
        (((0, 0), (0, 2), (1, 1)), ((0, 1), (1, 0), (1, 2)))
        >>> published_key_table(2, 3, head_order=(1, 0))[0]
        ((1, 1), (0, 0), (0, 2))
    """
    heads, kernel_size = check_count("heads", heads), check_count("kernel_size", kernel_size)
    try:
        order = [operator.index(h) for h in (range(heads) if head_order is None else head_order)]
    except TypeError:
        raise TypeError(f"head_order must hold integers, got {head_order!r}") from None
    if sorted(order) != list(range(heads)):
        raise ValueError(
            f"head_order must be a permutation of 0 to {heads - 1}, got {tuple(order)}"
        )
    ours = {published: mine for mine, published in enumerate(order)}
    return tuple(
        tuple(
            (ours[(m * heads + j) // kernel_size], (m * heads + j) % kernel_size)
            for m in range(kernel_size)
        )
        for j in order
    )


def check_count(name: str, value: SupportsIndex) -> int:
    """Checks an integer argument that must be at least 1 and returns it as an int.

    Raises:
        TypeError: not an integer.
        ValueError: below 1.

    Example:
        >>> check_count("heads", 4)
        4
    """
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    if number >= 2**63:
        raise ValueError(f"{name} must be below 2**63, got {number}")
    return number


def check_options(
    heads: int,
    kernel_size: int,
    dilation: int,
    causal: bool,
    scale: float | None,
    edge: str,
    key_table: KeyTable | None,
    backend: str | None,
) -> op.Options:
    """Checks the options of `local_temporal_attention`, which describes them.

    Args:
        heads: number of heads that a key table must serve.
        kernel_size, dilation, causal, scale, edge, key_table, backend: the options.

    Returns:
        The options as the op takes them.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is allowed.

    Example:
        >>> check_options(4, 3, 1, False, None, "zero", None, None).edge
        'zero'
    """
    kernel_size = check_count("kernel_size", kernel_size)
    dilation = check_count("dilation", dilation)
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be a bool, got {causal!r}")
    if scale is not None:
        if isinstance(scale, bool) or not isinstance(scale, (int, float)):
            raise TypeError(f"scale must be a float or None, got {scale!r}")
        if not abs(scale) <= sys.float_info.max:
            raise ValueError(f"scale must be finite, got {scale!r}")
        scale = float(scale)
    if edge not in op.EDGES:
        raise ValueError(f"edge must be one of {op.EDGES}, got {edge!r}")
    table: tuple[int, ...] = ()
    if key_table is not None:
        if edge != "zero" or dilation != 1 or causal:
            raise ValueError(
                "key_table needs edge='zero', dilation=1 and causal=False, got "
                f"edge={edge!r}, dilation={dilation}, causal={causal}"
            )
        table = _flatten_key_table(key_table, heads, kernel_size)
    name = backends.check_name("auto" if backend is None else backend)
    return op.Options(kernel_size, dilation, causal, scale, edge, table, name)


def with_context(options: op.Options) -> op.Options:
    """Adds the backend that `use_backend` demands, so that the backward pass keeps to it."""
    # In compiled code the op itself looks the context up when it runs.
    if options.backend or torch.compiler.is_compiling():
        return options
    return options._replace(backend=backends.requested())


def _flatten_key_table(key_table: KeyTable, heads: int, kernel_size: int) -> tuple[int, ...]:
    nested = key_table.tolist() if isinstance(key_table, Tensor) else key_table
    wanted = f"(heads={heads}, kernel_size={kernel_size}, 2) integers"
    try:
        shape_fits = len(nested) == heads and all(
            len(row) == kernel_size and all(len(pair) == 2 for pair in row) for row in nested
        )
        flat = tuple(operator.index(x) for row in nested for pair in row for x in pair)
    except TypeError:
        raise TypeError(f"key_table must hold {wanted}, got {key_table!r}") from None
    if not shape_fits:
        raise ValueError(f"key_table must hold {wanted}, got {key_table!r}")
    for name, values, size in (("head", flat[0::2], heads), ("slot", flat[1::2], kernel_size)):
        for value in values:
            if not 0 <= value < size:
                raise ValueError(
                    f"key_table names {name} {value}; {name}s must be in 0 to {size - 1}"
                )
    return flat


def _check_tensor(name: str, x: Tensor, dims: int, shape: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dim() < dims:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")
    if x.dtype not in _DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise TypeError(f"{name} must have one of the dtypes {allowed}, got {x.dtype}")
    if x.device.type not in _DEVICES and x.device.type != "meta":
        raise ValueError(f"{name} must be on a {' or '.join(_DEVICES)} device, got {x.device}")
    if x.layout != torch.strided:
        raise ValueError(f"{name} must be a strided tensor, got layout {x.layout}")
    if 0 in x.shape[-dims:]:
        raise ValueError(f"{name} must not be empty in {shape[6:-1]}, got {tuple(x.shape)}")


def _autocast(x: Tensor) -> Tensor:
    """Casts an operand as autocast casts those of a matrix product: all but float64."""
    device = x.device.type
    if device == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))
