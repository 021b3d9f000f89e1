"""Starting from trained weights, and keeping parts of a model fixed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ca3d import weights
from ca3d.errors import UserError
from ca3d.evaluate import weights_file


def initialize_from(
    model: nn.Module,
    classes: Sequence[str],
    file: str | Path,
    clips: Mapping[str, Any] | None = None,
) -> list[str]:
    """Copies the weights of a file into a model, save for a classifier of other classes.

    Rows of the classifier whose class both know are copied by name.

    Args:
        model: A model of the same kind as the file's.
        classes: The model's classes, in order.
        file: A weights file, or the folder of a run (its best weights).
        clips: What the model will see, by names of `ca3d.weights.ModelInfo`: color, stride, ...

    Returns:
        One line for every difference from a plain load: of the classifier, of the model's options,
        and of `clips` from what the weights were trained on.

    Raises:
        ca3d.errors.UserError: The file is no weights file, or its model is of another shape; the
            model is then unchanged.

    Example:
        >>> from ca3d import models
        >>> model = models.create("ca3d_tiny", num_classes=2)
        >>> initialize_from(model, ["run", "walk"], "missing.safetensors")
        Traceback (most recent call last):
        ca3d.errors.UserError: missing.safetensors: no such file
    """
    source, info = weights.load(weights_file(file))
    ours, theirs = model.state_dict(), source.state_dict()
    head = {name for name, module in model.named_modules() if module is model.classifier}
    head_keys = {f"{name}.{kind}" for name in head for kind in ("weight", "bias")}
    body = [key for key in ours if key not in head_keys]
    wrong = [
        f"{key} {tuple(theirs[key].shape) if key in theirs else 'missing'}"
        for key in body
        if key not in theirs or theirs[key].shape != ours[key].shape
    ]
    extra = [key for key in theirs if key not in ours]
    if wrong or extra:
        raise UserError(
            f"{file} holds {info.model} {info.options}, which does not fit the model to train: "
            + ", ".join((wrong + [f"{key} unknown" for key in extra])[:5])
            + (f" and {len(wrong + extra) - 5} more" if len(wrong + extra) > 5 else "")
        )
    report = _differences(model, info, clips or {})
    same_classes = tuple(info.classes) == tuple(classes)
    with torch.no_grad():
        for key in body if not same_classes else ours:
            ours[key].copy_(theirs[key])
        if not same_classes:
            known = {name: place for place, name in enumerate(info.classes)}
            shared = [(i, known[name]) for i, name in enumerate(classes) if name in known]
            for key in head_keys & set(theirs):
                for ours_row, theirs_row in shared:
                    ours[key][ours_row] = theirs[key][theirs_row]
            report.append(
                f"classifier replaced: {len(info.classes)} classes -> {len(classes)}"
                f" ({len(shared)} of the same name kept their weights)"
            )
    return report


def _differences(model: nn.Module, info: weights.ModelInfo, clips: Mapping[str, Any]) -> list[str]:
    """What fits in shape, and yet means that the weights will compute something else."""
    ours: Mapping[str, Any] = model.options  # type: ignore[assignment]
    names = [name for name in ours if name not in ("num_classes", "dropout")]
    values = [(f"option {name}", info.options.get(name), ours[name]) for name in names]
    values += [(name, getattr(info, name), value) for name, value in clips.items()]
    return [
        f"{name} differs: {theirs!r} in the weights, {mine!r} now"
        for name, theirs, mine in values
        if theirs != mine
    ]


def freeze(model: nn.Module, pattern: str) -> list[str]:
    """Stops the training of parameters by name.

    Args:
        model: The model.
        pattern: A regular expression, matched from the start of each parameter's name.

    Returns:
        The names of the frozen parameters.

    Raises:
        ca3d.errors.UserError: The pattern is no regular expression, or matches none or all.

    Example:
        >>> freeze(nn.Linear(2, 2), "bias")
        ['bias']
    """
    try:
        matcher = re.compile(pattern)
    except re.error as error:
        raise UserError(f"--freeze {pattern!r} is no regular expression: {error}") from error
    names = [name for name, _ in model.named_parameters()]
    frozen = [name for name in names if matcher.match(name)]
    if not frozen or len(frozen) == len(names):
        which = "no" if not frozen else "every"
        raise UserError(
            f"--freeze {pattern!r} matches {which} parameter;"
            f" names look like {', '.join(names[:3])}"
        )
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    return frozen


def set_batch_norm_frozen(model: nn.Module) -> int:
    """Puts every BatchNorm layer into evaluation mode; to be repeated after `model.train()`.

    Args:
        model: The model.

    Returns:
        The number of layers.

    Example:
        >>> set_batch_norm_frozen(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
        1
    """
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for layer in layers:
        layer.eval()
    return len(layers)
