"""What several commands print: progress, warnings, JSON."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any


class Bar:
    """A progress bar on a terminal, nothing elsewhere.

    Args:
        title: Stands before the bar.

    Example:
        >>> with Bar("counting") as bar:
        ...     bar.update(1, 10)
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._progress: Any = None
        self._task: Any = None

    def __enter__(self) -> Bar:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress

            self._progress = Progress(console=Console(stderr=True), transient=True)
            self._progress.start()
            self._task = self._progress.add_task(self.title, total=None)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def update(self, done: int, total: int, *rest: object) -> None:
        """Shows that `done` of `total` are done."""
        if self._progress is not None:
            self._progress.update(self._task, completed=done, total=total)


def log_warnings() -> None:
    """Shows the package's warnings (broken videos) as plain lines on standard error."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)


def as_json(value: Any) -> str:
    """Indented JSON, with null for what isn't finite.

    Args:
        value: Of dicts, lists, strings and numbers.

    Example:
        >>> print(as_json([float("nan")]))
        [
          null
        ]
    """
    from ca3d.training.logs import finite

    return json.dumps(finite(value), indent=2, ensure_ascii=False)
