"""The options of `ca3d watch`."""

# `option` returns dataclasses.field(...), which is what a default should be.

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ca3d.data.view import View
from ca3d.errors import UserError
from ca3d.options import option


@dataclass
class WatchConfig:
    """Every option of `ca3d watch`; `ca3d watch --help` prints what each of them means.

    Raises:
        ca3d.errors.UserError: From `validate`, naming the option, its value and what is allowed.

    Example:
        >>> WatchConfig("0", "best.safetensors", leave=2.0).validate()
        Traceback (most recent call last):
        ca3d.errors.UserError: --leave must be above 0 and at most 1, not 2.0
    """

    source: str = option(
        "",
        "Video file, folder of videos, number of a webcam, or rtsp:// address",
        "Input",
        positional=True,
    )
    weights: str = option("", "Weights file (.safetensors) or run folder", "Input")
    view: str | None = option(
        None,
        "Region of the frames to look at: center, letterbox, or 'roi X,Y,W,H' in pixels or in"
        " shares of the frame (default: as in training)",
        "Input",
    )
    realtime: bool = option(False, "Read files as fast as they play, dropping as a camera", "Input")
    credentials: str | None = option(
        None,
        "File with one line user:password for the camera (default: the variables CA3D_CAMERA_USER"
        " and CA3D_CAMERA_PASSWORD)",
        "Camera",
    )
    transport: Literal["tcp", "udp"] = option("tcp", "How RTSP brings the frames", "Camera")
    timeout: float = option(10.0, "Seconds to wait for the camera", "Camera")
    attempts: int | None = option(
        None,
        "Give up after so many attempts in a row to reach the camera (default: never)",
        "Camera",
    )
    decoder_memory: int = option(1024, "Megabytes that the decoding process may use", "Camera")

    step: int = option(4, "Model frames from one recognition to the next", "Recognition")
    queue: int | None = option(
        None, "Frames that may wait for the model (default: those of a window)", "Recognition"
    )
    threshold: float | None = option(
        None,
        "Probability from which a class counts (default: as calibrated, else 0.5)",
        "Recognition",
    )
    leave: float = option(
        0.7, "Share of its threshold above which an activity goes on", "Recognition"
    )
    min_duration: float = option(
        0.5, "Seconds that something must last to be an event", "Recognition"
    )
    device: str = option("auto", "cpu, cuda, cuda:1 ... (auto: cuda when there is one)", "Run")

    events: str | None = option(
        None, "File for the events, a JSON object a line (default: standard output)", "Results"
    )
    announce: bool = option(
        False, 'Also write an event when it begins, with "end": null', "Results"
    )
    force: bool = option(False, "Replace the --events file if it is there", "Results")
    save_clips: str | None = option(
        None,
        "Folder for clips of events, as the model saw them (default: none are saved)",
        "Results",
    )
    keep_days: float | None = option(None, "Delete saved clips that are older", "Results")
    max_gb: float | None = option(
        None, "Delete the oldest saved clips when they take more", "Results"
    )
    stats: bool = option(
        False, "Print speed, drops, lag and memory every ten seconds and at the end", "Results"
    )

    def validate(self) -> None:
        """Raises `UserError` for the first option whose value is not allowed."""
        for name in ("step", "queue", "attempts", "decoder_memory"):
            value = getattr(self, name)
            lowest = {"attempts": 0, "decoder_memory": 64}.get(name, 1)
            _check(self, name, value is None or value >= lowest, f"at least {lowest}")
        for name in ("timeout", "keep_days", "max_gb"):
            value = getattr(self, name)
            fine = value is None or (math.isfinite(value) and value > 0)
            _check(self, name, fine, "a finite number above 0")
        _check(self, "leave", 0 < self.leave <= 1, "above 0 and at most 1")
        fine = self.threshold is None or 0 < self.threshold <= 1
        _check(self, "threshold", fine, "above 0 and at most 1")
        duration = self.min_duration
        _check(self, "min_duration", math.isfinite(duration) and duration >= 0, "at least 0")
        if self.save_clips is None and (self.keep_days or self.max_gb):
            raise UserError("--keep-days and --max-gb are about saved clips: give --save-clips too")
        if self.view is not None:
            View.parse(self.view)


def _check(config: WatchConfig, name: str, fine: bool, allowed: str) -> None:
    if not fine:
        flag = "--" + name.replace("_", "-")
        raise UserError(f"{flag} must be {allowed}, not {getattr(config, name)!r}")
