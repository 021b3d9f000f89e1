from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_videos import bar_video, write_video
from untrained import save_model


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save_model(tmp_path_factory.mktemp("model") / "tiny.safetensors")


@pytest.fixture(scope="session")
def clip_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four seconds, 10 frames a second; do not change it."""
    path = tmp_path_factory.mktemp("clip") / "clip.avi"
    write_video(path, bar_video("down", 0, 40))
    return path


@pytest.fixture
def make_frames() -> Callable[[int], np.ndarray]:
    def make(count: int) -> np.ndarray:
        return bar_video("down", 1, count)

    return make
