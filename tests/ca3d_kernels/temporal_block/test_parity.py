"""The compiled kernels of the folded temporal half against their definition in float64."""

from collections.abc import Iterator

import pytest
import torch
from block_cases import CASES, HALF, MORE_CASES, Case, check

from ca3d_kernels import _native, backends, temporal_block


@pytest.fixture(params=_native.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _native.isa()
    _native.set_isa(request.param)
    yield request.param
    _native.set_isa(before)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("case", [*CASES, *MORE_CASES], ids=str)
def test_against_float64(case: Case, dtype: torch.dtype, isa: str) -> None:
    check(case, dtype, "cpu")


@pytest.mark.parametrize("case", [Case(positions=40), MORE_CASES[3]], ids=str)
def test_any_number_of_threads_gives_the_same_bits(case: Case) -> None:
    operands, options = case.tensors(torch.float32), case.options()
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            results.append(temporal_block(*operands, **options, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_infinities_stay_in_their_position() -> None:
    case = Case(positions=9, batch=1)
    operands = case.tensors(torch.float32)
    clean = temporal_block(*operands, backend="cpu")
    operands[0][0, 1, 4, 3] = torch.inf
    output = temporal_block(*operands, backend="cpu")
    others = [n for n in range(9) if n != 4]
    assert torch.equal(output[:, :, others], clean[:, :, others])
    assert torch.equal(output[..., case.head_dim :], clean[..., case.head_dim :])


def test_filters_are_made_again_when_the_weights_change() -> None:
    operands = Case(blocks=1).tensors(torch.float32)
    before = temporal_block(*operands, backend="cpu")
    assert torch.equal(temporal_block(*operands, backend="cpu"), before)
    kernels = backends.choose("temporal_block", "cpu")[0].load()
    operands[5].mul_(2)
    after = temporal_block(*operands, backend="cpu")
    assert not torch.equal(after, before)
    torch.testing.assert_close(
        after, temporal_block(*operands, backend="reference"), atol=1e-4, rtol=1e-4
    )
    count = len(kernels._filters)
    del operands
    assert len(kernels._filters) <= count
    with torch.inference_mode():
        operands = Case(blocks=1).tensors(torch.float32)
        temporal_block(*operands, backend="cpu")
        operands[5].zero_()
        expected = temporal_block(*operands, backend="reference")
        torch.testing.assert_close(temporal_block(*operands, backend="cpu"), expected)
