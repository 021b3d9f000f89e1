"""Definition of `norm_relu_conv` in plain torch operations: the oracle of every kernel.

Everything here is differentiable by torch any number of times and in forward mode, on every device
and in every floating dtype. Half-precision input is computed in float32; z and the convolution's
output are each rounded once.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Definition = tuple[Tensor, Tensor]


def computed(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which tensors of a dtype are computed.

    Example:
        >>> computed(torch.float16), computed(torch.float64)
        (torch.float32, torch.float64)
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def statistics(y: Tensor, relu: bool = True) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of ``x = relu(y)``.

    Args:
        y: (N, C, H, W).
        relu: False for x = y.

    Returns:
        Mean and variance, (C,), in float32 or float64.

    Example:
        >>> statistics(torch.tensor([-1.0, 1.0, 3.0]).view(3, 1, 1, 1))[0]
        tensor([1.3333])
    """
    x = y.to(computed(y.dtype))
    variance, mean = torch.var_mean(F.relu(x) if relu else x, (0, 2, 3), correction=0)
    return mean, variance


def norm_relu(
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-5,
    relu: bool = True,
) -> Tensor:
    """``z = (x - mean) / sqrt(variance + eps) * weight + bias (+ residual)`` with x = relu(y).

    Args:
        y: (N, C, H, W); mean and variance are those of x over N, H and W.
        weight, bias: (C,).
        residual: of y's shape and dtype, or None.
        eps: added to the variance.
        relu: False for x = y.

    Returns:
        z, of y's shape and dtype.

    Example:
        >>> y = torch.tensor([-1.0, 2.0]).view(2, 1, 1, 1)
        >>> norm_relu(y, torch.ones(1), torch.zeros(1), eps=0.0).flatten()
        tensor([-1.,  1.])
    """
    mean, variance = (m[:, None, None] for m in statistics(y, relu))
    x = y.to(mean.dtype)
    x = F.relu(x) if relu else x
    weight, bias = (p.to(mean.dtype)[:, None, None] for p in (weight, bias))
    z = (x - mean) * (torch.rsqrt(variance + eps) * weight) + bias
    if residual is not None:
        z = z + residual.to(z.dtype)
    return z.to(y.dtype)


def convolution(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
) -> Tensor:
    """A convolution in the dtype of `computed`, rounded once.

    Args:
        z: (N, C, H, W).
        weight: (K, C / groups, h, w).
        bias: (K,) or None.
        stride, padding, groups: as of `torch.nn.functional.conv2d`.

    Returns:
        (N, K, H', W') in z's dtype.

    Example:
        >>> one = torch.ones(1, 1, 1, 1)
        >>> convolution(one, 2 * one, None, (1, 1), (0, 0), 1).item()
        2.0
    """
    wide = computed(z.dtype)
    return F.conv2d(
        z.to(wide),
        weight.to(wide),
        None if bias is None else bias.to(wide),
        list(stride),
        list(padding),
        groups=groups,
    ).to(z.dtype)


def norm_relu_conv(
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    conv_weight: Tensor | None = None,
    conv_bias: Tensor | None = None,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    groups: int = 1,
    eps: float = 1e-5,
    relu: bool = True,
) -> Definition:
    """``conv(z)`` and z, with z as in `norm_relu`.

    Args:
        y, weight, bias, residual, eps, relu: as in `norm_relu`.
        conv_weight, conv_bias, stride, padding, groups: as in `convolution`; without a weight there
            is no convolution.

    Returns:
        The convolution's output (an empty tensor without one) and z.

    Example:
        >>> y, one = torch.randn(2, 3, 4, 4), torch.ones(3)
        >>> output, z = norm_relu_conv(y, one, one, conv_weight=torch.randn(5, 3, 1, 1))
        >>> output.shape, z.shape
        (torch.Size([2, 5, 4, 4]), torch.Size([2, 3, 4, 4]))
    """
    z = norm_relu(y, weight, bias, residual, eps=eps, relu=relu)
    if conv_weight is None:
        return y.new_empty(0), z
    return convolution(z, conv_weight, conv_bias, stride, padding, groups), z


def norm_relu_conv_backward(
    grad: Tensor | None,
    grad_z: Tensor | None,
    y: Tensor,
    z: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    conv_weight: Tensor | None,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    groups: int = 1,
    eps: float = 1e-5,
    relu: bool = True,
) -> tuple[Tensor, ...]:
    """Gradients of `norm_relu_conv`, themselves differentiable.

    Args:
        grad: gradient of the convolution's output, or None.
        grad_z: gradient of z, or None.
        y, weight, bias, conv_weight: operands of the forward pass.
        z: what the convolution read, or None to make it again from y (without a residual).
        stride, padding, groups, eps, relu: as in the forward pass.

    Returns:
        Gradients of z (all of it: of the residual, too), y, weight and bias, and of the weight and
        the bias of the convolution (empty tensors without one).

    Example:
        >>> y, one = torch.randn(2, 3, 4, 4), torch.ones(3)
        >>> norm_relu_conv_backward(None, y, y, None, one, one, None)[1].shape
        torch.Size([2, 3, 4, 4])
    """

    def normalise(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return norm_relu(y, weight, bias, eps=eps, relu=relu)

    vjp = torch.func.vjp(normalise, y, weight, bias)
    made, pull = vjp[0], vjp[1]
    grad_input, grad_conv_weight, grad_conv_bias = grad_z, y.new_empty(0), y.new_empty(0)
    if grad is not None and conv_weight is not None:
        wide = computed(y.dtype)
        gradients = torch.ops.aten.convolution_backward(
            grad.to(wide),
            (made if z is None else z).to(wide),
            conv_weight.to(wide),
            [conv_weight.shape[0]],
            list(stride),
            list(padding),
            [1, 1],
            False,
            [0, 0],
            groups,
            [True, True, True],
        )
        through, grad_conv_weight, grad_conv_bias = (g.to(y.dtype) for g in gradients)
        grad_input = through if grad_z is None else through + grad_z
    if grad_input is None:
        grad_input = torch.zeros_like(y)
    return grad_input, *pull(grad_input), grad_conv_weight, grad_conv_bias
