"""The registered ops: torch's own checks, compilation, and bad input for every backend."""

from typing import Any

import pytest
import torch
from step_cases import assert_same_bits, bits
from torch import Tensor

from ca3d_kernels import backends
from ca3d_kernels.preparam_step import op

STEP = torch.ops.ca3d.preparam_sgd_step.default
OVERFLOWS = torch.ops.ca3d.preparam_sgd_overflows.default
HYPER = (0.01, 0.9, 0.0, 5e-3, 128.0, 128.0)


def arguments(
    backend: str = "", dtype: torch.dtype = torch.float16, momentum: bool = True
) -> list[Any]:
    w = [torch.randn(5).to(dtype), torch.randn(3, 4).to(dtype), torch.empty(0, dtype=dtype)]
    hyper = torch.tensor(HYPER, dtype=torch.float64)
    hyper[1] *= momentum
    return [
        w,
        [torch.randn_like(x) for x in w],
        [x * 128 for x in w],
        [torch.randn_like(x) for x in w] if momentum else [],
        hyper,
        False,
        "nearest",
        backend,
    ]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_opcheck(backend: str, dtype: torch.dtype) -> None:
    torch.library.opcheck(STEP, arguments(backend, dtype))
    torch.library.opcheck(OVERFLOWS, arguments(backend, dtype))


@pytest.mark.parametrize("momentum", [False, True])
def test_backends_agree(momentum: bool) -> None:
    torch.manual_seed(1)
    ours = arguments("cpu", momentum=momentum)
    torch.manual_seed(1)
    theirs = arguments("reference", momentum=momentum)
    STEP(*ours)
    STEP(*theirs)
    for a, b in zip(ours[:4], theirs[:4], strict=True):
        for x, y in zip(a, b, strict=True):
            assert_same_bits(x, y)


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
    (4, lambda h: h[:5], ValueError, "hyper must hold 6 numbers, got 5"),
    (6, lambda r: "stochastic", ValueError, r"rounding must be one of \('nearest',\), got"),
    (7, lambda b: "gpu", ValueError, "allowed here"),
]


@pytest.mark.parametrize(("position", "value", "error", "message"), BAD)
def test_bad_input(position: int, value: Any, error: type[Exception], message: str) -> None:
    for call in (STEP, OVERFLOWS):
        with pytest.raises(error, match=message):
            call(*replaced(position, value))


def test_native_functions_check_what_they_can() -> None:
    native = backends.native()
    if native is None:
        pytest.skip("the native library is not built")
    w = torch.ones(4)
    row = [w.data_ptr(), w.data_ptr(), w.data_ptr(), 0, 4]
    good = [row, "float32", "float32", HYPER, False, "nearest", 1]
    for position, value, message in (
        (0, row[:4], "5 numbers a tensor"),
        (0, [*row[:4], -1], "tensor 0 has -1 elements"),
        (0, [0, *row[1:]], "tensor 0 has a null pointer"),
        (0, [*row, *row[:3], w.data_ptr(), 4], "all tensors have a momentum or none"),
        (1, "int8", "dtype 'int8' is not supported"),
        (2, "float16", "pre_param must have the type of param"),
        (3, (float("nan"), *HYPER[1:]), "lr must be finite, got nan"),
        (3, (*HYPER[:4], 0.0, 1.0), "scale must be finite and not zero"),
        (5, "stochastic", "rounding 'stochastic' is not supported; allowed: nearest"),
        (6, 0, "threads must be at least 1"),
    ):
        bad = list(good)
        bad[position] = value
        for function in (native.preparam_sgd_step, native.preparam_sgd_step_overflows):
            with pytest.raises(ValueError, match=message):
                function(*bad)
    assert (w == 1).all()
