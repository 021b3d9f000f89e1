"""What becomes of the numbers in a training step: rounded away, too small, too large."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ca3d.precision import Float32, Regime, Step
from ca3d_kernels import LinearMapping, PreParamSGD

__all__ = ["EXPONENTS", "KINDS", "UPDATE_EXPONENTS", "Observer", "Tally"]

KINDS = ("weights", "gradients", "theta", "momentum", "activations")
#: A value x is counted under floor(log2 |x|), cut to this range.
EXPONENTS = range(-40, 21)
#: An update is counted under floor(log2(|update| / spacing of float16 at theta)).
UPDATE_EXPONENTS = range(-24, 13)

# Half of float16's least number is rounded to 0; from the middle between its largest number and the
# next power of two on, values are rounded to infinity.
_VANISHES, _SUBNORMAL, _OVERFLOWS, _UPPER_BOUND = 2.0**-25, 2.0**-14, 65520.0, 32768.0


@dataclass
class Tally:
    """Counts over the elements of tensors of one kind.

    Args:
        count: Elements.
        zero: Those that are 0.
        vanish: Those that are not 0 and that float16 would round to 0 (none in a float16 tensor).
        subnormal: Those of the rest below 2^-14, which float16 stores with fewer digits.
        above_bound: Those from 32768 on, the paper's upper bound.
        overflow: Those that are not finite or that float16 would round to infinity.
        underflow: Those that are 0 as stored and not 0 in the exact or float32 computation.
        exponents: How many lie in each of `EXPONENTS`.

    Example:
        >>> tally = Tally()
        >>> tally.add(torch.tensor([0.0, 1.0, 2.0**-20, 2.0**-30, 1e6]))
        >>> tally.count, tally.zero, tally.vanish, tally.subnormal, tally.overflow
        (5, 1, 1, 1, 1)
    """

    count: int = 0
    zero: int = 0
    vanish: int = 0
    subnormal: int = 0
    above_bound: int = 0
    overflow: int = 0
    underflow: int = 0
    exponents: list[int] = field(default_factory=lambda: [0] * len(EXPONENTS))

    def add(self, x: Tensor) -> None:
        """Counts the elements of a tensor of any shape and floating dtype."""
        size = x.detach().flatten().double().abs()
        self.count += size.numel()
        self.zero += int((size == 0).sum())
        # Exactly half of the least number goes to the even neighbour, 0.
        self.vanish += int(((size > 0) & (size <= _VANISHES)).sum())
        self.subnormal += int(((size > _VANISHES) & (size < _SUBNORMAL)).sum())
        self.above_bound += int((size >= _UPPER_BOUND).sum())
        self.overflow += int(((size >= _OVERFLOWS) | ~size.isfinite()).sum())
        _count_exponents(self.exponents, size, EXPONENTS)


@dataclass
class Updates:
    """Counts over the updates of pre-parameters, those that are 0 by themselves left out.

    Args:
        count: Updates lr m that are not 0.
        unchanged: Those after which theta is what it was.
        lost: Those of them that no compensation keeps either.
        realised: Sum over the elements of (change of theta and its compensation) x (update).
        intended: Sum of the squared updates: realised / intended is 1 without rounding.
        exponents: How many lie in each of `UPDATE_EXPONENTS`.
    """

    count: int = 0
    unchanged: int = 0
    lost: int = 0
    realised: float = 0.0
    intended: float = 0.0
    exponents: list[int] = field(default_factory=lambda: [0] * len(UPDATE_EXPONENTS))


class Observer(Regime):
    """A regime that does what another does, and looks at the tensors of every n-th step.

    What is stored is compared with the same step in float64, from what was stored before it; the
    gradients and activations with a float32 pass of the same weights over the same batch.

    Args:
        regime: The regime that trains.
        every: Steps between two looks, at least 2 (the first step has no momentum yet).

    Attributes:
        tallies: Counts by kind.
        wide_activations: Counts of the activations of the float32 pass.
        updates: Counts of updates.
        steps: How many steps were looked at.

    Raises:
        ValueError: `every` is below 2.

    Example:
        >>> regime = Observer(Float32(), every=2)
        >>> layer = regime.prepare(nn.Linear(2, 2))
        >>> sgd = regime.optimizer("sgd", layer.parameters(), lr=0.1)
        >>> for _ in range(2):
        ...     logits = regime.forward(layer, torch.ones(1, 2))
        ...     regime.backward(regime.loss(logits, torch.tensor([1])))
        ...     step = regime.step(sgd, layer.parameters())
        >>> regime.steps, regime.tallies["weights"].count, regime.updates.unchanged
        (1, 6, 0)
    """

    def __init__(self, regime: Regime, every: int) -> None:
        if every < 2:
            raise ValueError(f"every must be at least 2, got {every}")
        self.regime, self.every = regime, every
        self.name, self.file_dtype, self.compact = regime.name, regime.file_dtype, regime.compact  # type: ignore[misc]
        self.tallies = {kind: Tally() for kind in KINDS}
        self.wide_activations = Tally()
        self.updates = Updates()
        self.steps = 0
        self._calls = 1
        self._model: nn.Module | None = None
        self._labels: Tensor | None = None
        self._wide_gradients: list[Tensor] = []

    @property
    def _looking(self) -> bool:
        return self._calls % self.every == 0

    def prepare(self, model: nn.Module) -> nn.Module:
        """As the regime does."""
        return self.regime.prepare(model)

    def autocast(self, device_type: str) -> AbstractContextManager[Any]:
        """As the regime does."""
        return self.regime.autocast(device_type)

    def forward(self, model: nn.Module, clips: Tensor) -> Tensor:
        """As the regime does; counts what the graph keeps of a training step that is looked at."""
        if not (model.training and self._looking):
            return self.regime.forward(model, clips)
        self._model, self._clips = model, clips
        # Before the pass proper: it changes BatchNorm's running statistics, and so would this one.
        self._wide_model = copy.deepcopy(model).float()
        with _counting(self.tallies["activations"], model):
            return self.regime.forward(model, clips)

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """As the regime does."""
        if self._model is not None and logits.requires_grad:
            wide = Float32()
            counting = _counting(self.wide_activations, self._wide_model)
            with torch.random.fork_rng(devices=[]), counting:
                wide_logits = wide.forward(self._wide_model, self._clips)
            wide_loss = wide.loss(
                wide_logits, labels, weight=weight, label_smoothing=label_smoothing
            )
            if bool(wide_loss.isfinite()):
                wide_loss.backward()
                self._wide_gradients = [
                    torch.zeros_like(p) if p.grad is None else p.grad
                    for p in self._wide_model.parameters()
                ]
            del self._wide_model
        return self.regime.loss(logits, labels, weight=weight, label_smoothing=label_smoothing)

    def backward(self, loss: Tensor) -> None:
        """As the regime does."""
        self.regime.backward(loss)

    def optimizer(
        self,
        kind: str,
        parameters: Iterable[Any],
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
    ) -> torch.optim.Optimizer:
        """As the regime does."""
        return self.regime.optimizer(
            kind, parameters, lr=lr, momentum=momentum, weight_decay=weight_decay
        )

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Iterable[nn.Parameter],
        clip_norm: float | None = None,
    ) -> Step:
        """As the regime does; counts what the step stores, and what it should have stored."""
        parameters = list(parameters)
        if self._model is None:
            self._calls += 1
            return self.regime.step(optimizer, parameters, clip_norm)
        self._count_gradients(list(self._model.parameters()))
        before = [
            _State(optimizer, group, p)
            for group in optimizer.param_groups
            for p in group["params"]
            if p.grad is not None and optimizer.state.get(p)
        ]
        done = self.regime.step(optimizer, parameters, clip_norm)
        self._calls += 1
        self._model, self._wide_gradients = None, []
        self.steps += 1
        if done.applied:
            for state in before:
                self._count_update(state, optimizer)
        return done

    def state_dict(self) -> dict[str, Any]:
        """As the regime does."""
        return self.regime.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As the regime does."""
        self.regime.load_state_dict(state)

    def to_dict(self) -> dict[str, Any]:
        """Returns all counts as plain values."""
        return {
            "steps": self.steps,
            "kinds": {kind: asdict(tally) for kind, tally in self.tallies.items()},
            "wide_activations": asdict(self.wide_activations),
            "updates": asdict(self.updates),
        }

    def _count_gradients(self, parameters: list[nn.Parameter]) -> None:
        tally = self.tallies["gradients"]
        for i, p in enumerate(parameters):
            if p.grad is not None:
                tally.add(p.grad)
                if self._wide_gradients:
                    gone = (p.grad == 0) & (self._wide_gradients[i] != 0)
                    tally.underflow += int(gone.sum())

    def _count_update(self, before: _State, optimizer: torch.optim.Optimizer) -> None:
        after = _State(optimizer, before.group, before.param)
        update = before.exact_update()
        weights, theta = self.tallies["weights"], self.tallies["theta"]
        weights.add(after.param)
        weights.underflow += int(((after.param == 0) & (after.theta != 0)).sum())
        theta.add(after.theta)
        exact = before.theta + before.compensation - update.change
        gone = (after.theta == 0) & (after.compensation == 0) & (exact != 0)
        theta.underflow += int(gone.sum())
        if after.momentum is not None:
            self.tallies["momentum"].add(after.momentum)
            gone = (after.momentum == 0) & (update.momentum != 0)
            self.tallies["momentum"].underflow += int(gone.sum())
        self._count_rounding(before, after, update.change)

    def _count_rounding(self, before: _State, after: _State, change: Tensor) -> None:
        updates = self.updates
        moving = change != 0
        stays = moving & (after.theta == before.theta)
        updates.count += int(moving.sum())
        updates.unchanged += int(stays.sum())
        updates.lost += int((stays & (after.compensation == before.compensation)).sum())
        moved = before.theta + before.compensation - after.theta - after.compensation
        updates.realised += float((moved * change).sum())
        updates.intended += float(change.square().sum())
        exponent = torch.frexp(before.theta.abs()).exponent.clamp(min=-13)
        spacing = torch.ldexp(torch.ones_like(change), exponent - 11)
        _count_exponents(updates.exponents, (change.abs() / spacing), UPDATE_EXPONENTS)


@dataclass
class _Update:
    change: Tensor
    momentum: Tensor


class _State:
    """A parameter with what its optimizer keeps, in float64.

    The weight takes the place of theta in an optimizer that has none.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, group: dict[str, Any], param: nn.Parameter
    ) -> None:
        state = optimizer.state[param]
        self.group, self.param = group, param
        theta = state.get("pre_parameter")
        self.theta = (param.detach() if theta is None else theta).double()
        momentum = state.get("momentum_buffer")
        self.momentum = None if momentum is None else momentum.double()
        kept = state.get("compensation")
        self.compensation = torch.zeros_like(self.theta) if kept is None else kept.double()
        self.gradient = None if param.grad is None else param.grad.double()
        if self.gradient is not None and isinstance(optimizer, PreParamSGD):
            mapping = group["mapping"]
            assert isinstance(mapping, LinearMapping)
            self.gradient = self.gradient * (mapping.scale / mapping.loss_factor)

    def exact_update(self) -> _Update:
        """What SGD without rounding does from here; `change` is subtracted from theta."""
        assert self.gradient is not None
        group = self.group
        at = self.theta + self.compensation
        direction = self.gradient + float(group["weight_decay"]) * at
        momentum = direction
        if self.momentum is not None:
            momentum = float(group["momentum"]) * self.momentum + direction
        return _Update(float(group["lr"]) * momentum, momentum)


def _counting(tally: Tally, model: nn.Module) -> saved_tensors_hooks:
    """Counts the floating-point tensors that the graph keeps, weights left out, each once."""
    seen = {p.data_ptr() for p in model.parameters()}

    def pack(x: Tensor) -> Tensor:
        if x.is_floating_point() and x.dim() > 1 and x.data_ptr() not in seen:
            seen.add(x.data_ptr())
            tally.add(x)
        return x

    return saved_tensors_hooks(pack, lambda x: x)


def _count_exponents(counts: list[int], size: Tensor, exponents: range) -> None:
    """Adds the number of positive finite values with each floor(log2 value) to `counts`."""
    some = size[(size > 0) & size.isfinite()]
    place = torch.frexp(some).exponent - 1 - exponents.start
    place = place.clamp(0, len(exponents) - 1).long()
    for i, count in enumerate(torch.bincount(place, minlength=len(exponents)).tolist()):
        counts[i] += count
