"""The step from one convolution to the next: ReLU, batch normalisation, residual sum, convolution.

In training on a CPU it is one op of `ca3d_kernels`, which keeps the first convolution's output and
makes everything else again when the gradient is computed; elsewhere it is the modules themselves,
one after the other.
"""

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ca3d_kernels import norm_relu, norm_relu_conv

__all__ = ["BatchNorm", "fuses", "normalise", "normalise_and_convolve", "track_statistics"]

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class BatchNorm(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` by the kernels of `ca3d_kernels.norm_relu` in training on a CPU.

    Same parameters, buffers and results (up to rounding) everywhere. torch's own kernel adds the
    values of a channel one by one in the tensor's precision: over the 200,000 values of a training
    step's first block its variance is off by 1e-3 (float32). In evaluation, on other devices, in
    other layouts, and in compiled or transformed code it is torch's own all the same.

    Example:
        >>> BatchNorm(4)(torch.randn(2, 4, 3, 3)).mean().abs().item() < 1e-6
        True
    """

    def forward(self, input: Tensor, relu: bool = False) -> Tensor:
        """Normalises (N, C, H, W).

        Args:
            input: the tensor to normalise.
            relu: whether to apply ReLU first; the input may then be overwritten.

        Returns:
            A new tensor in the same layout.
        """
        if not self.by_kernel(input):
            return super().forward(torch.relu_(input) if relu else input)
        z, mean, variance = norm_relu(input, self.weight, self.bias, eps=self.eps, relu=relu)
        self.track(mean, variance, input.numel() // input.shape[1])
        return z

    def by_kernel(self, x: Tensor) -> bool:
        """Whether `ca3d_kernels` normalises x, and not torch.

        Args:
            x: the tensor to normalise.

        Returns:
            True in training on a CPU, in eager code, for a `channels_last` tensor.

        Example:
            >>> x = torch.zeros(2, 4, 3, 3).to(memory_format=torch.channels_last)
            >>> BatchNorm(4).by_kernel(x), BatchNorm(4).eval().by_kernel(x)
            (True, False)
        """
        return (
            self.training
            and self.affine
            and x.device.type == "cpu"
            and x.dtype in _DTYPES
            and x.dim() == 4
            and x.numel() > x.shape[1]
            and x.movedim(1, -1).is_contiguous()
            and not torch.compiler.is_compiling()
            and not torch._C._are_functorch_transforms_active()
            and forward_ad._current_level < 0
        )

    def track(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Updates the running statistics as `torch.nn.BatchNorm2d` does.

        Args:
            mean, variance: of a batch, (C,); the variance is the biased one.
            count: values of each channel.

        Example:
            >>> norm = BatchNorm(1)
            >>> norm.track(torch.ones(1), torch.ones(1), 2)
            >>> norm.running_mean.item(), norm.running_var.item()
            (0.10000000149011612, 1.100000023841858)
        """
        track_statistics(self, mean, variance, count)


@torch.no_grad()
def track_statistics(norm: _BatchNorm, mean: Tensor, variance: Tensor, count: int) -> None:
    """Updates a normalisation's running statistics as torch's own modules do.

    Args:
        norm: any batch normalisation.
        mean, variance: of a batch, (C,); the variance is the biased one.
        count: values of each channel.

    Example:
        >>> norm = nn.BatchNorm1d(1)
        >>> track_statistics(norm, torch.ones(1), torch.ones(1), 2)
        >>> norm.num_batches_tracked.item()
        1
    """
    if norm.running_mean is None or norm.running_var is None:
        return
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    momentum = norm.momentum
    if momentum is None:
        momentum = 1 / norm.num_batches_tracked.item()
    unbiased = variance * (count / (count - 1))
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
    norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), momentum)


def fuses(y: Tensor, norm: nn.Module, conv: nn.Module | None = None) -> bool:
    """Whether normalisation and convolution run as one op instead of module by module.

    Args:
        y: the tensor to normalise.
        norm: the normalisation.
        conv: the convolution after it, or None.

    Returns:
        True if the kernels take y and both modules are plain ones: a hook wants to see the tensors
        between them.

    Example:
        >>> x = torch.zeros(2, 4, 3, 3).to(memory_format=torch.channels_last)
        >>> fuses(x, BatchNorm(4), nn.Conv2d(4, 4, 1)), fuses(x, nn.BatchNorm2d(4))
        (True, False)
    """
    if not isinstance(norm, BatchNorm) or hooked(norm) or not norm.by_kernel(y):
        return False
    if conv is None:
        return True
    if not isinstance(conv, nn.Conv2d) or type(conv).forward is not nn.Conv2d.forward:
        return False
    plain = conv.padding_mode == "zeros" and conv.dilation == (1, 1)
    autocast = torch.is_autocast_enabled("cpu")
    same = autocast or (conv.weight.dtype == y.dtype and conv.weight.device == y.device)
    return plain and same and not isinstance(conv.padding, str) and not hooked(conv)


def hooked(module: nn.Module) -> bool:
    """Whether calling a module runs more than its `forward`.

    Example:
        >>> hooked(nn.Identity())
        False
    """
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or nn.modules.module._has_any_global_hook()
    )


def normalise(
    y: Tensor, norm: nn.Module, residual: Tensor | None = None, *, relu: bool = True
) -> Tensor:
    """``norm(relu(y)) + residual``, the step that follows every convolution.

    Args:
        y: (N, C, H, W); it may be overwritten if `relu`.
        norm: a `BatchNorm`, or any other module in its place.
        residual: of y's shape, or None.
        relu: False for ``norm(y) + residual``.

    Returns:
        A new tensor of y's shape and layout.

    Example:
        >>> normalise(torch.randn(2, 4, 3, 3), BatchNorm(4)).shape
        torch.Size([2, 4, 3, 3])
    """
    if fuses(y, norm):
        assert isinstance(norm, BatchNorm)
        z, mean, variance = norm_relu(y, norm.weight, norm.bias, residual, eps=norm.eps, relu=relu)
        norm.track(mean, variance, y.numel() // y.shape[1])
        return z
    if relu and isinstance(norm, BatchNorm):
        z = norm(y, relu=True)
    else:
        z = norm(torch.relu_(y) if relu else y)
    return z if residual is None else z.add_(residual)


def normalise_and_convolve(
    y: Tensor,
    norm: nn.Module,
    conv: nn.Module,
    residual: Tensor | None = None,
    *,
    relu: bool = True,
    return_z: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``conv(z)`` and z, with ``z = norm(relu(y)) + residual``.

    Args:
        y, norm, residual, relu: as in `normalise`.
        conv: the convolution.
        return_z: whether z is wanted, too.

    Returns:
        The convolution's output, and z or None.

    Example:
        >>> y = torch.randn(2, 4, 3, 3)
        >>> normalise_and_convolve(y, BatchNorm(4), nn.Conv2d(4, 8, 1))[0].shape
        torch.Size([2, 8, 3, 3])
    """
    if not fuses(y, norm, conv):
        z = normalise(y, norm, residual, relu=relu)
        return conv(z), z if return_z else None
    assert isinstance(norm, BatchNorm)
    assert isinstance(conv, nn.Conv2d)
    assert not isinstance(conv.padding, str)
    result = norm_relu_conv(
        y,
        norm.weight,
        norm.bias,
        conv.weight,
        conv.bias,
        residual,
        stride=conv.stride,
        padding=conv.padding,
        groups=conv.groups,
        eps=norm.eps,
        relu=relu,
        return_z=return_z,
    )
    norm.track(result.mean, result.variance, y.numel() // y.shape[1])
    return result.output, result.z
