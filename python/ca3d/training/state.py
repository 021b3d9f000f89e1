"""Where a run is, and what it has to show at the end."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class TrainResult:
    """What a finished run has to show.

    Args:
        folder: The run folder.
        best_epoch: The epoch, from 0, whose weights are in `best.safetensors`.
        best_accuracy: Its top-1 accuracy on the validation split; NaN without one.
        test: Figures on the test split, or None without one.
        steps: Optimizer steps taken, skipped ones not counted.
        skipped: Steps skipped because a loss or gradient was not finite.
        missing: Listed videos that are not on the disk.
        unreadable: Videos that could not be read.

    Example:
        >>> TrainResult(Path("run"), 3, 0.9, test=None, steps=100, skipped=0).best_epoch
        3
    """

    folder: Path
    best_epoch: int
    best_accuracy: float
    test: dict[str, Any] | None
    steps: int
    skipped: int
    missing: int = 0
    unreadable: int = 0


@dataclass
class Progress:
    """Where a run is: all of it goes into the resume file.

    Args:
        epoch: Current epoch, from 0.
        batch: Batches of this epoch that are done.
        steps: Optimizer steps taken in the run.
        skipped: Steps skipped in the run.
        skipped_in_row: Steps skipped since the last one taken.
        broken: Messages on batches that could not be read.
        dropped: Batches dropped in this epoch because fewer than two clips were left.
        loss_sum: Sum of losses over the clips of this epoch.
        correct: Clips of this epoch classified rightly.
        count: Clips of this epoch.
        seconds: Time spent on this epoch.
        waiting: Part of it spent waiting for data.
        best_accuracy: Best validation accuracy so far.
        best_epoch: Its epoch; -1 before the first.
        finished: Whether training is over.

    Example:
        >>> progress = Progress(epoch=1, batch=7, steps=20)
        >>> progress.begin_epoch(2)
        >>> progress.epoch, progress.batch, progress.steps
        (2, 0, 20)
    """

    epoch: int = 0
    batch: int = 0
    steps: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    dropped: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    count: int = 0
    seconds: float = 0.0
    waiting: float = 0.0
    best_accuracy: float = -1.0
    best_epoch: int = -1
    finished: bool = False
    broken: list[str] = field(default_factory=list)

    def begin_epoch(self, epoch: int) -> None:
        """Clears what counts within an epoch."""
        self.epoch, self.batch, self.dropped, self.loss_sum = epoch, 0, 0, 0.0
        self.correct, self.count, self.seconds, self.waiting = 0, 0, 0.0, 0.0
