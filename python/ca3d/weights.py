"""Weights files: safetensors that carry all that is needed to rebuild and to use a model.

The tensors of the state dict are stored under their names in their dtypes; the header holds a
`ModelInfo` as JSON. Nothing in such a file is ever executed.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ca3d import models
from ca3d.errors import UserError
from ca3d.files import write_atomically

__all__ = ["VERSION", "ModelInfo", "load", "load_info", "replace_info", "save"]

VERSION = 1
_VERSION_KEY, _INFO_KEY = "ca3d.version", "ca3d.info"
_LISTED = 8


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """What a weights file says about its model.

    Attributes:
        model: name for `ca3d.models.create`.
        options: its keyword arguments, `num_classes` among them; plain JSON values.
        classes: class names in the order of the logits; empty when unknown.
        color: order of the input's colour channels, ``"rgb"`` or ``"bgr"``.
        mean, std: of each input channel in that order, for values in 0 to 1; None when unknown.
        frames: frames of a clip.
        stride: distance of a clip's frames in the video.
        window: frames read at that distance, of which a clip is the middle; None for `frames`.
        frames_per_second: of the videos that the model was trained on; None when unknown.
        size: side of the square crop in pixels.
        resize: length of the shorter side before cropping.
        view: region of the frames that it was trained on; see `ca3d.data.view.View`.
        precision: regime in which the model was trained.
        trained_on: the data set, in words.
        extra: further plain JSON values.

    Raises:
        ValueError: a field out of its range, or as many classes as the model doesn't have.
        TypeError: a field of the wrong type.

    Example:
        >>> ModelInfo("ca3d_tiny", {"num_classes": 2}, classes=("run", "walk")).color
        'rgb'
    """

    model: str
    options: dict[str, Any]
    classes: tuple[str, ...] = ()
    color: str = "rgb"
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    frames: int = 16
    stride: int = 2
    frames_per_second: float | None = None
    size: int = 112
    resize: int = 112
    window: int | None = None
    view: str = "center"
    precision: str = "float32"
    trained_on: str = ""
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("model", "view", "precision", "trained_on"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be a string, got {getattr(self, name)!r}")
        for name in ("options", "extra"):
            if not isinstance(getattr(self, name), dict):
                raise TypeError(f"{name} must be a dict, got {getattr(self, name)!r}")
        if self.color not in ("rgb", "bgr"):
            raise ValueError(f"color must be 'rgb' or 'bgr', got {self.color!r}")
        for name in ("frames", "stride", "size", "resize"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if self.window is not None and self.window < self.frames:
            raise ValueError(
                f"window must be None or at least frames ({self.frames}), got {self.window!r}"
            )
        rate = self.frames_per_second
        if rate is not None and not (_finite(rate) and rate > 0):
            raise ValueError(f"frames_per_second must be positive or None, got {rate!r}")
        object.__setattr__(self, "mean", _channels("mean", self.mean, positive=False))
        object.__setattr__(self, "std", _channels("std", self.std, positive=True))
        object.__setattr__(self, "classes", self._checked_classes())

    def _checked_classes(self) -> tuple[str, ...]:
        if isinstance(self.classes, str) or not isinstance(self.classes, Sequence):
            raise TypeError(f"classes must be a sequence of names, got {self.classes!r}")
        names = tuple(self.classes)
        for name in names:
            if not isinstance(name, str) or not name:
                raise TypeError(f"classes must be non-empty strings, got {name!r}")
        if len(set(names)) != len(names):
            double = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"classes must differ, got more than once: {', '.join(double)}")
        wanted = self.options.get("num_classes", len(names))
        if names and len(names) != wanted:
            raise ValueError(f"the model has {wanted} classes, got {len(names)} class names")
        return names


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _channels(name: str, values: Any, positive: bool) -> tuple[float, float, float] | None:
    if values is None:
        return None
    fits = isinstance(values, Sequence) and len(values) == 3 and all(map(_finite, values))
    if not fits or (positive and min(values) <= 0):
        kind = "positive numbers" if positive else "numbers"
        raise ValueError(f"{name} must be three {kind}, one a colour channel, got {values!r}")
    red, green, blue = map(float, values)
    return red, green, blue


def save(
    path: str | Path, model: nn.Module, info: ModelInfo, dtype: torch.dtype | None = None
) -> None:
    """Writes a weights file, atomically: at any moment the old or the new one is there in full.

    Args:
        path: the file; its folder must exist.
        model: the model; its state dict is stored in its dtypes, in plain row-major order.
        info: what to say about it.
        dtype: that floating-point tensors are cast to; None keeps theirs.

    Raises:
        OSError: the folder can't be written to or the disk is full; the previous file is intact.
        TypeError: options or extra hold values that JSON doesn't know.

    Example:
        >>> import tempfile
        >>> model = models.create("ca3d_tiny", num_classes=2)
        >>> info = ModelInfo(model.name, model.options, classes=("run", "walk"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/tiny.safetensors", model, info)
        ...     load_info(f"{folder}/tiny.safetensors").classes
        ('run', 'walk')
    """
    metadata = {
        "format": "pt",
        _VERSION_KEY: str(VERSION),
        _INFO_KEY: json.dumps(dataclasses.asdict(info)),
    }
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        kept = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        plain = tensor.detach().to("cpu", kept).contiguous()
        # The format forbids tensors that share memory, as tied weights do.
        tensors[name] = plain.clone() if plain.data_ptr() in seen else plain
        seen.add(plain.data_ptr())
    # Through memory: the library's own writer reports a full disk without its errno.
    content = safetensors.torch.save(tensors, metadata)
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def replace_info(path: str | Path, info: ModelInfo) -> None:
    """Writes a weights file anew with other information and the same tensors, atomically.

    Args:
        path: a file written by `save`.
        info: what to say about the model.

    Raises:
        ca3d.errors.UserError: no such file, or not one of this package's.
        OSError: it can't be written; the previous file is intact.

    Example:
        >>> replace_info("missing.safetensors", ModelInfo("ca3d", {}))
        Traceback (most recent call last):
        ca3d.errors.UserError: missing.safetensors: no such file
    """
    with _opened(path) as file:
        metadata = file.metadata()
        _info(path, metadata)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata = {**metadata, _INFO_KEY: json.dumps(dataclasses.asdict(info))}
    content = safetensors.torch.save(tensors, metadata)
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def load_info(path: str | Path) -> ModelInfo:
    """Reads what a weights file says about its model, without reading the tensors.

    Args:
        path: a file written by `save`.

    Returns:
        The information.

    Raises:
        ca3d.errors.UserError: no such file, no safetensors file, not one of this package's,
            damaged, or written by a newer version.

    Example:
        >>> load_info("missing.safetensors")
        Traceback (most recent call last):
        ca3d.errors.UserError: missing.safetensors: no such file
    """
    with _opened(path) as file:
        return _info(path, file.metadata())


def load(path: str | Path, device: torch.device | str = "cpu") -> tuple[nn.Module, ModelInfo]:
    """Rebuilds the model of a weights file.

    Args:
        path: a file written by `save`.
        device: where the model shall be.

    Returns:
        The model, in evaluation mode, its tensors in the dtypes of the file, and the information.
        Torch's random state is left as it was.

    Raises:
        ca3d.errors.UserError: as `load_info`; also an unknown model, options that it doesn't have,
            or tensors that don't fit it (all are listed).

    Example:
        >>> load("missing.safetensors")
        Traceback (most recent call last):
        ca3d.errors.UserError: missing.safetensors: no such file
    """
    with _opened(path) as file:
        info = _info(path, file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    try:
        # The initial values are overwritten, so their draws must not count.
        with torch.random.fork_rng(devices=[]):
            model = models.create(info.model, **info.options)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: its model can't be built: {error}") from error
    target = model.state_dict(keep_vars=True)
    _check_fit(path, target, tensors)
    for name, tensor in target.items():
        # A new tensor in the file's dtype keeps the memory layout that the model chose.
        tensor.data = torch.empty_like(tensor, dtype=tensors[name].dtype).copy_(tensors[name])
    return model.to(device).eval(), info


def _opened(path: str | Path) -> Any:
    if not Path(path).exists():
        raise UserError(f"{path}: no such file")
    if not Path(path).is_file():
        raise UserError(f"{path}: not a file")
    try:
        return safetensors.safe_open(path, framework="pt")
    except safetensors.SafetensorError as error:
        raise UserError(
            f"{path}: no safetensors file, or a damaged one ({error}); published weights (.pt) are "
            "converted by `ca3d convert`"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error


def _info(path: str | Path, metadata: dict[str, str] | None) -> ModelInfo:
    if not metadata or _VERSION_KEY not in metadata or _INFO_KEY not in metadata:
        raise UserError(f"{path}: a safetensors file, but not one of ca3d's")
    if metadata[_VERSION_KEY] != str(VERSION):
        raise UserError(
            f"{path}: has format version {metadata[_VERSION_KEY]}, this ca3d reads {VERSION}; "
            "a newer ca3d may read it"
        )
    try:
        return ModelInfo(**json.loads(metadata[_INFO_KEY]))
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: its description is damaged: {error}") from error


def _check_fit(path: str | Path, target: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    faults = [f"{name} is missing" for name in target if name not in tensors]
    faults += [f"{name} is unknown" for name in tensors if name not in target]
    faults += [
        f"{name} is of {tensors[name].dtype}"
        for name, tensor in target.items()
        if name in tensors and tensors[name].is_floating_point() != tensor.is_floating_point()
    ]
    faults += [
        f"{name} is {tuple(tensors[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in target.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if faults:
        more = f" and {len(faults) - _LISTED} more" if len(faults) > _LISTED else ""
        raise UserError(f"{path}: does not fit its model: {', '.join(faults[:_LISTED])}{more}")
