"""The compiled kernels of the folded convolution against their definition in float64."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from block_cases import HALF, assert_close, assert_rounded
from torch import Tensor

from ca3d_kernels import _native, folded_conv

# images, channels in and out, height, width, groups; and what differs from a 3 x 3 filter.
WINOGRAD: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((2, 64, 64, 14, 14, 1), {}),
    ((1, 80, 48, 7, 9, 1), {}),
    ((1, 64, 128, 6, 7, 1), {}),
    ((2, 64, 160, 5, 6, 1), {}),
    ((3, 256, 128, 5, 4, 4), {}),
    ((1, 64, 16, 1, 1, 1), {}),
    ((2, 64, 16, 2, 3, 1), {}),
    ((70, 64, 16, 3, 6, 1), {}),
    # In float32 torch convolves smaller images, unless they have groups.
    ((1, 512, 128, 6, 7, 1), {}),
    ((2, 832, 64, 5, 5, 1), {}),
    ((1, 96, 48, 13, 17, 1), {}),
    ((3, 64, 160, 18, 19, 1), {}),
    ((1, 448, 32, 2, 24, 1), {}),
]
OTHERS: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((2, 8, 24, 7, 6, 2), {}),
    ((3, 64, 128, 5, 4, 4), {}),
    ((2, 16, 32, 9, 8, 1), {"stride": (2, 2)}),
    ((1, 3, 16, 15, 15, 1), {"stride": (2, 2), "padding": (3, 3), "kernel": (7, 7)}),
    ((2, 16, 16, 6, 5, 1), {"padding": (1, 0), "kernel": (3, 1)}),
    ((1, 5, 7, 6, 5, 1), {"padding": (0, 0), "kernel": (2, 3)}),
]


@pytest.fixture(params=_native.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _native.isa()
    _native.set_isa(request.param)
    yield request.param
    _native.set_isa(before)


def operands(
    sizes: tuple[int, ...], dtype: torch.dtype, more: dict[str, Any], residual: bool
) -> tuple[list[Tensor | None], dict[str, Any]]:
    images, inputs, outputs, height, width, groups = sizes
    options = {"padding": (1, 1), "groups": groups, **more}
    kernel = options.pop("kernel", (3, 3))
    x = torch.randn(images, inputs, height, width)
    weight = torch.randn(outputs, inputs // groups, *kernel)
    weight *= weight[0].numel() ** -0.5
    rows = [torch.randn(outputs) for _ in range(4)]
    tensors: list[Any] = [x, weight, rows[0], rows[1], rows[2] if residual else None, None, None]
    if residual:
        tensors[5] = torch.randn(folded_conv(*tensors, **options).shape)
        tensors[6] = rows[3]
    made = [None if t is None else t.to(dtype) for t in tensors]
    made[0] = made[0].contiguous(memory_format=torch.channels_last)
    return made, options


def check(
    sizes: tuple[int, ...], dtype: torch.dtype, more: dict[str, Any], residual: bool
) -> tuple[Tensor, Tensor]:
    tensors, options = operands(sizes, dtype, more, residual)
    found = folded_conv(*tensors, **options, backend="cpu")
    same = folded_conv(*tensors, **options, backend="reference")
    wide = [None if t is None else t.double() for t in tensors]
    exact = folded_conv(*wide, **options, backend="reference")
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert_close(found, same, exact)
    return found, exact


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize(("sizes", "more"), WINOGRAD, ids=str)
def test_own_convolution(
    sizes: tuple[int, ...], more: dict[str, Any], dtype: torch.dtype, residual: bool, isa: str
) -> None:
    found, exact = check(sizes, dtype, more, residual)
    own = not (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype in HALF and own:
        assert_rounded(found, exact)


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize(("sizes", "more"), OTHERS, ids=str)
def test_other_convolutions(
    sizes: tuple[int, ...], more: dict[str, Any], dtype: torch.dtype, residual: bool, isa: str
) -> None:
    check(sizes, dtype, more, residual)


def test_any_number_of_threads_gives_the_same_bits() -> None:
    tensors, options = operands((3, 64, 32, 18, 19, 1), torch.float32, {}, True)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            results.append(folded_conv(*tensors, **options, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_an_image_alone_has_the_same_bits() -> None:
    tensors, options = operands((5, 64, 32, 18, 19, 1), torch.float32, {}, True)
    together = folded_conv(*tensors, **options)
    for i in range(5):
        one = [t[i : i + 1] if n in (0, 5) else t for n, t in enumerate(tensors)]
        assert torch.equal(folded_conv(*one, **options), together[i : i + 1])


def test_nan_passes() -> None:
    tensors, options = operands((1, 64, 16, 18, 19, 1), torch.float32, {}, False)
    assert isinstance(tensors[0], Tensor)
    tensors[0][0, 3, 0, 0] = torch.nan
    found = folded_conv(*tensors, **options)
    assert found[0, :, 0, 0].isnan().all()
    assert found[0, :, 4:, 8:].isfinite().all()


def test_filters_are_made_again_when_the_weight_changes() -> None:
    tensors, options = operands((1, 64, 16, 18, 18, 1), torch.float32, {}, False)
    folded_conv(*tensors, **options)
    assert isinstance(tensors[1], Tensor)
    tensors[1].mul_(-2)
    expected = folded_conv(*tensors, **options, backend="reference")
    torch.testing.assert_close(folded_conv(*tensors, **options), expected, atol=1e-5, rtol=1e-5)
