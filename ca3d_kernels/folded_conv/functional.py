"""The folded convolution as a function."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ca3d_kernels import backends
from ca3d_kernels.folded_conv import op

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def folded_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    groups: int = 1,
    backend: str | None = None,
) -> Tensor:
    """Convolution, ReLU, folded batch normalisation and residual sum in one step, for inference.

    ``z = scale * relu(conv2d(x, weight) + bias) + shift + residual_scale * residual``: a step of
    CA3D's residual columns (arXiv 2505.19928, section 3) with fixed statistics. There the
    normalisation comes after the ReLU and before the zero padding of the next convolution, so that
    its shift can't become a bias. Results are bitwise the same for any number of threads. It has no
    derivatives. torch.compile and torch.export work.

    Args:
        x: (N, C, H, W), float32, float64, float16 or bfloat16, on a CPU or CUDA device.
            Physically `channels_last`; anything else is copied. Half precision is computed in
            float32.
        weight: (K, C / groups, h, w), of x's dtype.
        bias, shift: (K,), of x's dtype.
        scale: (K,), of x's dtype, or None for ones.
        residual: of the result's shape and x's dtype, or None.
        residual_scale: (K,), of x's dtype, or None for ones.
        stride, padding: of the convolution, two integers each (height, width).
        groups: of the convolution.
        backend: ``"cpu"`` or ``"reference"``; None chooses (see `ca3d_kernels.backends`).

    Returns:
        z, (N, K, H', W') in `channels_last`.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes or devices don't fit, an option is out of range, or the backend can't run
            on this device.
        RuntimeError: a gradient would be needed.

    Example:
        >>> x, weight = torch.randn(2, 8, 5, 5), torch.randn(8, 8, 3, 3)
        >>> zero = torch.zeros(8)
        >>> folded_conv(x, weight, zero, zero, residual=x, padding=(1, 1)).shape
        torch.Size([2, 8, 5, 5])
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dtype not in _DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise TypeError(f"x must have one of the dtypes {names}, got {x.dtype}")
    size = x.shape
    if len(size) != 4 or 0 in size[1:]:
        raise ValueError(f"x must have shape (N, C, H, W), only N may be 0, got {tuple(size)}")
    if isinstance(groups, bool) or not isinstance(groups, int):
        raise TypeError(f"groups must be an integer, got {groups!r}")
    if groups < 1 or size[1] % groups:
        raise ValueError(f"groups must divide the {size[1]} channels of x, got {groups}")
    steps, pads = _pair("stride", stride, 1), _pair("padding", padding, 0)
    _check_operand("weight", weight, x)
    shape = weight.shape
    inputs = size[1] // groups
    if len(shape) != 4 or 0 in shape or shape[1] != inputs or shape[0] % groups:
        raise ValueError(
            f"weight must have shape (K, {inputs}, h, w) with K a multiple of groups={groups}, "
            f"got {tuple(shape)}"
        )
    if shape[2] > size[2] + 2 * pads[0] or shape[3] > size[3] + 2 * pads[1]:
        raise ValueError(
            f"weight must not be larger than x with its padding {pads}: got a kernel "
            f"{tuple(shape[2:])} for {tuple(size[2:])}"
        )
    options = op.Options(steps, pads, groups, _backend(backend))
    of_channels = torch.Size((shape[0],))
    _check_operand("bias", bias, x, of_channels)
    _check_operand("shift", shift, x, of_channels)
    if scale is not None:
        _check_operand("scale", scale, x, of_channels)
    if residual is not None:
        _check_operand("residual", residual, x, torch.Size(options.output_size(x, weight)))
    if residual_scale is not None:
        _check_operand("residual_scale", residual_scale, x, of_channels)
        if residual is None:
            raise ValueError("residual_scale needs a residual, got None")
    operands = (x, weight, bias, shift, scale, residual, residual_scale)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands):
        raise RuntimeError("folded_conv has no derivatives; call it under torch.no_grad()")
    return torch.ops.ca3d.folded_conv.default(*operands, *options)


def _backend(backend: str | None) -> str:
    name = "" if backend is None else backends.check_name(backend)
    # In compiled code the op itself looks the context up when it runs.
    return name if name or torch.compiler.is_compiling() else backends.requested()


def _check_operand(name: str, value: object, x: Tensor, shape: torch.Size | None = None) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype != x.dtype:
        raise TypeError(f"{name} must have x's dtype {x.dtype}, got {value.dtype}")
    if value.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}, got {value.device}")
    if shape is not None and value.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(value.shape)}")


def _pair(name: str, value: Sequence[int], least: int) -> tuple[int, int]:
    if isinstance(value, Sequence) and len(value) == 2:
        first, second = value
        if type(first) is int and type(second) is int and first >= least and second >= least:
            return first, second
    raise ValueError(f"{name} must be two integers of at least {least}, got {value!r}")
