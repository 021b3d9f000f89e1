"""Parameters, gradients and comparisons for tests of the pre-parameter step."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ca3d_kernels import LinearMapping, PreParamSGD, backends

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Vectors hold up to 16 elements, a thread takes 16384 at a time.
SIZES = (0, 1, 2, 7, 16, 17, 33, 513, 16384, 16385, 40_001)

# Around the 16384 elements whose magnitudes the CPU remembers together, and the 4096 of a GPU.
MAGNITUDE_SIZES = (1, 31, 512, 16384, 16385, 40000)

# Options of the optimizer that every kernel of the step is run with.
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum, decay": {"momentum": 0.9, "weight_decay": 5e-3, "skip_nonfinite": True},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "dampening": {"momentum": 0.9, "dampening": 0.1},
    "other map": {"momentum": 0.9, "mapping": LinearMapping(100.0, 0.1)},
    "float32 masters": {"momentum": 0.9, "pre_param_dtype": torch.float32, "skip_nonfinite": True},
    "stochastic": {"momentum": 0.9, "rounding": "stochastic", "seed": 2**62 + 5},
    "stochastic, plain": {"rounding": "stochastic", "skip_nonfinite": True},
    "compensated": {"momentum": 0.9, "rounding": "compensated", "weight_decay": 5e-3},
    "compensated, nesterov": {
        "momentum": 0.9,
        "nesterov": True,
        "rounding": "compensated",
        "skip_nonfinite": True,
    },
}

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def options_of(case: str, dtype: torch.dtype) -> dict[str, Any]:
    """Options of a case, whose masters are not narrower than the parameters."""
    options = CASES[case]
    if options.get("pre_param_dtype") and dtype == torch.float64:
        return {**options, "pre_param_dtype": torch.float64}
    return options


def bits(x: Tensor) -> Tensor:
    """The bit patterns of a tensor, with all NaN made alike."""
    x = x.detach()
    return torch.where(x.isnan(), torch.nan, x).to(x.dtype).view(_INTEGERS[x.element_size()])


def assert_same_bits(actual: Tensor, expected: Tensor, name: str = "") -> None:
    assert actual.dtype == expected.dtype, name
    assert actual.shape == expected.shape, name
    different = bits(actual) != bits(expected)
    assert not different.any(), (
        f"{name}: {int(different.sum())} of {different.numel()} differ, first "
        f"{actual[different][:3].tolist()} instead of {expected[different][:3].tolist()}"
    )


def assert_flag_of_float32(backend: str, dtype: torch.dtype) -> None:
    """With another default dtype of torch, a step still finds its overflow."""
    (w,) = parameters(dtype, [300])
    w.grad = torch.full_like(w, torch.inf)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        optimizer = PreParamSGD([w], lr=0.5, skip_nonfinite=True, backend=backend)
        optimizer.step()
    finally:
        torch.set_default_dtype(before)
    assert optimizer.skipped_steps == 1


def ulps_apart(a: Tensor, b: Tensor) -> Tensor:
    """How many representable numbers lie between the elements of two half-precision tensors."""

    def ordered(x: Tensor) -> Tensor:
        pattern = x.view(torch.int16).to(torch.int32)
        return torch.where(pattern < 0, -(pattern & 0x7FFF), pattern)

    return (ordered(a) - ordered(b)).abs()


def parameters(
    dtype: torch.dtype, shapes: Sequence[int | tuple[int, ...]] = SIZES, seed: int = 0
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter((torch.randn(shape, generator=generator) * 0.1).to(dtype)) for shape in shapes
    ]


def set_gradients(params: Sequence[nn.Parameter], seed: int = 0, scale: float = 0.5) -> None:
    """Gradients over several orders of magnitude."""
    generator = torch.Generator().manual_seed(1000 + seed)
    for param in params:
        size = torch.randn(param.shape, generator=generator)
        magnitude = 10 ** (-3 * torch.rand(param.shape, generator=generator))
        param.grad = (size * magnitude * scale).to(param.dtype)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def instruction_set(name: str) -> Iterator[None]:
    native = backends.native()
    assert native is not None
    before = native.isa()
    native.set_isa(name)
    try:
        yield
    finally:
        native.set_isa(before)


def instruction_sets() -> list[str]:
    native = backends.native()
    return [] if native is None else native.isas()


def assert_same_skips(
    backend: str, dtype: torch.dtype, options: dict[str, Any], sizes: Sequence[int]
) -> None:
    """Steps with gradients around the limit, where the sign decides whether the step is skipped."""
    limit = torch.finfo(dtype).max
    both = []
    for name in (backend, "reference"):
        params = parameters(dtype, sizes)
        optimizer = PreParamSGD(params, **options, backend=name)
        skipped = []
        for step in range(24):
            factor = (-1) ** step * limit / 128 * (1e-3, 0.9, 1.1, 0.3, 2.1, 0.99)[step // 4]
            set_small_gradients(params, step, factor)
            optimizer.step()
            skipped.append(optimizer.skipped_steps)
        both.append((params, skipped))
    (ours, our_skips), (reference, reference_skips) = both
    assert our_skips == reference_skips
    assert 0 < our_skips[-1] < 24
    for a, b in zip(ours, reference, strict=True):
        assert_same_bits(a.detach(), b.detach())


def set_small_gradients(params: Sequence[nn.Parameter], seed: int, largest: float) -> None:
    """Small ones, but for one element of one tensor."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(w.numel(), generator=generator, dtype=torch.float64) * 1e-3 for w in params]
    chosen = made[seed % len(made)]
    chosen[int(torch.randint(len(chosen), (), generator=generator))] = largest
    for w, grad in zip(params, made, strict=True):
        w.grad = grad.to(w.dtype)
