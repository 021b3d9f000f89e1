"""The interface between the trainer and a precision, and the two plain regimes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Step:
    """What an optimizer step did.

    Args:
        applied: Whether the parameters changed; False when a gradient was not finite.
        gradient_norm: L2 norm of all gradients before clipping.

    Example:
        >>> Step(applied=True, gradient_norm=1.5).applied
        True
    """

    applied: bool
    gradient_norm: float


class Regime:
    """Everything about training that depends on precision.

    The trainer calls `prepare` once, `optimizer` once, and then for every batch `forward`,
    `backward` and `step`. A subclass overrides what its precision does differently: storage in
    `prepare`, a loss factor in `backward`, an optimizer that steps something else than the
    parameters in `optimizer`.

    Example:
        >>> regime = Float32()
        >>> layer = regime.prepare(nn.Linear(2, 2))
        >>> sgd = regime.optimizer("sgd", layer.parameters(), lr=0.1)
        >>> regime.backward(regime.forward(layer, torch.ones(1, 2)).sum())
        >>> regime.step(sgd, layer.parameters()).applied
        True
    """

    name: ClassVar[str]
    #: Dtype of the weights files; None is that of the model.
    file_dtype: ClassVar[torch.dtype | None] = None
    #: Whether it is chosen for its small memory: training then starts with `return_freed_memory`.
    compact: ClassVar[bool] = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def prepare(self, model: nn.Module) -> nn.Module:
        """Converts the freshly made or loaded model to the dtypes of this regime."""
        return model

    def autocast(self, device_type: str) -> AbstractContextManager[Any]:
        """Returns the context in which the forward pass runs on "cpu" or "cuda"."""
        return nullcontext()

    def forward(self, model: nn.Module, clips: Tensor) -> Tensor:
        """Runs the model.

        Args:
            model: What `prepare` returned.
            clips: (batch, 3, frames, height, width), float32, normalised.

        Returns:
            (batch, classes) logits in the dtype that the regime stores activations in.
        """
        with self.autocast(clips.device.type):
            return model(clips).float()

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Cross-entropy, computed in float32.

        Args:
            logits: What `forward` returned.
            labels: (batch,) class numbers.
            weight: (classes,) weights, or None.
            label_smoothing: 0 to 1.

        Returns:
            A float32 scalar.
        """
        return F.cross_entropy(
            logits.float(), labels, weight=weight, label_smoothing=label_smoothing
        )

    def backward(self, loss: Tensor) -> None:
        """Accumulates the gradients of `loss`, a scalar."""
        loss.backward()

    def optimizer(
        self,
        kind: str,
        parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
    ) -> torch.optim.Optimizer:
        """Makes the optimizer.

        Args:
            kind: "sgd" or "adamw".
            parameters: The parameters to train, or groups of them as torch's optimizers take.
            lr: Base learning rate.
            momentum: SGD's momentum, AdamW's first beta.
            weight_decay: L2 (SGD) or decoupled (AdamW) weight decay.

        Returns:
            An ordinary torch optimizer; its state_dict is part of a resume file.

        Raises:
            ValueError: An unknown kind.
        """
        made: torch.optim.Optimizer
        if kind == "sgd":
            made = torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)
        elif kind == "adamw":
            made = torch.optim.AdamW(
                parameters, lr=lr, betas=(momentum, 0.999), weight_decay=weight_decay
            )
        else:
            raise ValueError(f"optimizer must be sgd or adamw, not {kind!r}")
        made.register_load_state_dict_pre_hook(_refuse_pre_parameters)
        return made

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Iterable[nn.Parameter],
        clip_norm: float | None = None,
    ) -> Step:
        """Steps the optimizer unless a gradient is not finite, and clears the gradients.

        Args:
            optimizer: What `optimizer` returned.
            parameters: The parameters whose gradients count.
            clip_norm: Gradients are scaled down to this L2 norm; None leaves them.

        Returns:
            Whether the step was taken, and the norm of the gradients.
        """
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = total_norm(gradients)
        applied = math.isfinite(norm)
        if applied:
            if clip_norm is not None and norm > clip_norm:
                torch._foreach_mul_(gradients, clip_norm / norm)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return Step(applied, norm)

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs to know of this regime besides model and optimizer."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""


def check_clips(clips: Tensor) -> None:
    """Refuses clips that a cast to float16 would make look like normalised ones.

    Raises:
        TypeError: not a floating-point tensor.

    Example:
        >>> check_clips(torch.zeros(1, dtype=torch.uint8))
        Traceback (most recent call last):
        TypeError: clips must be a floating-point tensor (normalised), got torch.uint8
    """
    if not clips.is_floating_point():
        raise TypeError(f"clips must be a floating-point tensor (normalised), got {clips.dtype}")


def _refuse_pre_parameters(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """torch would take such a state and start from momenta of zero."""
    for i, group in enumerate(state["param_groups"]):
        if "mapping" in group:
            raise ValueError(
                f"state_dict holds pre-parameters of {group['mapping']} in group {i}, which "
                f"{type(optimizer).__name__} has no use for: resume in the regime that saved it"
            )


def total_norm(gradients: Sequence[Tensor]) -> float:
    """L2 norm of all elements of all tensors, accumulated in float32 at least.

    Example:
        >>> total_norm([torch.full((4,), 60000.0).half()])
        120000.0
    """
    if not gradients:
        return 0.0
    norms = [
        torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32))
        for g in gradients
    ]
    return float(torch.linalg.vector_norm(torch.stack(norms)))


class Float32(Regime):
    """Weights, activations, gradients and optimizer state are stored and computed in float32.

    Example:
        >>> Float32().name
        'float32'
    """

    name = "float32"

    def prepare(self, model: nn.Module) -> nn.Module:
        """Converts all floating-point tensors of the model to float32."""
        return model.float()


class Bfloat16(Regime):
    """Weights, gradients and optimizer state in float32; convolutions, linear maps and attention
    run in bfloat16 by autocast, which stores their activations in bfloat16.

    Example:
        >>> Bfloat16().forward(nn.Linear(2, 2), torch.ones(1, 2)).dtype
        torch.float32
    """

    name = "bfloat16"

    def prepare(self, model: nn.Module) -> nn.Module:
        """Converts all floating-point tensors of the model to float32."""
        return model.float()

    def autocast(self, device_type: str) -> AbstractContextManager[Any]:
        """Returns torch's bfloat16 autocast for the device type."""
        return torch.autocast(device_type, torch.bfloat16)
