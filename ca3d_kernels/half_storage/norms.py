"""Normalisations with running statistics, which a second evaluation must not update again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ca3d_kernels.half_storage.recomputed import recomputed


def batch_norm(
    function: Callable[..., Any],
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm` in float32."""
    return _tracked(
        function, input, running_mean, running_var, weight, bias, training, momentum, eps
    )


def instance_norm(
    function: Callable[..., Any],
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.instance_norm` in float32."""
    return _tracked(
        function, input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
    )


def _tracked(
    function: Callable[..., Any],
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    own: bool,
    *options: float,
) -> Tensor:
    """Updates the running statistics at the first evaluation, and not at the second."""
    if not own or running_mean is None or running_var is None:
        return recomputed(function, input, running_mean, running_var, weight, bias, own, *options)
    running: list[Tensor] = [running_mean, running_var]

    def normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if not running:
            return function(x, None, None, weight, bias, True, *options)
        wide = [statistic.float() for statistic in running]
        y = function(x, *wide, weight, bias, True, *options)
        with torch.no_grad():
            for statistic, value in zip(running, wide, strict=True):
                statistic.copy_(value)
        running.clear()
        return y

    return recomputed(normalise, input, weight, bias)
