"""Writes docs/gpu-evidence.md: what can be known about the GPU kernels without a GPU.

    CA3D_CUDA_ARCHS=all python setup.py build_ext --inplace
    CA3D_PTX_RUNNER=FOLDER python scripts/gpu_evidence.py

It takes three quarters of an hour of one core. Registers, shared memory, spills and instructions
come from NVIDIA's assembler and tools, traffic from running the PTX on the CPU (left out unless
CA3D_PTX_RUNNER names the runner's folder), the rest is arithmetic on public data sheets. Built for
fewer GPUs, the CUDA kernels have no rows for older ones. Nothing in it is a measurement on a GPU.
"""

import platform
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

import ptx_runner  # noqa: E402
from torch import Tensor  # noqa: E402

from ca3d_kernels import cuda, cuda_dump, problems  # noqa: E402
from ca3d_kernels.backends import UnsupportedInputError  # noqa: E402
from ca3d_kernels.cuda_dump import Planned  # noqa: E402
from ca3d_kernels.problems import Case  # noqa: E402
from ca3d_kernels.triton_compile import Resources, compile_for, resources  # noqa: E402
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
LISTS = ("param", "grad", "pre_param", "momentum", "compensation")  # tensors of a step
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


class Kernel(NamedTuple):
    """A launch of a kernel of either backend.

    Attributes:
        name: of the kernel, with what distinguishes the launches of a step.
        threads: of a block.
        least: bytes of all operands, each read once, and of all results, each written once.
        operands: tensors that it reads or writes.
        resources: architecture -> what the assembler says.
        run: architecture -> what its PTX asks memory for, run on the CPU.
    """

    name: str
    threads: int
    least: int
    operands: list[Tensor]
    resources: Callable[[str], Resources]
    run: Callable[[str], ptx_runner.Traffic]


def size(tensors: list[Tensor]) -> int:
    """Bytes of the elements of tensors."""
    return sum(x.numel() * x.element_size() for x in tensors)


def of_step(
    name: str, reached: dict[str, list[Tensor]], flagged: bool, remembers: bool
) -> tuple[str, int]:
    """What to call the launch of a step or of its search for overflows, and what it must move."""
    w, g, *states = (size(reached.get(name, [])) for name in LISTS)
    if "overflows" not in name:
        return name if flagged else f"{name}, unconditional", g + w + 2 * sum(states)
    return (name, g) if remembers else (f"{name}, the first", g + sum(states))


def triton_kernel(case: Case, launch: Launch) -> Kernel:
    """A launch of a Triton kernel."""
    name = launch.kernel.__name__
    tensors = {k: x for k, x in launch.arguments.items() if isinstance(x, Tensor)}
    if case.op == "preparam_step":
        compensated = case.values["rounding"] == "compensated"
        names = LISTS if compensated else LISTS[:-1]
        each = len(launch.reached) // len(names)
        reached = {
            key: list(launch.reached[i * each : (i + 1) * each]) for i, key in enumerate(names)
        }
        flagged = launch.constants.get("PREDICATED") is not False
        name, least = of_step(name, reached, flagged, "largest" in launch.arguments)
        # A flag that isn't 0 would stop the step; the chunk table stays as it is.
        operands = [*launch.reached, *list(tensors.values())[2:]]
    else:
        skipped = ("key_counts", "bias", "weight", "partial_weight", "partial_bias")
        least = size([x for k, x in tensors.items() if k not in skipped])
        operands = [x for x in tensors.values() if x.is_floating_point()]

    def used(arch: str) -> Resources:
        compiled = compile_for(launch, arch)
        metadata = compiled.metadata
        return resources(compiled.asm["cubin"], metadata.name, metadata.shared)

    def run(arch: str) -> ptx_runner.Traffic:
        return ptx_runner.run(launch, arch, results=False)

    return Kernel(f"Triton {name}", 32 * launch.num_warps, least, operands, used, run)


def cuda_kernel(case: Case, launch: Planned) -> Kernel:
    """A launch of a CUDA kernel."""
    plan, operands = launch.plan, launch.operands
    name = plan["entry"].removeprefix("ca3d_")
    if case.op == "preparam_step":
        reached: dict[str, list[Tensor]] = {}
        for key, x in operands.items():
            reached.setdefault(key.rpartition(".")[2], []).append(x)
        flagged = "device.found_inf" in operands
        name, least = of_step(name, reached, flagged, "device.largest" in operands)
    else:
        least = size(list(operands.values()))

    def used(arch: str) -> Resources:
        _, cubin = cuda_dump.code(case.op, arch)
        return resources(cubin, plan["entry"], plan["shared"])

    def run(arch: str) -> ptx_runner.Traffic:
        ptx, _ = cuda_dump.code(case.op, arch)
        return ptx_runner.run_planned(ptx, launch)

    return Kernel(f"CUDA {name}", plan["block"][0], least, list(operands.values()), used, run)


def cuda_launches(case: Case, arch: str, device: str) -> list[Planned]:
    """The launches of an op's CUDA kernels, if there is code for the architecture."""
    launches = cuda_dump.planned(case, device)
    if launches:
        cuda_dump.code(case.op, arch)
    return launches


def kernels(case: Case, arch: str, device: str = "meta") -> Iterator[Kernel | str]:
    """The kernels of a problem, and why a backend has none."""
    for planned, kernel in (
        (lambda: problems.launches(case, arch, device), triton_kernel),
        (lambda: cuda_launches(case, arch, device), cuda_kernel),
    ):
        try:
            yield from (kernel(case, launch) for launch in planned())
        except UnsupportedInputError as reason:
            yield str(reason)


def compiled_rows() -> Iterator[str]:
    """Registers, memory and accesses of every kernel on every architecture, as a table."""
    yield "| kernel | problem | GPU | registers | shared bytes | spills | 128-bit loads + stores, "
    yield "other widths | warps a multiprocessor (of) |\n|---|---|---|---|---|---|---|---|\n"
    for case in problems.cases():
        for arch, limits in ARCHS.items():
            for kernel in kernels(case, arch):
                if isinstance(kernel, str):
                    yield f"| {case.op} | {case.name} | {arch} | refused: {kernel} | | | | |\n"
                    continue
                used = kernel.resources(arch)
                moved = {a: n for a, n in used.accesses.items() if a.startswith(("LDG", "STG"))}
                loads = moved.pop("LDG.128", 0) + moved.pop("LDGSTS.128", 0)
                stores = moved.pop("STG.128", 0)
                others = " ".join(f"{a} {n}" for a, n in moved.items()) or "none"
                held = occupancy(used.registers, used.shared, kernel.threads // 32, arch)
                yield f"| {kernel.name} | {case.name} | {arch} | {used.registers} "
                yield f"| {used.shared} | {used.stack} | {loads} + {stores}, {others} "
                yield f"| {held} of {limits.warps} |\n"


def small(case: Case, positions: int = 16) -> Case:
    """The problem with fewer positions or elements, as the PTX runner takes it."""
    if case.op == "preparam_step":
        sizes = {"small_tensors": 2, "large_tensors": 2, "large_size": 16384}
        return case._replace(values={**case.values, **sizes})
    return case._replace(values={**case.values, "batch": 1, "positions": positions})


def traffic_rows() -> Iterator[str]:
    """What the PTX asks memory for, as a table."""
    yield "| kernel | problem | bytes asked for / minimum | 32-byte sectors x 32 / minimum |\n"
    yield "|---|---|---|---|\n"
    for case in map(small, problems.cases()):
        # Of small problems the weights would be most of it.
        if case.op in ("qkv_attention", "temporal_block"):
            continue
        for kernel in kernels(case, "sm_90", device="cpu"):
            if isinstance(kernel, str):
                continue
            for x in kernel.operands:
                x.zero_()
            found = kernel.run("sm_90")
            yield f"| {kernel.name} | {case.name} | {found.bytes / kernel.least:.3f} "
            yield f"| {32 * found.sectors / kernel.least:.3f} |\n"


def marginal_traffic_rows() -> Iterator[str]:
    """What the PTX of the fused projection asks memory for with every further position."""
    yield "| kernel | problem | bytes asked for / minimum | 32-byte sectors x 32 / minimum |\n"
    yield "|---|---|---|---|\n"
    for case in problems.cases():
        if case.op != "qkv_attention":
            continue
        sizes = [
            problems.launches(small(case, positions), "sm_90", device="cpu")
            for positions in (16, 32)
        ]
        for pair in zip(*sizes, strict=True):
            found, least = [], []
            for launch in pair:
                # One program for each head goes through all of its tiles.
                alone = {"programs": case.values["heads"]} if "tiles" in launch.arguments else {}
                kernel = triton_kernel(case, launch._replace(**alone))
                for x in kernel.operands:
                    x.zero_()
                found.append(kernel.run("sm_90"))
                least.append(kernel.least)
            more = least[1] - least[0]
            yield f"| {kernel.name} | {case.name} | {(found[1].bytes - found[0].bytes) / more:.3f} "
            yield f"| {32 * (found[1].sectors - found[0].sectors) / more:.3f} |\n"


def roofline_rows() -> Iterator[str]:
    """Times that no kernel can beat, as a table."""
    yield "| kernel | problem | minimum MB | " + " | ".join(f"{d}, us" for d in DEVICES) + " |\n"
    yield "|---|---|---|" + "---|" * len(DEVICES) + "\n"
    for case in problems.cases():
        for kernel in kernels(case, "sm_90"):
            if isinstance(kernel, str):
                continue
            floors = " | ".join(f"{kernel.least / speed * 1e6:.1f}" for speed in DEVICES.values())
            yield f"| {kernel.name} | {case.name} | {kernel.least / 1e6:.1f} | {floors} |\n"


INTRODUCTION = """# What is known about the GPU kernels without a GPU

**Everything here is computed, not measured. No GPU has run these kernels.**
Written by `python scripts/gpu_evidence.py` with triton {triton} and a CUDA library built for
{archs} on {machine}, {date}.

"""
COMPILED = """## Compiled code (computed, not measured)

Spills are bytes of local memory of a thread; 0 is what the tests demand of these problems. (Of
other clips that are longer than a tile, Triton's backward pass has up to 72: in float32 with a
head_dim above 64, and on sm_75.)
Widths count memory instructions in the machine code. The last column is the theoretical occupancy
that registers, shared memory and block size allow.

"""
TRAFFIC = """
## Traffic (computed, not measured)

The PTX for sm_90, run on the CPU on a small problem: what its threads ask for, against every
operand read once and every result written once. A value that all threads of a warp read is counted
once a thread in the bytes, though it moves one sector: the step's flag shows there.
The step's search for overflows comes after another step, whose magnitudes tell that nothing can
overflow: its minimum are the gradients; the first search reads theta and momentum too.
Triton reads clips that are longer than a tile once too: a program goes along a clip and keeps the
last tile. Of clips longer than 512 frames several programs take a stretch each; where one ends and
the next begins, both read two tiles of 16 frames.

"""
MARGINAL = """
The fused projection, with every further position and against the pixels alone: what is above 1
comes from the caches. The backward kernel reads the 25 KB of its head's weights for every tile, the
kernel for a key table the weights of all heads for every four positions (eight at stage 2), and a
bias of every frame is read for every pixel. With a key table the backward pass is torch's
projection, not in this table, and then the two kernels named here: together they move 16 times the
bytes of x, where the backward kernel without a table moves 3.

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
        triton=version("triton"),
        archs=cuda.library().architectures().replace(",", ", "),
        machine=machine,
        date=time.strftime("%Y-%m-%d"),
    )
    traffic = [SKIPPED]
    if ptx_runner.FOLDER:
        traffic = [*traffic_rows(), MARGINAL, *marginal_traffic_rows()]
    parts = [introduction, COMPILED, *compiled_rows(), TRAFFIC, *traffic, ROOFLINE]
    parts += roofline_rows()
    (ROOT / "docs" / "gpu-evidence.md").write_text("".join(parts))


if __name__ == "__main__":
    main()
