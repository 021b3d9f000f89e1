"""The parity suites on a GPU, for every backend that serves one."""

from typing import Any

import block_cases
import pytest
import torch
from attention_cases import (
    DTYPES,
    NAMED,
    PARAMETERS,
    Problem,
    allowed,
    check,
    run,
    triton_takes,
    vary,
)
from pairwise import pairwise_cases
from qkv_cases import CASES, Case
from qkv_cases import check as check_qkv
from step_cases import CASES as STEP_CASES
from step_cases import assert_same_bits, options_of, parameters, set_gradients
from torch import Tensor

from ca3d_kernels import (
    PreParamSGD,
    UnsupportedInputError,
    backends,
    local_temporal_attention,
    use_backend,
)
from ca3d_kernels.preparam_step.op import ROUNDINGS

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("there is no CUDA device", allow_module_level=True)

PROBLEMS = {
    f"{name}, {dtype}": vary(problem, device="cuda", dtype=dtype)
    for name, problem in NAMED.items()
    for dtype in DTYPES
}
PROBLEMS |= {
    str(problem): vary(problem, device="cuda")
    for problem in (Problem(**case) for case in pairwise_cases(PARAMETERS, allowed))
}


def serving(op: str) -> list:
    """The backends that serve CUDA tensors, as pytest parameters."""
    return [
        pytest.param(name, marks=pytest.mark.skipif(bool(reason), reason=f"{name}: {reason}"))
        for name, reason in backends.explain(op, "cuda").items()
    ]


@pytest.mark.parametrize("backend", serving("local_attention"))
@pytest.mark.parametrize("name", PROBLEMS)
def test_local_attention(name: str, backend: str) -> None:
    problem = PROBLEMS[name]
    if backend == "triton" and not triton_takes(problem):
        with use_backend(backend, fallback=False), pytest.raises(UnsupportedInputError):
            run(problem, backend)
    else:
        check(problem, backend)


@pytest.mark.parametrize("backend", serving("local_attention"))
def test_local_attention_repeats_its_bits(backend: str) -> None:
    runs = []
    for _ in range(3):
        torch.manual_seed(1)
        problem = Problem(lead=(3, 370), device="cuda", dtype=torch.float16, layout="channels-last")
        runs.append(run(problem, backend)[0])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("backend", serving("qkv_attention"))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_qkv_attention(case: Case, dtype: torch.dtype, backend: str) -> None:
    check_qkv(case, dtype, backend, "cuda")


@pytest.mark.parametrize("backend", serving("temporal_block"))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", block_cases.CASES, ids=str)
def test_temporal_block(case: block_cases.Case, dtype: torch.dtype, backend: str) -> None:
    block_cases.check(case, dtype, backend, "cuda")


def trained(
    params: list[torch.nn.Parameter], backend: str, device: str, **options: Any
) -> list[Tensor]:
    """What three steps make of parameters, taken along to a device, on the CPU again."""
    moved = [torch.nn.Parameter(w.detach().to(device)) for w in params]
    optimizer = PreParamSGD(moved, lr=0.01, backend=backend, **options)
    for step in range(3):
        set_gradients(params, seed=step)
        for w, source in zip(moved, params, strict=True):
            assert source.grad is not None
            w.grad = source.grad.to(device)
        optimizer.step()
    assert optimizer.skipped_steps == 0
    states = [value for w in moved for value in optimizer.state[w].values()]
    return [x.detach().cpu() for x in (*moved, *states)]


@pytest.mark.parametrize("case", STEP_CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", serving("preparam_step"))
def test_preparam_step_is_that_of_the_cpu(backend: str, dtype: torch.dtype, case: str) -> None:
    options = options_of(case, dtype)
    expected = trained(parameters(dtype), "reference", "cpu", **options)
    actual = trained(parameters(dtype), backend, "cuda", **options)
    for i, (x, y) in enumerate(zip(actual, expected, strict=True)):
        assert_same_bits(x, y, f"tensor {i}")


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("backend", serving("preparam_step"))
def test_preparam_step_of_tensors_that_are_not_aligned(backend: str, rounding: str) -> None:
    results = []
    for name, device in ((backend, "cuda"), ("reference", "cpu")):
        storage = torch.linspace(-1, 1, 10_001, device=device).half()
        params = [torch.nn.Parameter(storage[1:5000]), torch.nn.Parameter(storage[5008:])]
        optimizer = PreParamSGD(params, lr=0.5, momentum=0.9, rounding=rounding, backend=name)
        for w in params:
            w.grad = torch.linspace(-0.1, 0.1, len(w)).half().to(device)
        optimizer.step()
        states = [value for w in params for value in optimizer.state[w].values()]
        results.append([x.detach().cpu() for x in (*params, *states)])
    for x, y in zip(*results, strict=True):
        assert_same_bits(x, y)


@pytest.mark.parametrize("backend", serving("local_attention"))
def test_kernels_are_queued_on_the_current_stream(backend: str) -> None:
    q = torch.randn(64, 4, 16, 64, device="cuda")
    expected = local_temporal_attention(q, q, q, backend=backend)
    stream, late = torch.cuda.Stream(), torch.zeros_like(q)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # cycles: what is queued elsewhere would read zeros
        late.copy_(q)
        actual = local_temporal_attention(late, late, late, backend=backend)
    torch.cuda.synchronize()
    assert torch.equal(actual, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
@pytest.mark.parametrize("backend", serving("local_attention"))
def test_kernels_run_on_the_device_of_their_tensors(backend: str) -> None:
    q = torch.randn(64, 4, 16, 64)
    first, second = (
        local_temporal_attention(*3 * (q.to(device),), backend=backend)
        for device in ("cuda:0", "cuda:1")
    )
    assert second.device.index == 1
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(second.cpu(), first.cpu())


@pytest.mark.parametrize("backend", serving("preparam_step"))
def test_a_step_that_overflows_writes_nothing(backend: str) -> None:
    w = torch.nn.Parameter(torch.ones(10_001, dtype=torch.float16, device="cuda"))
    w.grad = torch.ones_like(w)
    w.grad[10_000] = torch.inf
    optimizer = PreParamSGD([w], lr=0.5, skip_nonfinite=True, backend=backend)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert bool((w == 1).all())


@pytest.mark.parametrize(
    "backend", [x for x in serving("preparam_step") if x.values != ("reference",)]
)
def test_replays_of_a_captured_step_take_what_tensors_hold(backend: str) -> None:
    w = torch.nn.Parameter(torch.ones(10_001, dtype=torch.float16, device="cuda"))
    w.grad = torch.ones_like(w)
    lr, scale, found_inf = (torch.tensor(x, device="cuda") for x in (0.25, 2.0, 0.0))
    optimizer = PreParamSGD([w], lr=lr, backend=backend)
    optimizer.step(grad_scale=scale, found_inf=found_inf)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step(grad_scale=scale, found_inf=found_inf)
    expected = 0.875
    for number, (rate, divisor, flag) in enumerate(((0.25, 2, 0), (0.5, 4, 0), (0.5, 1, 1))):
        lr.fill_(rate)
        scale.fill_(divisor)
        found_inf.fill_(flag)
        graph.replay()
        expected -= 0.0 if flag else rate / divisor
        assert bool((w == expected).all()), number
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
@pytest.mark.parametrize(
    "backend", [x for x in serving("preparam_step") if x.values != ("reference",)]
)
def test_replays_of_a_captured_step_search_for_overflows(backend: str, rounding: str) -> None:
    w = torch.nn.Parameter(torch.ones(10_001, dtype=torch.float16, device="cuda"))
    w.grad = torch.full_like(w, 0.5)
    optimizer = PreParamSGD([w], lr=0.25, rounding=rounding, skip_nonfinite=True, backend=backend)
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for gradient, expected in ((0.5, 0.75), (torch.inf, 0.75), (-0.5, 0.875)):
        w.grad.fill_(gradient)
        graph.replay()
        assert bool((w == expected).all()), gradient
    assert optimizer.skipped_steps == 1
