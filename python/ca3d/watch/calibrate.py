"""`ca3d calibrate`: measuring how far a model's probabilities can be trusted."""

# `option` returns dataclasses.field(...), which is what a default should be.

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ca3d import weights
from ca3d.data.samples import load_info
from ca3d.errors import UserError
from ca3d.evaluate import EvalConfig, score_split, weights_file
from ca3d.options import option
from ca3d.watch.calibration import TEMPERATURES, Calibration, calibration_error, fit

# Log-probabilities stand for logits; below this they say no more than "impossible".
_LEAST_PROBABILITY = 1e-30
_AT_THE_LIMITS = (
    "the lowest that is tried: it is right about each of these videos",
    "the highest that is tried: its probabilities say next to nothing about these videos",
)


@dataclass
class CalibrateConfig:
    """Every option of `ca3d calibrate`.

    Example:
        >>> CalibrateConfig("runs/mine", "videos").split
        'val'
    """

    weights: str = option("", "Weights file (.safetensors) or run folder", "Data", positional=True)
    data: str = option(
        "", "Folder with one sub-folder of videos per class", "Data", positional=True
    )
    split: Literal["val", "test", "all"] = option(
        "val", "Which split: never one that the model was trained on", "Data"
    )
    list_file: str | None = option(
        None,
        "CSV or JSON-lines file of videos (path,label), such as splits/val.csv of the run, instead"
        " of the split",
        "Data",
    )
    force: bool = option(False, "Replace a calibration that the weights hold already", "Results")
    batch_size: int = option(8, "Videos in a batch", "Run")
    workers: int | None = option(None, "Processes that read videos (0: none)", "Run")
    device: str = option("auto", "cpu, cuda, cuda:1 ... (auto: cuda when there is one)", "Run")
    decoder: Literal["auto", "av", "torchcodec"] = option("auto", "Video decoder", "Run")


@dataclass(frozen=True)
class CalibrateResult:
    """What `calibrate` measured.

    Attributes:
        calibration: What was stored.
        classes: Class names.
        videos: How many were read.
        error_before: Expected calibration error without temperature.
        error_after: With it, on the same videos.
    """

    calibration: Calibration
    classes: tuple[str, ...]
    videos: int
    error_before: float
    error_after: float

    def __str__(self) -> str:
        thresholds = ", ".join(
            f"{name} {value:.2f}"
            for name, value in zip(self.classes, self.calibration.thresholds, strict=True)
        )
        temperature = self.calibration.temperature
        limit = ""
        for end, what in zip(TEMPERATURES, _AT_THE_LIMITS, strict=True):
            if math.isclose(temperature, end, rel_tol=1e-3):
                limit = f" ({what})"
        return (
            f"{self.videos} videos of {self.calibration.measured_on}\n"
            f"temperature {temperature:.3f}{limit}: expected calibration error"
            f" {100 * self.error_before:.1f} % without it, {100 * self.error_after:.1f} % with it"
            f" (on the same videos)\nthresholds: {thresholds}"
        )


def calibrate(config: CalibrateConfig) -> CalibrateResult:
    """Chooses temperature and thresholds on a validation split, and stores them in the weights.

    Only the description in the weights file changes; its tensors stay as they are, bit for bit.

    Args:
        config: The options.

    Returns:
        What was measured.

    Raises:
        ca3d.errors.UserError: The weights or data can't be used, or the weights hold a calibration
            and `force` is not set.

    Example:
        >>> calibrate(CalibrateConfig("missing.safetensors", "videos"))
        Traceback (most recent call last):
        ca3d.errors.UserError: missing.safetensors: no such file
    """
    file = weights_file(config.weights)
    info = weights.load_info(file)
    stored = Calibration.of_extra(info.extra, len(info.classes))
    if stored.measured_on and not config.force:
        raise UserError(
            f"{file}: holds a calibration on {stored.measured_on} already; --force replaces it"
        )
    scores = score_split(
        EvalConfig(
            str(file),
            config.data,
            split=config.split,
            list_file=config.list_file,
            batch_size=config.batch_size,
            workers=config.workers,
            device=config.device,
            decoder=config.decoder,
        )
    ).scores
    logits = scores.probabilities.double().clamp(min=_LEAST_PROBABILITY).log()
    split = config.list_file or config.split
    where = f"{load_info(config.data).name}, {Path(split).stem}"
    calibration = fit(logits, scores.labels, where)
    extra = {**info.extra, **calibration.to_extra()}
    try:
        weights.replace_info(file, dataclasses.replace(info, extra=extra))
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror or error}") from error
    return CalibrateResult(
        calibration,
        info.classes,
        len(scores.labels),
        calibration_error(scores.probabilities, scores.labels),
        calibration_error(calibration.probabilities(logits), scores.labels),
    )
