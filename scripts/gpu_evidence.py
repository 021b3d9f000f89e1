"""Writes docs/gpu-evidence.md: what can be known about the GPU kernels without a GPU.

    python scripts/gpu_evidence.py

Registers, shared memory, spills and instructions come from NVIDIA's assembler and tools, traffic
from running the PTX on the CPU (left out unless CA3D_PTX_RUNNER names the runner's folder), the
rest is arithmetic on public data sheets. Nothing in it is a measurement on a GPU.
"""

import platform
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

import ptx_runner  # noqa: E402
from torch import Tensor  # noqa: E402

from ca3d_kernels import problems  # noqa: E402
from ca3d_kernels.backends import UnsupportedInputError  # noqa: E402
from ca3d_kernels.problems import Case  # noqa: E402
from ca3d_kernels.triton_compile import compile_for, resources  # noqa: E402
from ca3d_kernels.triton_launch import Launch  # noqa: E402


class Multiprocessor(NamedTuple):
    """What one multiprocessor holds, by NVIDIA's programming guide."""

    warps: int
    blocks: int
    shared: int


ARCHS = {
    "sm_75": Multiprocessor(32, 16, 64 << 10),
    "sm_80": Multiprocessor(64, 32, 164 << 10),
    "sm_86": Multiprocessor(48, 16, 100 << 10),
    "sm_87": Multiprocessor(48, 16, 164 << 10),
    "sm_89": Multiprocessor(48, 24, 100 << 10),
    "sm_90": Multiprocessor(64, 32, 228 << 10),
    "sm_100": Multiprocessor(64, 32, 228 << 10),
    "sm_120": Multiprocessor(48, 24, 100 << 10),
}
# Bytes a second, by the data sheets.
DEVICES = {"H100 SXM": 3.35e12, "RTX 4090": 1.008e12, "Orin AGX": 204.8e9}


def occupancy(registers: int, shared: int, warps: int, arch: str) -> int:
    """Warps that a multiprocessor holds at once."""
    limits = ARCHS[arch]
    per_warp = -(-registers * 32 // 256) * 256
    reserved = 0 if arch == "sm_75" else 1024
    per_block = -(-(shared + reserved) // 128) * 128
    blocks = min(
        limits.blocks,
        limits.warps // warps,
        65536 // per_warp // warps,
        limits.shared // per_block if per_block else limits.blocks,
    )
    return blocks * warps


def minimum_bytes(case: Case, launch: Launch) -> int:
    """Bytes of all operands, each read once, and of all results, each written once."""
    name = launch.kernel.__name__
    if case.op == "preparam_step":
        batch = launch.reached
        kinds = [x.numel() * x.element_size() for x in batch]
        lists = 5 if case.values["rounding"] == "compensated" else 4
        each = len(kinds) // lists
        w, g, *states = (sum(kinds[i * each : (i + 1) * each]) for i in range(lists))
        return g + sum(states) if "overflows" in name else g + w + 2 * sum(states)
    skipped = ("key_counts", "bias", "weight", "partial_weight", "partial_bias")
    tensors = {k: x for k, x in launch.arguments.items() if isinstance(x, Tensor)}
    return sum(x.numel() * x.element_size() for k, x in tensors.items() if k not in skipped)


def label(launch: Launch) -> str:
    """Name of a kernel, with what distinguishes the launches of a step."""
    name = launch.kernel.__name__
    return f"{name}, unconditional" if launch.constants.get("PREDICATED") is False else name


def compiled_rows() -> Iterator[str]:
    """Registers, memory and accesses of every kernel on every architecture, as a table."""
    yield "| kernel | problem | GPU | registers | shared bytes | spills | 128-bit loads + stores, "
    yield "other widths | warps a multiprocessor (of) |\n|---|---|---|---|---|---|---|---|\n"
    for case in problems.cases():
        for arch, limits in ARCHS.items():
            try:
                launches = problems.launches(case, arch)
            except UnsupportedInputError as reason:
                yield f"| {case.op} | {case.name} | {arch} | refused: {reason} | | | | |\n"
                continue
            for launch in launches:
                used = resources(compile_for(launch, arch))
                moved = {a: n for a, n in used.accesses.items() if a.startswith(("LDG", "STG"))}
                loads = moved.pop("LDG.128", 0) + moved.pop("LDGSTS.128", 0)
                stores = moved.pop("STG.128", 0)
                others = " ".join(f"{a} {n}" for a, n in moved.items()) or "none"
                held = occupancy(used.registers, used.shared, launch.num_warps, arch)
                yield f"| {label(launch)} | {case.name} | {arch} | {used.registers} "
                yield f"| {used.shared} | {used.stack} | {loads} + {stores}, {others} "
                yield f"| {held} of {limits.warps} |\n"


def small(case: Case) -> Case:
    """The problem with fewer positions or elements, as the PTX runner takes it."""
    if case.op == "preparam_step":
        sizes = {"small_tensors": 2, "large_tensors": 2, "large_size": 16384}
        return case._replace(values={**case.values, **sizes})
    return case._replace(values={**case.values, "batch": 1, "positions": 16})


def traffic_rows() -> Iterator[str]:
    """What the PTX asks memory for, as a table."""
    yield "| kernel | problem | bytes asked for / minimum | 32-byte sectors x 32 / minimum |\n"
    yield "|---|---|---|---|\n"
    for case in map(small, problems.cases()):
        if case.op == "qkv_attention":
            continue
        for launch in problems.launches(case, "sm_90", device="cpu"):
            tensors = [x for x in launch.arguments.values() if isinstance(x, Tensor)]
            if case.op == "preparam_step":
                # A flag that isn't 0 would stop the step.
                tensors = [*launch.reached, *tensors[2:]]
            for x in tensors:
                if x.is_floating_point():
                    x.zero_()
            found = ptx_runner.run(launch, "sm_90", results=False)
            least = minimum_bytes(case, launch)
            yield f"| {label(launch)} | {case.name} | {found.bytes / least:.3f} "
            yield f"| {32 * found.sectors / least:.3f} |\n"


def roofline_rows() -> Iterator[str]:
    """Times that no kernel can beat, as a table."""
    yield "| kernel | problem | minimum MB | " + " | ".join(f"{d}, us" for d in DEVICES) + " |\n"
    yield "|---|---|---|" + "---|" * len(DEVICES) + "\n"
    for case in problems.cases():
        for launch in problems.launches(case, "sm_90"):
            least = minimum_bytes(case, launch)
            floors = " | ".join(f"{least / speed * 1e6:.1f}" for speed in DEVICES.values())
            yield f"| {label(launch)} | {case.name} | {least / 1e6:.1f} | {floors} |\n"


INTRODUCTION = """# What is known about the GPU kernels without a GPU

**Everything here is computed, not measured. No GPU has run these kernels.**
Written by `python scripts/gpu_evidence.py` with triton {triton} on {machine}, {date}.

"""
COMPILED = """## Compiled code (computed, not measured)

Spills are bytes of local memory of a thread; 0 is what the tests demand. Widths count memory
instructions in the machine code. The last column is the theoretical occupancy that registers,
shared memory and block size allow.

"""
TRAFFIC = """
## Traffic (computed, not measured)

The PTX for sm_90, run on the CPU on a small problem: what its threads ask for, against every
operand read once and every result written once. A value that all threads of a warp read is counted
once a thread in the bytes, though it moves one sector: the step's table and numbers show there.
Clips longer than a tile are read with their halo, most of which a GPU finds in its caches. The
fused projection is left out: beside its operands, each of its programs reads the 25 KB of its
head's weights from the L2 cache (forward once, backward for every tile).
With float32 masters a thread's float32 numbers take two loads, each of half a sector: the sectors
are counted twice and move once.

"""
SKIPPED = "Left out: CA3D_PTX_RUNNER names no PTX runner.\n"
ROOFLINE = """
## Roofline floors (computed, not measured)

The minimum of bytes over the memory bandwidth of the data sheet: no kernel can be faster (unless
its operands are in a cache), and no claim is made how near these come.

"""


def main() -> None:
    """Writes the file."""
    machine = f"{platform.system()} {platform.machine()}"
    introduction = INTRODUCTION.format(
        triton=version("triton"), machine=machine, date=time.strftime("%Y-%m-%d")
    )
    traffic = "".join(traffic_rows()) if ptx_runner.FOLDER else SKIPPED
    parts = [introduction, COMPILED, *compiled_rows(), TRAFFIC, traffic, ROOFLINE, *roofline_rows()]
    (ROOT / "docs" / "gpu-evidence.md").write_text("".join(parts))


if __name__ == "__main__":
    main()
