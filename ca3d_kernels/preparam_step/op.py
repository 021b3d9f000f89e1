"""Registers ``ca3d::preparam_sgd_step`` and ``ca3d::preparam_sgd_overflows`` with torch.

Both take the tensors of one dtype on one device all together. The optimizer calls `step` and
`overflows` directly, which saves it torch's handling of long tensor lists.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ca3d_kernels import backends, cuda, triton_launch
from ca3d_kernels.grad_mode import unrecorded
from ca3d_kernels.preparam_step.mapping import PreParamMapping
from ca3d_kernels.preparam_step.philox import Draws
from ca3d_kernels.preparam_step.reference import Hyperparameters, Stepped, applied, stepped
from ca3d_kernels.uploads import Uploads

# What kernels can round to; mappings that aren't linear and "published" have no kernels.
ROUNDINGS = ("nearest", "stochastic", "compensated")


class Batch(NamedTuple):
    """The tensors of one step under a linear map, and its numbers.

    Attributes:
        params, grads, pre_params: w, g and theta; the same number of each.
        momenta: likewise, or none for a step without momentum.
        hyper: the numbers of the step.
        scale: c in w = theta / c.
        gradient_scale: k; theta is stepped with k g.
        rounding: one of `ROUNDINGS`.
        backend: the demanded backend, or ``""``.
        cache: where kernels may keep what they derived from params, pre_params and momenta, for
            whoever steps the same lists again; None for others.
        compensations: r of "compensated" rounding, like theta, or none for other roundings.
        seed, steps, numbers: of the draws of "stochastic" rounding: the seed, how many steps came
            before, and the number of each tensor, which is its place in the lists by default.
        device_numbers: lr, momentum, 1 - dampening, weight decay, c and k in float64 on the device
            of the tensors, for asynchronous kernels, which read them when they run; those of hyper,
            scale and gradient_scale then don't count. None for the numbers above.
    """

    params: list[Tensor]
    grads: list[Tensor]
    pre_params: list[Tensor]
    momenta: list[Tensor]
    hyper: Hyperparameters
    scale: float
    gradient_scale: float
    rounding: str = "nearest"
    backend: str = ""
    cache: dict[str, Any] | None = None
    compensations: Sequence[Tensor] = ()
    seed: int = 0
    steps: int = 0
    numbers: Sequence[int] = ()
    device_numbers: Tensor | None = None

    @property
    def applied(self) -> str:
        """The rounding that the dtype of theta really gets; see `reference.applied`."""
        return applied(self.rounding, self.pre_params[0].dtype) if self.params else self.rounding

    def written(self) -> list[Tensor]:
        """The tensors that a step writes."""
        return [*self.params, *self.pre_params, *self.momenta, *self.compensations]

    def for_kernels(self, kernels: "Kernels") -> "Batch":
        """The batch for some kernels. Those that need its numbers on the CPU wait for them."""
        if self.device_numbers is None or _is_asynchronous(kernels):
            return self
        lr, momentum, _, weight_decay, scale, gradient_scale = self.device_numbers.tolist()
        return self._replace(
            hyper=self.hyper._replace(lr=lr, momentum=momentum, weight_decay=weight_decay),
            scale=scale,
            gradient_scale=gradient_scale,
            device_numbers=None,
        )


def uploaded_numbers(batch: Batch, uploads: Uploads) -> Tensor:
    """The numbers of a batch on its device, in the order of `Batch.device_numbers`.

    Example:
        >>> w = [torch.zeros(3)]
        >>> batch = Batch(w, w, w, [], Hyperparameters(lr=0.25), 128.0, 64.0)
        >>> uploaded_numbers(batch, Uploads()).tolist()
        [0.25, 0.0, 1.0, 0.0, 128.0, 64.0]
    """
    hyper = batch.hyper
    numbers = (
        *(hyper.lr, hyper.momentum, 1 - hyper.dampening, hyper.weight_decay),
        *(batch.scale, batch.gradient_scale),
    )
    return uploads.get(
        "numbers",
        numbers,
        lambda: torch.tensor(numbers, dtype=torch.float64, device="cpu"),
        batch.params[0].device,
    )


class Kernels(Protocol):
    """What a backend provides for this op."""

    def step(self, batch: Batch, found_inf: Tensor | None = None) -> None:
        """Writes the new theta, momentum and w of every tensor, unless found_inf isn't 0."""

    def overflows(self, batch: Batch) -> bool | Tensor:
        """Whether `step` would store a value that isn't finite, or a gradient holds one.

        With stochastic rounding: whether it would with any draw. (It can depend on the draw only
        whether w = theta / c becomes infinite, for c below 1.)

        A tensor (float32, 0 or 1) leaves the answer on the device, without waiting for it.
        """


class _Linear(PreParamMapping):
    """A linear map given by its two factors."""

    def __init__(self, scale: float, gradient_scale: float) -> None:
        self.scale = scale
        self.gradient_scale = gradient_scale

    def to_param(self, pre_param: Tensor) -> Tensor:
        return pre_param / self.scale

    def map_grad(self, grad: Tensor, param: Tensor) -> Tensor:
        return grad * self.gradient_scale


class ReferenceKernels:
    """The definition in torch operations, on any device."""

    def _stepped(self, batch: Batch, i: int, draws: Draws | None) -> Stepped:
        return stepped(
            batch.params[i],
            batch.grads[i],
            batch.pre_params[i],
            batch.momenta[i] if batch.momenta else None,
            _Linear(batch.scale, batch.gradient_scale),
            batch.hyper,
            batch.rounding,
            batch.compensations[i] if batch.compensations else None,
            draws,
        )

    def step(self, batch: Batch, found_inf: Tensor | None = None) -> None:
        """See `Kernels`."""
        if found_inf is not None and bool(found_inf):
            return
        for i in range(len(batch.params)):
            number = batch.numbers[i] if batch.numbers else i
            new = self._stepped(batch, i, Draws(batch.seed, batch.steps, number))
            batch.params[i].copy_(new.param)
            batch.pre_params[i].copy_(new.pre_param)
            if batch.momenta and new.momentum is not None:
                batch.momenta[i].copy_(new.momentum)
            if batch.compensations and new.compensation is not None:
                batch.compensations[i].copy_(new.compensation)

    def overflows(self, batch: Batch) -> bool:
        """See `Kernels`."""
        return any(
            not bool(grad.isfinite().all()) or not self._stepped(batch, i, None).is_finite()
            for i, grad in enumerate(batch.grads)
        )


def _load_cpu() -> Kernels:
    from ca3d_kernels.preparam_step.cpu import NativeKernels

    return NativeKernels()


def _cpu_unavailable(device: str) -> str | None:
    if device != "cpu":
        return "it serves CPU tensors only"
    return backends.native_lacks("preparam_sgd_step", "preparam_sgd_step_overflows")


def _load_triton() -> Kernels:
    from ca3d_kernels.preparam_step.triton import TritonKernels

    return TritonKernels()


def _load_cuda() -> Kernels:
    from ca3d_kernels.preparam_step.cuda import CudaKernels

    return CudaKernels(cuda.library())


backends.register(
    "preparam_step", backends.Implementation("reference", ReferenceKernels, lambda device: None)
)
backends.register("preparam_step", backends.Implementation("cpu", _load_cpu, _cpu_unavailable))
backends.register("preparam_step", backends.Implementation("cuda", _load_cuda, cuda.unavailable))
backends.register(
    "preparam_step",
    backends.Implementation("triton", _load_triton, triton_launch.unavailable),
)


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether element i of both lies at the same offset, for tensors of one shape.

    Example:
        >>> same_layout(torch.empty(2, 3), torch.empty(3, 2).t())
        False
    """
    return a.stride() == b.stride() or all(
        x == y for size, x, y in zip(a.shape, a.stride(), b.stride(), strict=True) if size > 1
    )


def step(batch: Batch, found_inf: Tensor | None = None) -> None:
    """Steps every tensor of a checked batch with the chosen backend.

    Args:
        batch: tensors that agree in shape and layout, one dtype for w and g and one for theta and
            momentum.
        found_inf: a float32 tensor with one element on their device; nothing is written if it
            isn't 0. Kernels on a GPU look at it when they run, without a wait on the CPU.

    Raises:
        RuntimeError: stochastic rounding is captured in a CUDA graph.
        ValueError: the demanded backend can't run here.

    Example:
        >>> w, g = torch.tensor([0.5]), torch.tensor([1.0])
        >>> step(Batch([w], [g], [128 * w], [], Hyperparameters(lr=0.25), 128.0, 128.0))
        >>> w
        tensor([0.2500])
    """
    if not batch.params:
        return
    if batch.applied == "stochastic" and cuda.is_capturing(batch.params[0].device):
        raise RuntimeError(
            "rounding 'stochastic' can't be captured in a CUDA graph: every replay would draw the "
            "same numbers; capture with rounding 'nearest' or 'compensated'"
        )
    with torch.no_grad():
        backends.run(
            "preparam_step",
            batch.params[0].device.type,
            batch.backend,
            lambda kernels: kernels.step(batch.for_kernels(kernels), found_inf),
        )


def is_asynchronous(batch: Batch) -> bool:
    """Whether the chosen kernels leave a flag on the device and obey it there.

    A step that is skipped then takes no wait on the CPU.

    Example:
        >>> w = [torch.zeros(3)]
        >>> is_asynchronous(Batch(w, w, w, [], Hyperparameters(lr=0.25), 128.0, 128.0))
        False
    """
    device = batch.params[0].device.type
    return _is_asynchronous(backends.choose("preparam_step", device, batch.backend)[0].load())


def _is_asynchronous(kernels: Kernels) -> bool:
    return getattr(kernels, "asynchronous", False)


def overflows(batch: Batch) -> Tensor:
    """1 if stepping a checked batch would store a value that isn't finite, or a gradient holds one.

    Args:
        batch: as for `step`; nothing is written.

    Returns:
        A float32 scalar, 0 or 1, on the tensors' device.

    Raises:
        ValueError: the demanded backend can't run here.

    Example:
        >>> w, g = torch.tensor([0.5]), torch.tensor([torch.nan])
        >>> overflows(Batch([w], [g], [128 * w], [], Hyperparameters(lr=0.25), 128.0, 128.0))
        tensor(1.)
    """
    if not batch.params:
        return torch.zeros((), dtype=torch.float32)
    device = batch.params[0].device
    with torch.no_grad():
        found = backends.run(
            "preparam_step",
            device.type,
            batch.backend,
            lambda kernels: kernels.overflows(batch.for_kernels(kernels)),
        )
    if isinstance(found, Tensor):
        return found
    return torch.tensor(float(found), dtype=torch.float32, device=device)


def _check(batch: Batch) -> None:
    """Raises a ValueError or TypeError for tensors that don't fit together."""
    count = len(batch.params)
    for name, tensors in (("grads", batch.grads), ("pre_params", batch.pre_params)):
        if len(tensors) != count:
            raise ValueError(f"{name} must hold {count} tensors as params does, got {len(tensors)}")
    if batch.momenta and len(batch.momenta) != count:
        raise ValueError(f"momenta must be empty or hold {count} tensors, got {len(batch.momenta)}")
    if bool(batch.momenta) != (batch.hyper.momentum != 0) and count:
        raise ValueError(
            f"momenta must hold tensors if and only if momentum is not 0, "
            f"got {len(batch.momenta)} with momentum {batch.hyper.momentum}"
        )
    if batch.rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {ROUNDINGS}, got {batch.rounding!r}")
    expected = count if batch.applied == "compensated" else 0
    if len(batch.compensations) != expected:
        raise ValueError(
            f"compensations must hold {expected} tensors with rounding {batch.rounding!r}, "
            f"got {len(batch.compensations)}"
        )
    if batch.numbers and len(batch.numbers) != count:
        raise ValueError(
            f"draws must hold a seed, a step and the numbers of {count} tensors, "
            f"got {len(batch.numbers)} numbers"
        )
    if batch.seed < 0 or batch.steps < 0 or any(not 0 <= n < 2**32 for n in batch.numbers):
        raise ValueError(
            "draws must not be negative, and numbers of tensors below 2**32, "
            f"got {(batch.seed, batch.steps, *batch.numbers)}"
        )
    for i in range(count):
        _check_tensors(batch, i)


def _check_tensors(batch: Batch, i: int) -> None:
    w, theta = batch.params[i], batch.pre_params[i]
    expected = [
        (f"params[{i}]", w, batch.params[0].dtype),
        (f"grads[{i}]", batch.grads[i], batch.params[0].dtype),
        (f"pre_params[{i}]", theta, batch.pre_params[0].dtype),
    ]
    if batch.momenta:
        expected.append((f"momenta[{i}]", batch.momenta[i], batch.pre_params[0].dtype))
    if batch.compensations:
        rest = batch.compensations[i]
        expected.append((f"compensations[{i}]", rest, batch.pre_params[0].dtype))
    for name, tensor, dtype in expected:
        if not tensor.dtype.is_floating_point or tensor.dtype != dtype:
            raise TypeError(f"{name} must be of dtype {dtype}, got {tensor.dtype}")
        if tensor.device != w.device or w.device != batch.params[0].device:
            raise ValueError(f"{name} must be on {batch.params[0].device}, got {tensor.device}")
        if tensor.shape != w.shape:
            raise ValueError(f"{name} must have shape {tuple(w.shape)}, got {tuple(tensor.shape)}")
        if not same_layout(tensor, w):
            raise ValueError(f"{name} must have the strides {w.stride()}, got {tensor.stride()}")


def _batch(
    draws: Tensor | None,
    params: list[Tensor],
    grads: list[Tensor],
    pre_params: list[Tensor],
    momenta: list[Tensor],
    compensations: list[Tensor],
    hyper: Tensor,
    nesterov: bool,
    rounding: str,
    backend: str,
) -> Batch:
    if hyper.numel() != 6:
        raise ValueError(f"hyper must hold 6 numbers, got {hyper.numel()}")
    lr, momentum, dampening, weight_decay, scale, gradient_scale = hyper.tolist()
    seed, steps, *numbers = (0, 0) if draws is None else draws.tolist()
    batch = Batch(
        params,
        grads,
        pre_params,
        momenta,
        Hyperparameters(lr, momentum, dampening, weight_decay, nesterov),
        scale,
        gradient_scale,
        rounding,
        backend,
        compensations=compensations,
        seed=seed,
        steps=steps,
        numbers=numbers,
    )
    _check(batch)
    return batch


def _step_op(*arguments: Any, found_inf: Tensor | None = None, draws: Tensor | None = None) -> None:
    batch = _batch(draws, *arguments)
    if batch.applied == "stochastic" and len(batch.numbers) != len(batch.params):
        raise ValueError("draws must be given with rounding 'stochastic', got None")
    step(batch, found_inf)
    written = [x for x in batch.written() if not x.is_inference()]
    torch.autograd.graph.increment_version(written)


def _overflows_op(*arguments: Any) -> Tensor:
    return overflows(_batch(None, *arguments))


# hyper is (lr, momentum, dampening, weight_decay, scale, gradient_scale) in float64. draws, for
# stochastic rounding only, is the seed, how many steps came before and the number of each tensor in
# int64.
_TAIL = "Tensor hyper, bool nesterov, str rounding, str backend"
_SCHEMAS: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {
    "preparam_sgd_step": (
        "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] pre_params, Tensor(c!)[] momenta, "
        f"Tensor(d!)[] compensations, {_TAIL}, *, Tensor? found_inf=None, Tensor? draws=None) "
        "-> ()",
        _step_op,
        lambda *arguments, **options: None,
    ),
    "preparam_sgd_overflows": (
        "(Tensor[] params, Tensor[] grads, Tensor[] pre_params, Tensor[] momenta, "
        f"Tensor[] compensations, {_TAIL}) -> Tensor",
        _overflows_op,
        lambda params, *arguments: torch.empty(
            (), dtype=torch.float32, device=params[0].device if params else None
        ),
    ),
}

_library = torch.library.Library("ca3d", "FRAGMENT")
for _name, (_schema, _kernel, _fake) in _SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, unrecorded(_kernel), _device)
    torch.library.register_fake(f"ca3d::{_name}", _fake, lib=_library)
