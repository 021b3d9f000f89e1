from pathlib import Path

import pytest

from ca3d.data import embedded

CLIPS = {"train": 30, "val": 30, "test": 30}


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A little mocap30 in files, made by two workers."""
    folder = tmp_path_factory.mktemp("embedded") / "mocap30"
    return embedded.make("mocap30", folder, size=CLIPS, workers=2, frames=8, resolution=32, seed=5)
