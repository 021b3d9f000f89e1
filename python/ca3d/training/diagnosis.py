"""Finding out where a model's numbers stop being finite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ca3d.precision import Regime


@torch.no_grad()
def first_nonfinite(model: nn.Module, regime: Regime, clips: Tensor) -> str:
    """Names the first layer whose output holds an infinity or NaN.

    The pass runs in the model's present mode, so BatchNorm's running statistics may change.

    Args:
        model: The model.
        regime: The precision to compute in.
        clips: (batch, 3, frames, height, width), the input that failed.

    Returns:
        The layer's name, "the input" or "the loss".

    Example:
        >>> from ca3d.precision import create
        >>> model = nn.Sequential(nn.Identity(), nn.Identity())
        >>> first_nonfinite(model, create("float32"), torch.tensor([1.0, float("inf")]))
        'the input'
    """
    if not bool(clips.isfinite().all()):
        return "the input"
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not bool(output.isfinite().all()):
                found.append(name)

        return hook

    handles = [
        module.register_forward_hook(watch(name))
        for name, module in model.named_modules()
        if not list(module.children())
    ]
    try:
        regime.forward(model, clips)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "the loss"


def last_nonfinite_gradient(model: nn.Module) -> str | None:
    """Names the parameter nearest to the loss whose gradient holds an infinity or NaN.

    The backward pass begins there: what is not finite spreads from it to the layers in front.

    Args:
        model: A model with gradients.

    Returns:
        "the gradient of NAME", or None where all are finite.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> layer.bias.grad = torch.tensor([float("nan")])
        >>> last_nonfinite_gradient(layer)
        'the gradient of bias'
    """
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
            return f"the gradient of {name}"
    return None
