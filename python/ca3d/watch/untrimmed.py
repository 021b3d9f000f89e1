"""`ca3d eval --untrimmed`: how well `ca3d watch` would find the events of long videos."""

from __future__ import annotations

import csv
import dataclasses
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ca3d.data.background import background_index
from ca3d.data.samples import SPLITS
from ca3d.errors import UserError
from ca3d.evaluate import results_folder, weights_file
from ca3d.predict import find_videos
from ca3d.watch.calibration import Calibration, calibration_error
from ca3d.watch.classifier import Classifier
from ca3d.watch.decoder import read_frames
from ca3d.watch.event_metrics import (
    Agreement,
    Annotation,
    VideoEvents,
    agreement,
    delays,
    false_alarms_per_hour,
)
from ca3d.watch.events import Event, EventDetector
from ca3d.watch.messages import Frame
from ca3d.watch.request import Request

if TYPE_CHECKING:
    from ca3d.evaluate import EvalConfig

ANNOTATIONS = "annotations.csv"
OVERLAPS = (0.3, 0.5, 0.7)
#: What `UntrimmedResult.save` writes.
_FILES = ("untrimmed.json", "events.csv")


@dataclass
class UntrimmedResult:
    """Figures of events in long videos.

    Attributes:
        agreements: Matches at each of `OVERLAPS`.
        delays: Seconds, of every annotation that was noticed.
        annotated: Annotations.
        false_alarms: Per hour.
        hours: Of video.
        windows: Windows whose true class is known, for the next three.
        accuracy: Share of them whose likeliest class is right.
        error_before: Expected calibration error without temperature.
        error_after: With the temperature in the weights.
        events: A row an event that was found.
        broken: Messages on videos that could not be read.
        settings: What was evaluated and how.
    """

    agreements: dict[float, Agreement]
    delays: list[float]
    annotated: int
    false_alarms: float
    hours: float
    windows: int
    accuracy: float
    error_before: float
    error_after: float
    events: list[dict[str, Any]]
    broken: list[str]
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures as plain values for JSON."""
        return {
            **self.settings,
            "hours": self.hours,
            "events": {
                f"{iou:g}": {"f1": a.f1, "precision": a.precision, "recall": a.recall}
                for iou, a in self.agreements.items()
            },
            "annotated": self.annotated,
            "found": len(self.events),
            "noticed": len(self.delays),
            "median_delay": statistics.median(self.delays) if self.delays else math.nan,
            "mean_delay": statistics.fmean(self.delays) if self.delays else math.nan,
            "false_alarms_per_hour": self.false_alarms,
            "windows": self.windows,
            "window_accuracy": self.accuracy,
            "calibration_error_uncalibrated": self.error_before,
            "calibration_error": self.error_after,
            "broken": self.broken,
        }

    def __str__(self) -> str:
        figures = self.to_dict()
        lines = [
            f"{self.hours:.2f} hours, {self.annotated} annotated events, {len(self.events)} found"
        ]
        for iou, a in self.agreements.items():
            lines.append(
                f"  overlap {iou:g}: F1 {100 * a.f1:.1f} %, precision {100 * a.precision:.1f} %,"
                f" recall {100 * a.recall:.1f} %"
            )
        lines += [
            f"  delay: median {figures['median_delay']:.2f} s, mean {figures['mean_delay']:.2f} s"
            f" ({len(self.delays)} of {self.annotated} events noticed)",
            f"  false alarms: {self.false_alarms:.1f} an hour",
            f"  windows: {self.windows}, accuracy {100 * self.accuracy:.1f} %, calibration error"
            f" {100 * self.error_before:.1f} % without temperature, {100 * self.error_after:.1f} %"
            " with it",
        ]
        return "\n".join(lines)

    def save(self, folder: str | Path) -> None:
        """Writes untrimmed.json and events.csv.

        Args:
            folder: Where to; made when missing.

        Raises:
            ca3d.errors.UserError: The folder can't be written to.
        """
        from ca3d.training.logs import write_csv, write_json

        folder = results_folder(folder)
        write_json(folder / "untrimmed.json", self.to_dict())
        if self.events:
            write_csv(folder / "events.csv", self.events)
        else:
            # Those of an earlier evaluation would stand beside these figures.
            (folder / "events.csv").unlink(missing_ok=True)


def evaluate_untrimmed(config: EvalConfig) -> UntrimmedResult:
    """Watches the long videos of a split and compares what it finds with the annotations.

    Args:
        config: The options of `ca3d eval`; `data` is a folder with videos, in sub-folders per
            split or not, and `annotations.csv` (path,label,start,end in seconds). A video without
            a row holds no events.

    Returns:
        The figures; also saved when `config.out` is set.

    Raises:
        ca3d.errors.UserError: The weights or data can't be used, none of the videos be read, or
            `config.out` not be written to or only with `config.force`.

    Example:
        >>> from ca3d.evaluate import EvalConfig
        >>> evaluate_untrimmed(EvalConfig("missing.safetensors", "videos"))
        Traceback (most recent call last):
        ca3d.errors.UserError: missing.safetensors: no such file
    """
    config.validate()
    if config.out is not None:
        results_folder(config.out, _FILES, force=config.force)
    classifier = Classifier.from_file(config.weights, config.step, config.device)
    info = classifier.info
    calibration = Calibration.of_extra(info.extra, len(info.classes))
    root = Path(config.data)
    annotations = read_annotations(root / ANNOTATIONS, info.classes)
    for path in annotations:
        if not path.is_file():
            raise UserError(f"{root / ANNOTATIONS}: {path} is not there; paths count from {root}")
    divided = [name for name in SPLITS if (root / name).is_dir()]
    if divided and config.split not in (*divided, "all"):
        raise UserError(f"{root}: has no split {config.split}, only {', '.join(divided)}")
    folder = root / config.split if config.split in divided else root
    videos: list[VideoEvents] = []
    rows: list[dict[str, Any]] = []
    broken: list[str] = []
    logits: list[Tensor] = []
    labels: list[int] = []
    for path in find_videos(folder):
        detector = EventDetector(info.classes, calibration, config.leave, config.min_duration)
        try:
            seen = _watch(path, classifier, detector)
        except UserError as error:
            broken.append(str(error))
            continue
        truth = annotations.pop(path.resolve(), [])
        videos.append(VideoEvents(seen.events, truth, seen.seconds))
        name = path.relative_to(root).as_posix()
        rows += [{"path": name, **dataclasses.asdict(event)} for event in seen.events]
        for middle, vector in zip(seen.middles, seen.logits, strict=True):
            label = _true_class(middle, truth, info.classes)
            if label is not None:
                labels.append(label)
                logits.append(vector)
    if not videos:
        raise UserError(f"{folder}: no video could be read: {broken[0]}")
    scores = torch.stack(logits) if logits else torch.empty(0, len(info.classes))
    truth_labels = torch.tensor(labels, dtype=torch.int64)
    right = (scores.argmax(1) == truth_labels).double()
    result = UntrimmedResult(
        agreements={iou: agreement(videos, iou) for iou in OVERLAPS},
        delays=delays(videos),
        annotated=sum(len(video.annotations) for video in videos),
        false_alarms=false_alarms_per_hour(videos),
        hours=sum(video.seconds for video in videos) / 3600,
        windows=len(labels),
        accuracy=float(right.mean()) if labels else math.nan,
        error_before=calibration_error(scores.softmax(1), truth_labels),
        error_after=calibration_error(calibration.probabilities(scores), truth_labels),
        events=rows,
        broken=broken,
        settings={
            "weights": str(weights_file(config.weights)),
            "data": config.data,
            "split": config.split,
            "step": config.step,
            "leave": config.leave,
            "min_duration": config.min_duration,
            "calibrated_on": calibration.measured_on,
        },
    )
    if config.out is not None:
        result.save(config.out)
    return result


def read_annotations(file: Path, classes: Iterable[str]) -> dict[Path, list[Annotation]]:
    """Reads the events of long videos.

    Args:
        file: CSV with the header path,label,start,end; paths count from its folder, times in
            seconds. Rows of the class `background` are left out.
        classes: The model's class names.

    Returns:
        Resolved path of each video that has events -> its events, by start.

    Raises:
        ca3d.errors.UserError: The file is missing or malformed, or names an unknown class.

    Example:
        >>> read_annotations(Path("missing.csv"), ["fall"])
        Traceback (most recent call last):
        ca3d.errors.UserError: missing.csv: no such file; it must list path,label,start,end
    """
    names = list(classes)
    background = background_index(names)
    found: dict[Path, list[Annotation]] = {}
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; it must list path,label,start,end") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as UTF-8 text: {error}") from error
    reader = csv.DictReader(text.splitlines(), skipinitialspace=True)
    if not {"path", "label", "start", "end"} <= set(reader.fieldnames or ()):
        raise UserError(f"{file}: the first line must be path,label,start,end")
    for row in reader:
        where = f"{file}, line {reader.line_num}"
        label = (row["label"] or "").strip()
        if background_index([label]) is not None:
            continue
        if label not in names or (background is not None and label == names[background]):
            raise UserError(f"{where}: the model has no class {label!r}")
        try:
            start, end = float(row["start"]), float(row["end"])
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{where}: start and end must be seconds, not {row['start']} and {row['end']}"
            ) from error
        try:
            annotation = Annotation(label, start, end)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error
        found.setdefault((file.parent / row["path"].strip()).resolve(), []).append(annotation)
    return {path: sorted(events, key=lambda a: a.start) for path, events in found.items()}


@dataclass
class _Seen:
    events: list[Event]
    middles: list[float]
    logits: list[Tensor]
    seconds: float


def _watch(path: Path, classifier: Classifier, detector: EventDetector) -> _Seen:
    """Does what `ca3d watch` does, in this process."""
    info = classifier.info
    request = Request(
        "file",
        str(path),
        view=info.view,
        resize=info.resize,
        size=info.size,
        stride=info.stride,
        frames_per_second=info.frames_per_second,
    )
    seen = _Seen([], [], [], 0.0)
    classifier.reset()
    period = 1.0
    for item in read_frames(request):
        if isinstance(item, Frame):
            seen.seconds = item.time + period
            logits = classifier.push(item.pixels)
            if logits is None:
                continue
            middle = item.time - (info.frames - 1) * period / 2
            probabilities = detector.calibration.probabilities(logits).tolist()
            seen.events += detector.push(middle, item.time, probabilities)
            seen.middles.append(middle)
            seen.logits.append(logits)
        elif item.kind == "opened":
            period = item.values["period"]
        elif item.kind == "gap":
            classifier.reset()
            seen.events += detector.interrupt()
        elif item.kind == "failed":
            raise UserError(item.text)
    seen.events += detector.interrupt()
    seen.events = [event for event in seen.events if not event.lasting]
    return seen


def _true_class(
    middle: float, annotations: list[Annotation], classes: tuple[str, ...]
) -> int | None:
    """The class of a window by its middle; None where the model has no name for it."""
    for annotation in annotations:
        if annotation.start <= middle < annotation.end:
            return classes.index(annotation.label)
    return background_index(classes)
