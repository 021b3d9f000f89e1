"""How long a pre-parameter SGD step of CA3D's 137 tensors takes, against torch and against a copy,
and how much longer with stochastic and compensated rounding.

The ratios are medians over interleaved rounds; see interleaved.py.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from allocator import settled_memory
from interleaved import Timings, interleave
from torch import Tensor, nn

from ca3d_kernels import LinearMapping, PreParamSGD

DTYPES = {torch.float16: "float16", torch.float32: "float32"}
HYPER = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-3}
ROUNDINGS = ("stochastic", "compensated")


def ca3d_shapes() -> list[tuple[int, ...]]:
    """Shapes of the parameters of CA3D with 101 classes, as matrices."""
    shapes: list[tuple[int, ...]] = []

    def norm(channels: int) -> None:
        shapes.extend([(channels,), (channels,)])

    def conv(outputs: int, inputs: int) -> None:
        shapes.extend([(outputs, inputs), (outputs,)])

    def column(channels: int, inputs: int) -> None:
        for _ in range(2):
            conv(channels, inputs)
            conv(channels, inputs)
            norm(channels)
            norm(channels)

    spatial = (
        (3, 64, 147, 576),
        (64, 128, 576, 1152),
        (128, 256, 1152, 2304),
        (256, 512, 576, 1152),
    )
    for inputs, outputs, stem, inner in spatial:
        norm(inputs)
        conv(outputs, stem)
        norm(outputs)
        column(outputs, inner)
    shapes.append((256, 8))
    for channels in (256, 512):
        norm(channels)
        norm(channels)
        conv(3 * channels, 64)
        column(channels, 192)
    norm(512)
    conv(101, 512)
    return shapes


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape in ca3d_shapes():
        made.append(nn.Parameter((torch.randn(shape, generator=generator) * 0.05).to(dtype)))
        made[-1].grad = (torch.randn(shape, generator=generator) * 0.01).to(dtype)
    return made


class TorchOps:
    """The same step in torch operations: map gradients, torch.optim.SGD on theta, map back."""

    def __init__(self, params: list[nn.Parameter], *, foreach: bool) -> None:
        self.params = params
        self.mapping = LinearMapping()
        self.thetas = [nn.Parameter(self.mapping.to_pre_param(w.detach())) for w in params]
        self.sgd = torch.optim.SGD(self.thetas, **HYPER, foreach=foreach)

    @torch.no_grad()
    def step(self) -> None:
        for w, theta in zip(self.params, self.thetas, strict=True):
            theta.grad = self.mapping.map_grad(w.grad, w)
        self.sgd.step()
        for w, theta in zip(self.params, self.thetas, strict=True):
            w.copy_(self.mapping.to_param(theta))


def copy_of(bytes_per_parameter: int) -> tuple[Tensor, Tensor]:
    """Source and target of a copy that reads and writes so many bytes a parameter together."""
    count = sum(math.prod(shape) for shape in ca3d_shapes()) * bytes_per_parameter // 2
    return torch.ones(count, dtype=torch.uint8), torch.ones(count, dtype=torch.uint8)


@pytest.fixture(scope="module")
def candidates() -> dict[str, Callable[[], object]]:
    made: dict[str, Callable[[], object]] = {}
    for dtype, name in DTYPES.items():
        for skip in (False, True):
            kind = f"{name} skip" if skip else name
            made[kind] = PreParamSGD(parameters(dtype), **HYPER, skip_nonfinite=skip).step
            numbers = 7 if skip else 6  # read or written for each parameter
            source, target = copy_of(numbers * dtype.itemsize)
            made[f"copy {kind}"] = partial(target.copy_, source)
        for foreach in (False, True):
            kind = f"torch foreach {name}" if foreach else f"torch {name}"
            made[kind] = TorchOps(parameters(dtype), foreach=foreach).step
    for rounding in ROUNDINGS:
        made[rounding] = PreParamSGD(parameters(torch.float16), **HYPER, rounding=rounding).step
    return made


@pytest.fixture(scope="module")
def timings(candidates: dict[str, Callable[[], object]]) -> Timings:
    torch.set_num_threads(min(2, torch.get_num_threads()))
    with settled_memory():
        return interleave(candidates, rounds=40)


@pytest.mark.parametrize("skip", [False, True], ids=["always", "skip non-finite"])
@pytest.mark.parametrize("name", DTYPES.values())
def test_step(
    benchmark: Any,
    candidates: dict[str, Callable[[], object]],
    timings: Timings,
    name: str,
    skip: bool,
) -> None:
    kind = f"{name} skip" if skip else name
    ratios = {
        "time / torch operations": timings.ratio(kind, f"torch {name}"),
        "time / torch foreach operations": timings.ratio(kind, f"torch foreach {name}"),
        "time / copy of the same bytes": timings.ratio(kind, f"copy {kind}"),
    }
    for what, ratio in ratios.items():
        benchmark.extra_info[what] = round(ratio, 4)
        print(f"{kind:13s} {what:32s} {ratio:7.3f}")
    benchmark.pedantic(candidates[kind], rounds=10, warmup_rounds=1)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_rounding(
    benchmark: Any,
    candidates: dict[str, Callable[[], object]],
    timings: Timings,
    rounding: str,
) -> None:
    ratio = timings.ratio(rounding, "float16")
    benchmark.extra_info["time / rounding to nearest"] = round(ratio, 4)
    print(f"{rounding:13s} {'time / rounding to nearest':32s} {ratio:7.3f}")
    benchmark.pedantic(candidates[rounding], rounds=10, warmup_rounds=1)


def test_shapes_are_those_of_the_model() -> None:
    models = pytest.importorskip("ca3d.models")
    expected = [w.numel() for w in models.create("ca3d", num_classes=101).parameters()]
    assert sorted(expected) == sorted(math.prod(shape) for shape in ca3d_shapes())
