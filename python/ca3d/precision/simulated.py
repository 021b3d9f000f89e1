"""float32 training of models that are to be used in float16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_hook

from ca3d.precision.regime import Float32, check_clips
from ca3d_kernels.half_storage import HalfStorage

__all__ = ["FakeQuant", "PtqFloat16", "rounded"]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.half().to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def rounded(x: Tensor) -> Tensor:
    """x rounded to float16 and back; the gradient passes as if it were not.

    Args:
        x: any shape, floating.

    Returns:
        A new tensor of x's dtype.

    Example:
        >>> rounded(torch.tensor([1.0001])).item()
        1.0
    """
    return _StraightThrough.apply(x)


class FakeQuant(Float32):
    """float32 is stored and computed; weights and the outputs of all layers are rounded to float16
    on their way, with straight-through gradients.

    Example:
        >>> regime = FakeQuant()
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.constant_(layer.weight, 1.0001)
        >>> regime.forward(layer, torch.ones(1, 1)).item()
        1.0
    """

    name = "fake-quant"

    def forward(self, model: nn.Module, clips: Tensor) -> Tensor:
        """Runs the model with rounded weights and activations; returns float32 logits."""
        check_clips(clips)
        weights = {name: rounded(p) for name, p in model.named_parameters()}
        with _rounding_outputs():
            logits: Tensor = functional_call(model, weights, (rounded(clips),))
        return logits


@contextmanager
def _rounding_outputs() -> Iterator[None]:
    def round_output(module: nn.Module, inputs: Any, output: Any) -> Any:
        is_layer = next(module.children(), None) is None
        return rounded(output) if is_layer and isinstance(output, Tensor) else None

    handle = register_module_forward_hook(round_output)
    try:
        yield
    finally:
        handle.remove()


class PtqFloat16(Float32):
    """Trained in float32, used in float16: validation, test and the weights files see the weights
    cast to float16. To fine-tune the result, train in `float16` from its file.

    Example:
        >>> PtqFloat16().forward(nn.Linear(1, 1).eval(), torch.ones(1, 1)).dtype
        torch.float16
    """

    name = "ptq-float16"
    file_dtype = torch.float16

    def forward(self, model: nn.Module, clips: Tensor) -> Tensor:
        """Runs the model in float32 in training, cast to float16 in evaluation."""
        if model.training:
            return super().forward(model, clips)
        check_clips(clips)
        cast = {
            name: x.half() if x.is_floating_point() else x for name, x in model.state_dict().items()
        }
        with HalfStorage():
            logits: Tensor = functional_call(model, cast, (clips.half(),))
        return logits
