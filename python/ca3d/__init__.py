"""CA3D video models, data, training and prediction on top of ca3d_kernels.

Importing this package is cheap: torch is only imported by what needs it.

Example:
    >>> import ca3d
    >>> callable(ca3d.load)
    True
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from ca3d.predict import Predictor
    from ca3d.streaming import Stream

__all__ = ["Stream", "fuse", "load"]


def fuse(model: nn.Module, *, portable: bool = False) -> nn.Module:
    """Returns a copy of a model for inference: batch normalisations folded, dropout removed.

    Args:
        model: The model; it is not changed.
        portable: Whether a CA3D model uses torch's own operators only, for export to a runtime that
            doesn't have those of `ca3d_kernels`.

    Returns:
        A model with the same logits (to rounding), in evaluation mode; see
        `ca3d.models.fusion.fuse`.

    Raises:
        TypeError: Not a module, fused already, or batch normalisations in a model that `torch.fx`
            can't follow.
        ValueError: A batch normalisation keeps no running statistics.

    Example:
        >>> import ca3d, torch
        >>> from ca3d.models import ca3d_tiny
        >>> ca3d.fuse(ca3d_tiny(num_classes=5))(torch.zeros(1, 3, 16, 32, 32)).shape
        torch.Size([1, 5])
    """
    from ca3d.models.fusion import fuse

    return fuse(model, portable=portable)


def load(file: str | Path, device: str | None = None, runtime: str = "torch") -> Predictor:
    """Loads a weights file and returns an object that predicts on video files.

    Args:
        file: A `.safetensors` file written by `ca3d train` or `ca3d convert`; with `runtime` "onnx"
            a folder of `ca3d export onnx`.
        device: Where to compute, such as "cpu" or "cuda"; None takes CUDA when there is one.
        runtime: "torch" or "onnx".

    Returns:
        The predictor; `predictor.predict("video.mp4")` gives a `ca3d.predict.Prediction`.

    Raises:
        ca3d.errors.UserError: The file is missing, is no weights file, or lacks what prediction
            needs (classes, colour order, mean and standard deviation).

    Example:
        >>> import ca3d
        >>> ca3d.load("missing.safetensors")
        Traceback (most recent call last):
        ca3d.errors.UserError: missing.safetensors: no such file
    """
    from ca3d.predict import Predictor

    return Predictor.from_file(file, device=device, runtime=runtime)


def __getattr__(name: str) -> Any:
    if name == "Stream":
        from ca3d.streaming import Stream

        return Stream
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
