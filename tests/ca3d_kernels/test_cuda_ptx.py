"""The PTX that nvcc makes of the CUDA kernels, run on the CPU: results, races, bytes moved.

Needs nvcc, and in `CA3D_PTX_RUNNER` the folder of a tool that translates PTX to C++.
"""

import functools
import itertools
import tempfile
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from attention_cases import Problem, assert_rounded, define, errors, operands, vary
from commands import run, tool
from exhaustive import often
from ptx_runner import ORDERS, cuda_module, memory, needs_ptx_runner, ptx_tool, spelled_out
from step_cases import assert_same_bits
from torch import Tensor

from ca3d_kernels.local_attention.cpu import operand, problem
from ca3d_kernels.local_attention.op import Options
from ca3d_kernels.preparam_step.cpu import library_arguments
from ca3d_kernels.preparam_step.op import Batch, ReferenceKernels
from ca3d_kernels.preparam_step.reference import Hyperparameters
from ca3d_kernels.preparam_step.remembered import unknown_largest

CSRC = Path(__file__).resolve().parents[2] / "csrc"

pytestmark = [pytest.mark.slow, needs_ptx_runner]

ARCHITECTURES = (80, 90, 120)
ORDINARY = Problem(frames=8, heads=4, head_dim=64, lead=(1, 6))
PROBLEMS = {
    "stage 1": vary(ORDINARY, layout="channels-last"),
    "stage 2": vary(ORDINARY, frames=4, heads=8, layout="channels-last"),
    "64 frames": vary(ORDINARY, frames=64, heads=1),
    "key table": vary(ORDINARY, edge="zero", table="published"),
    "dilated, shifted": vary(ORDINARY, dilation=2, edge="shift", kernel_size=4),
    "long, causal": vary(ORDINARY, frames=200, heads=1, head_dim=128, causal=True, lead=(1,)),
    "unaligned": vary(ORDINARY, layout="sliced", grad_layout="sliced", lead=(1, 2)),
    "wide window": vary(ORDINARY, frames=64, heads=1, head_dim=128, kernel_size=40, lead=(1,)),
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@functools.cache
def ptx(op: str, arch: int) -> str:
    command = (tool("nvcc"), "-std=c++17", "-O3", f"-I{CSRC}", f"-arch=compute_{arch}", "-ptx")
    with tempfile.TemporaryDirectory() as folder:
        run(*command, CSRC / op / f"{op}.cu", "-o", f"{folder}/kernels.ptx")
        return Path(folder, "kernels.ptx").read_text()


def execute(
    op: str, arch: int, plan: dict, tensors: list[Tensor], order: int = 0
) -> dict[str, int]:
    """Runs a described launch; returns what was loaded and stored."""
    (parameter,) = plan["parameters"]
    statistics, _ = cuda_module(ptx(op, arch), plan["entry"]).run(
        plan["entry"], plan["grid"], plan["block"], [parameter["bytes"]],
        [memory(x) for x in tensors], dyn=plan["shared"], order=order, stats=1,
    )  # fmt: skip
    return statistics


def launches(
    library: ModuleType, case: Problem
) -> tuple[list[tuple[dict, list[Tensor], list[Tensor]]], tuple[Tensor, ...]]:
    """Forward and backward plan of a problem, with all tensors and the results among them."""
    inputs = operands(case)
    q, k, v, go = (x.view((1,) * (5 - x.dim()) + tuple(x.shape)) for x in inputs)
    o, dq, dk, dv = (torch.empty(q.shape, dtype=q.dtype) for _ in range(4))
    arguments = problem(q, Options(**{"backend": "", **flat(case)}))
    found = []
    for tensors, results in (((q, k, v, o), [o]), ((q, k, v, go, dq, dk, dv), [dq, dk, dv])):
        (plan,) = library.local_attention_launches(*arguments, [operand(x) for x in tensors])
        found.append((plan, list(tensors), results))
    return found, inputs


def flat(case: Problem) -> dict:
    options = case.definition_options()
    return {**options, "key_table": tuple(options["key_table"] or ())}


def in_every_run(name: str, dtype: torch.dtype, arch: int) -> bool:
    """Every problem in one dtype, each way of access on every architecture."""
    turn = list(PROBLEMS).index(name) + ARCHITECTURES.index(arch) + DTYPES.index(dtype)
    return turn % len(DTYPES) == 0 and (
        arch == 90 or name in ("stage 1", "wide window", "unaligned")
    )


@pytest.mark.parametrize(
    ("name", "dtype", "arch"),
    often(itertools.product(PROBLEMS, DTYPES, ARCHITECTURES), in_every_run),
)
def test_attention(name: str, dtype: torch.dtype, arch: int, emulated_library: ModuleType) -> None:
    case = vary(PROBLEMS[name], dtype=dtype)
    plans, inputs = launches(emulated_library, case)
    exact = define(case, *(x.double() for x in inputs))
    same = define(case, *inputs)
    for plan, tensors, results in plans:
        first = None
        for order in ORDERS:
            for x in results:
                x.fill_(torch.nan)
            execute("local_attention", arch, plan, tensors, order)
            if first is None:
                first = [x.clone() for x in results]
            assert all(torch.equal(x, y) for x, y in zip(results, first, strict=True))
        for ours in results:
            truth, peer = exact.pop(0), same.pop(0)
            ours = ours.view(truth.shape)
            error, torch_error, largest = errors(ours, peer, truth)
            # The truth of float64 is itself of float64.
            roundings = 16 if dtype == torch.float64 else 2
            assert error <= 2 * torch_error + roundings * torch.finfo(dtype).eps * largest
            if dtype in (torch.float16, torch.bfloat16):
                assert_rounded(plan["entry"], ours, truth)


@pytest.mark.parametrize(
    ("name", "dtype"),
    often(
        itertools.product(("stage 1", "stage 2", "64 frames", "key table"), DTYPES),
        lambda name, dtype: dtype == torch.float16 or name == "stage 1",
    ),
)
def test_attention_moves_every_byte_once(
    name: str, dtype: torch.dtype, emulated_library: ModuleType
) -> None:
    case = vary(PROBLEMS[name], dtype=dtype)
    plans, _ = launches(emulated_library, case)
    if dtype in (torch.float16, torch.bfloat16):
        assert all(plan["entry"].endswith("staged") for plan, _, _ in plans)
    for plan, tensors, results in plans:
        moved = execute("local_attention", 90, plan, tensors)
        size = tensors[0].numel() * tensors[0].element_size()
        read, written = (len(tensors) - len(results)) * size, len(results) * size
        assert moved["st_bytes"] == written
        # Rows that aren't kept in shared memory, for want of room, come from the caches again, and
        # so do those around a tile.
        if plan["entry"].endswith("staged") and field(plan, "tiles.divisor") == 1:
            assert moved["ld_bytes"] <= 1.05 * read
            assert moved["ld_sectors"] * 32 <= 1.1 * moved["ld_bytes"]
        assert moved["st_sectors"] * 32 <= 1.1 * moved["st_bytes"]


def field(plan: dict, name: str) -> int:
    (parameter,) = plan["parameters"]
    (at,) = [x["offset"] for x in parameter["fields"] if x["name"] == name]
    return int.from_bytes(parameter["bytes"][at : at + 4], "little")


SIZES = (5000, 3, 4096, 16)


def step_batch(
    dtype: torch.dtype, wide: torch.dtype, rounding: str, sizes: Sequence[int] = SIZES
) -> Batch:
    torch.manual_seed(0)
    w = [(torch.randn(n) * 0.1).to(dtype) for n in sizes]
    grads = [(torch.randn(n) * 0.1).to(dtype) for n in sizes]
    theta = [(x * 128).to(wide) for x in w]
    momenta = [torch.randn(n).to(wide) for n in sizes]
    hyper = Hyperparameters(lr=0.05, momentum=0.9, weight_decay=5e-3)
    batch = Batch(w, grads, theta, momenta, hyper, 128.0, 128.0, rounding, seed=3, steps=7)
    if rounding != "compensated":
        return batch
    return batch._replace(compensations=[(torch.randn(n) * 1e-3).to(wide) for n in sizes])


STEPS = [
    (torch.float16, torch.float16, "nearest"),
    (torch.float16, torch.float16, "stochastic"),
    (torch.float16, torch.float16, "compensated"),
    (torch.float16, torch.float32, "nearest"),
    (torch.bfloat16, torch.bfloat16, "nearest"),
    (torch.bfloat16, torch.bfloat16, "stochastic"),
    (torch.bfloat16, torch.bfloat16, "compensated"),
    (torch.bfloat16, torch.float32, "nearest"),
    (torch.float32, torch.float32, "nearest"),
    (torch.float64, torch.float64, "nearest"),
]


# Each kernel on one architecture, and the plain one on all.
@pytest.mark.parametrize(
    ("dtype", "wide", "rounding", "arch"),
    often(
        [(*step, arch) for step in STEPS for arch in ARCHITECTURES],
        lambda *case: (
            case[:3] == STEPS[0]
            or ARCHITECTURES.index(case[3]) == STEPS.index(case[:3]) % len(ARCHITECTURES)
        ),
    ),
)
def test_step(
    dtype: torch.dtype,
    wide: torch.dtype,
    rounding: str,
    arch: int,
    emulated_library: ModuleType,
) -> None:
    ours, before, reference = (step_batch(dtype, wide, rounding) for _ in range(3))
    ReferenceKernels().step(reference)
    found, largest = torch.zeros(()), unknown_largest(ours, emulated_library.PREPARAM_CHUNK)
    tensors = [*ours.written(), *ours.grads, found, largest]
    kept = 3 if rounding == "compensated" else 2
    table, *rest = library_arguments(ours)
    table = np.frombuffer(array("q", table), np.int64)
    elements = sum(x.numel() for x in ours.params)
    sizes = [x.element_size() for x in (ours.params[0], ours.pre_params[0])]
    grads, both = elements * sizes[0], elements * (sizes[0] + kept * sizes[1])
    # A search that knows nothing, a step, and a search after it, which reads only gradients.
    steps = ((True, False, both), (False, True, both), (True, True, grads))
    for order, (overflows, remembers, read) in itertools.product(ORDERS, steps):
        addresses = (0, found.data_ptr(), remembers * largest.data_ptr())
        (plan,) = emulated_library.preparam_launches(table, *rest, addresses, overflows)
        moved = execute("preparam_step", arch, plan, tensors, order)
        pair = 2 * largest.element_size()
        if overflows:
            # A lane of each warp reads a pair.
            assert moved["ld_bytes"] - 8 * plan["grid"][0] * pair * remembers <= 1.05 * read
            assert moved["ld_sectors"] * 32 <= 1.1 * moved["ld_bytes"]
            assert moved["st_bytes"] == 0
            assert found.item() == 0
        else:
            # Each thread reads found_inf.
            assert moved["ld_bytes"] - 4 * 256 * plan["grid"][0] <= 1.05 * read
            assert moved["st_sectors"] * 32 <= 1.1 * moved["st_bytes"]
            assert moved["st_bytes"] == both + pair * plan["grid"][0]
            for x, y in zip(ours.written(), reference.written(), strict=True):
                assert_same_bits(x, y)
        if overflows and remembers:
            expected = [
                max(x.abs().max().item() for x in state)
                for state in (ours.pre_params, ours.momenta)
            ]
            assert largest.view(-1, 2).amax(0).tolist() == expected
            largest.fill_(torch.nan)
            for x, y in zip(ours.written(), before.written(), strict=True):
                x.copy_(y)


@pytest.mark.parametrize("arch", often(zip(ARCHITECTURES), lambda arch: arch == 90))
def test_step_of_many_tensors(arch: int, emulated_library: ModuleType) -> None:
    """The kernels whose tables are of up to 32 KB."""
    half = torch.float16
    ours, reference = (step_batch(half, half, "nearest", (7,) * 99 + (5000,)) for _ in range(2))
    ReferenceKernels().step(reference)
    found, largest = torch.zeros(()), unknown_largest(ours, emulated_library.PREPARAM_CHUNK)
    tensors = [*ours.written(), *ours.grads, found, largest]
    table, *rest = library_arguments(ours)
    arguments = (np.frombuffer(array("q", table), np.int64), *rest)
    for overflows in (True, False, True):
        addresses = (0, found.data_ptr(), largest.data_ptr())
        (plan,) = emulated_library.preparam_launches(*arguments, addresses, overflows)
        assert plan["entry"].endswith("_large")
        execute("preparam_step", arch, plan, tensors)
        assert found.item() == 0
    for x, y in zip(ours.written(), reference.written(), strict=True):
        assert_same_bits(x, y)
    ours.grads[98].fill_(torch.inf)
    execute("preparam_step", arch, plan, tensors)
    assert found.item() == 1


@pytest.mark.parametrize("arch", often(zip(ARCHITECTURES), lambda arch: arch == 90))
def test_overflows_are_told_once_a_warp(arch: int, emulated_library: ModuleType) -> None:
    batch = step_batch(torch.float16, torch.float16, "nearest")
    found = torch.zeros(())
    tensors = [*batch.written(), *batch.grads, found]
    table, *rest = library_arguments(batch)
    arguments = (np.frombuffer(array("q", table), np.int64), *rest, (0, found.data_ptr(), 0))
    (plan,) = emulated_library.preparam_launches(*arguments, True)
    # Vectors of 8 elements: 5000 and 4096 take 8 + 4 and 8 warps, the small ones a warp each.
    for overflows, warps in (([3], 1), ([0], 12), ([0, 1, 2, 3], 22)):
        for x in batch.grads:
            x.zero_()
        for i in overflows:
            batch.grads[i].fill_(torch.inf)
        for order in ORDERS:
            found.zero_()
            moved = execute("preparam_step", arch, plan, tensors, order)
            assert found.item() == 1
            assert moved["st_bytes"] == 4 * warps


def assert_no_races(op: str, arch: int, plan: dict, tensors: list[Tensor]) -> None:
    """Runs a described launch on zeros under the thread sanitizer."""
    (parameter,) = plan["parameters"]
    copies, pointers = [], {}
    for x in tensors:
        address, size, _ = memory(x)
        pointers[address] = np.zeros(size, np.uint8)
    for place in parameter["fields"]:
        at = place["offset"]
        address = int.from_bytes(parameter["bytes"][at : at + 8], "little")
        if place["type"].endswith("*") and address:
            copies.append((pointers[address], at))
    program = ptx_tool().Exe(spelled_out(ptx(op, arch)), only=plan["entry"], san="thread")
    code, text = program.run(
        plan["entry"], plan["grid"], plan["block"], [(parameter["bytes"], copies)],
        dyn=plan["shared"],
    )  # fmt: skip
    assert code == 0, text
    assert "ThreadSanitizer" not in text


@pytest.mark.parametrize(
    ("name", "arch"),
    often(
        itertools.product(("stage 2", "64 frames", "key table", "unaligned"), ARCHITECTURES),
        lambda name, arch: arch == 90,
    ),
)
def test_no_races(name: str, arch: int, emulated_library: ModuleType) -> None:
    case = vary(PROBLEMS[name], dtype=torch.float16, lead=(1, 2))
    for plan, tensors, _ in launches(emulated_library, case)[0]:
        assert_no_races("local_attention", arch, plan, tensors)


@pytest.mark.parametrize(
    ("rounding", "arch"),
    often(
        itertools.product(("nearest", "stochastic", "compensated"), ARCHITECTURES),
        lambda rounding, arch: (rounding, arch) == ("nearest", 90),
    ),
)
def test_no_races_in_a_step(rounding: str, arch: int, emulated_library: ModuleType) -> None:
    batch = step_batch(torch.float16, torch.float16, rounding)
    found, largest = torch.zeros(()), unknown_largest(batch, emulated_library.PREPARAM_CHUNK)
    table, *rest = library_arguments(batch)
    arguments = (np.frombuffer(array("q", table), np.int64), *rest)
    for overflows in (True, False):
        addresses = (0, found.data_ptr(), largest.data_ptr())
        (plan,) = emulated_library.preparam_launches(*arguments, addresses, overflows)
        tensors = [*batch.written(), *batch.grads, found, largest]
        assert_no_races("preparam_step", arch, plan, tensors)
