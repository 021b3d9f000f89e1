"""The CUDA sources on the host under sanitizers, and mistakes that these tests must notice."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from commands import attempt, run, tool
from cuda_emulation import EMULATION, ORDERS, ROOT, build_objects, compile_objects, link_program
from exhaustive import often

CSRC = ROOT / "csrc"
BOUNDS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
RACES = ("-fsanitize=thread",)

Objects = Mapping[str, Path]

# The first test of each sanitizer waits for its build.
pytestmark = pytest.mark.timeout(1800)

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


@pytest.mark.slow
@pytest.mark.parametrize("op", ["attention", "preparam"])
def test_no_access_out_of_bounds_in_any_order(op: str, bounds: Objects, tmp_path: Path) -> None:
    status, output = run_parity(op, bounds, tmp_path)
    assert status == 0, output
    assert [f"{order} ok" for order in ORDERS] == output.splitlines()


@x86_only
@pytest.mark.slow
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
    "no barrier before the largest of a block": (
        STEP,
        "= momentum;\n    }\n    __syncthreads();\n",
        "= momentum;\n    }\n",
        "races",
    ),
    "vote only of some": (
        STEP,
        "__any_sync(kWholeWarp, !finite) && threadIdx.x % 32 == 0",
        "!finite && __any_sync(kWholeWarp, true) && threadIdx.x % 32 == 0",
        "preparam",
    ),
    "vote forgotten": (
        STEP,
        "__any_sync(kWholeWarp, !finite) && threadIdx.x % 32 == 0",
        "!finite && threadIdx.x % 32 == 0",
        "preparam",
    ),
}
IN_EVERY_RUN = (
    "no barrier before gathering",
    "window one frame too short",
    "one vector of a chunk too many",
)


@x86_only
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", often([(name,) for name in MUTANTS], lambda name: name in IN_EVERY_RUN)
)
def test_mistakes_are_noticed(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    file, right, wrong, by = MUTANTS[name]
    csrc = tmp_path / "csrc"
    shutil.copytree(CSRC, csrc)
    text = (csrc / file).read_text()
    assert text.count(right) == 1, f"{name}: the text is no longer there"
    (csrc / file).write_text(text.replace(right, wrong))
    flags = RACES if by == "races" else BOUNDS
    kernel = STEP if file == STEP else ATTENTION
    (mutant,) = compile_objects(tmp_path, [kernel], "-O1", "-g", *flags, csrc=csrc)
    objects = {**request.getfixturevalue("races" if by == "races" else "bounds"), kernel: mutant}
    if by == "races":
        status, output = run_races(objects, tmp_path)
    else:
        status, output = run_parity(by, objects, tmp_path)
    assert status != 0, f"{name} went unnoticed:\n{output}"
    expected = ("data race",) if by == "races" else ("FAILED", "Sanitizer", "emulation:", "runtime")
    assert any(word in output for word in expected), output


EMULATED = """
#include "common/cuda.h"
struct Nothing {};
void kernel(Nothing) { %s }
int main() {
  for (int order = 0; order < emulation::kOrders; ++order) {
    emulation::set_order(order);
    ca3d::launch(kernel, 1, 64, 64, nullptr, Nothing());
  }
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
        ("if (threadIdx.x % 2) (void)__any_sync(0xffffffffu, true);", "deadlock"),
        ("(void)__any_sync(0x55555555u, true);", "not in its own mask"),
    ],
)
def test_the_emulation_notices_bad_synchronisation(body: str, words: str, tmp_path: Path) -> None:
    status, output = emulate(body, tmp_path)
    assert status != 0
    assert words in output


def emulate(body: str, folder: Path, *flags: str) -> tuple[int, str]:
    """Runs a kernel in two warps, in every order of threads."""
    source, program = folder / "kernel.cpp", folder / "kernel"
    source.write_text(EMULATED % body)
    options = ("-std=c++17", *flags, f"-I{CSRC}", "-include", EMULATION)
    run(tool("g++"), *options, source, "-o", program)
    return attempt(tool("setarch"), "-R", program)


# Many votes in a row, of which every lane decides some, and only its own warp sees them.
VOTES = """
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (unsigned i = 0; i < 200; ++i) {
    const bool mine = i % 40 == lane && warp == i % 2, expected = i % 40 < 32 && warp == i % 2;
    if (__any_sync(0xffffffffu, mine) != expected) emulation::fail("a wrong vote");
  }
"""


@x86_only
@pytest.mark.parametrize("flags", [(), RACES], ids=["plain", "races"])
def test_votes_are_those_of_the_warp(flags: tuple[str, ...], tmp_path: Path) -> None:
    status, output = emulate(VOTES, tmp_path, "-g", *flags)
    assert status == 0, output


@x86_only
def test_votes_order_no_memory(tmp_path: Path) -> None:
    body = """
      static int written;
      if (threadIdx.x == 0) written = 1;
      (void)__any_sync(0xffffffffu, true);
      if (threadIdx.x == 1 && written == 0) emulation::fail("not yet");
    """
    _, output = emulate(body, tmp_path, "-g", *RACES)
    assert "data race" in output
