"""Weights files of models that have learnt nothing."""

from pathlib import Path

from tiny_videos import SIDE

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
