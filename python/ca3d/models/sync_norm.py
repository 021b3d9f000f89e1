"""Batch normalisation by the statistics of all processes of a distributed run."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from ca3d.models.norm import track_statistics

__all__ = ["SyncBatchNorm", "synchronise"]


class SyncBatchNorm(_BatchNorm):
    """Batch normalisation whose mean and variance are those of the whole global batch.

    torch's own has no CPU path, and none for parameters in half precision; this one runs wherever
    torch.distributed does. What is kept for the gradient is the input and O(channels) numbers;
    half precision is computed in float32 and rounded once; statistics are combined in float64, in
    the order of the processes, so that all of them hold the same bits. In evaluation, and where
    there is a single process, it is `torch.nn.BatchNorm` itself.

    Example:
        >>> norm = SyncBatchNorm(4)
        >>> norm(torch.randn(2, 4, 3, 3)).mean().abs().item() < 1e-6
        True
    """

    @property
    def processes(self) -> int:
        """Number of processes whose clips are normalised together."""
        return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"input must have shape (N, C, ...), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalises (N, C, ...); in training every process must call it."""
        self._check_input_dim(input)
        if not self.training or self.processes == 1:
            return super().forward(input)
        z, mean, variance, count = _Normalise.apply(input, self.weight, self.bias, self.eps)
        track_statistics(self, mean, variance, int(count))
        return z


def synchronise(model: nn.Module) -> nn.Module:
    """Replaces every batch normalisation in a model by a `SyncBatchNorm` of the same parameters.

    Names in the state dict stay as they were.

    Args:
        model: Changed in place, unless it is a batch normalisation itself.

    Returns:
        The model.

    Example:
        >>> model = synchronise(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
        >>> type(model[1]).__name__, list(model.state_dict())[2]
        ('SyncBatchNorm', '1.weight')
    """
    if isinstance(model, _BatchNorm) and not isinstance(model, SyncBatchNorm):
        norm = SyncBatchNorm(
            model.num_features,
            model.eps,
            model.momentum,
            model.affine,
            model.track_running_stats,
        )
        norm.weight, norm.bias = model.weight, model.bias
        norm.running_mean, norm.running_var = model.running_mean, model.running_var
        norm.num_batches_tracked = model.num_batches_tracked
        return norm.train(model.training)
    for name, child in model.named_children():
        changed = synchronise(child)
        if changed is not child:
            setattr(model, name, changed)
    return model


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = _computed(x)
        mean, variance, count = _global_statistics(x, wide)
        scale = (variance + eps).rsqrt()
        if weight is not None:
            scale = scale * weight.double()
        z = x.to(wide) - _column(mean, x, wide)
        z *= _column(scale, x, wide)
        if bias is not None:
            z += _column(bias, x, wide)
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps, ctx.count = eps, count
        number = torch.tensor(count, dtype=torch.int64)
        ctx.mark_non_differentiable(mean, variance, number)
        return z.to(x.dtype), mean, variance, number

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance = ctx.saved_tensors
        wide, inverse = _computed(x), (variance + ctx.eps).rsqrt()
        normalised = x.to(wide) - _column(mean, x, wide)
        normalised *= _column(inverse, x, wide)
        dz = dz.to(wide)
        own = torch.stack([_sum(dz), _sum(dz * normalised)])
        everyone = own.clone()
        dist.all_reduce(everyone)
        of_one = everyone / ctx.count
        scale = inverse if weight is None else inverse * weight.double()
        dx = dz - _column(of_one[0], x, wide)
        dx -= normalised.mul_(_column(of_one[1], x, wide))
        dx *= _column(scale, x, wide)
        dweight = None if weight is None else own[1].to(weight.dtype)
        dbias = own[0].to(weight.dtype) if weight is not None else None
        return dx.to(x.dtype), dweight, dbias, None


def _computed(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _column(values: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype).view(1, -1, *(1,) * (x.dim() - 2))


def _sum(x: Tensor) -> Tensor:
    """Sums over all dimensions but the channels, (C,) in float64; sample by sample first."""
    places = list(range(2, x.dim()))
    return (x.sum(places) if places else x).double().sum(0)


def _global_statistics(x: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance of every channel over all processes, (C,) in float64; the count."""
    places = list(range(2, x.dim()))
    if places:
        variances, means = torch.var_mean(x.to(wide), places, correction=0)
    else:
        variances, means = torch.zeros_like(x, dtype=wide), x.to(wide)
    variances, means = variances.double(), means.double()
    mean = means.mean(0)
    variance = (variances + (means - mean).square()).mean(0)
    count = mean.new_full((1,), x.numel() // x.shape[1])
    own = torch.cat([count, mean, variance])
    rows = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, own)
    table = torch.stack(rows)
    counts, parts = table[:, :1], table[:, 1:].unflatten(1, (2, -1))
    total = counts.sum()
    mean = (counts * parts[:, 0]).sum(0) / total
    variance = (counts * (parts[:, 1] + (parts[:, 0] - mean).square())).sum(0) / total
    return mean, variance, int(total)
