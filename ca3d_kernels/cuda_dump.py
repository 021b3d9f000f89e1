"""The CUDA kernels for `ca3d_kernels.dump`: code out of the compiled library, and its launches.

Nothing is compiled here: the PTX is what the library carries for GPUs that it has no machine code
for, and machine code of all architectures was made from it.
"""

import functools
import re
import struct
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ca3d_kernels import cuda, problems
from ca3d_kernels.backends import UnsupportedInputError
from ca3d_kernels.dump import Compiled
from ca3d_kernels.local_attention.cpu import operand, problem
from ca3d_kernels.preparam_step.cpu import library_arguments
from ca3d_kernels.preparam_step.remembered import unknown_largest
from ca3d_kernels.problems import Case
from ca3d_kernels.triton_compile import tool

# Types of fields that hold numbers, as `struct` knows them.
_NUMBERS = {
    "bool": "?",
    "int32_t": "i",
    "uint32_t": "I",
    "int64_t": "q",
    "uint64_t": "Q",
    "float": "f",
    "double": "d",
}
_SOMEWHERE = 1 << 32  # aligned as every tensor is


class Planned(NamedTuple):
    """A launch as the library plans it.

    Attributes:
        plan: entry, grid, block, shared and the one parameter, a struct; see ``_cuda.pyi``.
        operands: name of a pointer in the struct -> the tensor that it points to; pointers that are
            left out are null.
    """

    plan: dict[str, Any]
    operands: dict[str, Tensor]


def planned(case: Case, device: str = "meta") -> list[Planned]:
    """The launches of a problem's forward and backward pass, or of its step.

    Args:
        case: the problem; of an op without CUDA kernels there are none.
        device: of the operands, which are not initialised.

    Raises:
        ImportError: the library isn't built.
        UnsupportedInputError: naming the limit of a kernel.
    """
    if case.op not in _PLANS:
        return []
    try:
        return _PLANS[case.op](case.values, torch.device(device))
    except cuda.library().UnsupportedError as limit:
        raise UnsupportedInputError(str(limit)) from None


def _attention(values: Mapping[str, Any], device: torch.device) -> list[Planned]:
    q, k, v, o, gradient = problems.attention_operands(values, device)
    dq, dk, dv = gradient.unbind(-3)
    arguments = problem(q, problems.options(values))
    found = []
    for tensors in (
        {"q": q, "k": k, "v": v, "o": o},
        {"q": q, "k": k, "v": v, "go": torch.empty_like(o), "dq": dq, "dk": dk, "dv": dv},
    ):
        plans = cuda.library().local_attention_launches(
            *arguments, [operand(x) for x in tensors.values()]
        )
        named = {f"{name}.data": x for name, x in tensors.items()}
        found += [Planned(plan, named) for plan in plans]
    return found


def _step(values: Mapping[str, Any], device: torch.device) -> list[Planned]:
    batch = problems.step_batch(values, device)
    found_inf = torch.empty((), dtype=torch.float32, device=device)
    table, *rest = library_arguments(batch)
    operands = {}
    columns = len(table) // len(batch.params)
    for column, (name, group) in enumerate(
        {
            "param": batch.params,
            "grad": batch.grads,
            "pre_param": batch.pre_params,
            "momentum": batch.momenta,
            "compensation": batch.compensations,
        }.items()
    ):
        for i, x in enumerate(group):
            operands[f"runs[{i}].{name}"] = x
            # Meta tensors have no address, and the library refuses null where it would read.
            table[i * columns + column] = x.data_ptr() or _SOMEWHERE
    largest = unknown_largest(batch, cuda.library().PREPARAM_CHUNK)
    first = {**operands, "device.found_inf": found_inf}
    checked = {**first, "device.largest": largest}
    found = []
    for overflows, tensors in (
        (True, first),
        (True, checked),
        (False, checked),
        (False, operands),
    ):
        addresses = [0, 0, 0]
        for i, name in enumerate(("device.found_inf", "device.largest"), 1):
            if name in tensors:
                addresses[i] = tensors[name].data_ptr() or _SOMEWHERE
        plans = cuda.library().preparam_launches(table, *rest, tuple(addresses), overflows)
        found += [Planned(plan, tensors) for plan in plans]
    return found


_PLANS = {"local_attention": _attention, "preparam_step": _step}


def describe(launch: Planned) -> list[dict[str, Any]]:
    """The parameter of a CUDA kernel's entry: a struct, field by field.

    Returns:
        One dictionary in a list: ``bytes`` is the struct in hexadecimal with all pointers null;
        each of ``fields`` has name, offset, type and meaning, and with them the dtype, shape and
        strides of the tensor that it points to, or its value.
    """
    (parameter,) = launch.plan["parameters"]
    content = bytearray(parameter["bytes"])
    fields = []
    for field in parameter["fields"]:
        name, kind, offset = field["name"], field["type"], field["offset"]
        entry = dict(field)
        if kind.endswith("*"):
            content[offset : offset + 8] = bytes(8)
            entry |= _pointer(launch.operands.get(name))
        elif kind in _NUMBERS:
            (entry["value"],) = struct.unpack_from("<" + _NUMBERS[kind], content, offset)
        fields.append(entry)
    return [
        {
            "name": parameter["name"],
            "type": parameter["type"],
            "meaning": "a struct, passed by value",
            "size": len(content),
            "bytes": content.hex(),
            "fields": fields,
        }
    ]


def _pointer(x: Tensor | None) -> dict[str, Any]:
    if x is None:
        return {"value": 0}
    return {
        "dtype": str(x.dtype).removeprefix("torch."),
        "shape": list(x.shape),
        "strides": list(x.stride()),
    }


@functools.cache
def code(op: str, arch: str) -> tuple[str, bytes]:
    """PTX and machine code of an op's kernels.

    Args:
        op: such as ``"local_attention"``.
        arch: such as ``"sm_90"``.

    Raises:
        ImportError: the library isn't built.
        UnsupportedInputError: it has no PTX for that architecture.
    """
    library = cuda.library()
    assert library.__file__ is not None
    wanted = int(arch.removeprefix("sm_"))
    compiled = [int(n) for n in re.findall(r"compute_(\d+)", library.architectures())]
    # What machine code comes from, and a driver would choose.
    newest = max((n for n in compiled if n <= wanted), default=None)
    if newest is None:
        raise UnsupportedInputError(
            f"the CUDA library was built for {library.architectures()}, not for {arch}; "
            f"CA3D_CUDA_ARCHS names others when it is installed"
        )
    with tempfile.TemporaryDirectory() as folder:
        tool("cuobjdump", "-xptx", "all", library.__file__, folder=folder)
        tool("cuobjdump", "-xelf", "all", "-arch", arch, library.__file__, folder=folder)
        ptx = Path(folder, f"{op}.sm_{newest}.ptx")
        cubin = Path(folder, f"{op}.{arch}.cubin")
        if not cubin.exists():
            tool("ptxas-blackwell", f"-arch={arch}", str(ptx), "-o", str(cubin))
        return ptx.read_text(), cubin.read_bytes()


def kernels(arch: str, changes: Mapping[str, str] | None) -> Iterator[Compiled]:
    """The CUDA kernels of every op that has any; see `ca3d_kernels.dump.Source`."""
    for case in problems.cases(changes):
        if case.op not in _PLANS:
            continue
        try:
            launches, (ptx, cubin) = planned(case), code(case.op, arch)
        except UnsupportedInputError as limit:
            print(f"{case.op}, {case.name}: not for cuda: {limit}")
            continue
        for launch in launches:
            yield Compiled(
                op=case.op,
                backend="cuda",
                problem={"name": case.name, **case.values},
                entry=launch.plan["entry"],
                ptx=ptx,
                cubin=cubin,
                parameters=describe(launch),
                grid=launch.plan["grid"],
                block=launch.plan["block"],
                shared=launch.plan["shared"],
                module=case.op,
            )
