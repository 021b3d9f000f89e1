"""The CUDA kernels of the pre-parameter step, run on the host by the emulation."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from commands import run, tool
from cuda_emulation import ORDERS, compile_objects
from pairwise import pairwise_cases
from step_cases import (
    DTYPES,
    MAGNITUDE_SIZES,
    assert_flag_of_float32,
    assert_same_bits,
    parameters,
    set_gradients,
)
from torch import Tensor, nn

from ca3d_kernels import LinearMapping, PreParamSGD, cuda
from ca3d_kernels.preparam_step import op, remembered
from ca3d_kernels.preparam_step.cuda import CudaKernels
from ca3d_kernels.preparam_step.reference import Hyperparameters

# A block takes 4096 elements, a vector up to 8.
SIZES = (0, 1, 2, 7, 8, 17, 33, 513, 4096, 4097, 9001)
HALVES = (torch.float16, torch.bfloat16)
CASES = pairwise_cases(
    {
        "dtype": DTYPES,
        "wide": (None, torch.float32),
        "momentum": (0.0, 0.9),
        "dampening": (0.0, 0.1),
        "nesterov": (False, True),
        "weight_decay": (0.0, 5e-3),
        "mapping": (LinearMapping(), LinearMapping(100.0, 0.1), LinearMapping(0.3)),
        "skip_nonfinite": (False, True),
        "rounding": op.ROUNDINGS,
        "order": range(len(ORDERS)),
    },
    lambda case: (
        (not case["nesterov"] or (case["momentum"] > 0 and case["dampening"] == 0))
        and (case["wide"] is None or case["dtype"] in HALVES)
    ),
)


def trained(params: list[nn.Parameter], backend: str, **options: object) -> list[Tensor]:
    """Weights, pre-parameters and momenta after some steps."""
    optimizer = PreParamSGD(params, lr=0.01, backend=backend, **options)
    for step in range(3):
        set_gradients(params, seed=step)
        optimizer.step()
    assert optimizer.skipped_steps == 0
    states = [value for w in params for value in optimizer.state[w].values()]
    return [w.detach() for w in params] + states


def assert_all_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for i, (x, y) in enumerate(zip(actual, expected, strict=True)):
        assert_same_bits(x, y, f"tensor {i}")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_reference_bit_for_bit(case: dict, emulated_cuda: ModuleType) -> None:
    options = {k: v for k, v in case.items() if k not in ("dtype", "wide", "order")}
    options["pre_param_dtype"] = case["wide"]
    emulated_cuda.set_order(case["order"])
    expected = trained(parameters(case["dtype"], SIZES), "reference", **options)
    assert_all_same(trained(parameters(case["dtype"], SIZES), "cuda", **options), expected)


@pytest.mark.parametrize("count", [81, 700])
def test_many_tensors(count: int, emulated_cuda: ModuleType) -> None:
    # More than a small table holds, and more than a large one.
    sizes = [i % 5 for i in range(count)]
    options = {"momentum": 0.9, "rounding": "stochastic"}
    expected = trained(parameters(torch.float16, sizes), "reference", **options)
    assert_all_same(trained(parameters(torch.float16, sizes), "cuda", **options), expected)


@pytest.mark.parametrize("rounding", op.ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned_tensors(dtype: torch.dtype, rounding: str, emulated_cuda: ModuleType) -> None:
    def shifted() -> list[nn.Parameter]:
        return [nn.Parameter(w.detach()[1:]) for w in parameters(dtype, (66, 4200))]

    options = {"momentum": 0.9, "rounding": rounding}
    expected = trained(shifted(), "reference", **options)
    assert_all_same(trained(shifted(), "cuda", **options), expected)


@pytest.mark.parametrize("rounding", op.ROUNDINGS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_bit_pattern_of_a_gradient(
    dtype: torch.dtype, rounding: str, emulated_cuda: ModuleType
) -> None:
    grad = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    results = []
    for backend in ("cuda", "reference"):
        w = nn.Parameter(torch.linspace(-1, 1, 2**16).to(dtype))
        w.grad = grad
        optimizer = PreParamSGD([w], lr=0.5, momentum=0.9, rounding=rounding, backend=backend)
        optimizer.step()
        results.append([w, *optimizer.state[w].values()])
    assert_all_same(*results)


def batch_of(
    grads: list[Tensor], dtype: torch.dtype, scale: float = 128.0, momentum: float = 0.9
) -> op.Batch:
    w = [torch.full_like(grad, 0.25) for grad in grads]
    theta = [(x * scale).to(dtype) for x in w]
    momenta = [torch.ones_like(x) for x in theta] if momentum else []
    hyper = Hyperparameters(lr=0.5, momentum=momentum, weight_decay=0.01)
    return op.Batch(w, grads, theta, momenta, hyper, scale, scale)


@pytest.mark.parametrize("place", [0, 15, 4095, 4096, 4999])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 6e4])
def test_overflows_are_found_anywhere(
    place: int, value: float, emulated_library: ModuleType
) -> None:
    kernels = CudaKernels(emulated_library)
    grads = [torch.zeros(9, dtype=torch.float16), torch.zeros(5000, dtype=torch.float16)]
    found = kernels.overflows(batch_of(grads, torch.float16))
    assert (found.item(), found.dtype) == (0, torch.float32)
    grads[1][place] = value  # 128 * 6e4 is beyond float16 as momentum and as theta
    batch = batch_of(grads, torch.float16)
    before = [x.clone() for x in (*batch.params, *batch.pre_params, *batch.momenta)]
    assert kernels.overflows(batch).item() == 1
    after = [*batch.params, *batch.pre_params, *batch.momenta]
    assert_all_same(after, before)


@pytest.mark.parametrize("order", range(len(ORDERS)), ids=ORDERS)
def test_overflows_of_all_elements_are_told_once_a_warp(
    order: int, emulated_library: ModuleType
) -> None:
    kernels = CudaKernels(emulated_library)
    emulated_library.set_order(order)
    # Three blocks, of the last of which only the first warp has elements.
    grads = [torch.full((8200,), torch.inf, dtype=torch.float16)]
    assert kernels.overflows(batch_of(grads, torch.float16)).item() == 1
    warps = 256 // 32
    assert emulated_library.atomics() == 2 * warps + 1
    assert kernels.overflows(batch_of([torch.zeros(8200).half()], torch.float16)).item() == 0
    assert emulated_library.atomics() == 0


@pytest.mark.parametrize("rounding", op.ROUNDINGS)
def test_overflow_of_the_weight_with_any_draw(rounding: str, emulated_library: ModuleType) -> None:
    # w = 2 theta, and theta between 32752, the largest, and 32768: with stochastic rounding it
    # could become the latter.
    kernels = CudaKernels(emulated_library)
    for gradient, expected in ((-32.0, False), (-32.5, rounding == "stochastic"), (-64.0, True)):
        grads = [torch.full((300,), gradient, dtype=torch.float16)]
        batch = batch_of(grads, torch.float16, 0.5, momentum=0)
        batch.pre_params[0].fill_(32736)
        batch = batch._replace(
            hyper=Hyperparameters(lr=1.0),
            rounding=rounding,
            compensations=[torch.zeros(300).half()] if rounding == "compensated" else [],
        )
        for some in (kernels, op.ReferenceKernels()):
            assert bool(some.overflows(batch)) == expected


def test_found_inf_skips_on_the_device(emulated_library: ModuleType) -> None:
    kernels = CudaKernels(emulated_library)
    batch = batch_of([torch.ones(5000)], torch.float32)
    kernels.step(batch, found_inf=torch.ones(()))
    assert bool((batch.params[0] == 0.25).all())
    kernels.step(batch, found_inf=torch.zeros(()))
    assert bool((batch.params[0] != 0.25).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_numbers_on_the_device(dtype: torch.dtype, emulated_library: ModuleType) -> None:
    kernels = CudaKernels(emulated_library)
    grads = [torch.linspace(-1, 1, 777).to(dtype)]
    expected, actual = batch_of(grads, dtype, 100.0), batch_of(grads, dtype, 100.0)
    kernels.step(expected)
    wrong = Hyperparameters(lr=9.0, momentum=0.1, weight_decay=9.0)
    numbers = torch.tensor([0.5, 0.9, 1.0, 0.01, 100.0, 100.0], dtype=torch.float64)
    kernels.step(
        actual._replace(hyper=wrong, scale=7.0, gradient_scale=7.0, device_numbers=numbers)
    )
    assert_all_same(
        [*actual.params, *actual.pre_params, *actual.momenta],
        [*expected.params, *expected.pre_params, *expected.momenta],
    )
    with pytest.raises(ValueError, match="device_numbers must be a contiguous tensor of 6"):
        kernels.step(actual._replace(device_numbers=torch.tensor(3.0)))


def trained_with_tensors(backend: str, tensors: bool, **options: object) -> list[Tensor]:
    """Results of steps whose numbers and loss scale are tensors that change, or numbers."""
    params = parameters(torch.float16, SIZES)
    numbers = {
        "lr": torch.tensor([0.1], dtype=torch.float64),
        "momentum": torch.tensor(0.9, dtype=torch.float64),
        "weight_decay": torch.tensor(5e-3),
    }
    given = numbers if tensors else {name: float(x) for name, x in numbers.items()}
    optimizer = PreParamSGD(params, **given, backend=backend, **options)
    for step in range(3):
        for name, x in numbers.items():
            x.mul_(0.75)
            if not tensors:
                optimizer.param_groups[0][name] = float(x)
        set_gradients(params, seed=step)
        optimizer.step(grad_scale=torch.tensor(3.0 + step))
    states = [value for w in params for value in optimizer.state[w].values()]
    return [w.detach() for w in params] + states


@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"dampening": 0.1}], ids=str)
def test_numbers_in_tensors_are_read_by_the_kernels(
    options: dict, emulated_cuda: ModuleType
) -> None:
    expected = trained_with_tensors("reference", tensors=False, **options)
    for backend in ("cpu", "reference", "cuda"):
        assert_all_same(trained_with_tensors(backend, tensors=True, **options), expected)


def test_kernels_read_tensors_without_a_wait(
    emulated_cuda: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = parameters(torch.float16, SIZES)
    numbers = {name: torch.tensor(0.5) for name in ("lr", "momentum", "weight_decay")}
    optimizer = PreParamSGD(params, **numbers, skip_nonfinite=True, backend="cuda")
    set_gradients(params)
    optimizer.step()
    monkeypatch.setattr(Tensor, "item", wait)
    monkeypatch.setattr(Tensor, "__bool__", wait)
    # Tensors on the CPU are checked there, as those on a GPU are not.
    monkeypatch.setattr("ca3d_kernels.preparam_step.optimizer.check_options", lambda group: None)
    monkeypatch.setattr(Tensor, "__float__", wait)
    optimizer.step(grad_scale=torch.ones(()))


def wait(*_: object) -> None:
    raise AssertionError("the CPU asked for a value on the device")


def test_a_capture_keeps_what_it_reads(
    emulated_cuda: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = parameters(torch.float16, SIZES)
    optimizer = PreParamSGD(params, lr=torch.tensor(0.5), momentum=0.9, backend="cuda")
    set_gradients(params)
    optimizer.step()
    (part,) = optimizer._plans[0].parts
    assert part.uploads.captured == []
    monkeypatch.setattr(cuda, "is_capturing", lambda device: True)
    optimizer.step()
    (source,) = part.uploads.captured
    monkeypatch.setattr(cuda, "is_capturing", lambda device: False)
    optimizer.param_groups[0]["rounding"] = "compensated"
    optimizer.step()
    assert optimizer._captured[0] is source


def test_what_is_kept_is_held_for_the_stream_that_reads_it(
    emulated_cuda: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = parameters(torch.float16, SIZES)
    optimizer = PreParamSGD(params, lr=0.5, skip_nonfinite=True, backend="cuda")
    set_gradients(params)
    optimizer.step()
    held = []
    monkeypatch.setattr(cuda, "used_here", lambda x: held.append(x) or x)
    optimizer.step()
    (part,) = optimizer._plans[0].parts
    assert held
    assert any(x is part.batch.cache["largest"] for x in held)


def test_the_flag_is_of_float32_whatever_the_default(emulated_cuda: ModuleType) -> None:
    assert_flag_of_float32("cuda", torch.float16)


CHECKED = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.01, "skip_nonfinite": True}


def test_chunks_are_remembered_by_themselves(emulated_cuda: ModuleType) -> None:
    optimizer = PreParamSGD(parameters(torch.float16, MAGNITUDE_SIZES), **CHECKED, backend="cuda")
    for w in optimizer.param_groups[0]["params"]:
        w.grad = torch.full_like(w, 1e-3)
    optimizer.step()
    (part,) = optimizer._plans[0].parts
    batch, chunk = part.batch, emulated_cuda.PREPARAM_CHUNK
    expected = [
        stretch.abs().max().item()
        for both in zip(batch.pre_params, batch.momenta, strict=True)
        for stretches in zip(*(x.split(chunk) for x in both), strict=True)
        for stretch in stretches
    ]
    assert remembered.known(batch).tolist() == expected
    # A step that is skipped leaves what is still true.
    batch.params[1].grad[30] = torch.nan
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert remembered.known(batch).tolist() == expected


def test_replays_of_a_graph_are_not_trusted(
    emulated_cuda: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = nn.Parameter(torch.ones(300, dtype=torch.float16))
    optimizer = PreParamSGD([w], **CHECKED, backend="cuda")
    w.grad = torch.ones_like(w) * 1e-3
    optimizer.step()
    monkeypatch.setattr(cuda, "is_capturing", lambda device: True)
    optimizer.step()
    monkeypatch.setattr(cuda, "is_capturing", lambda device: False)
    optimizer.step()
    (part,) = optimizer._plans[0].parts
    assert remembered.known(part.batch) is None
    # Nor are they by another plan of the same tensors.
    optimizer.param_groups[0]["rounding"] = "compensated"
    optimizer.step()
    (other,) = optimizer._plans[0].parts
    assert other is not part
    assert remembered.known(other.batch) is None


def test_skipped_steps_are_counted_in_one_place(emulated_cuda: ModuleType) -> None:
    # A CUDA graph adds to the tensor of its capture.
    (w,) = parameters(torch.float16, (300,))
    optimizer = PreParamSGD([w], lr=0.5, backend="cuda")
    counter = None
    for number, flag in enumerate((1.0, 0.0, 1.0)):
        w.grad = torch.ones_like(w)
        optimizer.step(found_inf=torch.full((1,), flag))
        assert counter is None or optimizer._skipped_on_device is counter
        counter = optimizer._skipped_on_device
        assert optimizer.skipped_steps == (1, 1, 2)[number]


def test_kernels_that_need_numbers_read_the_tensor() -> None:
    batch = batch_of([torch.ones(300)], torch.float32)
    numbers = torch.tensor([0.5, 0.9, 1.0, 0.01, 64.0, 32.0], dtype=torch.float64)
    read = batch._replace(device_numbers=numbers).for_kernels(op.ReferenceKernels())
    assert read.hyper == Hyperparameters(lr=0.5, momentum=0.9, weight_decay=0.01)
    assert (read.scale, read.gradient_scale) == (64.0, 32.0)
    assert read.device_numbers is None


def test_launches_of_an_ordinary_model(emulated_library: ModuleType) -> None:
    # 137 tensors, most of them small: one launch.
    table: list[int] = []
    sizes = [300] * 103 + [200_000] * 34
    for i, size in enumerate(sizes):
        table += [4096 * (i + 1)] * 4 + [0, size, i]
    arguments = (torch.tensor(table).numpy(), "float16", "float16", (0.1, 0.9, 0, 0, 128.0, 1.0))
    arguments = (*arguments, False, "nearest", (0, 0), (0, 0, 0))
    (plan,) = emulated_library.preparam_launches(*arguments, False)
    assert plan["entry"] == "ca3d_preparam_step_float16_float16_large"
    assert plan["grid"] == (103 + 34 * 49, 1, 1)
    assert plan["block"] == (256, 1, 1)
    (parameter,) = plan["parameters"]
    assert len(parameter["bytes"]) <= 32764
    fields = {x["name"]: x for x in parameter["fields"]}
    at = fields["runs[136].count"]["offset"]
    assert int.from_bytes(parameter["bytes"][at : at + 8], "little") == 200_000


# Prints the kernels of a step of 81 tensors and the rows of their tables, and runs the step unless
# it is only described.
STEP_OF_MANY = """
import importlib.util, sys
from array import array
spec = importlib.util.spec_from_file_location("_cuda", sys.argv[1])
library = importlib.util.module_from_spec(spec)
spec.loader.exec_module(library)
ones = [[array("f", [1.0] * 5) for _ in range(3)] for _ in range(81)]
table = array("q")
for number, arrays in enumerate(ones):
    table.extend([*(x.buffer_info()[0] for x in arrays), 0, 0, 5, number])
hyper = (0.5, 0.0, 0.0, 0.0, 1.0, 1.0)
options = ("float32", "float32", hyper, False, "nearest", (0, 0), (0, 0, 0))
for launch in library.preparam_launches(table, *options, False):
    (parameter,) = launch["parameters"]
    rows = sum(x["name"].endswith("].param") for x in parameter["fields"])
    print(launch["entry"].rsplit("_", 1)[1], rows)
if library.driver_version():
    library.preparam_sgd_step(table, *options, 0, 0)
    assert all(list(w) == [0.5] * 5 for w, *_ in ones)
"""


def step_of_many(library: str | Path, driver: int) -> list[str]:
    return run(
        sys.executable, "-c", STEP_OF_MANY, library, CA3D_EMULATED_DRIVER=str(driver)
    ).splitlines()


def test_large_tables_need_a_driver_that_takes_them(emulated_library: ModuleType) -> None:
    library = emulated_library.__file__
    assert library is not None
    small, large = ["small 64", "small 17"], ["large 81"]
    assert cuda.driver_obstacle(12000, 12080) is None
    for driver, launches in ((12000, small), (12010, large), (13000, large)):
        assert step_of_many(library, driver) == launches
    # Without one, what the library was built with is described.
    assert step_of_many(library, 0) == large


def test_large_tables_need_a_toolkit_that_compiles_them(
    emulated_library: ModuleType, tmp_path: Path
) -> None:
    assert emulated_library.__file__ is not None
    built = Path(emulated_library.__file__).parent
    options = ("-O0", "-fvisibility=hidden", "-DCUDART_VERSION=12000")
    objects = compile_objects(tmp_path, ["preparam_step/preparam_step.cu"], *options)
    objects += [x for x in built.glob("*.o") if x.name != objects[0].name]
    run(tool("g++"), "-shared", *objects, "-o", tmp_path / "_cuda.so")
    for driver in (0, 13000):
        assert step_of_many(tmp_path / "_cuda.so", driver) == ["small 64", "small 17"]
