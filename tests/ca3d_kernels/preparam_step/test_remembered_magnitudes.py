"""The skip check reads only gradients where remembered magnitudes bound theta and momentum."""

from typing import Any

import numpy as np
import pytest
import torch
from step_cases import MAGNITUDE_SIZES, assert_same_skips
from torch import Tensor, nn

from ca3d_kernels import LinearMapping, PreParamSGD, backends
from ca3d_kernels.preparam_step import op

OPTIONS: dict[str, Any] = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.01, "skip_nonfinite": True}


@pytest.fixture(params=["cpu", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    """The CUDA kernels run on the host."""
    if request.param == "cuda":
        request.getfixturevalue("emulated_cuda")
    return request.param


@pytest.mark.parametrize("rounding", op.ROUNDINGS)
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_same_steps_are_skipped_as_by_the_reference(
    dtype: torch.dtype, nesterov: bool, rounding: str, backend: str
) -> None:
    options = {**OPTIONS, "nesterov": nesterov, "rounding": rounding}
    assert_same_skips(backend, dtype, options, MAGNITUDE_SIZES)


@pytest.mark.parametrize("changes", [{"momentum": 0.0}, {"dtype": torch.float64}], ids=str)
def test_same_steps_are_skipped_with_other_options(changes: dict[str, Any], backend: str) -> None:
    options = {**OPTIONS, **changes}
    assert_same_skips(backend, options.pop("dtype", torch.float16), options, MAGNITUDE_SIZES)


CHANGES: list[tuple[str, dict[str, float]]] = [
    ("nearest", {"momentum_buffer": -65000, "pre_parameter": 60000}),
    ("stochastic", {"momentum_buffer": -65000, "pre_parameter": 60000}),
    ("compensated", {"momentum_buffer": -65000, "pre_parameter": 60000}),
    ("compensated", {"compensation": 60000, "pre_parameter": 60000}),
]


@pytest.mark.parametrize(("rounding", "values"), CHANGES)
def test_a_change_from_outside_is_seen(
    rounding: str, values: dict[str, float], backend: str
) -> None:
    (w,) = params = [nn.Parameter(torch.zeros(8, dtype=torch.float16))]
    optimizer = PreParamSGD(
        params, lr=1.0, momentum=0.9, rounding=rounding, skip_nonfinite=True, backend=backend
    )
    w.grad = torch.ones_like(w) * 1e-3
    optimizer.step()
    for name, value in values.items():
        optimizer.state[w][name].fill_(value)
    before = w.detach().clone()
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert torch.equal(w.detach(), before)


@pytest.mark.parametrize("name", ["pre_parameter", "momentum_buffer"])
def test_only_gradients_are_read_after_a_step(name: str, backend: str) -> None:
    w = nn.Parameter(torch.ones(5000, dtype=torch.float16))
    optimizer = PreParamSGD([w], **OPTIONS, backend=backend)
    w.grad = torch.ones_like(w) * 1e-3
    optimizer.step()
    # A write that no version tells of: whoever reads this skips the step.
    optimizer.state[w][name].numpy()[4999] = np.inf
    optimizer.step()
    assert optimizer.skipped_steps == 0
    # Too large a gradient to tell by itself.
    w.grad[4999] = 60000
    optimizer.step()
    assert optimizer.skipped_steps == 1


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
