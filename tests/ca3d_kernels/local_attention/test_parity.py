"""Every backend against the definition in float64, over the whole space of problems."""

import math

import pytest
import torch
from attention_cases import (
    DTYPES,
    NAMED,
    PARAMETERS,
    Problem,
    allowed,
    assert_close,
    backends_here,
    check,
    operands,
    run,
    triton_takes,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from pairwise import pairwise_cases

from ca3d_kernels import UnsupportedInputError, local_temporal_attention, use_backend
from ca3d_kernels.triton_launch import interpreted

pytestmark = pytest.mark.parametrize("backend", backends_here())

if interpreted():
    # An interpreted program takes milliseconds: no more of them than show every case.
    PARAMETERS = PARAMETERS | {"lead": ((), (3,), (2, 2)), "dtype": DTYPES[:1] + DTYPES[2:]}
PAIRWISE = [Problem(**case) for case in pairwise_cases(PARAMETERS, allowed)]
assert len(PAIRWISE) <= 300


def check_or_refuse(problem: Problem, backend: str) -> None:
    """Checks a problem, or that the kernel refuses it when its limits say so."""
    with use_backend(backend, fallback=False):
        if backend == "triton" and not triton_takes(problem):
            with pytest.raises(UnsupportedInputError, match=r"head_dim|dtype|frames are more"):
                run(problem, backend)
            return
        check(problem, backend)


@pytest.mark.parametrize("problem", PAIRWISE, ids=str)
def test_every_pair_of_options(problem: Problem, backend: str) -> None:
    check_or_refuse(problem, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", NAMED.values(), ids=NAMED.keys())
def test_edge_cases(problem: Problem, dtype: torch.dtype, backend: str) -> None:
    check_or_refuse(Problem(**{**vars(problem), "dtype": dtype}), backend)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_and_strides(backend: str, data: st.DataObject) -> None:
    """Dimensions in any physical order, each cut out of a longer one or expanded from size 1."""
    lead = data.draw(st.lists(st.integers(0, 4), max_size=4).map(tuple))
    shape = (*lead, *(data.draw(st.integers(1, n)) for n in (4, 9, 24)))
    window = {
        "kernel_size": data.draw(st.integers(1, 7)),
        "dilation": data.draw(st.integers(1, 3)),
        "causal": data.draw(st.booleans()),
        "edge": data.draw(st.sampled_from(PARAMETERS["edge"])),
    }

    def tensor() -> torch.Tensor:
        order = data.draw(st.permutations(range(len(shape))))
        expanded = [data.draw(st.integers(0, 9)) == 0 for _ in shape]
        margins = [data.draw(st.integers(0, 2)) for _ in shape]
        sizes = [1 if e else n + m for n, e, m in zip(shape, expanded, margins, strict=True)]
        storage = torch.randn([sizes[i] for i in order], dtype=torch.float64)
        x = storage.permute([order.index(i) for i in range(len(shape))])
        for dim, (size, repeat) in enumerate(zip(shape, expanded, strict=True)):
            x = x.expand(*x.shape[:dim], size, *x.shape[dim + 1 :]) if repeat else x
            x = x.narrow(dim, 0 if repeat else margins[dim] // 2, size)
        return x

    q, k, v, grad = (tensor() for _ in range(4))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    output = local_temporal_attention(*leaves, **window, backend=backend)
    gradients = torch.autograd.grad(output, leaves, grad)
    copies = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    expected = local_temporal_attention(*copies, **window, backend="reference")
    wanted = torch.autograd.grad(expected, copies, grad.clone())
    for ours, theirs in zip((output, *gradients), (expected, *wanted), strict=True):
        assert ours.shape == q.shape
        assert ours.stride(-1) == 1
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("lead", [(0,), (0, 3), (3, 0)], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
def test_empty_batch(packed: bool, lead: tuple[int, ...], backend: str) -> None:
    results, inputs = run(Problem(lead=lead, packed=packed), backend)
    assert all(x.shape == inputs[0].shape for x in results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
def test_same_bits_for_any_number_of_threads(
    packed: bool, dtype: torch.dtype, backend: str
) -> None:
    # The interpreter knows no threads: there it is one program after another, twice.
    lead, numbers = ((2,), (1, 2)) if interpreted() else ((3, 37), (1, 2, 3, 2))
    problem = Problem(lead=lead, dtype=dtype, packed=packed, layout="channels-last")
    runs = []
    for workers in numbers:
        torch.manual_seed(1)
        runs.append(run(problem, backend, workers)[0])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_operands_are_not_written(backend: str) -> None:
    inputs = operands(Problem(layout="sliced", grad_layout="sliced"))
    before = [x.clone() for x in inputs]
    *leaves, grad = (x.detach().requires_grad_(i < 3) for i, x in enumerate(inputs))
    output = local_temporal_attention(*leaves, backend=backend)
    torch.autograd.grad(output, leaves, grad)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_large_logits_do_not_overflow(dtype: torch.dtype, backend: str) -> None:
    # q . k is 64 * 100 * 100 = 640000: beyond float16, and its exponential beyond any format.
    q = torch.full((1, 2, 6, 64), 100.0, dtype=dtype)
    v = torch.arange(6.0, dtype=dtype).view(1, 1, 6, 1).expand(1, 2, 6, 64)
    output = local_temporal_attention(q, q, v, kernel_size=3, scale=1.0, backend=backend)
    expected = torch.tensor([0.5, 1, 2, 3, 4, 4.5], dtype=dtype)
    assert torch.equal(output[0, 1, :, 7], expected)


@pytest.mark.parametrize("frames", [5, 40])
@pytest.mark.parametrize("edge", PARAMETERS["edge"])
def test_a_query_without_any_weight_is_nan(edge: str, frames: int, backend: str) -> None:
    # Every logit is -inf, but that of 0 where a window leaves the clip and zeros take part.
    q = torch.full((1, 1, frames, 16), 1e20)
    v = torch.ones(1, 1, frames, 16)
    output = local_temporal_attention(q, -q, v, kernel_size=3, edge=edge, backend=backend)
    assert output[..., 1:-1, :].isnan().all()
    ends = output[..., [0, -1], :]
    assert ends.eq(0).all() if edge == "zero" else ends.isnan().all()


def with_gradients(backend: str, edge: str, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and gradients of q, k and v for windows of 3; the last input is the output's."""
    *operands, grad = inputs
    leaves = [x.clone().requires_grad_() for x in operands]
    output = local_temporal_attention(*leaves, kernel_size=3, edge=edge, backend=backend)
    gradients = torch.autograd.grad(output, leaves, grad)
    return dict(zip(("output", "dq", "dk", "dv"), (output.detach(), *gradients), strict=True))


@pytest.mark.parametrize("logit", [-120.0, 120.0], ids=str)
@pytest.mark.parametrize("edge", PARAMETERS["edge"])
def test_logits_whose_exponentials_leave_float32(edge: str, logit: float, backend: str) -> None:
    q, k = torch.full((1, 2, 5, 16), 4.0), torch.full((1, 2, 5, 16), logit / 16)
    inputs = (q, k, *torch.randn(2, 1, 2, 5, 16))
    ours, same_dtype = (with_gradients(name, edge, *inputs) for name in (backend, "reference"))
    exact = with_gradients("reference", edge, *(x.double() for x in inputs))
    for name, result in ours.items():
        assert_close(name, result, same_dtype[name], exact[name])


@pytest.mark.parametrize("place", ["q", "k", "v", "grad"])
@pytest.mark.parametrize("edge", PARAMETERS["edge"])
def test_nan_reaches_only_what_its_window_meets(edge: str, place: str, backend: str) -> None:
    inputs = dict(zip(("q", "k", "v", "grad"), torch.randn(4, 2, 2, 6, 16), strict=True))
    inputs[place][0, 0, 1, 3] = math.nan
    ours, theirs = (with_gradients(name, edge, *inputs.values()) for name in (backend, "reference"))
    for name, result in ours.items():
        # The reference's products with zeros are NaN where a kernel leaves the term out.
        assert not (theirs[name].isfinite() & result.isnan()).any()
        assert result[1].isfinite().all()
        assert result[0, 1].isfinite().all()


@pytest.mark.parametrize("edge", PARAMETERS["edge"])
def test_infinities_outside_a_window_do_not_leak(edge: str, backend: str) -> None:
    q = torch.randn(1, 1, 9, 16)
    v = torch.randn(1, 1, 9, 16)
    v[..., 8, :] = math.inf
    k = torch.randn(1, 1, 9, 16)
    clean = local_temporal_attention(q, k, v.nan_to_num(posinf=0), kernel_size=3, edge=edge)
    output = local_temporal_attention(q, k, v, kernel_size=3, edge=edge, backend=backend)
    torch.testing.assert_close(output[..., :6, :], clean[..., :6, :])
    assert not torch.isfinite(output[..., 8, :]).any()
