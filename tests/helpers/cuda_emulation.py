"""Builds the CUDA sources for the host, and lets the ops run them on CPU tensors."""

import contextlib
import fcntl
import importlib.util
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
from commands import attempt, run, tool

from ca3d_kernels import backends

ROOT = Path(__file__).resolve().parents[2]
EMULATION = ROOT / "tests/cuda_emulation/emulation.h"
KERNELS = ("local_attention/local_attention.cu", "preparam_step/preparam_step.cu")
HOST = (
    "cuda_bindings.cpp",
    "common/cuda_device.cpp",
    "local_attention/cuda_fields.cpp",
    "local_attention/cuda_plan.cpp",
    "local_attention/problem.cpp",
    "preparam_step/checks.cpp",
    "preparam_step/cuda_plan.cpp",
)
# Programs that run the kernels, and what takes the place of the CPU kernels in the parity programs.
PROGRAMS = {
    "attention": ROOT / "tests/native/attention_parity.cpp",
    "preparam": ROOT / "tests/native/preparam_parity.cpp",
    "few_blocks": ROOT / "tests/cuda_emulation/few_blocks.cpp",
    "as_cpu": ROOT / "tests/cuda_emulation/as_cpu.cpp",
}
OPTIONS = ("-std=c++17", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unknown-pragmas")
ORDERS = ("forward", "reverse", "random", "rotating")


def compile_objects(
    folder: Path, sources: Sequence[str | Path], *flags: str, csrc: Path = ROOT / "csrc"
) -> list[Path]:
    """Object files of sources (relative ones below csrc), with the emulation in front of each."""

    def build(source: str | Path) -> Path:
        out = folder / ("-".join(Path(csrc / source).parts[-2:]) + ".o")
        command = (
            *(tool("g++"), *OPTIONS, f"-I{csrc}", "-include", EMULATION),
            *('-DCA3D_VERSION="0"', '-DCA3D_CUDA_ARCHS="emulated"', *flags),
            *("-x", "c++", "-c", csrc / source, "-o", out),
        )
        status, output = attempt(*command)
        assert status == 0, output
        assert "warning" not in output, output
        return out

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(build, sources))


def build_module(folder: Path) -> ModuleType:
    """The module `_cuda` with the kernels emulated; one process builds it for all."""
    folder.mkdir(exist_ok=True)
    library = folder / "_cuda.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _build_module(folder, library)
    spec = importlib.util.spec_from_file_location("_cuda", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _build_module(folder: Path, library: Path) -> None:
    pybind11 = pytest.importorskip("pybind11")
    include = (f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}")
    objects = compile_objects(folder, (*KERNELS, *HOST), "-O2", "-fvisibility=hidden", *include)
    linked = folder / "linked.so"
    run(tool("g++"), "-shared", *objects, "-o", linked)
    linked.rename(library)


@contextlib.contextmanager
def registered(module: ModuleType) -> Iterator[None]:
    """Inside, backend "cuda" is the emulated library and takes CPU tensors."""
    from ca3d_kernels.local_attention.cuda import CudaKernels as AttentionKernels
    from ca3d_kernels.preparam_step.cuda import CudaKernels as StepKernels

    kernels: Mapping[str, type] = {
        "local_attention": AttentionKernels,
        "preparam_step": StepKernels,
    }
    before = {op: backends._implementations[op]["cuda"] for op in kernels}
    for op, kind in kernels.items():
        loaded = kind(module)
        backends.register(
            op, backends.Implementation("cuda", lambda k=loaded: k, lambda device: None)
        )
    try:
        yield
    finally:
        for op, implementation in before.items():
            backends.register(op, implementation)


def build_objects(folder: Path, *flags: str) -> dict[str, Path]:
    """Source -> object file of the kernels and their plans, and of what runs them in programs."""
    host = [x for x in HOST if x != "cuda_bindings.cpp"]
    sources = [*KERNELS, *host, *(str(path) for path in PROGRAMS.values())]
    options = ("-O1", "-g", f"-I{ROOT / 'tests/native'}", *flags)
    return dict(zip(sources, compile_objects(folder, sources, *options), strict=True))


def link_program(name: str, objects: Mapping[str, Path], out: Path, *flags: str) -> Path:
    """One of PROGRAMS, from the result of `build_objects`."""
    parts = [path for source, path in objects.items() if Path(source) not in PROGRAMS.values()]
    parts.append(objects[str(PROGRAMS[name])])
    if name != "few_blocks":
        parts.append(objects[str(PROGRAMS["as_cpu"])])
    run(tool("g++"), *flags, *parts, "-o", out)
    return out
