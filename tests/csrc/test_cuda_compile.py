"""nvcc compiles the CUDA sources for every architecture, and nothing is spilled to memory."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from commands import run, tool

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("local_attention/local_attention.cu", "preparam_step/preparam_step.cu")
ARCHITECTURES = (75, 80, 86, 87, 89, 90, 100, 120)
# Architectures of the default run; machine code of the others differs little.
USUAL = (75, 90)
KERNELS = {SOURCES[0]: 24, SOURCES[1]: 40}


@cache
def ptxas() -> Path:
    """The assembler beside nvcc."""
    text = run(tool("nvcc"), "--dryrun", "-c", "-x", "cu", "/dev/null", "-o", "/dev/null")
    (folder,) = re.findall(r"^#\$ _HERE_=(.*)$", text, re.MULTILINE)
    return Path(folder) / "ptxas"


@pytest.fixture(scope="module")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("ptx")

    @cache
    def compiled(source: str) -> Path:
        out = folder / f"{Path(source).stem}.ptx"
        options = ("-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "-arch=compute_75", "-ptx")
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


@pytest.mark.parametrize("arch", USUAL)
@pytest.mark.parametrize("source", SOURCES)
def test_no_spills(source: str, arch: int, ptx: Callable[[str], Path], tmp_path: Path) -> None:
    check(ptx(source), source, arch, tmp_path / "out.cubin")


@pytest.mark.slow
@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch not in USUAL])
@pytest.mark.parametrize("source", SOURCES)
def test_no_spills_elsewhere(
    source: str, arch: int, ptx: Callable[[str], Path], tmp_path: Path
) -> None:
    check(ptx(source), source, arch, tmp_path / "out.cubin")
