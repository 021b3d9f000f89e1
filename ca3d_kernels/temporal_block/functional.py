"""The folded temporal half of a CAST block as a function."""

import torch
from torch import Tensor

from ca3d_kernels.local_attention.functional import KeyTable, check_options, with_context
from ca3d_kernels.temporal_block.op import Weights

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def temporal_block(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    norm_scale: Tensor,
    norm_shift: Tensor,
    column_weight: Tensor,
    column_bias: Tensor,
    column_scale: Tensor,
    column_shift: Tensor,
    *,
    kernel_size: int = 5,
    dilation: int = 1,
    causal: bool = False,
    scale: float | None = None,
    edge: str = "truncate",
    key_table: KeyTable | None = None,
    backend: str | None = None,
) -> Tensor:
    """The temporal half of a CAST block in one kernel, for inference (arXiv 2505.19928, section 3).

    Pixel by pixel, for the channels x of a head in frame t (products from the left, as rows)::

        q, k, v = x qkv_weight + qkv_bias[t]
        y       = norm_scale * (x + attention(q, k, v)) + norm_shift[t]

    and for each residual block of the column, with convolutions of three frames, padded with zeros::

        u = scale[0] * relu(conv[0](y) + bias[0]) + shift[0]
        y = scale[1] * relu(conv[1](u) + bias[1]) + shift[1] + y

    A positional table and the normalisation in front of the projection are part of `qkv_bias`,
    `qkv_weight` and `norm_shift`. Half precision is computed in float32 and rounded once. Results
    are bitwise the same for any number of threads. It has no derivatives. torch.compile and
    torch.export work.

    Args:
        x: (B, T, N, C), channels contiguous (others are copied), N pixels; float32, float64,
            float16 or bfloat16, on a CPU or CUDA device.
        qkv_weight: (heads, d, 3 * d), of x's dtype as all that follow; inputs, then outputs q, k
            and v; ``heads * d`` is C.
        qkv_bias: (heads, T, 3 * d).
        norm_scale: (heads, d).
        norm_shift: (heads, T, d).
        column_weight: (2 * blocks, heads, 3 * d, d); inputs of frame t - 1, of t, of t + 1, then
            outputs.
        column_bias, column_scale, column_shift: (2 * blocks, heads, d).
        kernel_size, dilation, causal, scale, edge, key_table: of the attention; see
            `local_temporal_attention`.
        backend: ``"triton"``, ``"cpu"`` or ``"reference"``; None chooses (see
            `ca3d_kernels.backends`).

    Returns:
        (B, T, N, C), contiguous.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes or devices don't fit, an option is out of range, or the backend can't run
            on this device.
        RuntimeError: a gradient would be needed.

    Example:
        >>> x, d, heads = torch.randn(1, 8, 49, 32), 16, 2
        >>> qkv = torch.randn(heads, d, 3 * d), torch.randn(heads, 8, 3 * d)
        >>> norm = torch.ones(heads, d), torch.zeros(heads, 8, d)
        >>> column = torch.randn(2, heads, 3 * d, d), *torch.randn(3, 2, heads, d)
        >>> temporal_block(x, *qkv, *norm, *column).shape
        torch.Size([1, 8, 49, 32])
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dtype not in _DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise TypeError(f"x must have one of the dtypes {names}, got {x.dtype}")
    if x.dim() != 4 or 0 in (x.shape[1], x.shape[3]):
        raise ValueError(
            f"x must have shape (B, T, N, C), only B and N may be 0, got {tuple(x.shape)}"
        )
    weights = Weights(
        qkv_weight,
        qkv_bias,
        norm_scale,
        norm_shift,
        column_weight,
        column_bias,
        column_scale,
        column_shift,
    )
    heads = _check_weights(x, weights)
    options = check_options(heads, kernel_size, dilation, causal, scale, edge, key_table, backend)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights)):
        raise RuntimeError("temporal_block has no derivatives; call it under torch.no_grad()")
    return torch.ops.ca3d.temporal_block(x, *weights, *with_context(options))


def _check_weights(x: Tensor, weights: Weights) -> int:
    """Checks everything against x and returns the number of heads."""
    for name, value in weights._asdict().items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if value.dtype != x.dtype:
            raise TypeError(f"{name} must have x's dtype {x.dtype}, got {value.dtype}")
        if value.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {value.device}")
    frames, channels = x.shape[1], x.shape[3]
    found = tuple(weights.qkv_weight.shape)
    if len(found) != 3 or found[0] * found[1] != channels or found[2] != 3 * found[1]:
        raise ValueError(
            f"qkv_weight must have shape (heads, d, 3 * d) with heads * d = {channels}, the "
            f"channels of x, got {found}"
        )
    count = len(weights.column_weight) if weights.column_weight.dim() else 1
    if count % 2:
        raise ValueError(
            f"column_weight must hold two convolutions for each residual block, got {count}"
        )
    for name, shape in Weights.shapes(found[0], found[1], frames, count).items():
        value = getattr(weights, name)
        if tuple(value.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    return found[0]
