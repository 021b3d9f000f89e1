"""The registered ops: torch's own checks, compilation, and bad input for every backend."""

from typing import Any

import pytest
import torch
from step_cases import assert_same_bits, bits
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ca3d_kernels import backends
from ca3d_kernels.preparam_step import op

STEP = torch.ops.ca3d.preparam_sgd_step.default
OVERFLOWS = torch.ops.ca3d.preparam_sgd_overflows.default
HYPER = (0.01, 0.9, 0.0, 5e-3, 128.0, 128.0)
DRAWS = torch.tensor([77, 3, 0, 5, 2])  # seed, step, numbers of the tensors


def arguments(
    backend: str = "",
    dtype: torch.dtype = torch.float16,
    momentum: bool = True,
    rounding: str = "nearest",
) -> list[Any]:
    w = [torch.randn(5).to(dtype), torch.randn(3, 4).to(dtype), torch.empty(0, dtype=dtype)]
    hyper = torch.tensor(HYPER, dtype=torch.float64)
    hyper[1] *= momentum
    return [
        w,
        [torch.randn_like(x) for x in w],
        [x * 128 for x in w],
        [torch.randn_like(x) for x in w] if momentum else [],
        [torch.randn_like(x) * 1e-3 for x in w] if rounding == "compensated" else [],
        hyper,
        False,
        rounding,
        backend,
    ]


CASES = [
    (torch.float16, "nearest"),
    (torch.float32, "nearest"),
    (torch.float16, "stochastic"),
    (torch.bfloat16, "compensated"),
]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("dtype", "rounding"), CASES)
def test_opcheck(backend: str, dtype: torch.dtype, rounding: str) -> None:
    draws = {"draws": DRAWS} if rounding == "stochastic" else {}
    torch.library.opcheck(STEP, arguments(backend, dtype, rounding=rounding), draws)
    torch.library.opcheck(OVERFLOWS, arguments(backend, dtype, rounding=rounding))


@pytest.mark.parametrize("rounding", op.ROUNDINGS)
@pytest.mark.parametrize("momentum", [False, True])
def test_backends_agree(momentum: bool, rounding: str) -> None:
    torch.manual_seed(1)
    ours = arguments("cpu", momentum=momentum, rounding=rounding)
    torch.manual_seed(1)
    theirs = arguments("reference", momentum=momentum, rounding=rounding)
    STEP(*ours, draws=DRAWS)
    STEP(*theirs, draws=DRAWS)
    for a, b in zip(ours[:5], theirs[:5], strict=True):
        for x, y in zip(a, b, strict=True):
            assert_same_bits(x, y)


def test_fake_tensors_of_a_gpu() -> None:
    with FakeTensorMode() as mode:
        given = [
            [mode.from_tensor(x).to("cuda") for x in value]
            if isinstance(value, list)
            else mode.from_tensor(value)
            if isinstance(value, Tensor)
            else value
            for value in arguments()
        ]
        assert STEP(*given) is None
        found = OVERFLOWS(*given)
        assert (found.shape, found.dtype, found.device.type) == ((), torch.float32, "cuda")


def test_compile() -> None:
    def step(*tensors: Any) -> Tensor:
        found = OVERFLOWS(*tensors)
        STEP(*tensors, found_inf=found)
        return tensors[0][0] * 2

    torch.manual_seed(1)
    eager = arguments()
    torch.manual_seed(1)
    compiled = arguments()
    expected = step(*eager)
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled)
    assert_same_bits(actual, expected)
    for x, y in zip(compiled[2], eager[2], strict=True):
        assert_same_bits(x, y)


def test_versions_advance_and_found_inf_skips() -> None:
    tensors = arguments()
    before = [[x.clone() for x in group] for group in tensors[:4]]
    versions = [x._version for group in tensors[:4] for x in group]
    STEP(*tensors, found_inf=torch.tensor(1.0))
    for group, old in zip(tensors[:4], before, strict=True):
        for x, y in zip(group, old, strict=True):
            assert_same_bits(x, y)
    STEP(*tensors, found_inf=torch.tensor(0.0))
    after = [x._version for group in tensors[:4] for x in group]
    written = [True] * 3 + [False] * 3 + [True] * 6
    assert [b > a for a, b in zip(versions, after, strict=True)] == written
    assert (bits(tensors[0][0]) != bits(before[0][0])).any()


def test_overflows() -> None:
    for backend in ("cpu", "reference"):
        tensors = arguments(backend)
        assert OVERFLOWS(*tensors).item() == 0
        tensors[1][1][2, 3] = torch.inf
        found = OVERFLOWS(*tensors)
        assert found.item() == 1
        assert found.dtype == torch.float32
    assert op.overflows(op.Batch([], [], [], [], op.Hyperparameters(0.1), 1.0, 1.0)).item() == 0


def replaced(position: int, value: Any) -> list[Any]:
    tensors = arguments()
    tensors[position] = value(tensors[position])
    return tensors


BAD: list[tuple[int, Any, type[Exception], str]] = [
    (1, lambda g: g[:2], ValueError, "grads must hold 3 tensors as params does, got 2"),
    (3, lambda m: m[:2], ValueError, "momenta must be empty or hold 3 tensors, got 2"),
    (3, lambda m: [], ValueError, "momenta must hold tensors if and only if momentum is not 0"),
    (1, lambda g: [g[0].float(), *g[1:]], TypeError, r"grads\[0\] must be of dtype torch.float16"),
    (0, lambda w: [x.int() for x in w], TypeError, r"params\[0\] must be of dtype.*torch.int32"),
    (2, lambda t: [t[0], t[1].float(), t[2]], TypeError, r"pre_params\[1\] must be of dtype"),
    (1, lambda g: [g[0][:4], *g[1:]], ValueError, r"grads\[0\] must have shape \(5,\), got \(4,\)"),
    (
        2,
        lambda t: [t[0], t[1].t().contiguous().t(), t[2]],
        ValueError,
        r"pre_params\[1\] must have the strides \(4, 1\), got \(1, 3\)",
    ),
    (4, lambda r: [torch.zeros(5)], ValueError, "compensations must hold 0 tensors .*, got 1"),
    (5, lambda h: h[:5], ValueError, "hyper must hold 6 numbers, got 5"),
    (7, lambda r: "published", ValueError, r"rounding must be one of \('nearest',.*, got"),
    (7, lambda r: "compensated", ValueError, "compensations must hold 3 tensors .*, got 0"),
    (8, lambda b: "gpu", ValueError, "allowed here"),
]


@pytest.mark.parametrize(("position", "value", "error", "message"), BAD)
def test_bad_input(position: int, value: Any, error: type[Exception], message: str) -> None:
    for call in (STEP, OVERFLOWS):
        with pytest.raises(error, match=message):
            call(*replaced(position, value))


BAD_DRAWS: list[tuple[Any, str]] = [
    (None, "draws must be given with rounding 'stochastic', got None"),
    (DRAWS[:4], "numbers of 3 tensors, got 2 numbers"),
    (-DRAWS, "must not be negative"),
    (DRAWS << 32, r"numbers of tensors below 2\*\*32"),
]


@pytest.mark.parametrize(("draws", "message"), BAD_DRAWS)
def test_bad_draws(draws: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        STEP(*arguments(rounding="stochastic"), draws=draws)


def test_wide_pre_parameters_take_every_rounding_as_nearest() -> None:
    torch.manual_seed(1)
    expected = arguments(dtype=torch.float32)
    STEP(*expected)
    for rounding in op.ROUNDINGS:
        torch.manual_seed(1)
        actual = arguments(dtype=torch.float32)
        actual[7] = rounding
        STEP(*actual)
        for x, y in zip(actual[2], expected[2], strict=True):
            assert_same_bits(x, y)


def test_native_functions_check_what_they_can() -> None:
    native = backends.native()
    if native is None:
        pytest.skip("the native library is not built")
    w = torch.ones(4)
    row = [w.data_ptr(), w.data_ptr(), w.data_ptr(), 0, 0, 4, 0]
    good = [row, "float32", "float32", HYPER, False, "nearest", (0, 0), 1]
    for position, value, message in (
        (0, row[:4], "7 numbers a tensor"),
        (0, [*row[:5], -1, 0], "tensor 0 has -1 elements"),
        (0, [0, *row[1:]], "tensor 0 has a null pointer"),
        (0, [*row, *row[:3], w.data_ptr(), 0, 4, 0], "all tensors have a momentum or none"),
        (0, [*row[:4], w.data_ptr(), 4, 0], "if and only if rounding is compensated"),
        (1, "int8", "dtype 'int8' is not supported"),
        (2, "float16", "pre_param must have the type of param"),
        (3, (float("nan"), *HYPER[1:]), "lr must be finite, got nan"),
        (3, (*HYPER[:4], 0.0, 1.0), "scale must be finite and not zero"),
        (5, "published", "rounding 'published' is not supported; allowed: nearest, stochastic"),
        (7, 0, "threads must be at least 1"),
    ):
        bad = list(good)
        bad[position] = value
        for function in (native.preparam_sgd_step, native.preparam_sgd_step_overflows):
            with pytest.raises(ValueError, match=message):
                function(*bad)
    assert (w == 1).all()
