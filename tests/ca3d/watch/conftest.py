from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_videos import SIDE, bar_video, write_video

from ca3d import models, weights

CLASSES = ("background", "down", "up")


def save_model(path: Path, **changes: object) -> Path:
    """A model of no skill, whose weights file is complete."""
    model = models.create("ca3d_tiny", num_classes=len(CLASSES), frames=8, widths=[4, 4, 8, 8])
    info = {
        "classes": CLASSES,
        "mean": (0.3, 0.3, 0.3),
        "std": (0.2, 0.2, 0.2),
        "frames": 8,
        "stride": 1,
        "frames_per_second": 10.0,
        "size": SIDE,
        "resize": SIDE,
        "trained_on": "nothing at all",
        **changes,
    }
    weights.save(path, model, weights.ModelInfo(model.name, model.options, **info))  # type: ignore[arg-type]
    return path


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
