"""Batch normalisation of channels-last tensors with accurate statistics, fused with ReLU.

torch's own kernel for channels-last tensors on the CPU adds the values of a channel one by one in
the tensor's precision: over the 200,000 values of a training step's first block the variance is
off by 1e-3 (float32). Here the rows of the (pixels, channels) matrix are folded, many of them
side by side as if they were more channels, so that the same kernel makes many short sums, which
are then put together in float64: the same time, an error near float32's rounding.
"""

import math
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

__all__ = ["BatchNorm", "channel_statistics", "relu_norm"]

_FOLD = 256


def channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel.

    Args:
        x: (N, C, H, W), physically `channels_last`, float32 or float64.

    Returns:
        Mean and variance, (C,), in float64.

    Example:
        >>> x = torch.tensor([[[[1.0, 3.0]]]]).to(memory_format=torch.channels_last)
        >>> channel_statistics(x)
        (tensor([2.], dtype=torch.float64), tensor([1.], dtype=torch.float64))
    """
    channels, rows = x.shape[1], x.numel() // x.shape[1]
    fold = math.gcd(rows, _FOLD)
    # (pixels, channels) read as (pixels / fold, fold * channels), shown to the kernel as an image.
    folded = x.movedim(1, -1).reshape(1, rows // fold, 1, fold * channels).movedim(-1, 1)
    means, variances = torch.batch_norm_update_stats(folded, None, None, 0.0)
    # The variance of all is the mean of the variances and the variance of the means.
    between, mean = torch.var_mean(means.view(fold, channels).double(), 0, correction=0)
    within = variances.view(fold, channels).mean(0, dtype=torch.float64)
    return mean, within.add_(between)


class BatchNorm(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` with the statistics of `channel_statistics` in training on a CPU.

    Same parameters, buffers and results (up to rounding) everywhere; in evaluation, on other
    devices, in other dtypes and layouts, and in compiled or transformed code it is torch's own.

    Example:
        >>> BatchNorm(4)(torch.randn(2, 4, 3, 3)).mean().abs().item() < 1e-6
        True
    """

    def forward(self, input: Tensor, relu: bool = False) -> Tensor:
        """Normalises (N, C, H, W).

        Args:
            input: the tensor to normalise.
            relu: whether to apply ReLU first, in place.

        Returns:
            A new tensor in the same layout.
        """
        if not self._accurate(input):
            return super().forward(torch.relu_(input) if relu else input)
        return self._normalise(input, relu)

    def _accurate(self, x: Tensor) -> bool:
        return (
            self.training
            and self.affine
            and x.device.type == "cpu"
            and x.dtype in (torch.float32, torch.float64)
            and x.dtype == self.weight.dtype
            and x.dim() == 4
            and x.numel() > x.shape[1]
            and x.movedim(1, -1).is_contiguous()
            and not torch.compiler.is_compiling()
            and not torch._C._are_functorch_transforms_active()
            and forward_ad._current_level < 0
        )

    def _normalise(self, x: Tensor, relu: bool) -> Tensor:
        if relu:
            # Behind autograd's back, but not behind its version counters: the convolution that made
            # x doesn't need it again, and `_Normalise` accounts for the derivative.
            with torch.no_grad():
                torch.relu_(x)
        with torch.no_grad():
            mean, variance = channel_statistics(x)
            self._track(mean, variance, x.numel() // x.shape[1])
        y: Tensor = _Normalise.apply(x, self.weight, self.bias, mean, variance, self.eps, relu)
        return y

    def _track(self, mean: Tensor, variance: Tensor, count: int) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:
            momentum = 1 / self.num_batches_tracked.item()
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        unbiased = variance * (count / (count - 1))
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)


class _Normalise(torch.autograd.Function):
    """Batch normalisation by given batch statistics; saves nothing but its input.

    With `relu`, x is the already rectified input, and the gradient is the one before the ReLU.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        variance: Tensor,
        eps: float,
        relu: bool,
    ) -> Tensor:
        deviation_inverse = (variance + eps).rsqrt().to(x.dtype)
        mean, variance = mean.to(x.dtype), variance.to(x.dtype)
        ctx.save_for_backward(x, weight, mean, deviation_inverse)
        ctx.eps, ctx.relu = eps, relu
        # With training=False torch takes the statistics that it is given.
        return torch.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, eps)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, deviation_inverse = ctx.saved_tensors
        differentiated_again = torch.is_grad_enabled()
        if ctx.relu and differentiated_again:
            x = torch.relu(x)
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, None, None, mean, deviation_inverse, True, ctx.eps, [True, True, True]
        )
        if ctx.relu:
            if differentiated_again:
                grad_x = torch.ops.aten.threshold_backward(grad_x, x, 0)
            else:
                torch.ops.aten.threshold_backward.grad_input(grad_x, x, 0, grad_input=grad_x)
        return grad_x, grad_weight, grad_bias, None, None, None, None


def relu_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """``norm(relu(x))``, the step that follows every convolution; overwrites x.

    Args:
        x: (N, C, H, W), an output that nothing else needs.
        norm: a `BatchNorm`, or any other module in its place.

    Returns:
        The normalised tensor, of x's shape and layout.

    Example:
        >>> relu_norm(torch.randn(2, 4, 3, 3), BatchNorm(4)).shape
        torch.Size([2, 4, 3, 3])
    """
    y: Tensor = norm(x, relu=True) if isinstance(norm, BatchNorm) else norm(torch.relu_(x))
    return y
