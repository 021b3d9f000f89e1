"""The demo in its quick variant, from nothing to the report."""

import json
import re
from pathlib import Path

import pytest

from ca3d.cli import main


def test_demo_leaves_a_report_and_reuses_what_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    words = ["demo", "--quick", "--out", str(out)]
    assert main(words) == 0
    text = capsys.readouterr().out
    last = text.rstrip().splitlines()[-3:]
    for line, command in zip(last, ("data check", "train", "predict"), strict=True):
        assert command in line
    report = (out / "report.md").read_text()
    for picture in re.findall(r"\]\((.*?\.png)\)", report):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    for name in ("contact_sheet.png", "timeline.png", "curves.png", "confusion.png"):
        assert name in report
    results = json.loads((out / "run-quick" / "test" / "results.json").read_text())
    assert results["videos"] == 30
    assert f"**{100 * results['top1']:.1f} %**" in report
    assert "never over people" in report
    before = {
        path: path.stat().st_mtime_ns
        for path in [*out.rglob("*.avi"), *out.rglob("*.safetensors")]
        if path.name != "film.avi"
    }
    assert len(before) == 120 + 2
    assert main(words) == 0
    assert "already there" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
