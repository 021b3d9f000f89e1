"""Triton kernels, compiled for GPUs that aren't here: spills, widths of accesses, dumps."""

import importlib.util
import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from exhaustive import often

from ca3d_kernels import __main__, triton_launch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if triton_launch.interpreted():
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from ca3d_kernels import dump, problems
from ca3d_kernels.backends import UnsupportedInputError
from ca3d_kernels.problems import Case
from ca3d_kernels.triton_compile import compile_for, resources, signature

ARCHS = ("sm_75", "sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_120")
CASES = {(case.op, case.name): case for case in problems.cases()}
QUICK = [CASES[op, "stage 1"] for op in ("local_attention", "qkv_attention")]
QUICK.append(CASES["temporal_block", "stage 1"])
QUICK.append(CASES["qkv_attention", "stage 1, published"])
QUICK += [
    CASES["preparam_step", f"small model{kind}"] for kind in ("", ", stochastic", ", compensated")
]


def check(case: Case, arch: str) -> int:
    """Compiles a problem's launches and holds them to the promises; returns how many."""
    if case.op in ("qkv_attention", "temporal_block") and arch == "sm_75":
        with pytest.raises(UnsupportedInputError, match="older than sm_80"):
            problems.launches(case, arch)
        return 0
    launches = problems.launches(case, arch)
    for launch in launches:
        # Whoever launches the PTX passes them in this order.
        in_order = [x for x in launch.kernel.arg_names if x in launch.arguments]
        assert list(launch.arguments) == in_order
        compiled = compile_for(launch, arch)
        used = resources(compiled.asm["cubin"], compiled.metadata.name, compiled.metadata.shared)
        name = f"{launch.kernel.__name__}, {case.name}, {arch}: {used}"
        assert used.stack == 0, name
        assert {"LDG.128", "LDGSTS.128"} & set(used.accesses), name
        if "overflows" not in launch.kernel.__name__:
            assert used.accesses.get("STG.128", 0) > 0, name
        # Operands of the attention move in 128-bit vectors only.
        if case.op == "local_attention":
            others = {"LDG.U8"} if case.values["published"] else set()
            moved = {a for a in used.accesses if a.startswith(("LDG", "STG"))}
            assert moved == {"LDG.128", "STG.128"} | others, name
        assert not re.search(r"wgmma|tcgen05|cp\.async\.bulk", compiled.asm["ptx"]), name
    return len(launches)


@pytest.mark.parametrize("arch", ["sm_75", "sm_90"])
@pytest.mark.parametrize("case", QUICK, ids=lambda case: f"{case.op}, {case.name}")
def test_stage_1_and_the_step(case: Case, arch: str) -> None:
    check(case, arch)


# The first two everywhere, the others where registers are scarcest.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "arch"),
    often(
        itertools.product(
            range(len(QUICK)), [arch for arch in ARCHS if arch not in ("sm_75", "sm_90")]
        ),
        lambda number, arch: number < 2 or arch == "sm_120",
    ),
)
def test_stage_1_elsewhere(number: int, arch: str) -> None:
    check(QUICK[number], arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", often(zip(ARCHS), lambda arch: arch == "sm_90"))
def test_every_ordinary_problem(arch: str) -> None:
    assert sum(check(case, arch) for case in CASES.values()) >= 26


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", ["gfx942", "gfx1100"])
@pytest.mark.parametrize("case", QUICK, ids=lambda case: f"{case.op}, {case.name}")
def test_amd(case: Case, arch: str) -> None:
    for launch in problems.launches(case, arch):
        assert compile_for(launch, arch).asm["hsaco"]


def test_offsets_are_64_bit() -> None:
    # 80,000 sequences of length 16, 5 billion elements: nothing but the strides grows.
    case = Case("local_attention", "huge", {**problems.DEFAULTS["local_attention"], "frames": 16})
    case.values.update(batch=80_000, positions=64)
    forward, backward = problems.launches(case, "sm_90")
    q = forward.arguments["q"]
    assert isinstance(q, torch.Tensor)
    assert q.numel() > 2**32
    assert forward.programs == backward.programs == 80_000 * 64 * 4
    for launch in (forward, backward):
        types = signature(launch)
        for name, value in launch.arguments.items():
            if not isinstance(value, torch.Tensor) and isinstance(value, int) and value >= 2**31:
                assert types[name] == "i64", name
        strides = [kind for name, kind in types.items() if name.endswith(("_outer", "_frame"))]
        assert set(strides) == {"i64"}


def test_too_many_sequences_are_refused() -> None:
    case = Case("local_attention", "huge", {**problems.DEFAULTS["local_attention"], "frames": 1})
    case.values.update(batch=2**20, positions=2**10, heads=4, head_dim=8)
    with pytest.raises(UnsupportedInputError, match="4294967296 sequences are too many"):
        problems.launches(case, "sm_90")


def test_dump_describes_every_parameter(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["dump-kernels", "--arch", "sm_90", "--out", str(tmp_path)]
    assert __main__.main([*arguments, "--problem", "frames=4,edge=zero,published=true"]) == 0
    assert "kernels written" in capsys.readouterr().out
    # Two of the attention; with the projection three, of which the second is that of the attention.
    files = sorted(tmp_path.glob("triton-*.json"))
    assert len(files) == 5
    for file in files:
        about = json.loads(file.read_text())
        ptx = (tmp_path / about["ptx"]).read_text()
        assert (tmp_path / about["cubin"]).read_bytes()[:4] == b"\x7fELF"
        entry = re.search(rf"\.entry {about['entry']}\((.*?)\)", ptx, re.DOTALL)
        assert entry
        declared = re.findall(r"\.param \.(\w+)", entry[1])
        assert len(declared) == len(about["parameters"])
        widths = {"i32": "32", "fp32": "32", "i64": "64"}
        for kind, parameter in zip(declared, about["parameters"], strict=True):
            assert kind.endswith(widths.get(parameter["type"], "64")), parameter
            assert parameter["meaning"]
            assert "shape" in parameter or "value" in parameter
        by_name = {parameter["name"]: parameter for parameter in about["parameters"]}
        if about["entry"] != "qkv_projection_backward":
            assert sum(by_name["key_counts"]["contents"]) == 4 * 5
        assert about["block"][0] % 32 == 0
        assert f".reqntid {about['block'][0]}" in ptx


@pytest.mark.parametrize("case", [*CASES.values()], ids=lambda case: f"{case.op}, {case.name}")
def test_meanings_are_those_of_the_parameters(case: Case) -> None:
    for launch in problems.launches(case, "sm_90"):
        described = dump.describe(launch, signature(launch))
        for parameter in described:
            name = parameter["name"]
            is_stride = name.rpartition("_")[0] in launch.arguments and "value" in parameter
            assert parameter["meaning"].startswith("stride of ") == is_stride, parameter


def test_other_sources_are_dumped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = dump.Compiled(
        "op", "cuda", {"name": "a b"}, "entry", "ptx", b"cubin", [], (1, 1, 1), (32, 1, 1), 0
    )
    monkeypatch.setattr(dump, "SOURCES", [lambda arch, changes: iter([kernel])])
    (file,) = dump.dump("sm_80", tmp_path)
    assert json.loads(file.read_text())["backend"] == "cuda"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--arch", "hopper"], "--arch must be like sm_90, got 'hopper'"),
        (["--arch", "sm_90", "--problem", "frames"], "--problem must be KEY=VALUE"),
        (["--arch", "sm_90", "--problem", "warp=1"], "no op has the key 'warp'"),
        (["--arch", "sm_90", "--problem", "frames=0"], "frames must be an integer above 0"),
        (["--arch", "sm_90", "--problem", "edge=x"], "edge must be one of"),
        (["--arch", "sm_90", "--problem", "causal=2"], "causal must be true or false"),
        (["--arch", "sm_90", "--problem", "momentum=-1"], "momentum must be a number"),
        (["--arch", "sm_90", "--problem", "frames=4,momentum=1"], "no op has all of the keys"),
    ],
)
def test_bad_arguments(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert __main__.main(["dump-kernels", "--out", str(tmp_path), *arguments]) == 2
    assert words in capsys.readouterr().err
