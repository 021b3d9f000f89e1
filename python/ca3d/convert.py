"""Converts weights of the published CA3D code to weights files of this package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ca3d import models, weights
from ca3d.errors import UserError
from ca3d.models import published

__all__ = ["convert", "read_published"]

# What numpy values in a checkpoint (metrics, random states) are made of; none of it runs code.
_PLAIN_NUMPY: list[Any] = [np.ndarray, np.dtype]
_PLAIN_NUMPY += [type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"]
_PLAIN_NUMPY += [
    (value.__reduce__()[0], f"{module}.{name}")
    for module in ("numpy.core.multiarray", "numpy._core.multiarray")
    for name, value in (("_reconstruct", np.empty(0)), ("scalar", np.float64(0)))
]
_DTYPES = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


def convert(
    in_path: str | Path,
    out_path: str | Path,
    *,
    classes: Sequence[str] | None = None,
    color: str = "bgr",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    model: str | None = None,
    frames: int | None = None,
    stride: int = 2,
    frames_per_second: float | None = None,
    size: int = 112,
    resize: int | None = None,
    precision: str = "float32",
    trained_on: str = "",
) -> weights.ModelInfo:
    """Reads a published state dict or training checkpoint and writes a weights file.

    The model (CA3D or CA3D-L), its pool placement, number of classes and frames are found from the
    tensors. Names under which a tensor is stored a second time and pre-parameters may be there.
    What the published files don't hold must come from the user, or `ca3d predict` will refuse the
    result: class names, and the mean and standard deviation of the input.

    Args:
        in_path: a file that `torch.save` wrote: a state dict, or a checkpoint with one under
            ``"model_dict"``. It is read without executing anything in it.
        out_path: the weights file to write, atomically.
        classes: class names in the order of the logits.
        color: order of the input's channels; the published models are trained on ``"bgr"``.
        mean, std: of each channel in that order, for values in 0 to 1.
        model: ``"ca3d"`` or ``"ca3d_l"``; an error if the file holds the other. None accepts both.
        frames: frames of a clip; an error if the file holds another number. None accepts any.
        stride, frames_per_second, size, resize, trained_on: see `ca3d.weights.ModelInfo`; `resize`
            None is `size`.
        precision: dtype of the stored tensors: ``"float32"``, ``"float16"`` or ``"float64"``.

    Returns:
        What was written about the model.

    Raises:
        ca3d.errors.UserError: the file can't be read, is no published CA3D model, has missing,
            unknown or misshaped tensors (all are listed), or contradicts an argument; or the result
            can't be written. Nothing is written then.

    Example:
        >>> convert("missing.pt", "out.safetensors")
        Traceback (most recent call last):
        ca3d.errors.UserError: missing.pt: no such file
    """
    if Path(out_path).exists() and Path(in_path).exists() and Path(out_path).samefile(in_path):
        raise UserError(f"{out_path}: is the file to convert; choose another name")
    for name, values, lowest in (("mean", mean, 0.0), ("std", std, 1e-6)):
        if values is not None and not all(lowest <= x <= 1 for x in values):
            raise UserError(f"{name} must be three numbers in [{lowest:g}, 1], got {values!r}")
    if resize is not None and resize < size:
        raise UserError(f"resize must be at least size ({size}), got {resize}")
    if precision not in _DTYPES:
        raise UserError(f"precision must be one of {', '.join(_DTYPES)}, got {precision!r}")
    state = read_published(in_path)
    try:
        name, options = published.detect(state)
        if model is not None and model != name:
            raise ValueError(f"holds the model {name!r}, not {model!r}")
        if frames is not None and frames != options["frames"]:
            raise ValueError(f"its clips have {options['frames']} frames, not {frames}")
        with torch.random.fork_rng(devices=[]):
            network = models.create(name, **options)
        assert isinstance(network, models.CA3D)
        info = weights.ModelInfo(
            model=name,
            options=network.options,
            classes=tuple(classes or ()),
            color=color,
            mean=None if mean is None else tuple(mean),  # type: ignore[arg-type]
            std=None if std is None else tuple(std),  # type: ignore[arg-type]
            frames=options["frames"],
            stride=stride,
            frames_per_second=frames_per_second,
            size=size,
            resize=size if resize is None else resize,
            precision=precision,
            trained_on=trained_on,
        )
        tensors = published.from_published(state, network)
    except (TypeError, ValueError) as error:
        raise UserError(f"{in_path}: {error}") from error
    # Counters stay whole numbers, even if all of the file was made half precision.
    tensors = {
        key: tensor.to(_DTYPES[precision] if own.is_floating_point() else own.dtype)
        for key, tensor, own in ((k, tensors[k], v) for k, v in network.state_dict().items())
    }
    broken = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise UserError(f"{in_path}: values that are not finite in {precision}: {broken[:8]}")
    network.load_state_dict(tensors, assign=True)
    try:
        weights.save(out_path, network, info)
    except OSError as error:
        raise UserError(f"cannot write {out_path}: {error.strerror or error}") from error
    return info


def read_published(path: str | Path) -> dict[str, Tensor]:
    """Reads the state dict out of a file of the published code, executing nothing in it.

    Args:
        path: a state dict, or a checkpoint with one under ``"model_dict"``.

    Returns:
        Published names to tensors.

    Raises:
        ca3d.errors.UserError: the file can't be read, holds objects other than plain values, or no
            state dict.

    Example:
        >>> read_published("missing.pt")
        Traceback (most recent call last):
        ca3d.errors.UserError: missing.pt: no such file
    """
    if not Path(path).exists():
        raise UserError(f"{path}: no such file")
    try:
        with torch.serialization.safe_globals(_PLAIN_NUMPY):
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # torch reports a damaged file in many ways
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"{path}: not a file of tensors that can be read safely ({reason})"
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("model_dict"), Mapping):
        content = content["model_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise UserError(f"{path}: holds no state dict but a {type(content).__name__}")
    return dict(content)
