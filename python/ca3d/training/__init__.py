"""Training, checkpoints and metrics.

`TrainConfig` holds every option, `train` runs them. Both are imported on first use, so that the
command line can print its help without importing torch.

Example:
    >>> from ca3d.training import TrainConfig
    >>> TrainConfig(data="videos", out="run").epochs
    50
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ca3d.training.config import TrainConfig
    from ca3d.training.loop import train
    from ca3d.training.state import TrainResult

__all__ = ["TrainConfig", "TrainResult", "train"]


def __getattr__(name: str) -> Any:
    if name == "TrainConfig":
        from ca3d.training.config import TrainConfig

        return TrainConfig
    if name in ("train", "TrainResult"):
        from ca3d.training import loop

        return getattr(loop, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
