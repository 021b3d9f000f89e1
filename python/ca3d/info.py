"""Describing an installation, a weights file, a run, a data set or a video."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ca3d.errors import UserError


def describe(path: str | Path) -> dict[str, Any]:
    """Describes whatever lies at a path.

    Args:
        path: A weights file, a run folder, a data set or a video file.

    Returns:
        Plain values by name.

    Raises:
        ca3d.errors.UserError: There is nothing, or nothing that is known.

    Example:
        >>> describe("missing")
        Traceback (most recent call last):
        ca3d.errors.UserError: missing: no such file or folder
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_dir():
        if (path / "best.safetensors").is_file() or (path / "resume.pt").is_file():
            return _run(path)
        return _data_set(path)
    if path.suffix == ".safetensors":
        return weights(path)
    return _video(path)


def weights(path: str | Path) -> dict[str, Any]:
    """Describes a weights file.

    Args:
        path: A `.safetensors` file.

    Returns:
        The fields of its `ca3d.weights.ModelInfo`; an epoch among them is counted from 1.

    Raises:
        ca3d.errors.UserError: It is no weights file.

    Example:
        >>> weights("missing.safetensors")
        Traceback (most recent call last):
        ca3d.errors.UserError: missing.safetensors: no such file
    """
    import dataclasses

    from ca3d.weights import load_info

    content = {"weights": str(path), **dataclasses.asdict(load_info(path))}
    return {**content, "extra": _from_one(content["extra"])}


def installation() -> dict[str, Any]:
    """Returns versions, machine, kernels, models and precisions.

    Example:
        >>> "ca3d-kernels" in installation()["packages"]
        True
    """
    from ca3d import models as known_models
    from ca3d import precision
    from ca3d.training.run_folder import environment

    content = environment()
    del content["command"]
    content["models"] = known_models.names()
    content["precisions"] = precision.names()
    content["kernels"] = "python -m ca3d_kernels tells which are used here"
    return content


def models() -> dict[str, Any]:
    """Returns the models with their numbers of parameters at 101 classes, or what they need.

    Example:
        >>> models()["ca3d"]
        '6,950,891 parameters at 101 classes'
    """
    import torch

    from ca3d import models as known

    content = {}
    for name in known.names():
        try:
            with torch.device("meta"):
                count = sum(p.numel() for p in known.create(name, num_classes=101).parameters())
        except UserError as error:
            content[name] = str(error)
        else:
            content[name] = f"{count:,} parameters at 101 classes"
    return content


def as_text(content: dict[str, Any], indent: int = 0) -> str:
    """Returns nested values as indented lines.

    Args:
        content: Plain values by name.
        indent: Spaces in front of every line.

    Example:
        >>> print(as_text({"a": 1, "b": {"c": [1, 2]}}))
        a: 1
        b:
          c: 1, 2
    """
    lines = []
    for key, value in content.items():
        if isinstance(value, dict) and value:
            lines += [f"{' ' * indent}{key}:", as_text(value, indent + 2)]
        else:
            text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
            lines.append(f"{' ' * indent}{key}: {text}")
    return "\n".join(lines)


def _run(path: Path) -> dict[str, Any]:
    from ca3d.training.checkpoint import load_resume_state

    content: dict[str, Any] = {"run": str(path)}
    if (path / "resume.pt").is_file():
        state = load_resume_state(path / "resume.pt")
        at = state["progress"]
        content["finished"] = at["finished"]
        content["epochs done"] = at["epoch"]
        content["steps"] = at["steps"]
        content["skipped steps"] = at["skipped"]
        content["best epoch"] = at["best_epoch"] + 1
        content["best validation accuracy"] = round(at["best_accuracy"], 4)
        if state["rows"]:
            row = _from_one(state["rows"][-1])
            content["last epoch"] = {k: v for k, v in row.items() if v == v}
    results = path / "test" / "results.json"
    if results.is_file():
        content["test"] = _from_one(json.loads(results.read_text()))
    if (path / "best.safetensors").is_file():
        content["best"] = weights(path / "best.safetensors")
    return content


def _from_one(values: dict[str, Any]) -> dict[str, Any]:
    """Counts the epoch among them from 1, as the trainer shows it; files count from 0."""
    epoch = values.get("epoch")
    return {**values, "epoch": epoch + 1} if isinstance(epoch, int) else values


def _data_set(path: Path) -> dict[str, Any]:
    from ca3d.data.samples import load_info, load_samples, splits_of

    declared = load_info(path)
    samples, classes = load_samples(path)
    return {
        "data set": declared.name,
        "description": declared.description,
        "videos": len(samples),
        "classes": classes,
        "splits": {name: len(load_samples(path, name)[0]) for name in splits_of(path)},
        "horizontal flip": declared.horizontal_flip,
        "reversal": declared.reverse,
        "frames per second": declared.frames_per_second,
    }


def _video(path: Path) -> dict[str, Any]:
    from ca3d.data.reader import open_video

    with open_video(path) as video:
        return {
            "video": str(path),
            "frames": video.num_frames,
            "frames per second": round(video.frames_per_second, 3),
            "seconds": round(video.duration, 3),
            "width": video.width,
            "height": video.height,
        }
