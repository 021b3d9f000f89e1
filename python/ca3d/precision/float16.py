"""Training and inference that store nothing wider than float16, by pre-parameters."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ca3d.errors import UserError
from ca3d.precision.regime import Regime, Step, check_clips, total_norm
from ca3d_kernels import LinearMapping, PreParamMapping, PreParamSGD, published_mapping
from ca3d_kernels.half_storage import HalfStorage, half_storage

ROUNDINGS = ("nearest", "stochastic", "compensated", "published")

__all__ = ["QAT", "Float16", "Float16Published", "Float16Root", "Float16Sqr", "RawFloat16"]


class Float16(Regime):
    """Everything is stored in float16 (paper, section 3): weights, activations, gradients,
    pre-parameters, momentum and the running statistics of normalisations. Sums run in float32.

    The optimizer steps theta = 128 w and rounds each stored value once. The loss is multiplied by
    128, so that small gradients don't vanish; the map takes the factor out again. Wider than
    float16 are O(channels) statistics and scalars, while a step runs. On a CPU, convolutions and
    what else torch can't do in half precision run in float32 on transient copies
    (`ca3d_kernels.half_storage`); on a GPU they are torch's own half kernels.

    Args:
        constant: c of theta = c w; None is the regime's own.
        loss_factor: What the loss is multiplied by; None is the regime's own.
        rounding: Of the optimizer's step, see `ca3d_kernels.PreParamSGD`; None is the regime's own.
            Stochastic rounding draws from `torch.initial_seed()`, the seed of the run.

    Raises:
        ValueError: A number is not positive and finite, the rounding is unknown, or the regime's
            map is not linear and so has no constant.
        TypeError: A number is none.

    Example:
        >>> regime = Float16()
        >>> layer = regime.prepare(nn.Linear(2, 2))
        >>> sgd = regime.optimizer("sgd", layer.parameters(), lr=0.1)
        >>> logits = regime.forward(layer, torch.ones(1, 2))
        >>> regime.backward(regime.loss(logits, torch.tensor([1])))
        >>> regime.step(sgd, layer.parameters()).applied, layer.weight.dtype
        (True, torch.float16)
    """

    name: ClassVar[str] = "float16"
    mapping: PreParamMapping = LinearMapping(128.0, loss_factor=128.0)
    rounding: str = "nearest"
    pre_param_dtype: ClassVar[torch.dtype] = torch.float16
    compact: ClassVar[bool] = True

    def __init__(
        self,
        *,
        constant: float | None = None,
        loss_factor: float | None = None,
        rounding: str | None = None,
    ) -> None:
        if constant is not None or loss_factor is not None:
            if not isinstance(self.mapping, LinearMapping):
                raise ValueError(
                    f"precision {self.name} has a map of its own: constant and loss_factor must be"
                    f" left out, got {constant!r} and {loss_factor!r}"
                )
            self.mapping = LinearMapping(
                self.mapping.scale if constant is None else constant,
                self.mapping.loss_factor if loss_factor is None else loss_factor,
            )
        if rounding is not None:
            if rounding not in ROUNDINGS:
                raise ValueError(
                    f"rounding must be one of {', '.join(ROUNDINGS)}, not {rounding!r}"
                )
            self.rounding = rounding

    @property
    def loss_factor(self) -> float:
        """What `backward` multiplies the loss by; the map divides gradients by it."""
        return float(getattr(self.mapping, "loss_factor", 1.0))

    def prepare(self, model: nn.Module) -> nn.Module:
        """Converts all floating-point tensors of the model to float16.

        Raises:
            ca3d.errors.UserError: A value is beyond float16's range, or a parameter of a lazy
                module has no values yet.
        """
        for name, x in model.state_dict().items():
            if nn.parameter.is_lazy(x):
                raise UserError(
                    f"{name} has no values yet (a lazy module): run the model on one batch before "
                    f"precision {self.name} takes it"
                )
            if x.is_floating_point() and bool((x.half().isinf() & x.isfinite()).any()):
                raise UserError(
                    f"{name} holds values up to {float(x.abs().max()):.3g}, and float16 holds "
                    f"none beyond {torch.finfo(torch.float16).max:.0f}: precision {self.name} "
                    "can't store this model"
                )
        return model.half()

    def autocast(self, device_type: str) -> AbstractContextManager[Any]:
        """Returns the context in which torch's functions store in float16."""
        return HalfStorage()

    def forward(self, model: nn.Module, clips: Tensor) -> Tensor:
        """Runs the model on clips rounded to float16; returns float16 logits."""
        check_clips(clips)
        with self.autocast(clips.device.type):
            return model(clips.half())

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Cross-entropy, computed in float32; of the logits it keeps the float16 ones."""
        if logits.device.type != "cpu":
            return super().loss(logits, labels, weight=weight, label_smoothing=label_smoothing)
        return _cross_entropy(logits, labels, weight, label_smoothing)

    def backward(self, loss: Tensor) -> None:
        """Accumulates the gradients of the loss times `loss_factor`."""
        (loss * self.loss_factor).backward()

    def optimizer(
        self,
        kind: str,
        parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
    ) -> torch.optim.Optimizer:
        """Makes a `ca3d_kernels.PreParamSGD` that skips steps that would store a non-finite value.

        Raises:
            ValueError: A kind other than "sgd".
        """
        if kind != "sgd":
            raise ValueError(f"optimizer must be sgd with precision {self.name}, not {kind!r}")
        return PreParamSGD(
            parameters,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            mapping=self.mapping,
            rounding=self.rounding,
            pre_param_dtype=self.pre_param_dtype,
            seed=torch.initial_seed() % 2**63,
            skip_nonfinite=True,
        )

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Iterable[nn.Parameter],
        clip_norm: float | None = None,
    ) -> Step:
        """Steps the pre-parameters unless a value that would be stored is not finite.

        The norm is that of the gradients without `loss_factor`.
        """
        assert isinstance(optimizer, PreParamSGD)
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = total_norm(gradients) / self.loss_factor
        if clip_norm is not None and norm > clip_norm and norm != float("inf"):
            torch._foreach_mul_(gradients, clip_norm / norm)
        before = optimizer.skipped_steps
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return Step(optimizer.skipped_steps == before, norm)


def _cross_entropy(
    logits: Tensor, labels: Tensor, weight: Tensor | None, label_smoothing: float
) -> Tensor:
    def negative_log_likelihood(logits: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, labels, weight=weight, label_smoothing=label_smoothing)
        return loss.double()  # `half_storage` rounds float32 results, and leaves others alone

    return half_storage(negative_log_likelihood)(logits).float()


class RawFloat16(Float16):
    """As `Float16` without its two means: the optimizer steps theta = w, the loss has no factor.

    Example:
        >>> RawFloat16().loss_factor
        1.0
    """

    name = "raw-float16"
    mapping = LinearMapping(1.0)


class Float16Published(Float16):
    """As `Float16` with the published code's constants and roundings: theta = 100 w, the loss times
    0.1, gradients times 1000; every operation of the step is rounded to float16.

    Example:
        >>> Float16Published().loss_factor
        0.1
    """

    name = "float16-published"
    mapping = published_mapping("f16")
    rounding = "published"


class Float16Sqr(Float16Published):
    """As `Float16Published`, with the published quadratic map.

    Example:
        >>> Float16Sqr().rounding
        'published'
    """

    name = "float16-sqr"
    mapping = published_mapping("f16-sqr")


class Float16Root(Float16Published):
    """As `Float16Published`, with the published square-root map.

    Example:
        >>> Float16Root().rounding
        'published'
    """

    name = "float16-root"
    mapping = published_mapping("f16-root")


class QAT(Float16):
    """As published under this name: weights, activations and gradients in float16, theta and
    momentum in float32 (master weights). The loss has no factor.

    Example:
        >>> QAT().pre_param_dtype
        torch.float32
    """

    name = "qat"
    mapping = LinearMapping(1.0)
    pre_param_dtype = torch.float32
