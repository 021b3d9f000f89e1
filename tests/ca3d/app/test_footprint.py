"""`ca3d footprint`: its figures add up, and float16 keeps half of what float32 does."""

import json
from pathlib import Path

import pytest

from ca3d.cli import main
from ca3d.errors import UserError
from ca3d.footprint import FootprintConfig, footprint

SMALL = ["--models", "ca3d_tiny", "--size", "64", "--batch", "2", "--rounds", "1", "--threads", "1"]


def test_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    arguments = ["footprint", *SMALL, "--regimes", "float32, float16", "--json", str(file)]
    assert main(arguments) == 0
    table = capsys.readouterr().out
    wide, half = json.loads(file.read_text())
    assert (wide["model"], wide["regime"], half["regime"]) == ("ca3d_tiny", "float32", "float16")
    assert wide["clip"] == [3, 16, 64, 64]
    assert wide["macs"] == half["macs"] > 1e8
    for row in (wide, half):
        assert row["batch"] == 2
        assert row["train_frames_per_second"] > 0
        assert row["infer_frames_per_second"] > 0
        memory = row["memory"]
        assert memory["gradients"] == row["parameters"] * (4 if row is wide else 2)
        assert 0 < memory["activations"] < 5 * row["peak_train_bytes"]
        assert f"{row['regime']} " in table
    # Momentum in float32; momentum and theta in float16.
    assert wide["memory"]["optimizer"] == half["memory"]["optimizer"] == 4 * wide["parameters"]
    assert half["memory"]["activations"] < 0.6 * wide["memory"]["activations"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": 1}, "--batch must be at least 2, not 1"),
        ({"rounds": 0}, "--rounds must be at least 1, not 0"),
        ({"models": "c3d"}, "model 'c3d' is not known; choose from"),
        ({"models": " ,"}, "must name at least one"),
        ({"regimes": "float32,int4"}, "precision 'int4' is not known"),
    ],
)
def test_bad_input(options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        footprint(FootprintConfig(**options))
