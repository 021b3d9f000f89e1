"""Initial values of CA3D's parameters."""

import math

import torch
from torch import Generator, nn

from ca3d.models.blocks import PositionalTable
from ca3d_kernels import LocalTemporalAttention

__all__ = ["initialize"]


@torch.no_grad()
def initialize(model: nn.Module, generator: Generator | None = None) -> None:
    """Draws the initial parameters of a CA3D model.

    Convolutions and per-head projections are Xavier-normal as matrices (outputs of all heads,
    inputs of one head times kernel): ``std = sqrt(2 / (fan_in + fan_out))``, with biases 0. So is
    the positional table as (channels, frames). The classifier is ``N(0, 2 / features)`` with its
    bias uniform in ``±features**-0.5``. Normalisations start at weight 1 and bias 0.

    The draws follow the order of `model.modules()`: for each spatial half its convolution, then
    those of its column; the positional table before the first temporal half; for each temporal
    half its projection, then its column; last the classifier's bias, then its weight. (Building a
    model draws torch's own initial values first, which these replace.)

    Args:
        model: a `ca3d.models.CA3D`.
        generator: source of the random numbers; None for torch's global one.

    Example:
        >>> from ca3d.models import ca3d_tiny
        >>> model = ca3d_tiny(num_classes=5)
        >>> initialize(model, torch.Generator().manual_seed(0))
        >>> model.layers["spatial1"].conv.bias.abs().max().item()
        0.0
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is not None
            _xavier_normal(module.weight, module.weight[0].numel(), generator)
            module.bias.zero_()
        elif isinstance(module, PositionalTable):
            _xavier_normal(module.weight, module.weight.shape[1], generator)
        elif isinstance(module, LocalTemporalAttention):
            assert module.qkv_bias is not None
            _xavier_normal(module.qkv_weight, module.qkv_weight.shape[-1], generator)
            module.qkv_bias.zero_()
        elif isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            module.bias.uniform_(-bound, bound, generator=generator)
            module.weight.normal_(0, math.sqrt(2 / module.in_features), generator=generator)


def _xavier_normal(weight: torch.Tensor, fan_in: int, generator: Generator | None) -> None:
    fan_out = weight.numel() // fan_in
    weight.normal_(0, math.sqrt(2 / (fan_in + fan_out)), generator=generator)
