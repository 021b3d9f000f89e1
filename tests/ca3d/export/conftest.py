from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tiny_videos import RATE, SIDE, make_folder

from ca3d import models, weights
from ca3d.export.options import ExportConfig
from ca3d.export.run import Export, export

FRAMES = 8


@dataclass
class Exported:
    """A folder of `ca3d export`, and where it came from."""

    folder: Path
    result: Export
    model: torch.nn.Module
    info: weights.ModelInfo


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """20 videos in two classes, without split files."""
    return make_folder(tmp_path_factory.mktemp("export") / "bars")


@pytest.fixture(scope="session")
def weights_path(tmp_path_factory):
    """A small model whose normalisations do something."""
    torch.manual_seed(3)
    depths = {"spatial_depths": (1, 1, 1, 1), "temporal_depths": (0, 0, 1, 1)}
    model = models.create("ca3d_tiny", 2, widths=(4, 4, 8, 8), frames=FRAMES, **depths).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(-1.5, 1.5)
    info = weights.ModelInfo(
        "ca3d_tiny",
        model.options,
        classes=("down", "up"),
        mean=(0.2, 0.3, 0.4),
        std=(0.2, 0.2, 0.25),
        frames=FRAMES,
        stride=1,
        frames_per_second=float(RATE),
        size=SIDE,
        resize=SIDE,
    )
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    weights.save(path, model, info)
    return path


def make(weights_path, folder, **options):
    config = ExportConfig("onnx", str(weights_path), str(folder), rounds=1, threads=1, **options)
    result = export(config)
    return Exported(folder, result, *weights.load(weights_path))


@pytest.fixture(scope="session")
def float32(weights_path, tmp_path_factory):
    return make(weights_path, tmp_path_factory.mktemp("float32") / "new", stream=True)


@pytest.fixture(scope="session")
def float16(weights_path, tmp_path_factory):
    return make(weights_path, tmp_path_factory.mktemp("float16"), precision="float16")


@pytest.fixture(scope="session")
def int8(weights_path, videos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8")
    return make(
        weights_path,
        folder,
        precision="int8",
        stream=True,
        stride=2,
        calibration=str(videos),
        calibration_clips=6,
        check_data=str(videos),
        check_split="all",
        check_clips=50,
    )
