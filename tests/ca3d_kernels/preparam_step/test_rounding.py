"""What stochastic and compensated rounding store: without bias, and without loss."""

import math
from typing import Any

import pytest
import torch
from step_cases import assert_same_bits, parameters, set_gradients
from torch import Tensor, nn

from ca3d_kernels import LinearMapping, PreParamSGD, cuda
from ca3d_kernels.preparam_step import op
from ca3d_kernels.preparam_step.mapping import PreParamMapping
from ca3d_kernels.preparam_step.reference import Hyperparameters, stepped
from ca3d_kernels.preparam_step.stochastic import round_stochastically

HALVES = (torch.float16, torch.bfloat16)
BACKENDS = ("cpu", "reference")


def patterns(dtype: torch.dtype) -> Tensor:
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)


def drawn(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Every possible result for one value, as float32."""
    random = torch.arange(2**16)
    return round_stochastically(x.expand(2**16), dtype, random).float()


# ---- the rounding of one value ----


@pytest.mark.parametrize("random", [0, 12345, 65535])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_what_is_representable_stays(dtype: torch.dtype, random: int) -> None:
    x = patterns(dtype)
    assert_same_bits(round_stochastically(x.float(), dtype, torch.full((2**16,), random)), x)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_results_are_the_two_neighbours_and_their_mean_is_the_value(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    values = [1 / 3, -1.0001, 1.999, 3e4, -info.smallest_normal * 1.0001, info.smallest_normal]
    values += [info.smallest_normal * 0.9999, -info.smallest_normal / 3, info.tiny / 100, 0.0]
    for value in values:
        x = torch.tensor(value)
        results = drawn(x, dtype)
        lower, upper = results.min(), results.max()
        assert lower <= x <= upper
        near = x.to(dtype)
        assert near.float() in (lower, upper)
        if lower < upper:
            assert torch.nextafter(lower.to(dtype), upper.to(dtype)).float() == upper
        # Below its normal range, x is rounded to 2^-13 ulp of float16 first.
        allowed = 2.0**-38 if dtype == torch.float16 and abs(value) < 2**-14 else 0
        assert abs(results.double().mean() - x.double()) <= allowed
        assert (results.signbit() == x.signbit()).all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_result_grows_with_the_draw(dtype: torch.dtype) -> None:
    for value in (0.7, 1e-5, 1e-7, 5e4):
        assert (drawn(torch.tensor(value), dtype).diff() >= 0).all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_beyond_the_largest_number_values_are_rounded_to_nearest(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    ulp = 2.0 ** (math.frexp(largest)[1] - 1) * torch.finfo(dtype).eps
    inf = torch.inf
    inside, outside = largest + ulp * 0.499, largest + ulp * 0.5
    for value, expected in ((inside, largest), (outside, inf), (inf, inf), (1.5 * outside, inf)):
        for sign in (1, -1):
            assert (drawn(torch.tensor(sign * value), dtype) == sign * expected).all()
    assert drawn(torch.tensor(torch.nan), dtype).isnan().all()


# ---- stochastic steps ----


def batch(
    theta: Tensor, grad: Tensor, momentum: Tensor | None, hyper: Hyperparameters, **options: Any
) -> op.Batch:
    momenta = [] if momentum is None else [momentum]
    return op.Batch([theta / 128], [grad], [theta], momenta, hyper, 128.0, 1.0, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_steps_have_no_bias(dtype: torch.dtype, backend: str) -> None:
    # 10,000 elements step alike for 40 steps. Each step is below half an ulp, so that rounding to
    # nearest would leave theta where it is; momentum decays by a share that nearest would distort.
    count, steps, lr, mu = 10_000, 40, 2.0**-5, 0.9
    hyper = Hyperparameters(lr, mu)
    ulp = torch.finfo(dtype).eps
    gradient = ulp * 0.7
    theta = torch.ones(count, dtype=dtype)
    momentum = torch.full((count,), ulp * 3, dtype=dtype)
    grad = torch.full((count,), gradient, dtype=dtype)
    exact_theta, exact_m = 1.0, momentum[0].item()
    gradient = grad[0].item()
    for step in range(steps):
        op.step(
            batch(theta, grad, momentum, hyper, rounding="stochastic", backend=backend, steps=step)
        )
        exact_m = mu * exact_m + gradient
        exact_theta -= lr * exact_m
    assert exact_theta < 1 - ulp
    for values, exact in ((theta, exact_theta), (momentum, exact_m)):
        error = (values.double() - exact).mean().abs()
        assert values.unique().numel() > 1
        assert error < 5 * values.double().std() / count**0.5


def test_small_updates_are_lost_by_nearest_only() -> None:
    moved = {}
    for rounding in op.ROUNDINGS:
        w = nn.Parameter(torch.full((5000,), 0.5, dtype=torch.float16))
        optimizer = PreParamSGD([w], lr=2.0**-15, rounding=rounding)
        for _ in range(64):
            w.grad = torch.ones_like(w)
            optimizer.step()
        moved[rounding] = 0.5 - w.double().mean().item()
    assert moved["nearest"] == 0
    assert moved["compensated"] == 2.0**-9
    assert moved["stochastic"] == pytest.approx(2.0**-9, rel=0.05)


@pytest.mark.parametrize("backend", BACKENDS)
def test_draws_differ_between_tensors_steps_and_seeds_only(backend: str) -> None:
    def after(seed: int, steps: int, number: int) -> Tensor:
        theta, grad = torch.ones(1000).half(), torch.full((1000,), 0.3).half()
        hyper = Hyperparameters(2.0**-10)
        random = {"seed": seed, "steps": steps, "numbers": [number]}
        op.step(batch(theta, grad, None, hyper, rounding="stochastic", backend=backend, **random))
        return theta

    first = after(1, 2, 3)
    assert_same_bits(after(1, 2, 3), first)
    for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0), (2**32 + 1, 2, 3)):
        different = (after(*other) != first).double().mean()
        assert 0.2 < different < 0.7  # 2 p (1 - p) of them, with p about 0.6


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_weight_overflows_with_any_draw_or_none(backend: str) -> None:
    # With c = 1/2, w = 2 theta: whether theta is rounded up decides. A step that could overflow is
    # skipped.
    w = nn.Parameter(torch.full((200,), 65472.0, dtype=torch.float16))
    optimizer = PreParamSGD(
        [w],
        lr=0.5,
        mapping=LinearMapping(0.5),
        rounding="stochastic",
        skip_nonfinite=True,
        backend=backend,
    )
    w.grad = torch.zeros_like(w)
    optimizer.step()
    theta = optimizer.state[w]["pre_parameter"]
    assert (theta == 32736).all()
    w.grad[-1] = -65.0  # 32736 + 16.25: between 32752, the largest, and 32768
    optimizer.step()
    assert optimizer.skipped_steps == 1
    w.grad[-1] = -64.0
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert w[-1] == 65504


# ---- compensated steps ----


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_compensated_steps_add_up_as_in_float64(dtype: torch.dtype, backend: str) -> None:
    generator = torch.Generator().manual_seed(2)
    (w,) = parameters(dtype, [2000])
    optimizer = PreParamSGD([w], lr=2.0**-12, rounding="compensated", backend=backend)
    nearest = PreParamSGD([v := nn.Parameter(w.detach().clone())], lr=2.0**-12, backend=backend)
    exact = 128 * w.detach().double()
    for _ in range(300):
        w.grad = v.grad = (1 + torch.randn(2000, generator=generator)).to(dtype)
        exact -= 2.0**-12 * 128 * w.grad.double()
        optimizer.step()
        nearest.step()
    state = optimizer.state[w]
    assert state["compensation"].dtype == dtype
    total = state["pre_parameter"].double() + state["compensation"].double()
    largest = exact.abs().max()
    error = (total - exact).abs().max() / largest
    lost = (nearest.state[v]["pre_parameter"].double() - exact).abs().max() / largest
    eps = torch.finfo(dtype).eps
    # Each step rounds the compensation, which is below half an ulp of theta, to its own eps.
    assert error < 300 * eps**2 / 4
    assert lost > 20 * error
    # theta is the half-precision number nearest to the sum.
    assert (state["compensation"].abs() <= eps * state["pre_parameter"].abs() / 2).all()


def test_compensation_follows_the_weight() -> None:
    (w,) = parameters(torch.float16, [50])
    optimizer = PreParamSGD([w], lr=0.01, rounding="compensated")
    set_gradients([w])
    optimizer.step()
    assert optimizer.state[w]["compensation"].any()
    # A weight that is set from outside has no rest.
    with torch.no_grad():
        w.fill_(0.5)
    w.grad = torch.zeros_like(w)
    with pytest.warns(RuntimeWarning, match="1 parameters were changed outside"):
        optimizer.step()
    assert not optimizer.state[w]["compensation"].any()
    assert (w == 0.5).all()
    # Other roundings would leave a rest behind that is none any more.
    optimizer.param_groups[0]["rounding"] = "nearest"
    optimizer.step()
    assert set(optimizer.state[w]) == {"pre_parameter"}


# ---- the optimizer ----


class Doubling(PreParamMapping):
    """A linear map that doesn't say so: it takes the reference."""

    def to_param(self, pre_param: Tensor) -> Tensor:
        return pre_param / 2

    def to_pre_param(self, param: Tensor) -> Tensor:
        return param * 2

    def map_grad(self, grad: Tensor, param: Tensor) -> Tensor:
        return grad * 2


@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
def test_maps_without_kernels_give_the_same_bits(rounding: str) -> None:
    results = []
    for mapping in (LinearMapping(2.0), Doubling()):
        params = parameters(torch.float16, [5, 700])
        options = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.01, "seed": 4}
        optimizer = PreParamSGD(params, **options, mapping=mapping, rounding=rounding)
        for step in range(3):
            set_gradients(params, seed=step)
            optimizer.step()
        results.append([*params, *(x for w in params for x in optimizer.state[w].values())])
    for x, y in zip(*results, strict=True):
        assert_same_bits(x, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_with_their_own_rounding(backend: str) -> None:
    roundings = ("nearest", "compensated", "stochastic", "published", "stochastic")
    params = parameters(torch.float16, [300] * len(roundings))
    options: list[dict[str, Any]] = [
        {"rounding": rounding, "lr": 0.01 * (i + 1), "momentum": 0.1 * i}
        for i, rounding in enumerate(roundings)
    ]
    groups = [{"params": [w], **own} for w, own in zip(params, options, strict=True)]
    optimizer = PreParamSGD(groups, lr=1.0, seed=8, backend=backend)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    # Each parameter alone, at its place in an optimizer whose other parameters stay as they are.
    alone = parameters(torch.float16, [300] * len(roundings))
    others = [PreParamSGD(alone, seed=8, backend=backend, **own) for own in options]
    for step in range(4):
        set_gradients(params, seed=step)
        optimizer.step()
        scheduler.step()
        for i, other in enumerate(others):
            for w in alone:
                w.grad = None
            alone[i].grad = params[i].grad
            other.step()
            other.param_groups[0]["lr"] *= 0.5
    for i, (w, v) in enumerate(zip(params, alone, strict=True)):
        assert_same_bits(v, w, roundings[i])
    expected = {
        i: {"pre_parameter"}
        | ({"momentum_buffer"} if i else set())
        | ({"compensation"} if roundings[i] == "compensated" else set())
        for i in range(5)
    }
    assert {i: set(optimizer.state[w]) for i, w in enumerate(params)} == expected


@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
def test_learning_rate_tensor_scale_and_found_inf(rounding: str) -> None:
    results = []
    for tensors in (False, True):
        params = parameters(torch.float16, [300])
        lr = torch.tensor(0.0625, dtype=torch.float64) if tensors else 0.0625
        optimizer = PreParamSGD(params, lr=lr, momentum=0.5, rounding=rounding)
        for step in range(3):
            set_gradients(params, seed=step)
            if tensors:
                scale = torch.tensor(4.0)
                params[0].grad *= scale
                optimizer.step(grad_scale=scale, found_inf=torch.tensor(0.0))
            else:
                optimizer.step()
        results.append([*params, *optimizer.state[params[0]].values()])
    for x, y in zip(*results, strict=True):
        assert_same_bits(x, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_skipped_steps_count_as_steps(backend: str) -> None:
    # Whether a GPU skips a step the CPU doesn't know: the numbers must not depend on it.
    results = []
    for bad in (False, True):
        (w,) = parameters(torch.float16, [300])
        optimizer = PreParamSGD(
            [w], lr=0.01, rounding="stochastic", skip_nonfinite=True, backend=backend
        )
        w.grad = torch.full_like(w, torch.inf)
        if bad:
            optimizer.step()
        else:
            optimizer.load_state_dict({**optimizer.state_dict(), "steps": 1})
        set_gradients([w])
        optimizer.step()
        assert optimizer.state_dict()["steps"] == 2
        assert optimizer.skipped_steps == bad
        results.append(w)
    assert_same_bits(*results)


def test_a_state_without_steps_starts_at_zero() -> None:
    (w,) = parameters(torch.float16, [5])
    optimizer = PreParamSGD([w], lr=0.01, rounding="stochastic", seed=3)
    saved = optimizer.state_dict()
    del saved["seed"], saved["steps"]
    optimizer.load_state_dict(saved)
    assert (optimizer.state_dict()["seed"], optimizer.state_dict()["steps"]) == (3, 0)


@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
def test_wide_pre_parameters_are_rounded_to_nearest(rounding: str) -> None:
    results = []
    for way in ("nearest", rounding):
        params = parameters(torch.float16, [50]) + parameters(torch.float32, [50])
        optimizer = PreParamSGD(
            params, lr=0.01, momentum=0.9, rounding=way, pre_param_dtype=torch.float32
        )
        set_gradients(params)
        optimizer.step()
        assert "compensation" not in optimizer.state[params[0]]
        results.append([*params, *(x for w in params for x in optimizer.state[w].values())])
    for x, y in zip(*results, strict=True):
        assert_same_bits(x, y)


def test_change_of_dtype_drops_the_compensation() -> None:
    layer = nn.Linear(3, 2).half()
    optimizer = PreParamSGD(layer.parameters(), lr=0.01, rounding="compensated")
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        layer.to(dtype)
        set_gradients(list(layer.parameters()))
        optimizer.step()
        state = optimizer.state[layer.weight]
        kept = {name: value.dtype for name, value in state.items()}
        expected = {"pre_parameter": dtype}
        if dtype != torch.float32:
            expected["compensation"] = dtype
        assert kept == expected


def test_stochastic_rounding_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "is_capturing", lambda device: True)
    for rounding in ("nearest", "stochastic"):
        w = nn.Parameter(torch.ones(3).half())
        w.grad = torch.ones_like(w)
        optimizer = PreParamSGD([w], lr=0.5, rounding=rounding)
        if rounding == "nearest":
            optimizer.step()
            continue
        with pytest.raises(RuntimeError, match="can't be captured in a CUDA graph"):
            optimizer.step()


def test_unknown_rounding_of_the_reference() -> None:
    w = torch.ones(1)
    with pytest.raises(ValueError, match=r"rounding must be one of .*, got 'up'"):
        stepped(w, w, w, None, LinearMapping(), Hyperparameters(0.1), "up")
