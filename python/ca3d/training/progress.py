"""What a run shows while it trains: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any, TextIO

from ca3d.errors import UserError
from ca3d.training.logs import Row


@dataclass
class Status:
    """The state of a running epoch.

    Args:
        epoch: Epoch, from 0.
        epochs: Epochs in all.
        batch: Batches done in this epoch.
        batches: Batches in an epoch.
        loss: Mean loss of this epoch so far.
        accuracy: Top-1 accuracy of this epoch so far.
        lr: Learning rate of the last step.
        clips_per_second: Over the last few seconds.
        waiting: Share of the time spent waiting for data, in [0, 1].
        skipped: Steps skipped so far in the run.
        phase: "train" or "val".

    Example:
        >>> Status(epoch=0, epochs=2, batch=1, batches=10).batch
        1
    """

    epoch: int
    epochs: int
    batch: int
    batches: int
    loss: float = float("nan")
    accuracy: float = float("nan")
    lr: float = 0.0
    clips_per_second: float = 0.0
    waiting: float = 0.0
    skipped: int = 0
    phase: str = "train"


class Reporter:
    """Shows nothing; the base of the other two.

    Example:
        >>> with Reporter() as reporter:
        ...     reporter.message("not shown")
    """

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self, title: str, status: Status) -> None:
        """Begins at the position of `status`."""

    def update(self, status: Status) -> None:
        """Shows the state after a batch."""

    def epoch(self, row: Row) -> None:
        """Shows the figures of a finished epoch."""

    def message(self, text: str) -> None:
        """Shows a line."""

    def stop(self) -> None:
        """Ends the display."""


class PlainReporter(Reporter):
    """Prints a line every few batches and at the end of every epoch.

    Args:
        every: Batches between lines.
        file: Where to; None is standard output.

    Example:
        >>> PlainReporter(every=50).message("training")
        training
    """

    def __init__(self, every: int = 50, file: TextIO | None = None) -> None:
        self.every = every
        self.file = file
        self._clock = _Clock()

    def message(self, text: str) -> None:
        """Prints a line."""
        print(text, file=self.file or sys.stdout, flush=True)

    def start(self, title: str, status: Status) -> None:
        """Prints the title."""
        self._clock.start(status)
        self.message(title)

    def update(self, status: Status) -> None:
        """Prints the state after every `every` training batches."""
        if status.phase == "train" and status.batch % self.every == 0 and status.batch:
            skipped = f"  skipped {status.skipped}" if status.skipped else ""
            self.message(
                f"epoch {status.epoch + 1}/{status.epochs}  batch {status.batch}/{status.batches}"
                f"  loss {status.loss:.4f}  accuracy {100 * status.accuracy:.1f} %"
                f"  {status.clips_per_second:.1f} clips/s"
                f" (waiting for data {100 * status.waiting:.0f} %)"
                f"  lr {status.lr:.2e}  left {self._clock.left(status)}{skipped}"
            )

    def epoch(self, row: Row) -> None:
        """Prints the figures of the epoch."""
        self.message(epoch_line(row))


class RichReporter(Reporter):
    """A progress bar over the run with the current figures below it.

    Args:
        console: A `rich.console.Console`; None is standard output.

    Example:
        >>> from rich.console import Console
        >>> import io
        >>> with RichReporter(Console(file=io.StringIO())) as reporter:
        ...     reporter.start("demo", Status(epoch=0, epochs=1, batch=0, batches=4))
        ...     reporter.update(Status(epoch=0, epochs=1, batch=1, batches=4))
    """

    def __init__(self, console: Any = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        self.console = console or Console()
        self._clock = _Clock()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[left]} left"),
            console=self.console,
            expand=True,
        )
        self._figures = Progress(TextColumn("{task.description}"), console=self.console)
        self._run: Any = None
        self._line: Any = None
        self._live: Any = None

    def start(self, title: str, status: Status) -> None:
        """Opens the display."""
        from rich.console import Group
        from rich.live import Live

        self._clock.start(status)
        self.console.print(title, highlight=False, markup=False)
        self._run = self._progress.add_task(
            "", total=status.epochs * status.batches, left="-:--:--"
        )
        self._line = self._figures.add_task("")
        self._live = Live(
            Group(self._progress, self._figures), console=self.console, refresh_per_second=4
        )
        self._live.start()
        self.update(status)

    def update(self, status: Status) -> None:
        """Moves the bar and renews the figures."""
        if self._live is None:
            return
        done = status.epoch * status.batches
        done += status.batch if status.phase == "train" else status.batches
        phase = "" if status.phase == "train" else " (validating)"
        self._progress.update(
            self._run,
            completed=done,
            description=f"epoch {status.epoch + 1}/{status.epochs}{phase}",
            left=self._clock.left(status),
        )
        if status.phase == "train":
            skipped = f"  [red]skipped {status.skipped}[/]" if status.skipped else ""
            waiting = round(100 * status.waiting)
            self._figures.update(
                self._line,
                description=(
                    f"loss {status.loss:.4f}  accuracy {100 * status.accuracy:5.1f} %  "
                    f"lr {status.lr:.2e}{skipped}\n"
                    f"{status.clips_per_second:.1f} clips/s: {waiting} % waiting for data, "
                    f"{100 - waiting} % computing"
                ),
            )

    def epoch(self, row: Row) -> None:
        """Prints the figures of the epoch above the bar."""
        self.message(epoch_line(row))

    def message(self, text: str) -> None:
        """Prints a line above the bar."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def stop(self) -> None:
        """Closes the display."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def create(kind: str, every: int = 50) -> Reporter:
    """Makes a reporter.

    Args:
        kind: "rich", "plain", "none", or "auto": rich on a terminal, plain elsewhere.
        every: Batches between plain lines.

    Returns:
        The reporter, a context manager.

    Raises:
        ca3d.errors.UserError: An unknown kind.

    Example:
        >>> type(create("plain")).__name__
        'PlainReporter'
    """
    if kind == "auto":
        kind = "rich" if sys.stdout.isatty() else "plain"
    if kind == "none":
        return Reporter()
    if kind == "plain":
        return PlainReporter(every)
    if kind == "rich":
        return RichReporter()
    raise UserError(f"--progress must be auto, rich, plain or none, not {kind!r}")


def epoch_line(row: Row) -> str:
    """Returns the figures of an epoch as one line.

    Args:
        row: A row of the metrics log.

    Example:
        >>> row = {"epoch": 0, "train_loss": 1.0, "train_accuracy": 0.5, "seconds": 3.0}
        >>> epoch_line(row)
        'epoch 1: train loss 1.0000, accuracy 50.0 %  (3 s)'
    """
    text = (
        f"epoch {row['epoch'] + 1}: train loss {row['train_loss']:.4f},"
        f" accuracy {100 * row['train_accuracy']:.1f} %"
    )
    if row.get("val_count"):
        text += f" | val loss {row['val_loss']:.4f}, accuracy {100 * row['val_accuracy']:.1f} %" + (
            " (best)" if row.get("best") else ""
        )
    skipped = f"  skipped {row['skipped']}" if row.get("skipped") else ""
    return f"{text}  ({row['seconds']:.0f} s){skipped}"


class _Clock:
    """Estimates the time left from the batches done since this process began."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._done = 0

    def start(self, status: Status) -> None:
        self._begin = time.monotonic()
        self._done = status.epoch * status.batches + status.batch

    def left(self, status: Status) -> str:
        done = status.epoch * status.batches + status.batch - self._done
        if status.phase != "train" or done <= 0:
            return "-:--:--"
        left = status.epochs * status.batches - self._done - done
        seconds = round((time.monotonic() - self._begin) / done * left)
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
