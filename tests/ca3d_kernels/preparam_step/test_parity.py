"""The compiled step against its definition (bit for bit) and against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairwise import pairwise_cases
from step_cases import (
    DTYPES,
    SIZES,
    assert_same_bits,
    instruction_set,
    instruction_sets,
    parameters,
    set_gradients,
    threads,
    ulps_apart,
)
from torch import Tensor, nn

from ca3d_kernels import LinearMapping, PreParamSGD, backends
from ca3d_kernels.preparam_step import op
from ca3d_kernels.preparam_step.reference import Hyperparameters, stepped

if backends.native() is None:
    pytest.skip("the native library is not built", allow_module_level=True)

HALVES = (torch.float16, torch.bfloat16)
CASES = pairwise_cases(
    {
        "dtype": DTYPES,
        "wide": (None, torch.float32, torch.float64),
        "momentum": (0.0, 0.9),
        "dampening": (0.0, 0.1),
        "nesterov": (False, True),
        "weight_decay": (0.0, 5e-3),
        "mapping": (LinearMapping(), LinearMapping(100.0, 0.1), LinearMapping(0.3)),
        "skip_nonfinite": (False, True),
        "rounding": op.ROUNDINGS,
        "seed": (0, 2**62 + 3),
    },
    lambda case: (
        (not case["nesterov"] or (case["momentum"] > 0 and case["dampening"] == 0))
        and (case["wide"] is None or torch.finfo(case["wide"]).bits > 16)
        and (
            case["wide"] is None or torch.promote_types(case["wide"], case["dtype"]) == case["wide"]
        )
    ),
)


def trained(
    params: list[nn.Parameter], backend: str, steps: int = 3, **options: object
) -> list[Tensor]:
    """Weights, pre-parameters and momenta after some steps."""
    optimizer = PreParamSGD(params, lr=0.01, backend=backend, **options)
    for step in range(steps):
        set_gradients(params, seed=step)
        optimizer.step()
    assert optimizer.skipped_steps == 0
    states = [value for w in params for value in optimizer.state[w].values()]
    return [w.detach() for w in params] + states


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.filterwarnings("ignore:the cpu kernel of preparam_step can't take this input")
def test_native_equals_the_reference_bit_for_bit(case: dict) -> None:
    options = {name: value for name, value in case.items() if name not in ("dtype", "wide")}
    options["pre_param_dtype"] = case["wide"]
    expected = trained(parameters(case["dtype"]), "reference", **options)
    assert all(x.isfinite().all() for x in expected)
    for isa in instruction_sets():
        with instruction_set(isa):
            actual = trained(parameters(case["dtype"]), "cpu", **options)
        for i, (x, y) in enumerate(zip(actual, expected, strict=True)):
            assert_same_bits(x, y, f"{isa}, tensor {i}")


@pytest.mark.parametrize("rounding", op.ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_do_not_change_a_bit(dtype: torch.dtype, rounding: str) -> None:
    options = {"momentum": 0.9, "skip_nonfinite": True, "rounding": rounding}
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(trained(parameters(dtype), "cpu", **options))
    for other in results[1:]:
        for x, y in zip(other, results[0], strict=True):
            assert_same_bits(x, y)


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=4).map(tuple), min_size=1, max_size=12),
    dtype=st.sampled_from(DTYPES),
    momentum=st.sampled_from((0.0, 0.5)),
    rounding=st.sampled_from(op.ROUNDINGS),
)
def test_any_shapes(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, momentum: float, rounding: str
) -> None:
    options = {"momentum": momentum, "rounding": rounding}
    expected = trained(parameters(dtype, shapes), "reference", **options)
    actual = trained(parameters(dtype, shapes), "cpu", **options)
    for x, y in zip(actual, expected, strict=True):
        assert_same_bits(x, y)


def float16_patterns() -> Tensor:
    return torch.arange(0, 2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("rounding", op.ROUNDINGS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_bit_pattern_of_a_gradient(isa: str, rounding: str, dtype: torch.dtype) -> None:
    # Subnormal numbers, infinities and NaN included: conversions are the same everywhere.
    grad = float16_patterns().view(torch.int16).view(dtype)
    results = []
    for backend in ("cpu", "reference"):
        w = nn.Parameter(torch.linspace(-1, 1, 2**16).to(dtype))
        w.grad = grad
        optimizer = PreParamSGD([w], lr=0.5, momentum=0.9, rounding=rounding, backend=backend)
        with instruction_set(isa):
            optimizer.step()
            optimizer.step()  # from infinities and NaN, too
        results.append([w, *optimizer.state[w].values()])
    for x, y in zip(*results, strict=True):
        assert_same_bits(x, y)


def torch_step(
    w: Tensor, grad: Tensor, theta: Tensor, momentum: Tensor, hyper: Hyperparameters, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The step in torch operations of one dtype: mapping and torch.optim.SGD."""
    param = nn.Parameter(theta.clone())
    sgd = torch.optim.SGD(
        [param], lr=hyper.lr, momentum=hyper.momentum, weight_decay=hyper.weight_decay
    )
    sgd.state[param]["momentum_buffer"] = momentum.clone()
    param.grad = grad * scale
    sgd.step()
    return param.detach() / scale, param.detach(), sgd.state[param]["momentum_buffer"]


@pytest.mark.parametrize("scale", [128.0, 100.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_against_float64(dtype: torch.dtype, scale: float) -> None:
    hyper = Hyperparameters(lr=0.05, momentum=0.9, weight_decay=5e-3)
    w = (torch.randn(20_000) * 0.1).to(dtype)
    grad = (torch.randn(20_000) * 0.05).to(dtype)
    theta = w * scale
    momentum = (torch.randn(20_000) * 2).to(dtype)
    mapping = LinearMapping(scale)
    exact = stepped(w.double(), grad.double(), theta.double(), momentum.double(), mapping, hyper)
    peer = torch_step(w, grad, theta, momentum, hyper, scale)
    batch = op.Batch([w], [grad], [theta], [momentum], hyper, scale, scale, backend="cpu")
    op.step(batch)
    for ours, theirs, truth in zip((w, theta, momentum), peer, exact[:3], strict=True):
        assert ours.dtype == dtype
        error = (ours.double() - truth).abs().max()
        allowed = 2 * (theirs.double() - truth).abs().max()
        allowed += 2 * torch.finfo(dtype).eps * truth.abs().max()
        assert error <= allowed
        if dtype in HALVES:
            close = ulps_apart(ours, truth.to(dtype)) <= 1
            assert close.double().mean() >= 0.999


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_power_of_two_scale_is_plain_float16_sgd(backend: str) -> None:
    # With c = 128 and one rounding a stored value, theta, momentum and w are those of plain float16
    # SGD (float32 registers) times 128, 128 and 1, bit for bit, until a value becomes subnormal.
    lr, mu, decay = 0.05, 0.9, 5e-3
    param = nn.Parameter((torch.randn(20_000) * 0.1).half())
    optimizer = PreParamSGD(
        [param],
        lr=lr,
        momentum=mu,
        weight_decay=decay,
        mapping=LinearMapping(128.0),
        backend=backend,
    )
    w, m = param.detach().clone(), torch.zeros(20_000, dtype=torch.float16)
    normal = torch.ones(20_000, dtype=torch.bool)
    for step in range(30):
        set_gradients([param], seed=step)
        d = param.grad.float() + w.float() * decay
        wide = m.float() * mu + d
        w, m = (w.float() - wide * lr).half(), wide.half()
        optimizer.step()
        for value in (w, m):
            normal &= value.abs() >= torch.finfo(torch.float16).smallest_normal
        state = optimizer.state[param]
        assert_same_bits(param[normal], w[normal], f"w in step {step}")
        assert_same_bits(state["momentum_buffer"][normal], (m * 128)[normal], f"m in step {step}")
        assert_same_bits(state["pre_parameter"][normal], (w * 128)[normal], f"theta, step {step}")
    assert normal.float().mean() > 0.95


def test_pre_parameters_outlast_plain_float16_in_the_subnormal_range() -> None:
    # What the map gains: an update of 2^-26 vanishes in plain float16, theta still counts it.
    param = nn.Parameter(torch.zeros(1, dtype=torch.float16))
    optimizer = PreParamSGD([param], lr=2.0**-10)
    plain = torch.zeros(1, dtype=torch.float16)
    for _ in range(4):
        param.grad = torch.full((1,), 2.0**-16, dtype=torch.float16)
        plain = (plain.float() - 2.0**-10 * param.grad.float()).half()
        optimizer.step()
    assert param.item() == -(2.0**-24)
    assert plain.item() == 0


@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
def test_layouts_of_memory(rounding: str) -> None:
    # What is drawn for an element depends on its place in memory, for all backends.
    results = []
    for backend in ("cpu", "reference"):
        (w,) = parameters(torch.float16, [(4, 3, 5, 5)])
        w = nn.Parameter(w.detach().to(memory_format=torch.channels_last))
        assert not w.is_contiguous()
        results.append(trained([w], backend, momentum=0.9, rounding=rounding))
    for x, y in zip(*results, strict=True):
        assert_same_bits(x, y)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_layouts(backend: str) -> None:
    def conv(memory_format: torch.memory_format) -> nn.Parameter:
        (w,) = parameters(torch.float16, [(4, 3, 5, 5)])
        return nn.Parameter(w.detach().to(memory_format=memory_format))

    contiguous, channels_last = conv(torch.contiguous_format), conv(torch.channels_last)
    results = {}
    for name, w, grad_format in (
        ("both contiguous", contiguous, torch.contiguous_format),
        ("both channels-last", channels_last, torch.channels_last),
        ("gradient contiguous", conv(torch.channels_last), torch.contiguous_format),
        ("gradient channels-last", conv(torch.contiguous_format), torch.channels_last),
    ):
        optimizer = PreParamSGD([w], lr=0.01, momentum=0.9, backend=backend)
        strides = w.stride()
        for step in range(2):
            set_gradients([w], seed=step)
            w.grad = w.grad.contiguous(memory_format=grad_format)
            optimizer.step()
        assert w.stride() == strides
        assert all(x.stride() == strides for x in optimizer.state[w].values())
        results[name] = w.detach()
    for name, w in results.items():
        assert_same_bits(w.contiguous(), results["both contiguous"], name)


def test_parameter_with_gaps_takes_the_reference() -> None:
    def make(dense: bool) -> nn.Parameter:
        (w,) = parameters(torch.float32, [(6, 8)])
        return nn.Parameter(w.detach() if dense else torch.zeros(6, 16)[:, ::2].copy_(w.detach()))

    gaps, dense = make(False), make(True)
    for w in (gaps, dense):
        w.grad = torch.ones(6, 8)
    with pytest.warns(RuntimeWarning, match="has gaps"):
        PreParamSGD([gaps], lr=0.1, backend="cpu").step()
    PreParamSGD([dense], lr=0.1).step()
    assert not gaps.is_contiguous()
    assert_same_bits(gaps.contiguous(), dense)


def test_expected_sizes_are_tried() -> None:
    assert 0 in SIZES
    assert max(SIZES) > 32768  # the smallest step that gets a team of threads
