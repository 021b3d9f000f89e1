"""Parameters, gradients and comparisons for tests of the pre-parameter step."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ca3d_kernels import backends

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Vectors hold up to 16 elements, a thread takes 16384 at a time.
SIZES = (0, 1, 2, 7, 16, 17, 33, 513, 16384, 16385, 40_001)

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


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
