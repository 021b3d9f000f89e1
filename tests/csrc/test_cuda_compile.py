"""nvcc compiles the CUDA sources for every architecture, and nothing is spilled to memory."""

import re
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from commands import run, tool

from ca3d_kernels.cuda import covers

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("local_attention/local_attention.cu", "preparam_step/preparam_step.cu")
ARCHITECTURES = (75, 80, 86, 87, 89, 90, 100, 120)
# Of the default run; machine code of the others differs little.
USUAL = ((SOURCES[0], 90), (SOURCES[1], 75))
OTHERS = [(x, arch) for x in SOURCES for arch in ARCHITECTURES if (x, arch) not in USUAL]
KERNELS = {SOURCES[0]: 24, SOURCES[1]: 40}


@cache
def ptxas() -> Path:
    """The assembler beside nvcc."""
    text = run(tool("nvcc"), "--dryrun", "-c", "-x", "cu", "/dev/null", "-o", "/dev/null")
    (folder,) = re.findall(r"^#\$ _HERE_=(.*)$", text, re.MULTILINE)
    return Path(folder) / "ptxas"


def base(arch: int) -> int:
    """Architecture of the PTX that machine code comes from, as in cmake/cuda.cmake."""
    return 75 if arch < 80 else 80


@pytest.fixture(scope="module")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    folder = tmp_path_factory.mktemp("ptx")

    @cache
    def compiled(source: str, arch: int) -> Path:
        out = folder / f"{Path(source).stem}.{arch}.ptx"
        options = ("-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", f"-arch=compute_{arch}", "-ptx")
        run(tool("nvcc"), *options, "-Werror=all-warnings", ROOT / "csrc" / source, "-o", out)
        return out

    return compiled


def resources(ptx_file: Path, arch: int, out: Path) -> dict[str, tuple[int, int]]:
    """Kernel -> registers, and bytes of spills and stack."""
    text = run(ptxas(), "-v", f"-arch=sm_{arch}", ptx_file, "-o", out)
    found = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        text,
        re.DOTALL,
    )
    return {name: (int(used), int(a) + int(b) + int(c)) for name, a, b, c, used in found}


def check(ptx_file: Path, source: str, arch: int, out: Path) -> None:
    offered = run(tool("nvcc"), "--list-gpu-arch").split()
    if f"compute_{arch}" not in offered:
        pytest.skip(f"this nvcc does not offer compute_{arch}")
    kernels = resources(ptx_file, arch, out)
    assert len(kernels) == KERNELS[source]
    assert {name: spilled for name, (_, spilled) in kernels.items() if spilled} == {}
    for name, (registers, _) in kernels.items():
        # Blocks of 256 threads: two fit into a multiprocessor, with less than 64 bits four.
        most = 64 if re.search("(float32|float16)_staged", name) else 128
        assert registers <= most, name


@pytest.mark.parametrize(("source", "arch"), USUAL)
def test_no_spills(source: str, arch: int, ptx: Callable[[str, int], Path], tmp_path: Path) -> None:
    check(ptx(source, base(arch)), source, arch, tmp_path / "out.cubin")


@pytest.mark.slow
@pytest.mark.parametrize(("source", "arch"), OTHERS)
def test_no_spills_elsewhere(
    source: str, arch: int, ptx: Callable[[str, int], Path], tmp_path: Path
) -> None:
    check(ptx(source, base(arch)), source, arch, tmp_path / "out.cubin")


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_bfloat16_is_converted_by_one_instruction(
    source: str, ptx: Callable[[str, int], Path]
) -> None:
    conversion = "cvt.rn.bf16.f32"
    assert conversion in ptx(source, 80).read_text()
    # Why machine code of newer GPUs must not come from this.
    assert conversion not in ptx(source, 75).read_text()


@pytest.mark.slow
def test_the_library_is_built_from_this_ptx(tmp_path: Path) -> None:
    pybind11 = pytest.importorskip("pybind11")
    tool("nvcc")
    beside = str(Path(sys.executable).parent)
    cmake, ninja = (shutil.which(name, path=beside) or tool(name) for name in ("cmake", "ninja"))
    output = run(
        *(cmake, "-S", ROOT, "-B", tmp_path, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"),
        *(f"-DPython_EXECUTABLE={sys.executable}", "-DPYBIND11_FINDPYTHON=ON"),
        *(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", "-DCA3D_CUDA=on", "-DCA3D_CUDA_ARCHS=all"),
    )
    commands = (tmp_path / "build.ninja").read_text()
    groups = set(re.findall(r"-gencode=arch=compute_(\d+),code=\[(.*?)\]", commands))
    assert sorted(int(lowest) for lowest, _ in groups) == [75, 80]
    for lowest, codes in groups:
        *machine, embedded = codes.split(",")
        assert embedded == f"compute_{lowest}"
        assert {base(int(code.removeprefix("sm_"))) for code in machine} == {int(lowest)}
    built = re.search("CUDA kernels are built for (\\S+)", output)
    assert built
    for capability in ((7, 5), (8, 0), (8, 9), (12, 0), (13, 0)):
        assert covers(built[1], capability)
