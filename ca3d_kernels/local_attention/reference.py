"""Definition of local temporal attention in plain torch operations: the oracle of every kernel.

Everything here is differentiable by torch any number of times and in forward mode, on every
device and in every floating dtype. Half-precision input is computed in float32 and rounded once.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def window_frames(
    frames: int,
    kernel_size: int = 5,
    dilation: int = 1,
    causal: bool = False,
    edge: str = "truncate",
) -> tuple[Tensor, Tensor]:
    """Frame that each window slot of each query frame looks at.

    Slot n of frame t is frame ``t + (n - kernel_size // 2) * dilation``, or
    ``t - (kernel_size - 1 - n) * dilation`` when causal. With ``edge="shift"`` the window of a
    frame near an end of the clip is moved inwards, inside the frames congruent to t modulo the
    dilation, until it has its full size (or, if these frames are fewer, holds them all). A causal
    window is never moved, because that would show it the future.

    Args:
        frames: number of frames T.
        kernel_size: number of slots K.
        dilation: distance of neighbouring slots in frames.
        causal: whether the window ends at its query's frame instead of being centred on it.
        edge: ``"truncate"``, ``"zero"`` or ``"shift"``.

    Returns:
        Two tensors of shape (T, K): the frame numbers (int64), and whether the slot lies in the
        clip (bool). Frame numbers of slots outside the clip are meaningless.

    Example:
        >>> window_frames(3, kernel_size=3)[0].tolist()
        [[-1, 0, 1], [0, 1, 2], [1, 2, 3]]
        >>> window_frames(3, kernel_size=3, edge="shift")[0].tolist()
        [[0, 1, 2], [0, 1, 2], [0, 1, 2]]
    """
    t = torch.arange(frames, device="cpu").unsqueeze(1)
    slot = torch.arange(kernel_size, device="cpu")
    # Frames of one dilation class are numbered 0, 1, ... : t is frame `position` of class `phase`.
    phase, position = t % dilation, t // dilation
    length = (frames - phase + dilation - 1) // dilation
    start = position - (kernel_size - 1 if causal else kernel_size // 2)
    if edge == "shift" and not causal:
        start = torch.minimum(start, length - kernel_size).clamp(min=0)
    index = start + slot
    return phase + index * dilation, (index >= 0) & (index < length)


def sources(
    heads: int,
    frames: int,
    kernel_size: int,
    dilation: int,
    causal: bool,
    edge: str,
    key_table: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    """Row of the (heads * T, head_dim) keys that each head, frame and slot meets, and its mask.

    Args:
        heads, frames: numbers of heads and of frames T.
        kernel_size, dilation, causal, edge, key_table: see `attention`.

    Returns:
        (heads, T, K): the rows (int64), and whether the slot lies in the clip (bool). Rows of slots
        outside the clip are those of other frames.

    Example:
        >>> sources(1, 3, 3, 1, False, "truncate", None)[0].tolist()
        [[[0, 0, 1], [0, 1, 2], [1, 2, 2]]]
    """
    frame, inside = window_frames(frames, kernel_size, dilation, causal, edge)
    if key_table:
        table = torch.tensor(key_table, device="cpu").view(heads, 1, kernel_size, 2)
        slot = table[..., 1].expand(heads, frames, kernel_size)
        frame = frame.expand(heads, -1, -1).gather(2, slot)
        inside = inside.expand(heads, -1, -1).gather(2, slot)
        head = table[..., 0]
    else:
        head = torch.arange(heads, device="cpu").view(heads, 1, 1)
        inside = inside.expand(heads, -1, -1)
    rows = head * frames + frame.clamp(0, frames - 1)
    return rows, inside


def _sources(q: Tensor, *window: Any) -> tuple[Tensor, Tensor]:
    """`sources` of the heads and frames of q, on its device."""
    rows, inside = sources(*q.shape[-3:-1], *window)
    return rows.to(q.device), inside.to(q.device)


def _gather(x: Tensor, rows: Tensor, inside: Tensor) -> Tensor:
    """Window of every query, (..., heads, T, K, head_dim); slots outside the clip hold zeros."""
    window = x.flatten(-3, -2).index_select(-2, rows.flatten()).unflatten(-2, rows.shape)
    # Not a product with the mask: the frame that stands in for a missing one may hold infinities.
    return window.masked_fill(~inside.unsqueeze(-1), 0)


def _scatter(window: Tensor, rows: Tensor, inside: Tensor) -> Tensor:
    """Transpose of `_gather`: sums every slot into the row that it came from."""
    heads, frames, _ = rows.shape
    window = window.masked_fill(~inside.unsqueeze(-1), 0).flatten(-4, -2)
    total = window.new_zeros(*window.shape[:-2], heads * frames, window.shape[-1])
    return total.index_add(-2, rows.flatten(), window).unflatten(-2, (heads, frames))


def _probabilities(q: Tensor, k_window: Tensor, inside: Tensor, scale: float, edge: str) -> Tensor:
    """Softmax over the K slots of ``scale * q . k``, (..., heads, T, K)."""
    logits = scale * (q.unsqueeze(-2) * k_window).sum(-1)
    if edge != "zero":
        logits = logits.masked_fill(~inside, -torch.inf)
    return logits.softmax(-1)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def attention_weights(
    q: Tensor,
    k: Tensor,
    *,
    kernel_size: int = 5,
    dilation: int = 1,
    causal: bool = False,
    scale: float | None = None,
    edge: str = "truncate",
    key_table: Sequence[int] | None = None,
) -> Tensor:
    """Attention probabilities of local temporal attention, for figures and analysis.

    Args:
        q: queries, (..., heads, T, head_dim), any floating dtype.
        k: keys, of q's shape.
        kernel_size, dilation, causal, scale, edge: see `ca3d_kernels.local_temporal_attention`.
        key_table: None, or ``heads * kernel_size * 2`` integers: source head and window slot of
            each (head, slot).

    Returns:
        (..., heads, T, kernel_size), the weight of each slot (`window_frames` names its frame), in
        float64 for float64 input, else in float32. Slots outside the clip have weight 0, except
        with ``edge="zero"``, where they take part in the softmax.

    Example:
        >>> q = torch.zeros(1, 2, 8)                     # one head, two frames
        >>> attention_weights(q, q, kernel_size=3).tolist()
        [[[0.0, 0.5, 0.5], [0.5, 0.5, 0.0]]]
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = (x.to(_compute_dtype(x.dtype)) for x in (q, k))
    rows, inside = _sources(q, kernel_size, dilation, causal, edge, key_table)
    return _probabilities(q, _gather(k, rows, inside), inside, scale, edge)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel_size: int = 5,
    dilation: int = 1,
    causal: bool = False,
    scale: float | None = None,
    edge: str = "truncate",
    key_table: Sequence[int] | None = None,
) -> Tensor:
    """Local temporal attention as it is defined, in plain torch.

    ``o[h, t] = sum_n p[h, t, n] v[h, s(t, n)]``, ``p = softmax_n(scale * q[h, t] . k[h, s(t, n)])``
    with ``s`` from `window_frames`. Slots outside the clip don't exist (``edge="truncate"``), have
    logit 0 and value 0 (``"zero"``), or don't occur (``"shift"``). With a key table, slot n of
    head h reads head ``key_table[h][n][0]`` at window slot ``key_table[h][n][1]``.

    Args:
        q, k, v: (..., heads, T, head_dim), one shape, one floating dtype.
        kernel_size, dilation, causal, scale, edge: see `ca3d_kernels.local_temporal_attention`.
        key_table: None, or ``heads * kernel_size * 2`` integers.

    Returns:
        (..., heads, T, head_dim) in q's dtype.

    Example:
        >>> q, v = torch.zeros(1, 3, 1), torch.tensor([[[1.0], [2.0], [6.0]]])
        >>> attention(q, q, v, kernel_size=3).flatten().tolist()
        [1.5, 3.0, 4.0]
    """
    dtype, scale = q.dtype, q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.to(_compute_dtype(dtype)) for x in (q, k, v))
    rows, inside = _sources(q, kernel_size, dilation, causal, edge, key_table)
    p = _probabilities(q, _gather(k, rows, inside), inside, scale, edge)
    return (p.unsqueeze(-1) * _gather(v, rows, inside)).sum(-2).to(dtype)


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel_size: int = 5,
    dilation: int = 1,
    causal: bool = False,
    scale: float | None = None,
    edge: str = "truncate",
    key_table: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attention`, written out: what the backward kernels compute.

    With ``dp[t, n] = do[t] . v[s(t, n)]`` and ``ds = p (dp - sum_n p dp)``, the gradients are
    ``dq[t] = scale sum_n ds[t, n] k[s(t, n)]``, ``dk[s] = scale sum ds[t, n] q[t]`` and
    ``dv[s] = sum p[t, n] do[t]``, the last two over all (t, n) that read frame s.

    Args:
        grad: gradient of the output, (..., heads, T, head_dim).
        q, k, v: the operands of `attention`.
        kernel_size, dilation, causal, scale, edge, key_table: the options of `attention`.

    Returns:
        Gradients of q, k and v, in q's dtype.

    Example:
        >>> q, k, v, do = torch.randn(4, 2, 6, 8, dtype=torch.double).requires_grad_().unbind()
        >>> expected = torch.autograd.grad(attention(q, k, v), (q, k, v), do)
        >>> all(map(torch.allclose, attention_backward(do, q, k, v), expected))
        True
    """
    dtype, scale = q.dtype, q.shape[-1] ** -0.5 if scale is None else scale
    grad, q, k, v = (x.to(_compute_dtype(dtype)) for x in (grad, q, k, v))
    rows, inside = _sources(q, kernel_size, dilation, causal, edge, key_table)
    k_window, v_window = _gather(k, rows, inside), _gather(v, rows, inside)
    p = _probabilities(q, k_window, inside, scale, edge)
    dp = (grad.unsqueeze(-2) * v_window).sum(-1)
    ds = (scale * p * (dp - (p * dp).sum(-1, keepdim=True))).unsqueeze(-1)
    dq = (ds * k_window).sum(-2)
    dk = _scatter(ds * q.unsqueeze(-2), rows, inside)
    dv = _scatter(p.unsqueeze(-1) * grad.unsqueeze(-2), rows, inside)
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)
