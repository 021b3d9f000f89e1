"""`ca3d footprint`: its figures add up, and float16 keeps half of what float32 does."""

import json
from pathlib import Path

import pytest

from ca3d.cli import main
from ca3d.errors import UserError
from ca3d.footprint import FootprintConfig, footprint
from ca3d.report.footprint_table import as_text

SMALL = ["--models", "ca3d_tiny", "--size", "32", "--batch", "2", "--rounds", "1", "--threads", "1"]


def test_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    arguments = ["footprint", *SMALL, "--regimes", "float32, float16", "--json", str(file)]
    assert main(arguments) == 0
    table = capsys.readouterr().out
    wide, half = json.loads(file.read_text())
    assert main(arguments) == 1
    assert f"--json {file}: exists already; --force replaces it" in capsys.readouterr().err
    assert (wide["model"], wide["regime"], half["regime"]) == ("ca3d_tiny", "float32", "float16")
    assert wide["clip"] == [3, 16, 32, 32]
    assert wide["macs"] == half["macs"] > 2.5e7
    for row in (wide, half):
        assert row["batch"] == 2
        assert row["train_frames_per_second"] > 0
        assert row["infer_frames_per_second"] > 0
        memory = row["memory"]
        assert memory["gradients"] == row["parameters"] * (4 if row is wide else 2)
        assert 0 < memory["activations"] < 5 * row["peak_train_bytes"]
        assert row["engine"] == "both"
        assert row["two_macs"] == 2 * row["macs"]
    for title in ("As shipped", "Same engine"):
        assert table.count(title) == 1
    assert len([line for line in table.splitlines() if line.startswith("ca3d_tiny ")]) == 6
    assert "GFLOPs come from a hardware counter" not in table  # of models that the paper has not
    # Momentum in float32; momentum and theta in float16.
    assert wide["memory"]["optimizer"] == half["memory"]["optimizer"] == 4 * wide["parameters"]
    assert half["memory"]["activations"] < 0.6 * wide["memory"]["activations"]


def test_engines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A convolutional model is measured on both, one of tokens as it is shipped."""
    small = ["--size", "32", "--batch", "2", "--rounds", "1", "--threads", "1"]
    file = tmp_path / "rows.json"
    arguments = [*small, "--models", "r3d_tiny:size=32,swin3d_tiny", "--regimes", "qat"]
    assert main(["footprint", *arguments, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert [(row["model"], row["engine"]) for row in rows] == [
        ("r3d_tiny:size=32", "as shipped"),
        ("r3d_tiny:size=32", "same engine"),
        ("swin3d_tiny", "as shipped"),
    ]
    assert rows[0]["macs"] == rows[1]["macs"]
    assert all(row["infer_frames_per_second"] > 0 for row in rows)
    shipped, same = capsys.readouterr().out.split("Memory at")[0].split("Same engine")
    assert shipped.count("swin3d_tiny") == 1
    assert "swin3d_tiny" not in same


def test_the_papers_figures_stand_beside() -> None:
    rows = [
        {"model": model, "regime": "float32", "engine": "as shipped", "batch": 2,
         "clip": [3, 16, 8, 8], "parameters": 1, "macs": 10**9, "two_macs": 2 * 10**9,
         "train_frames_per_second": 1.0, "infer_frames_per_second": 1.0, "device": "cpu",
         "threads": 1, "peak_train_bytes": 0,
         "memory": dict.fromkeys(
             ("weights", "gradients", "optimizer", "activations", "transient"), 0)}
        for model in ("r3d_18", "i3d")
    ]  # fmt: skip
    text = as_text(rows)
    assert "33M, 9.9, 7.4 GB" in text
    assert "are no FLOP count" in text
    assert "CA3D is not the lightest row" in text
    assert "Same engine" not in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": 1}, "--batch must be at least 2, not 1"),
        ({"rounds": 0}, "--rounds must be at least 1, not 0"),
        ({"models": "c3d"}, "model 'c3d' is not known; choose from"),
        ({"models": " ,"}, "must name at least one"),
        ({"models": "ca3d:pool"}, "'pool' is not OPTION=VALUE"),
        ({"models": "ca3d:pool=max"}, "--models ca3d:pool=max: pool must be one of"),
        ({"json": "nowhere/rows.json"}, "--json nowhere/rows.json: no such folder"),
        ({"regimes": "float32,int4"}, "precision 'int4' is not known"),
    ],
)
def test_bad_input(options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        footprint(FootprintConfig(**options))
