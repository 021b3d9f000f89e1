"""The C++ kernels without Python: linker hygiene, sanitizers, and machines that this one is not."""

import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from commands import run, tool

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
KERNELS = sorted(CSRC.glob("*/*_cpu.cpp"))
X86_ISAS = ("baseline", "avx2", "avx512")
ARM_ISAS = ("baseline", "neon")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")
# The program that holds the kernels of an op to their definition.
PARITY = {
    "folded_conv": "folded_conv_parity",
    "local_attention": "attention_parity",
    "norm_relu_conv": "norm_relu_conv_parity",
    "preparam_step": "preparam_parity",
    "temporal_block": "temporal_block_parity",
}
# Sources of other ops that an op's problem is checked by.
SHARED = {"temporal_block": (CSRC / "local_attention/problem.cpp",)}

native_machine = os.uname().machine
each_op = pytest.mark.parametrize("op", PARITY)
on_x86 = pytest.mark.skipif(native_machine != "x86_64", reason="needs an x86-64 machine")


@cache
def isa_flags(isa: str) -> tuple[str, ...]:
    """Compiler options of an instruction set, as CMakeLists.txt gives them."""
    text = (ROOT / "CMakeLists.txt").read_text()
    (flags,) = re.findall(rf"add_kernels\({isa}\b([^)]*)\)", text)
    return tuple(flags.split())


@cache
def source_flags(source: Path) -> tuple[str, ...]:
    """Compiler options of a source, as CMakeLists.txt gives them; none for other sources."""
    if not source.is_relative_to(ROOT):
        return ()
    text = (ROOT / "CMakeLists.txt").read_text()
    name = re.escape(str(source.relative_to(ROOT)))
    flags = re.findall(rf"properties\({name}\s+PROPERTIES COMPILE_OPTIONS ([^)]*)\)", text)
    return tuple(flag for found in flags for flag in found.split(";"))


def compile_kernel(compiler: str, source: Path, isa: str, out: Path, *flags: str) -> Path:
    options = ("-std=c++17", "-fPIC", "-fvisibility=hidden", f"-I{CSRC}", f"-DCA3D_ISA={isa}")
    own = (*isa_flags(isa), *source_flags(source))
    run(compiler, *options, *own, *flags, "-c", source, "-o", out)
    return out


def build_parity(op: str, folder: Path, compiler: str, isas: tuple[str, ...], *flags: str) -> Path:
    """The parity program of an op with its kernels of several instruction sets linked into it."""
    kernel = CSRC / op / f"{op}_cpu.cpp"
    objects = [
        compile_kernel(compiler, kernel, isa, folder / f"{isa}.o", "-fopenmp", *flags)
        for isa in isas
    ]
    program = folder / PARITY[op]
    sources = [
        ROOT / f"tests/native/{PARITY[op]}.cpp",
        CSRC / "common/dispatch.cpp",
        *(source for source in sorted((CSRC / op).glob("*.cpp")) if source not in KERNELS),
        *SHARED.get(op, ()),
    ]
    # The definition computes as the kernels do: it takes their options too.
    options = ("-std=c++17", "-fopenmp", f"-I{CSRC}", *source_flags(kernel))
    have = [f"-DCA3D_HAVE_{isa}" for isa in isas]
    run(compiler, *options, *have, *flags, *sources, *objects, "-o", program)
    return program


@pytest.fixture(scope="module")
def optimised(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The parity program of an op as users' machines run it, built once for all tests."""

    @cache
    def build(op: str) -> Path:
        isas = X86_ISAS if native_machine == "x86_64" else ARM_ISAS
        return build_parity(op, tmp_path_factory.mktemp(op), tool("g++"), isas, "-O3")

    return build


def test_every_kernel_has_a_parity_program() -> None:
    assert {source.parent.name for source in KERNELS} == set(PARITY)


def test_flags_are_those_of_the_build() -> None:
    assert isa_flags("avx2") == ("-mavx2", "-mfma", "-mf16c")
    assert source_flags(CSRC / "preparam_step/preparam_step_cpu.cpp") == ("-ffp-contract=off",)
    assert source_flags(CSRC / "local_attention/local_attention_cpu.cpp") == ()


@pytest.mark.parametrize("isa", X86_ISAS if native_machine == "x86_64" else ARM_ISAS)
@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.stem)
def test_kernels_share_no_function_with_other_instruction_sets(
    source: Path, isa: str, tmp_path: Path
) -> None:
    """A weak symbol is one that the linker merges with the same of another instruction set.

    Without optimization, so that no inline function hides by being inlined."""
    compiler, nm = tool("g++"), tool("nm")
    compiled = compile_kernel(compiler, source, isa, tmp_path / "kernel.o", "-fopenmp", "-O0")
    symbols = [line.split(maxsplit=2) for line in run(nm, "-C", compiled).splitlines()]
    defined = [(parts[1], parts[2]) for parts in symbols if len(parts) == 3]
    assert defined
    # A DW.ref is a pointer for exception tables: the same data wherever it comes from.
    merged = [name for kind, name in defined if kind in "WVuwv" and not name.startswith("DW.ref.")]
    assert not merged
    exported = [name for kind, name in defined if kind in "TDBRGS"]
    assert exported
    assert all(name.startswith(f"ca3d::{isa}::") for name in exported), exported


@on_x86
@pytest.mark.slow
def test_the_check_notices_shared_functions(tmp_path: Path) -> None:
    source = tmp_path / "shared.cpp"
    source.write_text("#include <algorithm>\nint f(int a) { return std::max(a, 1); }\n")
    with pytest.raises(AssertionError, match="std::max"):
        test_kernels_share_no_function_with_other_instruction_sets(source, "avx512", tmp_path)


# `test_sanitized_library.py` has all of them under the sanitizers in every full run.
@pytest.mark.slow
@pytest.mark.exhaustive
@each_op
def test_kernels_under_sanitizers(op: str, tmp_path: Path) -> None:
    isas = X86_ISAS if native_machine == "x86_64" else ARM_ISAS
    program = build_parity(op, tmp_path, tool("g++"), isas, "-O1", *SANITIZE)
    # libgomp keeps its threads until the process ends.
    assert "baseline ok" in run(program, "8", ASAN_OPTIONS="detect_leaks=0")


@pytest.mark.slow
@each_op
def test_kernels_over_many_shapes(op: str, optimised: Callable[[str], Path]) -> None:
    assert "baseline ok" in run(optimised(op), "150")


@on_x86
@pytest.mark.slow
@each_op
def test_kernels_on_older_machines(op: str, optimised: Callable[[str], Path]) -> None:
    program = optimised(op)
    emulator = tool("qemu-x86_64")
    old = run(emulator, "-cpu", "Nehalem", program, "10")
    assert "baseline ok" in old
    assert not re.search(r"^avx\S* ok$", old, re.MULTILINE)
    haswell = run(emulator, "-cpu", "Haswell", program, "5")
    assert re.search(r"^avx2 ok$", haswell, re.MULTILINE)
    assert not re.search(r"^avx512 ok$", haswell, re.MULTILINE)


@on_x86
@pytest.mark.slow
@each_op
def test_kernels_on_aarch64(op: str, tmp_path: Path) -> None:
    program = build_parity(op, tmp_path, tool("aarch64-linux-gnu-g++"), ARM_ISAS, "-O3")
    libraries = "/usr/aarch64-linux-gnu"
    assert "neon ok" in run(tool("qemu-aarch64"), "-L", libraries, program, "10")
