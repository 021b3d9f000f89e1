from pathlib import Path

import pytest
from tiny_videos import make_folder


@pytest.fixture(scope="session")
def bars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 videos in two classes, without split files."""
    return make_folder(tmp_path_factory.mktemp("data") / "bars")
