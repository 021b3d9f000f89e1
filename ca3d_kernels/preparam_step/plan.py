"""What `PreParamSGD` steps in one group: tensors and their state, kept from step to step."""

from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ca3d_kernels.preparam_step import op, remembered
from ca3d_kernels.preparam_step.philox import Draws
from ca3d_kernels.preparam_step.reference import (
    Hyperparameters,
    Stepped,
    applied,
    derived,
    restored,
    stepped,
)
from ca3d_kernels.uploads import Uploads

PRE_PARAM, MOMENTUM, COMPENSATION = "pre_parameter", "momentum_buffer", "compensation"

# Numbers of a group that may be tensors, and their places in `op.Batch.device_numbers`.
TENSOR_NUMBERS = {"lr": 0, "momentum": 1, "weight_decay": 3}
# Likewise for all groups: what gradients are divided by.
GRAD_SCALE = "grad_scale"

# Version and address of a weight at the time when theta was last in step with it.
Seen = tuple[int, int]


def has_momentum(group: Mapping[str, Any]) -> bool:
    """Whether a group stores a momentum; it does for any tensor, whose value may change.

    Example:
        >>> has_momentum({"momentum": 0.0}), has_momentum({"momentum": torch.zeros(())})
        (False, True)
    """
    return isinstance(group["momentum"], Tensor) or group["momentum"] != 0


def with_values(
    hyper: Hyperparameters, gradient_scale: float, tensors: Mapping[str, Tensor]
) -> tuple[Hyperparameters, float]:
    """The numbers of a step, and k, with what tensors hold now; waits for those on a GPU.

    Args:
        hyper: the numbers.
        gradient_scale: k.
        tensors: by their names in `TENSOR_NUMBERS`, and what k is divided by.

    Example:
        >>> numbers = {"lr": torch.tensor(0.5), GRAD_SCALE: torch.tensor(4.0)}
        >>> with_values(Hyperparameters(lr=0.0), 128.0, numbers)[1]
        32.0
    """
    values = {name: float(x) for name, x in tensors.items()}
    gradient_scale /= values.pop(GRAD_SCALE, 1.0)
    changed = hyper._replace(
        lr=values.get("lr", hyper.lr),
        momentum=values.get("momentum", hyper.momentum),
        weight_decay=values.get("weight_decay", hyper.weight_decay),
    )
    return changed, gradient_scale


def seen(param: Tensor) -> Seen:
    """What changes when a weight is written or replaced.

    Example:
        >>> w = torch.ones(1)
        >>> before = seen(w)
        >>> seen(w.zero_()) == before
        False
    """
    return param._version, param.data_ptr()


class Single(NamedTuple):
    """A tensor that no kernel can step: it takes the reference."""

    param: Tensor
    grad: Tensor
    state: dict[str, Any]
    group: dict[str, Any]
    hyper: Hyperparameters
    draws: Draws

    def stepped(self) -> Stepped:
        """What a step would store."""
        return stepped(
            self.param,
            self.grad,
            self.state[PRE_PARAM],
            self.state.get(MOMENTUM) if has_momentum(self.group) else None,
            self.group["mapping"],
            self.hyper,
            self.group["rounding"],
            self.state.get(COMPENSATION),
            self.draws,
        )

    def write(self, new: Stepped) -> None:
        """Stores the result of `stepped`."""
        self.param.copy_(new.param)
        self.state[PRE_PARAM].copy_(new.pre_param)
        if new.momentum is not None:
            # A first step creates its momentum only now, so that a skipped one leaves none behind.
            self.state.setdefault(MOMENTUM, new.momentum).copy_(new.momentum)
        if new.compensation is not None:
            self.state[COMPENSATION].copy_(new.compensation)


class Part:
    """Tensors of one dtype on one device, which a kernel steps together.

    The lists of a part stay what they are, but for `grads`, which every step brings anew. As long
    as `accepts` the gradients, a step needs no work per tensor but these comparisons.

    Args:
        rounding: one of `op.ROUNDINGS`.
        backend: the demanded backend, or ``""``.
        has_momentum: whether the step has a momentum.

    Attributes:
        uploads: what the kernels of this part read on the device.
    """

    def __init__(self, rounding: str, backend: str, has_momentum: bool) -> None:
        nothing = Hyperparameters(0.0)
        self._compensations: list[Tensor] = []
        self.uploads = Uploads()
        cache = {"uploads": self.uploads}
        self.batch = op.Batch(
            *([], [], [], []), nothing, 1.0, 1.0, rounding, backend, cache, self._compensations
        )
        self._has_momentum = has_momentum
        self.positions: list[int] = []
        self._states: list[dict[str, Any]] = []
        self._strides: list[tuple[int, ...]] = []
        self._versions: list[int] = []
        self._addresses: list[int] = []
        self._layouts_differ = False

    def add(self, position: int, param: Tensor, grad: Tensor, state: dict[str, Any]) -> None:
        """Adds a parameter, its gradient and its state; all in the layout of the parameter."""
        self.positions.append(position)
        self._states.append(state)
        self._strides.append(grad.stride())
        if not op.same_layout(grad, param):
            self._layouts_differ = True
            grad = torch.empty_like(param, requires_grad=False).copy_(grad)
        self.batch.params.append(param)
        self.batch.grads.append(grad)
        self.batch.pre_params.append(state[PRE_PARAM])
        if self._has_momentum:
            self.batch.momenta.append(state[MOMENTUM])
        if self.batch.applied == "compensated":
            self._compensations.append(state[COMPENSATION])

    def accepts(self, grads: Sequence[Tensor]) -> bool:
        """Whether the tensors are those of the last step, untouched, and the gradients fit them."""
        batch = self.batch
        return (
            not self._layouts_differ
            and [w._version for w in batch.params] == self._versions
            and [w.data_ptr() for w in batch.params] == self._addresses
            and all(map(is_, [state.get(PRE_PARAM) for state in self._states], batch.pre_params))
            and all(map(is_, [state.get(MOMENTUM) for state in self._states], batch.momenta))
            and all(
                map(is_, [state.get(COMPENSATION) for state in self._states], batch.compensations)
            )
            and all(g.layout is torch.strided and g.dtype is batch.params[0].dtype for g in grads)
            and [g.stride() for g in grads] == self._strides
        )

    def prepare(
        self,
        hyper: Hyperparameters,
        scales: tuple[float, float],
        draws: Draws,
        tensors: Mapping[str, Tensor],
    ) -> None:
        """Takes the gradients and numbers of the next step.

        Args:
            hyper: the numbers.
            scales: c and k.
            draws: those of the first parameter of the group.
            tensors: numbers that kernels read when they run, if they can and the tensor is on a
                device like theirs; see `with_values`.
        """
        # A part that was just made holds its gradients already, in the layout of the weights.
        grads = self.batch.grads or [w.grad for w in self.batch.params if w.grad is not None]
        kind = self.batch.params[0].device.type
        on_device = {}
        if tensors and op.is_asynchronous(self.batch):
            on_device = {name: x for name, x in tensors.items() if x.device.type == kind}
        known = {name: x for name, x in tensors.items() if name not in on_device}
        scale, gradient_scale = scales
        hyper, gradient_scale = with_values(hyper, gradient_scale, known)
        self.batch = self.batch._replace(
            grads=grads,
            hyper=hyper,
            scale=scale,
            gradient_scale=gradient_scale,
            seed=draws.seed,
            steps=draws.step,
            numbers=[draws.tensor + position for position in self.positions],
            device_numbers=None,
        )
        if on_device:
            numbers = op.uploaded_numbers(self.batch, self.uploads).clone()
            for name, place in TENSOR_NUMBERS.items():
                if name in on_device:
                    numbers[place].copy_(on_device[name].reshape(()), non_blocking=True)
            if GRAD_SCALE in on_device:
                numbers[5].div_(on_device[GRAD_SCALE].reshape(()).to(numbers, non_blocking=True))
            self.batch = self.batch._replace(device_numbers=numbers)

    def may_be_replayed(self) -> None:
        """Notes that replays of a CUDA graph may write the tensors, which no version tells."""
        assert self.batch.cache is not None
        self.batch.cache[remembered.REPLAYED] = True

    def release(self) -> None:
        """Lets go of the gradients, whose memory is free once the user drops them too."""
        self.batch = self.batch._replace(grads=[])

    def written(self) -> None:
        """Notes that a kernel has written the tensors: theta is in step with every weight."""
        batch = self.batch
        torch.autograd.graph.increment_version(batch.written())
        self._versions = [w._version for w in batch.params]
        self._addresses = [w.data_ptr() for w in batch.params]

    def seen(self) -> dict[Tensor, Seen]:
        """What `seen` returned for each weight when it was last written; nothing before that.

        Weights whose theta was replaced since are left out.
        """
        return {
            w: (version, address)
            for w, version, address, state, theta in zip(
                self.batch.params,
                self._versions,
                self._addresses,
                self._states,
                self.batch.pre_params,
                strict=False,
            )
            if state.get(PRE_PARAM) is theta
        }


class Plan:
    """How a group of parameters is stepped.

    Args:
        group: of the optimizer.
        backend: the demanded backend, or ``""``.
    """

    def __init__(self, group: dict[str, Any], backend: str) -> None:
        self.params: list[Tensor] = list(group["params"])
        self.has_grad = [w.grad is not None for w in self.params]
        self.options = options(group, backend)
        self.parts: list[Part] = []
        self.singles: list[Single] = []
        self.rederived = 0
        self._scales = group["mapping"].linear_scales
        self._only_parts = True

    @classmethod
    def make(
        cls,
        group: dict[str, Any],
        backend: str,
        states: dict[Tensor, dict[str, Any]],
        last_seen: dict[Tensor, Seen],
        hyper: Hyperparameters,
        draws: Draws,
    ) -> "Plan":
        """Looks at every parameter of a group, and derives pre-parameters where needed.

        Args:
            group: of the optimizer.
            backend: the demanded backend, or ``""``.
            states: of the optimizer; gets the pre-parameters and momenta that are missing.
            last_seen: the weights when their theta was last in step with them.
            hyper: the numbers of the step.
            draws: those of the first parameter of the group.

        Raises:
            RuntimeError: a gradient is sparse.
            ValueError: a weight's pre-parameter isn't finite.
        """
        plan = cls(group, backend)
        linear = group["mapping"].linear_scales is not None and group["rounding"] in op.ROUNDINGS
        parts: dict[tuple[torch.dtype, torch.device], Part] = {}
        for position, param in enumerate(plan.params):
            grad = param.grad
            if grad is None:
                continue
            if grad.layout != torch.strided:
                raise RuntimeError(f"PreParamSGD does not support {grad.layout} gradients")
            state = states[param]
            if PRE_PARAM not in state:
                state[PRE_PARAM] = _derived_like(param, group)
            elif last_seen.get(param) != seen(param):
                plan.rederived += _refresh(param, state, group)
            if applied(group["rounding"], state[PRE_PARAM].dtype) != "compensated":
                # Other roundings step theta alone: what it lacked once is of no use later.
                state.pop(COMPENSATION, None)
            elif COMPENSATION not in state:
                state[COMPENSATION] = torch.zeros_like(state[PRE_PARAM])
            first = has_momentum(group) and MOMENTUM not in state
            # The kernels know no first step: they start from a momentum of 0, which differs if
            # there is dampening.
            if not linear or grad.dtype != param.dtype or (first and hyper.dampening != 0):
                own = draws._replace(tensor=draws.tensor + position)
                plan.singles.append(Single(param, grad, state, group, hyper, own))
                continue
            if first:
                state[MOMENTUM] = torch.zeros_like(state[PRE_PARAM])
            key = (param.dtype, param.device)
            if key not in parts:
                parts[key] = Part(group["rounding"], backend, has_momentum(group))
            parts[key].add(position, param, grad, state)
        plan.parts = list(parts.values())
        plan._only_parts = not plan.singles
        return plan

    def accepts(self, group: dict[str, Any], backend: str) -> bool:
        """Whether the plan still holds, with the gradients that the parameters have now."""
        params = group["params"]
        grads = [w.grad for w in params]
        return (
            self._only_parts
            and len(params) == len(self.params)
            and all(map(is_, params, self.params))
            and [g is not None for g in grads] == self.has_grad
            and options(group, backend) == self.options
            and all(part.accepts([grads[i] for i in part.positions]) for part in self.parts)
        )

    def prepare(self, hyper: Hyperparameters, tensors: Mapping[str, Tensor], draws: Draws) -> None:
        """Takes the gradients and numbers of the next step.

        Args:
            hyper: the numbers.
            tensors: numbers that stand for those of `hyper`, and what gradients are divided by.
                Kernels on a GPU read them when they run; others wait for their values.
            draws: those of the first parameter of the group.
        """
        for part in self.parts:
            assert self._scales is not None
            part.prepare(hyper, self._scales, draws, tensors)
        if self.singles:
            hyper, _ = with_values(hyper, 1.0, tensors)
            divisor = float(tensors.get(GRAD_SCALE, 1.0))
            self.singles = [
                single._replace(
                    hyper=hyper, grad=single.grad if divisor == 1 else single.grad / divisor
                )
                for single in self.singles
            ]

    def is_asynchronous(self) -> bool:
        """Whether kernels on a device do all of it; see `op.is_asynchronous`."""
        return not self.singles and all(op.is_asynchronous(part.batch) for part in self.parts)

    def release(self) -> None:
        """Lets go of the gradients."""
        self.singles = []
        for part in self.parts:
            part.release()


def options(group: dict[str, Any], backend: str) -> tuple[Any, ...]:
    """What the plan of a group depends on besides tensors.

    Example:
        >>> group = {"momentum": 0.9, "mapping": "m", "rounding": "nearest"}
        >>> options({**group, "pre_param_dtype": None}, "cpu")
        ('m', 'nearest', None, True, 'cpu')
    """
    kinds = (group["mapping"], group["rounding"], group["pre_param_dtype"])
    return (*kinds, has_momentum(group), backend)


def _derived_like(param: Tensor, group: dict[str, Any]) -> Tensor:
    """Pre-parameter of a weight, in the memory layout of the weight."""
    dtype = group["pre_param_dtype"] or param.dtype
    mapping, rounding = group["mapping"], group["rounding"]
    w = param.detach()
    theta = derived(w, mapping, dtype, rounding)
    finite = theta.isfinite() & restored(theta, mapping, param.dtype, rounding).isfinite()
    # The published code goes on with infinity, and its rounding is bit for bit that of the code.
    if rounding != "published" and not bool((finite | ~w.isfinite()).all()):
        largest = float(w[w.isfinite()].abs().max())
        raise ValueError(
            f"the pre-parameter of a weight of {param.dtype}, shape {tuple(param.shape)} and "
            f"magnitudes up to {largest:.4g} isn't finite in {dtype} with {mapping}; "
            "allowed are a scale for which it is, or pre_param_dtype=torch.float32"
        )
    return torch.empty_like(param, dtype=dtype, requires_grad=False).copy_(theta)


def _refresh(param: Tensor, state: dict[str, Any], group: dict[str, Any]) -> bool:
    """Brings the state of a parameter that may have changed back in step with it.

    Returns:
        Whether the weight was no longer that of its pre-parameter, which was derived anew.
    """
    fresh = _derived_like(param, group)
    for name in (PRE_PARAM, MOMENTUM, COMPENSATION):
        old = state.get(name)
        if old is None:
            continue
        if old.shape != param.shape or (name == COMPENSATION and old.dtype != fresh.dtype):
            state[name] = torch.zeros_like(fresh)
        elif (
            old.dtype != fresh.dtype or old.device != fresh.device or not op.same_layout(old, fresh)
        ):
            state[name] = torch.empty_like(fresh).copy_(old)
    theta = state[PRE_PARAM]
    weight = restored(theta, group["mapping"], param.dtype, group["rounding"])
    if _same(weight, param) or _same(theta, fresh):
        return False
    state[PRE_PARAM] = fresh
    state.pop(COMPENSATION, None)
    return True


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether all values are equal, NaN included."""
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
