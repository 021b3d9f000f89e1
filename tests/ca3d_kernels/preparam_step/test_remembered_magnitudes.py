"""The skip check reads only gradients where remembered magnitudes bound theta and momentum."""

from typing import Any

import numpy as np
import pytest
import torch
from step_cases import assert_same_bits
from torch import Tensor, nn

from ca3d_kernels import LinearMapping, PreParamSGD, backends
from ca3d_kernels.preparam_step import op

SIZES = (1, 31, 512, 16384, 16385, 40000)  # a piece holds 16384 elements
OPTIONS: dict[str, Any] = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.01, "skip_nonfinite": True}


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(n, generator=generator).to(dtype)) for n in SIZES]


def gradients(seed: int, dtype: torch.dtype, factor: float) -> list[Tensor]:
    """Small ones, but for one element of one tensor."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(n, generator=generator) * 1e-3 for n in SIZES]
    which = seed % len(SIZES)
    at = int(torch.randint(SIZES[which], (), generator=generator))
    made[which][at] = factor
    return [grad.to(dtype) for grad in made]


@pytest.mark.parametrize("rounding", op.ROUNDINGS)
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_same_steps_are_skipped_as_by_the_reference(
    dtype: torch.dtype, nesterov: bool, rounding: str
) -> None:
    limit = torch.finfo(dtype).max
    both = []
    for backend in ("cpu", "reference"):
        params = parameters(dtype)
        optimizer = PreParamSGD(
            params, **OPTIONS, nesterov=nesterov, rounding=rounding, backend=backend
        )
        skipped = []
        for step in range(24):
            # From harmless through the neighbourhood of the limit, where the sign decides.
            factor = (-1) ** step * limit / 128 * (1e-3, 0.9, 1.1, 0.3, 2.1, 0.99)[step // 4]
            for w, grad in zip(params, gradients(step, dtype, factor), strict=True):
                w.grad = grad
            optimizer.step()
            skipped.append(optimizer.skipped_steps)
        both.append((params, skipped))
    (ours, our_skips), (reference, reference_skips) = both
    assert our_skips == reference_skips
    assert 0 < our_skips[-1] < 24
    for a, b in zip(ours, reference, strict=True):
        assert_same_bits(a.detach(), b.detach())


CHANGES: list[tuple[str, dict[str, float]]] = [
    ("nearest", {"momentum_buffer": -65000, "pre_parameter": 60000}),
    ("stochastic", {"momentum_buffer": -65000, "pre_parameter": 60000}),
    ("compensated", {"momentum_buffer": -65000, "pre_parameter": 60000}),
    ("compensated", {"compensation": 60000, "pre_parameter": 60000}),
]


@pytest.mark.parametrize(("rounding", "values"), CHANGES)
def test_a_change_from_outside_is_seen(rounding: str, values: dict[str, float]) -> None:
    (w,) = params = [nn.Parameter(torch.zeros(8, dtype=torch.float16))]
    optimizer = PreParamSGD(
        params, lr=1.0, momentum=0.9, rounding=rounding, skip_nonfinite=True, backend="cpu"
    )
    w.grad = torch.ones_like(w) * 1e-3
    optimizer.step()
    for name, value in values.items():
        optimizer.state[w][name].fill_(value)
    before = w.detach().clone()
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert torch.equal(w.detach(), before)


def native_arguments(w: Tensor, grad: Tensor, theta: Tensor, momentum: Tensor) -> list[Any]:
    table = np.array([*(x.data_ptr() for x in (w, grad, theta, momentum)), 0, w.numel(), 0])
    hyper = (0.1, 0.9, 0.0, 0.0, 1.0, 1.0)
    return [table, "float16", "float16", hyper, False, "nearest", (0, 0), 1]


def test_a_step_reports_the_largest_magnitudes_it_stored() -> None:
    native = backends.native()
    assert native is not None
    scales = torch.tensor([[3.0], [1.0], [5.0], [2.0]])
    tensors = (torch.randn(4, 20000) * scales).half().unbind()
    _, grad, theta, momentum = tensors
    largest = np.full(4, np.nan)
    native.preparam_sgd_step(*native_arguments(*tensors), largest)
    pieces = (slice(16384), slice(16384, None))
    expected = [x[piece].abs().max().item() for piece in pieces for x in (theta, momentum)]
    assert largest.tolist() == expected
    grad[0] = torch.inf
    native.preparam_sgd_step(*native_arguments(*tensors), largest)
    assert np.isnan(largest[:2]).all()
    assert np.isfinite(largest[2:]).all()


def test_magnitudes_bound_what_stochastic_rounding_stores() -> None:
    native = backends.native()
    assert native is not None
    tensors = (torch.randn(4, 20000) * 3).half().unbind()
    arguments = native_arguments(*tensors)
    arguments[5] = "stochastic"
    reached = 0
    for step in range(20):
        arguments[6] = (0, step)
        largest = np.full(4, np.nan)
        native.preparam_sgd_step(*arguments, largest)
        pieces = (slice(16384), slice(16384, None))
        stored = [x[piece].abs().max() for piece in pieces for x in tensors[2:]]
        for bound, value in zip(largest.tolist(), stored, strict=True):
            below = torch.nextafter(torch.tensor(bound).half(), torch.tensor(0.0).half())
            assert below <= value <= bound
            reached += value.item() == bound
    assert 0 < reached < 80


def test_a_wrong_number_of_magnitudes_is_refused() -> None:
    native = backends.native()
    assert native is not None
    tensors = torch.zeros(4, 20000).half().unbind()
    arguments = native_arguments(*tensors)
    for function in (native.preparam_sgd_step, native.preparam_sgd_step_overflows):
        with pytest.raises(ValueError, match="2 numbers for each of 2 pieces"):
            function(*arguments, np.zeros(2))


def test_mapping_scale_bounds_the_weight() -> None:
    """A weight overflows before its pre-parameter does, with a scale below 1."""
    w = nn.Parameter(torch.full((4,), 600.0, dtype=torch.float16))
    optimizer = PreParamSGD(
        [w], lr=1.0, mapping=LinearMapping(1 / 64), skip_nonfinite=True, backend="cpu"
    )
    w.grad = torch.full_like(w, -1.0)
    optimizer.step()
    assert optimizer.skipped_steps == 0
    w.grad = torch.full_like(w, -65000.0)
    optimizer.step()
    assert optimizer.skipped_steps == 1
