"""ReLU, batch normalisation and residual sum as a function, alone or in front of a convolution."""

import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ca3d_kernels import backends
from ca3d_kernels.norm_relu_conv import op

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Normalised(NamedTuple):
    """Result of `norm_relu`.

    Attributes:
        z: the normalised tensor.
        mean, variance: the statistics that it was normalised by, (C,), float64, without gradient;
            the variance is the biased one.
    """

    z: Tensor
    mean: Tensor
    variance: Tensor


class Convolved(NamedTuple):
    """Result of `norm_relu_conv`.

    Attributes:
        output: the convolution's output.
        z: what was convolved, if it was asked for, else None.
        mean, variance: as in `Normalised`.
    """

    output: Tensor
    z: Tensor | None
    mean: Tensor
    variance: Tensor


def norm_relu(
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-5,
    relu: bool = True,
    backend: str | None = None,
) -> Normalised:
    """Batch normalisation of relu(y) by its own statistics, and a residual sum, in two passes.

    ``z = (x - mean) / sqrt(variance + eps) * weight + bias (+ residual)`` with ``x = relu(y)``,
    channel by channel: the order of the layers in CA3D (arXiv 2505.19928, section 3). For the
    backward pass nothing is kept but y and the statistics. Results are bitwise the same for any
    number of threads. Higher derivatives, forward mode, vmap, torch.compile and torch.export work.
    Under autocast y and residual are cast to its dtype.

    Args:
        y: (N, C, H, W), N * H * W at least 2; float32, float64, float16 or bfloat16, on a CPU or a
            CUDA device. Physically `channels_last`; anything else is copied. Half precision is
            computed in float32 and rounded once.
        weight, bias: (C,), any of these dtypes.
        residual: of y's shape, dtype and device, or None.
        eps: added to the variance, at least 0.
        relu: False for x = y.
        backend: ``"cpu"`` or ``"reference"``; None chooses (see `ca3d_kernels.backends`).

    Returns:
        z, of y's shape and dtype, in `channels_last`; mean and biased variance of x.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes or devices don't fit, an option is out of range, or the backend can't run
            on this device.

    Example:
        >>> y = torch.randn(2, 8, 5, 5)
        >>> norm_relu(y, torch.ones(8), torch.zeros(8), residual=y).z.shape
        torch.Size([2, 8, 5, 5])
    """
    _check_norm(y, weight, bias, residual, eps, relu)
    y, residual = _autocast(y), None if residual is None else _autocast(residual)
    _check_residual(y, residual)
    options = op.Options(eps=float(eps), relu=relu, backend=_backend(backend))
    _, z, mean, variance = op.norm_relu_conv(y, weight, bias, residual, None, None, *options)
    return Normalised(z, mean, variance)


def norm_relu_conv(
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    groups: int = 1,
    eps: float = 1e-5,
    relu: bool = True,
    return_z: bool = False,
    backend: str | None = None,
) -> Convolved:
    """Convolves the z of `norm_relu`, which the backward pass makes again instead of keeping it.

    ``output = conv2d(z, conv_weight, conv_bias)``: the step from one convolution's output y to the
    next one's. What is kept is y, which the next layer's statistics read anyway, and O(channels)
    numbers; with a residual, z is kept too (a residual sum, which is what the next block adds). The
    convolution is torch's. On a CPU, float16 is convolved in float32, on transient copies.

    Args:
        y, weight, bias, residual, eps, relu, backend: as in `norm_relu`.
        conv_weight: (K, C / groups, h, w), of y's dtype.
        conv_bias: (K,), of y's dtype, or None.
        stride, padding: of the convolution, one integer or two (height, width).
        groups: of the convolution.
        return_z: whether z is wanted, too (as the residual of a later step).

    Returns:
        The output, (N, K, H', W') in `channels_last`; z or None; mean and biased variance of x.

    Raises:
        TypeError, ValueError: as in `norm_relu`.

    Example:
        >>> y, one, zero = torch.randn(2, 8, 5, 5), torch.ones(8), torch.zeros(8)
        >>> step = norm_relu_conv(y, one, zero, torch.randn(4, 8, 3, 3), padding=1, return_z=True)
        >>> step.output.shape, step.z.shape
        (torch.Size([2, 4, 5, 5]), torch.Size([2, 8, 5, 5]))
    """
    _check_norm(y, weight, bias, residual, eps, relu)
    if not isinstance(return_z, bool):
        raise TypeError(f"return_z must be a bool, got {return_z!r}")
    steps, pads = _pair("stride", stride, 1), _pair("padding", padding, 0)
    if isinstance(groups, bool) or not isinstance(groups, int):
        raise TypeError(f"groups must be an integer, got {groups!r}")
    _check_convolution(y, conv_weight, conv_bias, pads, groups)
    y, conv_weight = _autocast(y), _autocast(conv_weight)
    residual = None if residual is None else _autocast(residual)
    conv_bias = None if conv_bias is None else _autocast(conv_bias)
    _check_residual(y, residual)
    for name, x in (("conv_weight", conv_weight), ("conv_bias", conv_bias)):
        if x is not None and x.dtype != y.dtype:
            raise TypeError(f"{name} must have y's dtype {y.dtype}, got {x.dtype}")
    keep = return_z or residual is not None
    options = op.Options(steps, pads, groups, float(eps), relu, keep, _backend(backend))
    output, z, mean, variance = op.norm_relu_conv(
        y, weight, bias, residual, conv_weight, conv_bias, *options
    )
    return Convolved(output, z if return_z else None, mean, variance)


def _backend(backend: str | None) -> str:
    name = backends.check_name("auto" if backend is None else backend)
    # In compiled code the op itself looks the context up when it runs.
    return name if name or torch.compiler.is_compiling() else backends.requested()


def _names() -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)


def _check_tensor(name: str, x: Tensor, y: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name} must have one of the dtypes {_names()}, got {x.dtype}")
    if x.layout != torch.strided:
        raise ValueError(f"{name} must be a strided tensor, got layout {x.layout}")
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")
    if x.device != y.device:
        raise ValueError(f"{name} must be on y's device {y.device}, got {x.device}")


def _check_norm(
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    eps: float,
    relu: bool,
) -> None:
    if not isinstance(y, Tensor):
        raise TypeError(f"y must be a tensor, got {type(y).__name__}")
    if y.dim() != 4 or 0 in y.shape:
        raise ValueError(f"y must have shape (N, C, H, W) and not be empty, got {tuple(y.shape)}")
    _check_tensor("y", y, y, tuple(y.shape))
    if y.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"y must be on a cpu or cuda device, got {y.device}")
    if y.numel() == y.shape[1]:
        raise ValueError(
            f"y must have more than 1 value per channel, got shape {tuple(y.shape)}: its variance "
            "would be 0"
        )
    for name, x in (("weight", weight), ("bias", bias)):
        _check_tensor(name, x, y, (y.shape[1],))
    if residual is not None:
        _check_tensor("residual", residual, y, tuple(y.shape))
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps must be a float, got {eps!r}")
    if not 0 <= eps < math.inf:  # not isfinite: torch.compile can't trace it with dynamic floats
        raise ValueError(f"eps must be finite and at least 0, got {eps!r}")
    if not isinstance(relu, bool):
        raise TypeError(f"relu must be a bool, got {relu!r}")


def _check_residual(y: Tensor, residual: Tensor | None) -> None:
    if residual is not None and residual.dtype != y.dtype:
        raise TypeError(f"residual must have y's dtype {y.dtype}, got {residual.dtype}")


def _check_convolution(
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: tuple[int, int],
    groups: int,
) -> None:
    channels = y.shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(f"groups must divide the {channels} channels of y, got {groups}")
    if not isinstance(weight, Tensor):
        raise TypeError(f"conv_weight must be a tensor, got {type(weight).__name__}")
    shape = tuple(weight.shape)
    if weight.dim() != 4 or 0 in shape or shape[1] * groups != channels or shape[0] % groups:
        raise ValueError(
            f"conv_weight must have shape (K, {channels // groups}, h, w) with K a multiple of "
            f"groups={groups}, got {shape}"
        )
    _check_tensor("conv_weight", weight, y, shape)
    if bias is not None:
        _check_tensor("conv_bias", bias, y, (shape[0],))
    for size, pad, kernel in zip(y.shape[2:], padding, shape[2:], strict=True):
        if kernel > size + 2 * pad:
            raise ValueError(
                f"conv_weight must not be larger than y with its padding {padding}: got a kernel "
                f"{shape[2:]} for {tuple(y.shape[2:])}"
            )


def _pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    """One integer or two, as two."""
    try:
        values = (value, value) if not isinstance(value, Sequence) else tuple(value)
        numbers = tuple(operator.index(v) for v in values)
    except TypeError:
        raise TypeError(f"{name} must be one integer or two, got {value!r}") from None
    if len(numbers) != 2 or min(numbers) < least or isinstance(value, bool):
        raise ValueError(f"{name} must be one integer or two, at least {least}, got {value!r}")
    return numbers[0], numbers[1]


def _autocast(x: Tensor) -> Tensor:
    """Casts an operand as autocast casts those of a convolution: all but float64."""
    kind = x.device.type
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
        return x
    return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(kind))
