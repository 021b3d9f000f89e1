"""`ca3d watch`: from the options to the exit status."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ca3d import weights
from ca3d.data.background import background_index
from ca3d.data.view import View
from ca3d.errors import UserError
from ca3d.evaluate import weights_file
from ca3d.watch.calibration import Calibration
from ca3d.watch.classifier import Classifier
from ca3d.watch.clips import ClipSaver
from ca3d.watch.display import Display
from ca3d.watch.events import EventDetector
from ca3d.watch.feed import Feed
from ca3d.watch.options import WatchConfig
from ca3d.watch.records import EventLog
from ca3d.watch.request import Request
from ca3d.watch.source import find_sources, password_in_address
from ca3d.watch.watcher import Watcher

DISCLAIMER = (
    "not a medical or safety device: nobody's safety may depend on what it reports or misses"
)


def watch(config: WatchConfig) -> None:
    """Watches a source until it ends.

    Args:
        config: The options.

    Raises:
        ca3d.errors.UserError: An option is wrong, or a source could not be read to its end.

    Example:
        >>> watch(WatchConfig("missing.mp4", "missing.safetensors"))
        Traceback (most recent call last):
        ca3d.errors.UserError: missing.safetensors: no such file
    """
    config.validate()
    classifier = Classifier.from_file(config.weights, config.step, config.device)
    info = classifier.info
    view = config.view if config.view is not None else info.view
    requests = find_sources(
        config, view, info.size, info.resize, info.stride, info.frames_per_second
    )
    if config.events is not None:
        events = Path(config.events).resolve()
        if any(r.kind == "file" and Path(r.address).resolve() == events for r in requests):
            raise UserError(f"--events {config.events}: is a video to watch")
    calibration = Calibration.of_extra(info.extra, len(info.classes))
    if config.threshold is not None:
        thresholds = (config.threshold,) * len(info.classes)
        calibration = dataclasses.replace(calibration, thresholds=thresholds)
    display = Display()
    clips = None
    if config.save_clips is not None:
        clips = ClipSaver(config.save_clips, config.keep_days, config.max_gb)
    for line in introduction(
        config, weights_file(config.weights), info, calibration, view, requests[0]
    ):
        display.note(line)
    failures = []
    with EventLog(config.events, config.force, config.announce) as log:
        for request in requests:
            detector = EventDetector(info.classes, calibration, config.leave, config.min_duration)
            capacity = config.queue or info.frames
            silence = max(20.0, 2 * config.timeout)
            with Feed(request, capacity, config.attempts, silence=silence) as feed:
                watcher = Watcher(feed, classifier, detector, log, display, clips, config.stats)
                statistics = watcher.statistics
                try:
                    watcher.run()
                finally:
                    # A camera ends by a signal only.
                    display.note(f"{request.name}: {statistics.line()}")
            if not watcher.failure and not statistics.windows:
                display.note(
                    f"{request.name}: too short for a window of {info.frames} frames"
                    if not statistics.gaps
                    else f"{request.name}: not one window without a gap"
                )
            if watcher.failure:
                failures.append(watcher.failure)
                if len(requests) > 1:
                    display.note(f"left out: {watcher.failure}")
    if len(failures) == 1:
        raise UserError(failures[0])
    if failures:
        raise UserError(f"{config.source}: {len(failures)} of {len(requests)} videos failed")


def introduction(
    config: WatchConfig,
    file: Path,
    info: weights.ModelInfo,
    calibration: Calibration,
    view: str,
    request: Request,
) -> list[str]:
    """Returns what a user must know before anything is watched.

    Args:
        config: The options.
        file: The weights file.
        info: What it says.
        calibration: What is in use.
        view: The region that is looked at.
        request: The first source.
    """
    lines = [
        f"{file}: {info.model}, {len(info.classes)} classes, trained on"
        f" {info.trained_on or 'data that its file does not name'}",
        DISCLAIMER,
    ]
    if calibration.measured_on:
        lines.append(
            f"calibrated on {calibration.measured_on}: temperature {calibration.temperature:.3g}"
        )
    else:
        lines.append(
            "not calibrated: probabilities are the model's own, thresholds"
            f" {calibration.thresholds[0]:g} (ca3d calibrate RUN DATA)"
        )
    if background_index(info.classes) is None:
        lines.append(
            "warning: the model has no class 'background': it will find an activity in anything"
        )
    trained, seen = View.parse(info.view), View.parse(view)
    if seen != trained:
        lines.append(f"warning: the model was trained with view {trained}, not {seen}")
    network = "the camera only" if request.kind == "rtsp" else "none"
    saved = f"clips of events in {config.save_clips}" if config.save_clips else "no pictures"
    lines.append(f"network: {network}; saved: {saved}")
    if password_in_address(config.source):
        lines.append(
            "warning: a password in the address can be seen in the list of processes; use"
            " --credentials"
        )
    return lines
