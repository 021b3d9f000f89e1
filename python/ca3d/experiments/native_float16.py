"""Training in torch's own float16, as a check on what this package stores in float16."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ca3d.precision import Regime, Step
from ca3d.precision.regime import total_norm

__all__ = ["NativeFloat16"]


class NativeFloat16(Regime):
    """`model.half()` and `torch.optim.SGD`: every operation is torch's own, in float16.

    Convolutions and sums are then formed as torch sees fit; on a CPU that is slow. Steps with a
    gradient that is not finite are skipped.

    Args:
        loss_factor: What the loss is multiplied by; gradients are divided by it, in float16.

    Example:
        >>> regime = NativeFloat16()
        >>> layer = regime.prepare(nn.Linear(2, 2))
        >>> regime.forward(layer, torch.ones(1, 2)).dtype
        torch.float16
    """

    name: ClassVar[str] = "native-float16"
    compact: ClassVar[bool] = True

    def __init__(self, loss_factor: float = 1.0) -> None:
        self.loss_factor = loss_factor

    def prepare(self, model: nn.Module) -> nn.Module:
        """Converts all floating-point tensors of the model to float16."""
        return model.half()

    def autocast(self, device_type: str) -> AbstractContextManager[Any]:
        """Returns a context that changes nothing."""
        return nullcontext()

    def forward(self, model: nn.Module, clips: Tensor) -> Tensor:
        """Runs the model on clips rounded to float16; returns float16 logits."""
        return model(clips.half())

    def backward(self, loss: Tensor) -> None:
        """Accumulates the gradients of the loss times `loss_factor`."""
        (loss * self.loss_factor).backward()

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Iterable[nn.Parameter],
        clip_norm: float | None = None,
    ) -> Step:
        """Divides the gradients by `loss_factor` and steps, unless one is not finite."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.loss_factor != 1:
            torch._foreach_div_(gradients, self.loss_factor)
        norm = total_norm(gradients)
        applied = norm < float("inf")
        if applied:
            if clip_norm is not None and norm > clip_norm:
                torch._foreach_mul_(gradients, clip_norm / norm)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return Step(applied, norm)
