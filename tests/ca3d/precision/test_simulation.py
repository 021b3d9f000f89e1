"""50 training steps in float16 against a simulation in float64 that rounds where the docs say.

The optimizer's arithmetic is elementwise, and equal bit for bit. Sums (convolutions, statistics,
matrix products) run in another order, so that what depends on them is equal within a bound.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ca3d import models, precision
from ca3d.models import blocks
from ca3d.models.model import CA3D
from ca3d_kernels import LinearMapping, LocalTemporalAttention, norm_relu, norm_relu_conv
from ca3d_kernels.half_storage import HalfStorage
from ca3d_kernels.local_attention import module as attention

STEPS, LR, MOMENTUM, WEIGHT_DECAY = 50, 0.02, 0.9, 5e-3


def tiny() -> CA3D:
    torch.manual_seed(0)
    model = models.create("ca3d_tiny", num_classes=3, frames=4, dropout=0.0)
    assert isinstance(model, CA3D)
    return model


def batches(size: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(6) % 3
    patterns = torch.randn(3, 3, 4, size, size, generator=generator)[labels]
    for _ in range(STEPS):
        yield patterns + torch.randn(6, 3, 4, size, size, generator=generator), labels


# ---- the optimizer: bit for bit ----


def single(x: Tensor) -> Tensor:
    """float64 values rounded to float32.

    The operands of every operation here are float32 numbers: float64 holds their product, and a sum
    that is rounded to 53 bits and then to 24 is rounded as one that is rounded to 24 at once.
    """
    return x.float().double()


class SimulatedSGD:
    """The step of docs/precision.md: float32 operations, each rounded; stored values rounded once.

    Args:
        weights: the first ones.
        regime: whose map and dtypes count.
    """

    def __init__(self, weights: list[Tensor], regime: precision.Float16) -> None:
        mapping = regime.mapping
        assert isinstance(mapping, LinearMapping)
        assert mapping.linear_scales is not None
        self.scale, self.gradient_scale = mapping.linear_scales
        self.dtype = regime.pre_param_dtype
        self.theta = [self.stored(single(w.double() * self.scale)) for w in weights]
        self.momentum: list[Tensor | None] = [None] * len(weights)
        self.lr, self.decay, self.rest = (
            float(single(torch.tensor(x, dtype=torch.float64)))
            for x in (LR, WEIGHT_DECAY, MOMENTUM)
        )

    def stored(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).double()

    def step(self, gradients: list[Tensor]) -> list[Tensor]:
        """The new weights, in float16."""
        for i, gradient in enumerate(gradients):
            mapped = single(gradient.double() * self.gradient_scale)
            m = single(mapped + single(self.theta[i] * self.decay))
            before = self.momentum[i]
            if before is not None:
                m = single(single(before * self.rest) + m)
            self.theta[i] = self.stored(single(self.theta[i] - single(m * self.lr)))
            self.momentum[i] = self.stored(m)
        return [single(theta / self.scale).half() for theta in self.theta]


@pytest.mark.parametrize("name", ["float16", "raw-float16", "qat"])
def test_the_optimizer_is_equal_bit_for_bit(name: str) -> None:
    regime = precision.create(name)
    assert isinstance(regime, precision.Float16)
    model = regime.prepare(tiny()).train()
    parameters = list(model.parameters())
    optimizer = regime.optimizer(
        "sgd", parameters, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
    )
    simulated = SimulatedSGD([p.detach() for p in parameters], regime)
    for clips, labels in batches(16):
        regime.backward(regime.loss(regime.forward(model, clips), labels))
        expected = simulated.step([p.grad.clone() for p in parameters if p.grad is not None])
        assert regime.step(optimizer, parameters).applied
        for parameter, weight in zip(parameters, expected, strict=True):
            assert torch.equal(parameter.detach(), weight)
    for parameter, theta, m in zip(parameters, simulated.theta, simulated.momentum, strict=True):
        state = optimizer.state[parameter]
        kept = [x for x in state.values() if isinstance(x, Tensor) and x.shape == parameter.shape]
        assert any(torch.equal(x.double(), theta) for x in kept)
        assert m is not None
        assert any(torch.equal(x.double(), m) for x in kept)


# ---- forward and backward: within a bound ----


class _Stored(torch.autograd.Function):
    """A tensor that is stored in float16, and its gradient, which is, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.float().half().double()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.float().half().double()


def stored(x: Tensor) -> Tensor:
    return _Stored.apply(x)


class Largest:
    """The largest difference from the simulation, in units of what the bound allows."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}

    def compare(self, what: str, ours: Tensor, truth: Tensor) -> None:
        """The bound: a unit in the last place, and 2^-10 of the tensor's largest value.

        It is 2^-8 where all pixels are summed up: there most of what is added cancels out.
        """
        assert ours.dtype == torch.float16
        share = 2**-8 if truth.dim() == 1 else 2**-10
        allowed = 2**-10 * truth.abs() + share * truth.abs().max() + 2**-24
        ratio = float(((ours.double() - stored(truth)).abs() / allowed).max())
        self.found[what] = max(self.found.get(what, 0), ratio)


class _Checked(torch.autograd.Function):
    """Runs a part of the model, and in float64 the simulation of it, on the same half tensors."""

    @staticmethod
    def forward(ctx: Any, part: "Part", *tensors: Tensor | None) -> Any:
        ctx.graphs = []
        for simulated in (False, True):
            leaves = [
                None if x is None else x.detach().to(torch.float64 if simulated else x.dtype)
                for x in tensors
            ]
            for leaf in leaves:
                if leaf is not None:
                    leaf.requires_grad_()
            with torch.enable_grad():
                outputs = (part.simulated if simulated else part.real)(*leaves)
            ctx.graphs.append((outputs, leaves))
        ctx.part = part
        for ours, truth in zip(*(outputs for outputs, _ in ctx.graphs), strict=True):
            part.largest.compare(f"{part.name} forward", ours.detach(), truth.detach())
        return tuple(x.detach() for x in ctx.graphs[0][0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        found = []
        for outputs, leaves in ctx.graphs:
            inputs = [x for x in leaves if x is not None]
            wide = [g.to(y.dtype) for g, y in zip(grads, outputs, strict=True)]
            found.append(torch.autograd.grad(outputs, inputs, wide))
        results = iter(found[0])
        for i, (ours, truth) in enumerate(zip(*found, strict=True)):
            ctx.part.largest.compare(f"{ctx.part.name} gradient {i}", ours, truth)
        return None, *(None if x is None else next(results) for x in ctx.graphs[0][1])


@dataclass
class Part:
    """A part of the model: functions of the same tensors that return tuples of tensors."""

    name: str
    real: Callable[..., tuple[Tensor, ...]]
    simulated: Callable[..., tuple[Tensor, ...]]
    largest: Largest

    def __call__(self, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return _Checked.apply(self, *tensors)


def normalised(
    y: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, *, relu: bool
) -> Tensor:
    z = F.batch_norm(F.relu(y) if relu else y, None, None, weight, bias, training=True)
    return stored(z if residual is None else z + residual)


def watch(patch: pytest.MonkeyPatch, model: nn.Module, largest: Largest) -> None:
    """Puts the simulation beside every part of the model that adds numbers up."""

    def normalise(
        y: Tensor, norm: nn.Module, residual: Tensor | None = None, *, relu: bool = True
    ) -> Tensor:
        def real(y: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Any:
            return (norm_relu(y, weight, bias, residual, relu=relu).z,)

        def simulated(*tensors: Any) -> Any:
            return (normalised(*tensors, relu=relu),)

        part = Part("normalise", real, simulated, largest)
        return part(y, norm.weight, norm.bias, residual)[0]

    def normalise_and_convolve(
        y: Tensor,
        norm: nn.Module,
        conv: nn.Conv2d,
        residual: Tensor | None = None,
        *,
        relu: bool = True,
        return_z: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        options: Any = {"stride": conv.stride, "padding": conv.padding, "groups": conv.groups}

        def real(
            y: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor, shift: Tensor, *residual: Any
        ) -> tuple[Tensor, ...]:
            made = norm_relu_conv(
                y, weight, bias, kernel, shift, *residual, relu=relu, return_z=return_z, **options
            )
            return made[:2] if return_z else made[:1]

        def simulated(
            y: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor, shift: Tensor, residual: Any
        ) -> tuple[Tensor, ...]:
            z = normalised(y, weight, bias, residual, relu=relu)
            # The convolution's own gradient of z is stored, and then the sum of all.
            output = stored(F.conv2d(stored(z), kernel, shift, **options))
            return (output, z) if return_z else (output,)

        part = Part("normalise_and_convolve", real, simulated, largest)
        made = part(y, norm.weight, norm.bias, conv.weight, conv.bias, residual)
        return made[0], made[1] if return_z else None

    patch.setattr(blocks, "normalise", normalise)
    patch.setattr(blocks, "normalise_and_convolve", normalise_and_convolve)
    for name, layer in model.named_modules():
        # Layers that are a part by themselves; the projection in front of attention is stored, too.
        if isinstance(layer, LocalTemporalAttention | nn.BatchNorm1d | nn.Linear):
            patch.setattr(layer, "forward", watched(name, layer, largest))


def watched(name: str, layer: nn.Module, largest: Largest) -> Callable[[Tensor], Tensor]:
    names = [key for key, _ in layer.named_parameters()]
    plain, wide = copy.deepcopy(layer), copy.deepcopy(layer).double()

    def real(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        with HalfStorage():
            made = functional_call(plain, dict(zip(names, parameters, strict=True)), (x,))
        return (made,)

    def simulated(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "half_storage", lambda f: lambda *a, **k: stored(f(*a, **k)))
            made = functional_call(wide, dict(zip(names, parameters, strict=True)), (x,))
        return (stored(made),)

    part = Part(type(layer).__name__, real, simulated, largest)
    return lambda x: part(x, *layer.parameters())[0]


def test_forward_and_backward_are_equal_within_a_bound() -> None:
    regime = precision.create("float16")
    model = regime.prepare(tiny()).train()
    parameters = list(model.parameters())
    optimizer = regime.optimizer(
        "sgd", parameters, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
    )
    largest = Largest()
    losses = []
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, model, largest)
        for clips, labels in batches(32):
            loss = regime.loss(regime.forward(model, clips), labels)
            regime.backward(loss)
            losses.append(float(loss.detach()))
            assert regime.step(optimizer, parameters).applied
    assert sum(losses[-5:]) < sum(losses[:5]) / 2  # it is training that was watched
    assert len(largest.found) > 20
    assert max(largest.found.values()) <= 1, sorted((x, k) for k, x in largest.found.items())
