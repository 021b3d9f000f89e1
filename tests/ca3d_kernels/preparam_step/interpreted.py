"""The Triton step against its definition, bit for bit; runs in Triton's interpreter.

Not collected by itself: `test_interpreted.py` runs it in a process of its own.
"""

import itertools

import pytest
import torch
from exhaustive import often
from step_cases import (
    CASES,
    DTYPES,
    assert_flag_of_float32,
    assert_same_bits,
    assert_same_skips,
    options_of,
    parameters,
    set_gradients,
)
from torch import Tensor, nn

from ca3d_kernels import PreParamSGD, UnsupportedInputError, cuda, triton_launch, use_backend
from ca3d_kernels.preparam_step import op, remembered
from ca3d_kernels.preparam_step import triton as step
from ca3d_kernels.preparam_step.reference import Hyperparameters

SIZES = (0, 1, 15, 16, 17, 513, step.CHUNK, step.CHUNK + 1, 2 * step.CHUNK + 35)


def trained(params: list[nn.Parameter], backend: str, **options: object) -> list[Tensor]:
    optimizer = PreParamSGD(params, lr=0.01, backend=backend, **options)
    with use_backend(backend, fallback=False):
        for number in range(2):
            set_gradients(params, seed=number)
            optimizer.step()
    assert optimizer.skipped_steps == 0
    states = [value for w in params for value in optimizer.state[w].values()]
    return [w.detach() for w in params] + states


def in_every_run(case: str, dtype: torch.dtype) -> bool:
    """Each case in float16 and one more dtype."""
    return dtype in (torch.float16, DTYPES[1 + list(CASES).index(case) % (len(DTYPES) - 1)])


@pytest.mark.parametrize(("case", "dtype"), often(itertools.product(CASES, DTYPES), in_every_run))
def test_equals_the_reference_bit_for_bit(case: str, dtype: torch.dtype) -> None:
    options = options_of(case, dtype)
    expected = trained(parameters(dtype, SIZES), "reference", **options)
    actual = trained(parameters(dtype, SIZES), "triton", **options)
    for i, (x, y) in enumerate(zip(actual, expected, strict=True)):
        assert_same_bits(x, y, f"tensor {i}")


@pytest.mark.parametrize("rounding", op.ROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_bit_pattern_of_a_gradient(dtype: torch.dtype, rounding: str) -> None:
    grad = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    results = []
    for backend in ("triton", "reference"):
        w = nn.Parameter(torch.linspace(-1, 1, 2**16).to(dtype))
        w.grad = grad
        optimizer = PreParamSGD([w], lr=0.5, momentum=0.9, rounding=rounding, backend=backend)
        optimizer.step()
        results.append([w, *optimizer.state[w].values()])
    for x, y in zip(*results, strict=True):
        assert_same_bits(x, y)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan, 6e4])
@pytest.mark.parametrize(
    ("where", "rounding"),
    [(0, "nearest"), (4096 + 34, "stochastic"), (2 * step.CHUNK + 34, "compensated")],
)
def test_a_step_that_overflows_writes_nothing(where: int, bad: float, rounding: str) -> None:
    # 6e4 is finite, but 128 times it isn't.
    (w,) = parameters(torch.float16, [2 * step.CHUNK + 35])
    before = w.detach().clone()
    w.grad = torch.zeros_like(w)
    w.grad[where] = bad
    optimizer = PreParamSGD(
        [w], lr=0.5, momentum=0.9, rounding=rounding, skip_nonfinite=True, backend="triton"
    )
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert torch.equal(w, before)
    assert not optimizer.state[w]["momentum_buffer"].any()
    w.grad[where] = 0
    optimizer.step()
    assert optimizer.skipped_steps == 1


def test_overflow_of_the_weight_with_any_draw() -> None:
    # w = 2 theta, and theta between 32752, the largest, and 32768: it could become the latter.
    for gradient, expected in ((-32.0, False), (-32.5, True)):
        theta = [torch.full((300,), 32736.0).half()]
        grads = [torch.full((300,), gradient).half()]
        w = [torch.zeros(300).half()]
        hyper = Hyperparameters(1.0)
        one = op.Batch(w, grads, theta, [], hyper, 0.5, 0.5, rounding="stochastic")
        for kernels in (step.TritonKernels(), op.ReferenceKernels()):
            assert bool(kernels.overflows(one)) == expected


@pytest.mark.parametrize("rounding", op.ROUNDINGS)
def test_tensors_that_are_not_aligned(rounding: str) -> None:
    results = []
    for backend in ("triton", "reference"):
        storage = torch.linspace(-1, 1, 10_001).half()
        params = [nn.Parameter(storage[1:5000]), nn.Parameter(storage[5008:])]
        results.append(trained(params, backend, momentum=0.9, rounding=rounding))
    for x, y in zip(*results, strict=True):
        assert_same_bits(x, y)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float16, {"momentum": 0.9, "weight_decay": 0.01}),
        (torch.float16, {"momentum": 0.9, "nesterov": True, "rounding": "stochastic"}),
        (torch.bfloat16, {"momentum": 0.9, "weight_decay": 0.01, "rounding": "compensated"}),
        (torch.float16, {"momentum": 0.9, "pre_param_dtype": torch.float32, "lr": 64.0}),
        (torch.float32, {}),
        (torch.float64, {"momentum": 0.9, "dampening": 0.5}),
    ],
    ids=str,
)
def test_same_steps_are_skipped_as_by_the_reference(dtype: torch.dtype, options: dict) -> None:
    options = {"lr": 0.5, "skip_nonfinite": True, **options}
    assert_same_skips("triton", dtype, options, (31, step.CHUNK + 35))


@pytest.mark.parametrize("name", ["pre_parameter", "momentum_buffer"])
def test_only_gradients_are_read_after_a_step(name: str) -> None:
    storage = torch.ones(5001, dtype=torch.float16)
    params = [nn.Parameter(storage[1:].clone()), nn.Parameter(storage[1:])]
    optimizer = PreParamSGD(params, lr=0.5, momentum=0.9, skip_nonfinite=True, backend="triton")
    for w in params:
        w.grad = torch.ones_like(w) * 1e-3
    optimizer.step()
    (part,) = optimizer._plans[0].parts
    expected = [
        stretch.abs().max().item()
        for theta, m in zip(part.batch.pre_params, part.batch.momenta, strict=True)
        for pair in zip(theta.split(step.CHUNK), m.split(step.CHUNK), strict=True)
        for stretch in pair
    ]
    largest = remembered.known(part.batch, part.batch.cache["chosen"])
    assert largest.tolist() == expected
    # A write that no version tells of: whoever reads this skips the step.
    for w in params:
        optimizer.state[w][name].numpy()[4999] = torch.inf
    optimizer.step()
    assert optimizer.skipped_steps == 0
    # Too large a gradient to tell by itself.
    params[1].grad[4999] = 60000
    optimizer.step()
    assert optimizer.skipped_steps == 1


def batch(w: list[Tensor], lr: float = 0.1) -> op.Batch:
    return op.Batch(w, w, w, [], Hyperparameters(lr), 128.0, 128.0, cache={})


def test_tables_are_kept_until_an_address_changes() -> None:
    w = [torch.zeros(5000), torch.zeros(3)]
    first = batch(w)
    tables = step.launches(first, None)[0].arguments
    again = step.launches(first._replace(hyper=Hyperparameters(0.2)), None)[0].arguments
    assert again["chunks"] is tables["chunks"]
    assert (tables["hyper"][0], again["hyper"][0]) == (0.1, 0.2)
    moved = step.launches(first._replace(grads=[x.clone() for x in w]), None)[0].arguments
    assert moved["chunks"] is not tables["chunks"]


def test_a_capture_has_tables_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    first = batch([torch.zeros(5000)])
    tables = step.launches(first, None)[0].arguments
    monkeypatch.setattr(cuda, "is_capturing", lambda device: True)
    captured = step.launches(first, None)[0].arguments
    monkeypatch.setattr(cuda, "is_capturing", lambda device: False)
    again = step.launches(first, None)[0].arguments
    assert first.cache is not None
    sources = first.cache["uploads"].captured
    for name in ("chunks", "hyper"):
        assert again[name] is tables[name]
        assert torch.equal(captured[name], tables[name])
        assert any(torch.equal(x, captured[name]) for x in sources)
    assert captured["chunks"] is not tables["chunks"]


@pytest.mark.parametrize("flag", [None, 0.0])
def test_a_capture_runs_the_kernels_of_its_warm_up(
    flag: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No other can be loaded while a CUDA graph is captured."""
    kernels: set[tuple[str, ...]] = set()

    def note(launch: triton_launch.Launch) -> None:
        kernels.add((launch.kernel.__name__, str(launch.constants), *launch.arguments))

    monkeypatch.setattr(triton_launch, "run", note)
    (w,) = parameters(torch.float16, [5000])
    w.grad = torch.zeros_like(w)
    optimizer = PreParamSGD([w], lr=0.5, skip_nonfinite=flag is None, backend="triton")
    found_inf = None if flag is None else torch.tensor(flag)
    optimizer.step(found_inf=found_inf)
    warm = kernels.copy()
    monkeypatch.setattr(cuda, "is_capturing", lambda device: True)
    optimizer.step(found_inf=found_inf)
    assert kernels == warm


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_the_flag_is_of_float32_whatever_the_default(dtype: torch.dtype) -> None:
    assert_flag_of_float32("triton", dtype)


def test_refusals() -> None:
    gaps = torch.zeros(6, 16)[:, ::2]
    with pytest.raises(UnsupportedInputError, match="has gaps"):
        step.launches(batch([gaps]), None)
    mixed = batch([torch.zeros(3)])._replace(pre_params=[torch.zeros(3, dtype=torch.float64)])
    with pytest.raises(UnsupportedInputError, match=r"of torch.float64 with .* torch.float32"):
        step.launches(mixed, None)


def test_numbers_in_tensors_are_read_by_the_kernels() -> None:
    results = []
    for backend in ("triton", "reference"):
        params = parameters(torch.float16, [5000, 3])
        lr, momentum = torch.tensor(0.1), torch.tensor(0.9)
        optimizer = PreParamSGD(params, lr=lr, momentum=momentum, backend=backend)
        for number in range(3):
            lr.fill_(0.1 / 2**number)
            momentum.mul_(0.75)
            set_gradients(params, seed=number)
            optimizer.step(grad_scale=torch.tensor(3.0))
        results.append([*params, *(s["pre_parameter"] for s in optimizer.state.values())])
    for x, y in zip(*results, strict=True):
        assert_same_bits(x, y)


@pytest.mark.parametrize("flag", [0.0, 1.0])
def test_a_flag_from_outside(flag: float) -> None:
    (w,) = parameters(torch.float16, [100])
    before = w.detach().clone()
    w.grad = torch.ones_like(w)
    optimizer = PreParamSGD([w], lr=0.5, backend="triton")
    for _ in range(3):
        optimizer.step(found_inf=torch.tensor([flag]))
    assert torch.equal(w, before) == bool(flag)
    assert optimizer.skipped_steps == 3 * flag
    assert optimizer.state_dict()["skipped_steps"] == 3 * flag
