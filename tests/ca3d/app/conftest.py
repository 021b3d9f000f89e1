from pathlib import Path

import pytest
from tiny_videos import TINY, flags, make_folder

from ca3d.cli import main


@pytest.fixture(scope="session")
def bars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 videos in two classes with split files."""
    root = make_folder(tmp_path_factory.mktemp("data") / "bars")
    assert main(["data", "split", str(root), "--val", "0.2", "--test", "0.2"]) == 0
    return root


@pytest.fixture(scope="session")
def trained(bars: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("runs") / "run"
    options = flags({**TINY, "epochs": 3, "progress": "none"})
    assert main(["train", str(bars), "--out", str(out), *options]) == 0
    return out
