"""Runs the PTX of described launches on the CPU, with the tool that CA3D_PTX_RUNNER names.

The tool translates PTX to C++; it checks every address, counts bytes and 32-byte sectors, and
takes the threads of a block in a chosen order.
"""

import ctypes
import functools
import importlib
import multiprocessing
import os
import re
import sys
from typing import Any, NamedTuple

import numpy as np
import pytest
from torch import Tensor

from ca3d_kernels.triton_launch import Launch

FOLDER = os.environ.get("CA3D_PTX_RUNNER", "")
ORDERS = (0, 1, 2, 3)  # forward, reverse, random, rotating

needs_ptx_runner = pytest.mark.skipif(
    not FOLDER, reason="CA3D_PTX_RUNNER names no folder with ptx2cpp.py"
)


class Traffic(NamedTuple):
    """Bytes and 32-byte sectors that the threads of a launch asked for, loads and stores."""

    bytes: int
    sectors: int


@functools.cache
def ptx_tool() -> Any:
    """The module that translates and runs PTX."""
    sys.path.insert(0, FOLDER)
    return importlib.import_module("ptx2cpp")


# Instructions of which the tool passes over a modifier, and others that mean the same: `.sat` and
# `.relu` clamp, additions of mixed precision widen one operand, maxima may be of three.
_SPELLED_OUT = (
    (
        r"(?P<op>fma\.\w+|cvt)\.sat\.(?P<types>(f32\.)?f32)\s+(?P<to>%\w+),(?P<rest>[^;]*);",
        r"\g<guard>\g<op>.\g<types> \g<to>,\g<rest>; "
        r"\g<guard>max.f32 \g<to>, \g<to>, 0f00000000; "
        r"\g<guard>min.f32 \g<to>, \g<to>, 0f3F800000;",
    ),
    (
        r"min\.relu\.s32\s+(?P<to>%\w+),(?P<rest>[^;]*);",
        r"\g<guard>min.s32 \g<to>,\g<rest>; \g<guard>max.s32 \g<to>, \g<to>, 0;",
    ),
    (
        r"(?P<op>add|sub)\.rn\.f32\.(?P<half>b?f16)\s+(?P<to>%\w+),\s*(?P<x>%\w+),(?P<y>[^;]*);",
        r"{ .reg .f32 %widened; cvt.f32.\g<half> %widened, \g<x>; "
        r"\g<guard>\g<op>.f32 \g<to>, %widened,\g<y>; }",
    ),
    (
        r"(?P<op>(max|min)\.f32)\s+(?P<to>%\w+),(?P<xy>[^,;]*,[^,;]*),(?P<z>[^,;]*);",
        r"{ .reg .f32 %of_two; \g<op> %of_two,\g<xy>; "
        r"\g<guard>\g<op> \g<to>, %of_two,\g<z>; }",
    ),
)


def spelled_out(ptx: str) -> str:
    """PTX of the same meaning in instructions that the tool reads as they are meant."""
    for pattern, replacement in _SPELLED_OUT:
        ptx = re.sub(r"(?P<guard>@!?%\w+\s+)?\b" + pattern, replacement, ptx)
    return ptx


@functools.cache
def _module(ptx: str) -> Any:
    return ptx_tool().Module(spelled_out(ptx))


@functools.cache
def cuda_module(ptx: str, entry: str) -> Any:
    """One kernel of a CUDA source's PTX, ready to run."""
    return ptx_tool().Module(spelled_out(ptx), only=entry)


def memory(x: Tensor) -> tuple[int, int, int]:
    """Address and bytes that a tensor spans, for the check of every access."""
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    size = (last + 1) * x.element_size() if x.numel() else 0
    return x.data_ptr(), size, 0


def _run(ptx: str, entry: str, launch: Launch, shared: int, order: int) -> dict[str, int]:
    tensors = [x for x in launch.arguments.values() if isinstance(x, Tensor)]
    values = [x.data_ptr() if isinstance(x, Tensor) else x for x in launch.arguments.values()]
    buffers = [memory(x) for x in (*tensors, *launch.reached)]
    statistics, _ = _module(ptx).run(
        entry, (launch.programs,), (32 * launch.num_warps,), [*values, 0, 0], buffers,
        dyn=shared, order=order, stats=1,
    )  # fmt: skip
    return statistics


def _traffic(counts: dict[str, int]) -> Traffic:
    loads, stores = counts["ld_bytes"], counts["st_bytes"]
    return Traffic(loads + stores, counts["ld_sectors"] + counts["st_sectors"])


def run_planned(ptx: str, launch: Any) -> Traffic:
    """Runs a CUDA kernel on CPU tensors; see `ca3d_kernels.cuda_dump.Planned`."""
    plan = launch.plan
    (parameter,) = plan["parameters"]
    counts, _ = cuda_module(ptx, plan["entry"]).run(
        plan["entry"], plan["grid"], plan["block"], [parameter["bytes"]],
        [memory(x) for x in launch.operands.values()], dyn=plan["shared"], stats=1,
    )  # fmt: skip
    return _traffic(counts)


def races(launch: Launch, arch: str, *, replicated_stores: bool = False) -> str:
    """What the thread sanitizer says about a launch on CPU tensors; nothing if all is well.

    The tensors are copied and results are lost. If the kernel reaches tensors through addresses,
    its first argument is the table of these.

    Args:
        launch: of a Triton kernel.
        arch: such as ``"sm_90"``.
        replicated_stores: whether two writes by one instruction are allowed. Where several threads
            hold one value, as after a reduction, Triton has all of them store it. If the values
            differed, results would depend on the order of the threads.
    """
    from ca3d_kernels.triton_compile import compile_for

    compiled = compile_for(launch, arch)
    entry = compiled.metadata.name
    ptx = spelled_out(compiled.asm["ptx"])
    if launch.reached:
        program = _relocating_program(ptx, entry)
    else:
        program = ptx_tool().Exe(ptx, only=entry, san="thread")
    arguments: list[Any] = []
    for value in launch.arguments.values():
        if isinstance(value, Tensor):
            address, size, _ = memory(value)
            copied = bytearray(ctypes.string_at(address, size))
            arguments.append(np.frombuffer(copied, np.uint8))
        else:
            arguments.append(value)
    scratch = 0
    if launch.reached:
        arguments[0], scratch = _moved_together(arguments[0].view(np.int64), launch.reached)
    code, text = program.run(
        entry, (launch.programs,), (32 * launch.num_warps,), [*arguments, 0, scratch],
        dyn=compiled.metadata.shared,
        env={"TSAN_OPTIONS": "halt_on_error=0:exitcode=0"} if replicated_stores else {},
    )  # fmt: skip
    if replicated_stores and code == 0:
        reports = text.split("WARNING: ThreadSanitizer")[1:]
        return "".join(report for report in reports if not _is_replicated_store(report))
    return text if code != 0 or "ThreadSanitizer" in text else ""


# Words of a table from here on are offsets in the last buffer of the sanitized program.
_OFFSETS = 1 << 60
_RELOCATE = f"""
 for (u64 i = 0; i + 8 <= bn[0]; i += 8) {{
  u64 word; memcpy(&word, bp[0] + i, 8);
  if (word < {_OFFSETS}ull) continue;
  word += (u64)bp.back() - {_OFFSETS}ull; memcpy(bp[0] + i, &word, 8);
 }}
"""


def _relocating_program(ptx: str, entry: str) -> Any:
    """The sanitized program, which makes the offsets of `_moved_together` addresses."""
    tool = ptx_tool()
    main, read = tool.MAIN, "fclose(f); if(const"
    assert main.count(read) == 1, "the PTX runner's program has changed"
    tool.MAIN = main.replace(read, f"{_RELOCATE} {read}")
    try:
        return tool.Exe(ptx, only=entry, san="thread")
    finally:
        tool.MAIN = main


def _moved_together(
    table: np.ndarray, reached: tuple[Tensor, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """A table of addresses with offsets in one buffer instead of these, and the buffer."""
    moved, parts, start = table.copy(), [], 0
    for x in reached:
        address, size, _ = memory(x)
        inside = (table >= address) & (table < address + size)
        moved[inside] = table[inside] - address + start + _OFFSETS
        room = -(-size // 256) * 256
        parts.append(ctypes.string_at(address, size).ljust(room, b"\0"))
        start += room
    return moved, np.frombuffer(bytearray(b"".join(parts)), np.uint8)


def _is_replicated_store(report: str) -> bool:
    """Whether both accesses of a report are writes by one instruction of the kernel."""
    writes = re.findall(r"^  (?:Write|Previous write) of size", report, re.MULTILINE)
    places = re.findall(r"^    #1 (.*)$", report, re.MULTILINE)[:2]
    return len(writes) == 2 and len(places) == 2 and places[0] == places[1]


def run(launch: Launch, arch: str, order: int = 0, *, results: bool = True) -> Traffic:
    """Compiles a launch on CPU tensors and runs its PTX.

    A process of its own runs it, so that a bad access fails one test alone. For results the
    tensors must be in shared memory.
    """
    from ca3d_kernels.triton_compile import compile_for

    compiled = compile_for(launch, arch)
    ptx, entry = compiled.asm["ptx"], compiled.metadata.name
    _module(ptx)
    for x in (*launch.arguments.values(), *launch.reached):
        if not (results and isinstance(x, Tensor)):
            continue
        assert x.is_shared(), "results would stay in the child"
    # Forked by hand: the launch needs the addresses, and must not be pickled.
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            sender.send(_run(ptx, entry, launch, compiled.metadata.shared, order))
            status = 0
        finally:
            os._exit(status)
    sender.close()
    counts = receiver.recv() if receiver.poll(300) else {}
    assert os.waitpid(child, 0)[1] == 0, f"{entry}: the PTX runner reported an error"
    return _traffic(counts)
