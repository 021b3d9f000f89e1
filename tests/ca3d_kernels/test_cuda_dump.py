"""Dumps of the CUDA kernels: complete, and enough to launch the PTX without any other knowledge."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from ptx_runner import cuda_module, memory, needs_ptx_runner
from torch import Tensor

from ca3d_kernels import cuda, cuda_dump, dump
from ca3d_kernels.local_attention import reference

try:
    cuda.library()
except ImportError as reason:
    pytest.skip(f"no CUDA kernels: {reason}", allow_module_level=True)
pytest.importorskip("triton")


def dumped(folder: Path, arch: str, **changes: str) -> list[dict[str, Any]]:
    """The descriptions of a problem's CUDA kernels."""
    files = dump.dump(arch, folder, changes)
    found = [json.loads(file.read_text()) for file in files]
    return [about for about in found if about["backend"] == "cuda"]


def test_every_field_is_described(tmp_path: Path) -> None:
    attention = dumped(tmp_path, "sm_90", frames="4", edge="zero", published="true")
    step = dumped(tmp_path, "sm_90", small_tensors="3", large_tensors="1", momentum="0")
    ops = [about["op"] for about in attention + step]
    assert ops == ["local_attention"] * 2 + ["preparam_step"] * 4
    for about in attention + step:
        ptx = (tmp_path / about["ptx"]).read_text()
        assert (tmp_path / about["cubin"]).read_bytes()[:4] == b"\x7fELF"
        entry = re.search(rf"\.entry {about['entry']}\((.*?)\)", ptx, re.DOTALL)
        assert entry
        (declared,) = re.findall(r"\[(\d+)\]", entry[1])
        (parameter,) = about["parameters"]
        assert parameter["size"] == int(declared) == len(bytes.fromhex(parameter["bytes"]))
        for field in parameter["fields"]:
            assert field["meaning"], field
            if field["type"].endswith("*"):
                assert "shape" in field or field["value"] == 0
                start = 2 * field["offset"]
                assert parameter["bytes"][start : start + 16] == "0" * 16
            else:
                assert "value" in field or field["name"] == "table"
    fields = {x["name"]: x for x in step[2]["parameters"][0]["fields"]}
    assert fields["device.found_inf"]["shape"] == []
    assert fields["runs[2].param"]["shape"] == [256]
    assert fields["runs[2].momentum"]["value"] == 0
    assert fields["tensors"]["value"] == 4


def test_an_older_gpu_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dump, "SOURCES", [dump.cuda_kernels])
    assert dumped(tmp_path, "sm_70", frames="4") == []
    assert "not for cuda: the CUDA library was built for" in capsys.readouterr().out


def test_other_architectures_are_assembled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dump, "SOURCES", [dump.cuda_kernels])
    (about, *_) = dumped(tmp_path, "sm_89", small_tensors="3", large_tensors="1")
    assert (tmp_path / about["cubin"]).read_bytes()[:4] == b"\x7fELF"


class Built:
    """What the library says that it was built for."""

    __file__ = cuda.library().__file__

    def __init__(self, architectures: str) -> None:
        self.architectures = lambda: architectures


@pytest.mark.parametrize(
    ("arch", "chosen"), [("sm_75", 75), ("sm_80", 80), ("sm_90", 80), ("sm_120", 80)]
)
def test_the_newest_ptx_that_serves_a_gpu_is_dumped(
    arch: str, chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def extract(name: str, *arguments: str, folder: str) -> str:
        if "-xptx" in arguments:
            for lowest in (75, 80):
                Path(folder, f"preparam_step.sm_{lowest}.ptx").write_text(f"of {lowest}")
        else:
            Path(folder, f"preparam_step.{arch}.cubin").write_bytes(b"code")
        return ""

    monkeypatch.setattr(cuda_dump, "tool", extract)
    built = Built("sm_75,compute_75,sm_80,sm_90,compute_80")
    monkeypatch.setattr(cuda, "library", lambda: built)
    found = cuda_dump.code.__wrapped__("preparam_step", arch)
    assert found == (f"of {chosen}", b"code")


def execute(about: dict[str, Any], folder: Path, tensors: dict[str, Tensor]) -> None:
    """Launches a described kernel on the CPU, by nothing but its description."""
    (parameter,) = about["parameters"]
    content = bytearray.fromhex(parameter["bytes"])
    for field in parameter["fields"]:
        if "shape" in field:
            start = field["offset"]
            address = tensors[field["name"]].data_ptr()
            content[start : start + 8] = address.to_bytes(8, "little")
    cuda_module((folder / about["ptx"]).read_text(), about["entry"]).run(
        about["entry"], about["grid"], about["block"], [bytes(content)],
        [memory(x) for x in tensors.values()], dyn=about["shared"],
    )  # fmt: skip


@pytest.mark.slow
@needs_ptx_runner
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
def test_descriptions_are_enough_to_launch(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dump, "SOURCES", [dump.cuda_kernels])
    forward, backward = dumped(
        tmp_path, arch, batch="1", positions="3", frames="6", dtype="float32"
    )
    tensors: dict[str, Tensor] = {}
    for about, written in ((forward, "o"), (backward, "dq dk dv")):
        mine = {}
        for field in about["parameters"][0]["fields"]:
            if "shape" in field:
                empty = torch.empty_strided(field["shape"], field["strides"])
                mine[field["name"]] = tensors.setdefault(field["name"], empty)
                if field["name"].removesuffix(".data") not in written.split():
                    empty.copy_(torch.randn(field["shape"]))
        execute(about, tmp_path, mine)
    inputs = [tensors[f"{name}.data"].double().requires_grad_() for name in ("q", "k", "v")]
    o = reference.attention(*inputs, kernel_size=5)
    exact = dict(
        zip(
            ("dq", "dk", "dv"),
            torch.autograd.grad(o, inputs, tensors["go.data"].double()),
            strict=True,
        )
    )
    for name, expected in {"o": o.detach(), **exact}.items():
        ours = tensors[f"{name}.data"].double()
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
