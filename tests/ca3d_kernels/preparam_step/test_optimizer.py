"""PreParamSGD as a torch optimizer: options, schedulers, skipping, changes from outside."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from step_cases import assert_same_bits, parameters, set_gradients
from torch import Tensor, nn

from ca3d_kernels import (
    LinearMapping,
    PreParamMapping,
    PreParamSGD,
    published_mapping,
    use_backend,
)


class Cube(PreParamMapping):
    """A map without kernels."""

    def to_param(self, pre_param: Tensor) -> Tensor:
        return pre_param**3

    def to_pre_param(self, param: Tensor) -> Tensor:
        return param.sign() * param.abs() ** (1 / 3)

    def map_grad(self, grad: Tensor, param: Tensor) -> Tensor:
        return 2 * grad


def one_parameter(value: float = 0.5, dtype: torch.dtype = torch.float16) -> nn.Parameter:
    w = nn.Parameter(torch.full((4,), value, dtype=dtype))
    w.grad = torch.ones_like(w)
    return w


def test_is_sgd_on_the_weights() -> None:
    options = {"lr": 0.05, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    a, b = PreParamSGD(ours, **options), torch.optim.SGD(theirs, **options)
    for step in range(5):
        set_gradients(ours, seed=step)
        set_gradients(theirs, seed=step)
        a.step()
        b.step()
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)


def test_groups_have_their_own_options() -> None:
    a, b, c = one_parameter(), one_parameter(), one_parameter(dtype=torch.float32)
    optimizer = PreParamSGD(
        [{"params": [a], "lr": 0.5}, {"params": [b, c], "mapping": LinearMapping(64.0)}], lr=0.25
    )
    optimizer.add_param_group({"params": [d := one_parameter()], "mapping": Cube()})
    optimizer.step()
    assert (a == 0).all()
    assert (b == 0.25).all()
    assert (c == 0.25).all()
    assert optimizer.state[a]["pre_parameter"].dtype == torch.float16
    assert (optimizer.state[b]["pre_parameter"] == 16).all()
    assert optimizer.state[c]["pre_parameter"].dtype == torch.float32
    theta = optimizer.state[d]["pre_parameter"]
    start = torch.tensor(0.5 ** (1 / 3)).half()
    assert_same_bits(theta, (start.float() - 2 * 0.25).half().expand(4))
    assert_same_bits(d, (theta.float() ** 3).half())


def test_parameters_without_gradient_stay() -> None:
    a, b = one_parameter(), one_parameter()
    b.grad = None
    optimizer = PreParamSGD([a, b], lr=0.25, momentum=0.9)
    optimizer.step()
    assert (a == 0.25).all()
    assert (b == 0.5).all()
    assert not optimizer.state[b]
    optimizer.zero_grad()
    optimizer.step()
    assert (a == 0.25).all()


def test_learning_rate_tensor_and_closure() -> None:
    w = one_parameter(dtype=torch.float32)
    optimizer = PreParamSGD([w], lr=torch.tensor(0.25))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (2 * w).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert (w == 0).all()
    optimizer.param_groups[0]["lr"].fill_(0.5)
    optimizer.step()
    assert (w == -1).all()


SCHEDULERS: list[Callable[[Any], Any]] = [
    lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch)),
    lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 3], 0.5),
    lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10),
]


@pytest.mark.parametrize("make", SCHEDULERS, ids=["lambda", "multistep", "onecycle"])
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_schedulers(make: Callable[[Any], Any], tensor_lr: bool) -> None:
    ours, theirs = parameters(torch.float64, [50]), parameters(torch.float64, [50])
    rates: list[float | Tensor] = [0.1, 0.1]
    if tensor_lr:
        rates = [torch.tensor(0.1), torch.tensor(0.1)]
    a = PreParamSGD(ours, lr=rates[0], momentum=0.9)
    b = torch.optim.SGD(theirs, lr=rates[1], momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedulers = make(a), make(b)
        for step in range(5):
            for params, optimizer, scheduler in zip(
                (ours, theirs), (a, b), schedulers, strict=True
            ):
                set_gradients(params, seed=step)
                optimizer.step()
                scheduler.step()
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("mapping", [LinearMapping(), Cube(), published_mapping("f16-root")])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated", "published"])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_skips_steps_that_are_not_finite(
    backend: str, mapping: PreParamMapping, rounding: str, value: float
) -> None:
    params = parameters(torch.float16, [5, 40_000, 17])
    optimizer = PreParamSGD(
        params,
        lr=0.01,
        momentum=0.9,
        dampening=0.5,
        mapping=mapping,
        rounding=rounding,
        skip_nonfinite=True,
        backend=backend,
    )
    set_gradients(params)
    optimizer.step()
    before = [w.detach().clone() for w in params]
    before += [x.clone() for w in params for x in optimizer.state[w].values()]
    set_gradients(params, seed=1)
    params[1].grad[39_999] = value
    optimizer.step()
    after = [w.detach() for w in params] + [x for w in params for x in optimizer.state[w].values()]
    for x, y in zip(after, before, strict=True):
        assert_same_bits(x, y)
    assert optimizer.skipped_steps == 1
    set_gradients(params, seed=1)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    after = [w.detach() for w in params] + [x for w in params for x in optimizer.state[w].values()]
    assert all((x != y).any() for x, y in zip(after, before, strict=True))


@pytest.mark.parametrize(
    ("value", "dtype", "scale"),
    [(600.0, torch.float16, 128.0), (1.0, torch.float32, 1e-300), (1.0, torch.float16, 1e38)],
)
def test_weights_whose_pre_parameter_is_not_finite_are_refused(
    value: float, dtype: torch.dtype, scale: float
) -> None:
    w = torch.nn.Parameter(torch.tensor([value, 0.5], dtype=dtype))
    w.grad = torch.zeros_like(w)
    optimizer = PreParamSGD([w], lr=0.1, mapping=LinearMapping(scale))
    with pytest.raises(ValueError, match=rf"magnitudes up to {value:g} isn't finite in {dtype}"):
        optimizer.step()
    assert w.tolist() == [value, 0.5]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("size", [1, 15, 16, 50])
def test_skips_overflow_of_the_pre_parameter(backend: str, momentum: float, size: int) -> None:
    # The gradient is finite, but theta = 128 w would leave the range of float16: 65504.
    w = nn.Parameter(torch.zeros(size, dtype=torch.float16))
    w.grad = torch.zeros(size, dtype=torch.float16)
    options = {"lr": 1.0, "momentum": momentum, "skip_nonfinite": True, "backend": backend}
    optimizer = PreParamSGD([w], **options)
    w.grad[-1] = 511.75  # theta = 65504, the largest number
    optimizer.step()
    assert optimizer.skipped_steps == 0
    assert w[-1].item() == -511.75
    w.grad[-1] = 0.125  # theta would be 65520, which rounds to infinity
    if momentum:
        optimizer.state[w]["momentum_buffer"].zero_()
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert w[-1].item() == -511.75
    w.grad[-1] = 0.0625  # 65512 rounds back to 65504
    optimizer.step()
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_skips_overflow_of_the_momentum_and_of_the_weight(backend: str) -> None:
    options = {"lr": 1e-6, "momentum": 0.9, "skip_nonfinite": True, "backend": backend}
    w = one_parameter()
    w.grad.fill_(600)  # momentum = 128 * 600
    optimizer = PreParamSGD([w], **options)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    # A float32 theta of 0.9 * 65536 is fine, w = theta / 0.5 is not.
    w = one_parameter(32_000)
    w.grad.fill_(-3000)
    optimizer = PreParamSGD(
        [w],
        lr=1.0,
        mapping=LinearMapping(0.5),
        pre_param_dtype=torch.float32,
        skip_nonfinite=True,
        backend=backend,
    )
    for expected in range(1, 40):
        optimizer.step()
        if optimizer.skipped_steps:
            break
        assert w[0].item() == pytest.approx(32_000 + 3000 * expected, rel=1e-3)
    assert optimizer.skipped_steps == 1
    assert w.isfinite().all()
    assert w[0].item() > 60_000


def test_without_skipping_infinities_pass() -> None:
    w = one_parameter()
    w.grad[0] = torch.inf
    optimizer = PreParamSGD([w], lr=0.25)
    optimizer.step()
    assert w.tolist() == [-torch.inf, 0.25, 0.25, 0.25]
    assert optimizer.skipped_steps == 0


def test_found_inf_of_the_caller() -> None:
    w = one_parameter()
    optimizer = PreParamSGD([w], lr=0.25, momentum=0.9)
    optimizer.step(found_inf=torch.tensor(1.0))
    assert (w == 0.5).all()
    assert optimizer.skipped_steps == 1
    optimizer.step(found_inf=torch.tensor([0.0]))
    assert (w == 0.25).all()
    optimizer.step(grad_scale=torch.tensor(4.0))
    assert (w == 0.25 - 0.25 * (0.9 + 0.25)).all()


def test_gradient_scaler() -> None:
    w = nn.Parameter(torch.full((4,), 0.5, dtype=torch.float16))
    optimizer = PreParamSGD([w], lr=0.25)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    for factor, expected in ((1.0, 0.25), (1e6, 0.25), (1.0, 0.0)):
        optimizer.zero_grad()
        scaler.scale((w.float() * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert (w == expected).all()
    assert optimizer.skipped_steps == 1


def test_changes_from_outside_are_noticed() -> None:
    layer = nn.Linear(3, 2).half()
    optimizer = PreParamSGD(layer.parameters(), lr=0.25, momentum=0.9)

    def step() -> None:
        for w in layer.parameters():
            w.grad = torch.zeros_like(w)
        optimizer.step()

    def nothing_is_noticed() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            step()

    nothing_is_noticed()
    nothing_is_noticed()
    new = {name: torch.randn_like(w) for name, w in layer.state_dict().items()}
    layer.load_state_dict(new)
    with pytest.warns(RuntimeWarning, match="2 parameters were changed outside") as caught:
        step()
    assert len(caught) == 1
    assert all(torch.equal(w, new[name]) for name, w in layer.named_parameters())
    nothing_is_noticed()
    # Writing the same values is no change: theta may know them more precisely.
    layer.load_state_dict(layer.state_dict())
    nothing_is_noticed()
    with torch.no_grad():
        layer.bias.add_(1)
    with pytest.warns(RuntimeWarning, match="1 parameters were changed"):
        step()
    nothing_is_noticed()
    layer.weight.data = layer.weight.detach() * 2
    with pytest.warns(RuntimeWarning, match="1 parameters were changed"):
        step()


def test_change_of_dtype_converts_the_state() -> None:
    layer = nn.Linear(3, 2)
    optimizer = PreParamSGD(layer.parameters(), lr=0.25, momentum=0.9)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    momentum = optimizer.state[layer.bias]["momentum_buffer"].clone()
    layer.half()
    for w in layer.parameters():
        w.grad = torch.zeros_like(w)
    expected = layer.weight.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert optimizer.state[layer.bias]["pre_parameter"].dtype == torch.float16
    assert_same_bits(optimizer.state[layer.bias]["momentum_buffer"], (momentum * 0.9).half())
    assert_same_bits(layer.weight, expected)


def test_version_counters_advance() -> None:
    # A backward pass through a value that the step has overwritten must fail, not be wrong.
    for mapping in (LinearMapping(), Cube()):
        w = one_parameter(dtype=torch.float32)
        loss = w.square().sum()
        PreParamSGD([w], lr=0.1, mapping=mapping).step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_backends_agree_and_can_be_demanded() -> None:
    results = []
    for backend in ("cpu", "reference"):
        params = parameters(torch.float16, [100])
        set_gradients(params)
        with use_backend(backend):
            PreParamSGD(params, lr=0.1).step()
        results.append(params[0])
    assert_same_bits(*results)
    w = one_parameter()
    with pytest.raises(ValueError, match="'triton' can't run preparam_step on cpu"):
        PreParamSGD([w], lr=0.1, backend="triton").step()
    assert (w == 0.5).all()


def test_float16_training_reaches_what_float32_training_reaches() -> None:
    x = torch.randn(256, 8)
    y = (x[:, 0] * x[:, 1] > 0).long()
    losses = {}
    for dtype in (torch.float16, torch.float32):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 2)).to(dtype)
        optimizer = PreParamSGD(model.parameters(), lr=0.1, momentum=0.9, skip_nonfinite=True)
        for _ in range(150):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x.to(dtype)).float(), y)
            loss.backward()
            optimizer.step()
        state = [value for w in model.parameters() for value in optimizer.state[w].values()]
        assert {value.dtype for value in state} == {dtype}
        losses[dtype] = loss.item()
    assert losses[torch.float16] < 0.15
    assert abs(losses[torch.float16] - losses[torch.float32]) < 0.05


BAD_OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lr": -0.1}, ValueError, "lr must be finite and at least 0, got -0.1"),
    ({"lr": float("nan")}, ValueError, "lr must be finite and at least 0, got nan"),
    ({"lr": float("inf")}, ValueError, "lr must be finite"),
    ({"lr": "0.1"}, TypeError, "lr must be a number or a tensor with one element, got '0.1'"),
    ({"lr": torch.ones(2)}, ValueError, "lr must be a number or a tensor with one element"),
    ({"lr": torch.tensor(torch.nan)}, ValueError, "lr must be finite"),
    ({"momentum": -1.0}, ValueError, "momentum must be finite and at least 0, got -1.0"),
    ({"momentum": None}, TypeError, "momentum must be a number or a tensor with .*, got None"),
    ({"momentum": torch.tensor(-1.0)}, ValueError, "momentum must be finite and at least 0"),
    ({"dampening": float("inf")}, ValueError, "dampening must be finite, got inf"),
    ({"weight_decay": -1e-3}, ValueError, "weight_decay must be finite and at least 0"),
    ({"weight_decay": torch.ones(2)}, ValueError, "weight_decay must be a number or a tensor"),
    ({"dampening": torch.ones(1)}, ValueError, "dampening must be a number, got tensor"),
    ({"nesterov": True}, ValueError, "nesterov needs momentum > 0 and dampening 0"),
    ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, ValueError, "nesterov needs"),
    ({"nesterov": 1}, TypeError, "nesterov must be True or False, got 1"),
    ({"mapping": "f16"}, TypeError, "mapping must be a PreParamMapping.*got 'f16'"),
    ({"rounding": "up"}, ValueError, r"'nearest', 'stochastic', .*'published'\), got 'up'"),
    ({"rounding": None}, ValueError, r"rounding must be one of .*, got None"),
    ({"seed": -1}, ValueError, r"seed must be at least 0 and below 2\*\*63, got -1"),
    ({"seed": 2**63}, ValueError, r"seed must be at least 0 and below 2\*\*63, got 9223"),
    ({"seed": 0.5}, TypeError, "seed must be an integer, got 0.5"),
    ({"seed": True}, TypeError, "seed must be an integer, got True"),
    ({"skip_nonfinite": None}, TypeError, "skip_nonfinite must be True or False, got None"),
    ({"pre_param_dtype": torch.int32}, TypeError, "pre_param_dtype must be None or one of"),
    ({"pre_param_dtype": torch.bfloat16}, ValueError, "can't hold parameter 0.*torch.float16"),
    ({"backend": "gpu"}, ValueError, "backend must be one of"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PreParamSGD([one_parameter()], **options)


def test_bad_group_is_not_added() -> None:
    optimizer = PreParamSGD([one_parameter()], lr=0.1)
    with pytest.raises(ValueError, match="momentum must be"):
        optimizer.add_param_group({"params": [one_parameter()], "momentum": -1.0})
    assert len(optimizer.param_groups) == 1


def test_bad_option_set_later_stops_the_step() -> None:
    w = one_parameter()
    optimizer = PreParamSGD([w], lr=0.1)
    optimizer.param_groups[0]["lr"] = float("nan")
    with pytest.raises(ValueError, match="lr must be finite"):
        optimizer.step()
    assert (w == 0.5).all()


def test_bad_parameters_and_gradients() -> None:
    with pytest.raises(TypeError, match=r"parameter 0 must be of one of the dtypes.*complex64"):
        PreParamSGD([nn.Parameter(torch.ones(2, dtype=torch.complex64))], lr=0.1)
    with pytest.raises(TypeError, match=r"torch\.int64"):
        PreParamSGD([torch.ones(2, dtype=torch.int64)], lr=0.1)
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"does not support torch\.sparse_coo gradients"):
        PreParamSGD(embedding.parameters(), lr=0.1).step()
    optimizer = PreParamSGD([one_parameter()], lr=0.1)
    with pytest.raises(TypeError, match="found_inf and grad_scale must be tensors, got 1"):
        optimizer.step(found_inf=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must have one element, got 2"):
        optimizer.step(grad_scale=torch.ones(2))


def test_inside_torch_compile_the_step_runs_eagerly() -> None:
    w = one_parameter(dtype=torch.float32)
    optimizer = PreParamSGD([w], lr=0.25)
    torch.compile(optimizer.step, backend="eager")()
    assert (w == 0.25).all()
