"""The CUDA sources on the host under sanitizers, and mistakes that these tests must notice."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from commands import attempt, run, tool
from cuda_emulation import ORDERS, ROOT, build_objects, compile_objects, link_program
from exhaustive import often

CSRC = ROOT / "csrc"
BOUNDS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
RACES = ("-fsanitize=thread",)

Objects = Mapping[str, Path]

x86_only = pytest.mark.skipif(os.uname().machine != "x86_64", reason="fibers of ThreadSanitizer")


@pytest.fixture(scope="module")
def bounds(tmp_path_factory: pytest.TempPathFactory) -> Objects:
    return build_objects(tmp_path_factory.mktemp("bounds"), *BOUNDS)


@pytest.fixture(scope="module")
def races(tmp_path_factory: pytest.TempPathFactory) -> Objects:
    return build_objects(tmp_path_factory.mktemp("races"), *RACES)


def run_parity(op: str, objects: Objects, folder: Path) -> tuple[int, str]:
    program = link_program(op, objects, folder / op, *BOUNDS)
    return attempt(program, "6", ASAN_OPTIONS="detect_leaks=0")


def run_races(objects: Objects, folder: Path) -> tuple[int, str]:
    program = link_program("few_blocks", objects, folder / "few_blocks", *RACES)
    # ThreadSanitizer of gcc 12 can't stand much randomness in the addresses.
    return attempt(tool("setarch"), "-R", program, TSAN_OPTIONS="halt_on_error=1")


@pytest.mark.parametrize("op", ["attention", "preparam"])
def test_no_access_out_of_bounds_in_any_order(op: str, bounds: Objects, tmp_path: Path) -> None:
    status, output = run_parity(op, bounds, tmp_path)
    assert status == 0, output
    assert [f"{order} ok" for order in ORDERS] == output.splitlines()


@x86_only
def test_no_races(races: Objects, tmp_path: Path) -> None:
    status, output = run_races(races, tmp_path)
    assert status == 0, output
    assert output.endswith("done\n")
    for access in ("staged", "vectors", "scalars"):
        assert f"_{access}: " in output


ATTENTION = "local_attention/local_attention.cu"
BLOCK = "local_attention/block.cuh"
STEP = "preparam_step/preparam_step.cu"

# Name -> file, the right text, a mistake, and what notices it.
MUTANTS = {
    "no barrier after staging": (
        ATTENTION,
        "    block.stage_keys();\n    __syncthreads();\n",
        "    block.stage_keys();\n",
        "races",
    ),
    "no barrier after staging queries": (
        ATTENTION,
        "    block.stage_queries();\n    __syncthreads();\n",
        "    block.stage_queries();\n",
        "races",
    ),
    "no barrier before gathering": (
        ATTENTION,
        "  differentiate_scores(block);\n  __syncthreads();\n",
        "  differentiate_scores(block);\n",
        "races",
    ),
    "no barrier of the warp": (ATTENTION, "    __syncwarp();", "    ", "races"),
    "window one frame too short": (
        BLOCK,
        "seen.exists && n < seen.own.count}",
        "seen.exists && n + 1 < seen.own.count}",
        "attention",
    ),
    "last query forgotten": (
        ATTENTION,
        "t < queries.first + queries.count; ++t",
        "t < queries.first + queries.count - 1; ++t",
        "attention",
    ),
    "one vector of a row too many": (
        BLOCK,
        "      if (i < a.head_dim) store<",
        "      if (i <= a.head_dim) store<",
        "attention",
    ),
    "barrier only for some": (
        ATTENTION,
        "    __syncwarp();",
        "    if (query.exists) __syncwarp();",
        "attention",
    ),
    "one vector of a chunk too many": (
        STEP,
        "chunk.count / kVector : 0",
        "(chunk.count + kVector - 1) / kVector : 0",
        "preparam",
    ),
    "tensor found off by one": (
        STEP,
        "if (a.first_block[middle] <= blockIdx.x)",
        "if (a.first_block[middle] < blockIdx.x)",
        "preparam",
    ),
}
QUICK = ("no barrier before gathering", "one vector of a chunk too many")


def notice(name: str, request: pytest.FixtureRequest, folder: Path) -> None:
    file, right, wrong, by = MUTANTS[name]
    csrc = folder / "csrc"
    shutil.copytree(CSRC, csrc)
    text = (csrc / file).read_text()
    assert text.count(right) == 1, f"{name}: the text is no longer there"
    (csrc / file).write_text(text.replace(right, wrong))
    flags = RACES if by == "races" else BOUNDS
    kernel = STEP if file == STEP else ATTENTION
    (mutant,) = compile_objects(folder, [kernel], "-O1", "-g", *flags, csrc=csrc)
    objects = {**request.getfixturevalue("races" if by == "races" else "bounds"), kernel: mutant}
    if by == "races":
        status, output = run_races(objects, folder)
    else:
        status, output = run_parity(by, objects, folder)
    assert status != 0, f"{name} went unnoticed:\n{output}"
    expected = ("data race",) if by == "races" else ("FAILED", "Sanitizer", "emulation:", "runtime")
    assert any(word in output for word in expected), output


@x86_only
@pytest.mark.parametrize("name", QUICK)
def test_mistakes_are_noticed(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    notice(name, request, tmp_path)


@x86_only
@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    often([(name,) for name in sorted(set(MUTANTS) - set(QUICK))], lambda name: "window" in name),
)
def test_more_mistakes_are_noticed(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    notice(name, request, tmp_path)


EMULATED = """
#include "common/cuda.h"
struct Nothing {};
void kernel(Nothing) { %s }
int main() {
  ca3d::launch(kernel, 1, 64, 64, nullptr, Nothing());
}
"""


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("if (threadIdx.x < 32) __syncthreads();", "deadlock"),
        (
            "if (threadIdx.x < 32) { __syncthreads(); } else {\n __syncthreads(); }",
            "different barriers",
        ),
        ("if (threadIdx.x % 2) __syncwarp();", "deadlock"),
        ("(void)__shfl_xor_sync(1u << threadIdx.x % 32, 1.0f, 1);", "outside its mask"),
    ],
)
def test_the_emulation_notices_bad_synchronisation(body: str, words: str, tmp_path: Path) -> None:
    source = tmp_path / "kernel.cpp"
    source.write_text(EMULATED % body)
    emulation = ROOT / "tests/cuda_emulation/emulation.h"
    program = tmp_path / "kernel"
    run(tool("g++"), "-std=c++17", f"-I{CSRC}", "-include", emulation, source, "-o", program)
    status, output = attempt(program)
    assert status != 0
    assert words in output
