"""The events as JSON, a line each."""

from __future__ import annotations

import datetime
import json
import os
import sys
from typing import Any, TextIO

from ca3d.errors import UserError
from ca3d.files import check_free
from ca3d.watch.events import Event


class EventLog:
    """Writes events as JSON lines, to standard output or to a file that its owner alone reads.

    Args:
        path: The file; None for standard output.
        force: Replace the file if it is there.
        announce: Also write an event when it begins, with `"end": null`.

    Raises:
        ca3d.errors.UserError: The file is there already, or can't be written.

    Example:
        >>> with EventLog() as log:
        ...     log.write(Event("fall", 1.0, 2.5, 0.9, 1.75), "a.mp4", began=None)
        {"label": "fall", "start": 1.0, "end": 2.5, "confidence": 0.9, "source": "a.mp4"}
    """

    def __init__(
        self, path: str | None = None, force: bool = False, announce: bool = False
    ) -> None:
        self._path, self._announce = path, announce
        self._file: TextIO | None = None
        if path is not None:
            check_free(path, force=force, flag="--events")
            how = os.O_CREAT | os.O_WRONLY | os.O_TRUNC
            try:
                self._file = os.fdopen(os.open(path, how, 0o600), "w", encoding="utf-8")
                os.fchmod(self._file.fileno(), 0o600)
            except OSError as error:
                raise UserError(f"--events {path}: {error.strerror}") from error

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(
        self, event: Event, source: str, began: datetime.datetime | None, clip: str | None = None
    ) -> None:
        """Writes an event.

        Args:
            event: The event; one that lasts is written only when announcing.
            source: Name of the source, without credentials.
            began: Wall-clock time of second 0, for cameras.
            clip: The saved clip.

        Raises:
            ca3d.errors.UserError: The file can't be written.
        """
        if event.lasting and not self._announce:
            return
        record: dict[str, Any] = {
            "label": event.label,
            "start": event.start,
            "end": None if event.lasting else event.end,
            "confidence": round(event.confidence, 4),
            "source": source,
        }
        if began is not None:
            start = began + datetime.timedelta(seconds=event.start)
            record["time"] = start.isoformat(timespec="milliseconds")
        if clip is not None:
            record["clip"] = clip
        line = json.dumps(record, ensure_ascii=False)
        try:
            print(line, file=self._file or sys.stdout, flush=True)
        except BrokenPipeError:
            raise
        except OSError as error:
            where = "standard output" if self._path is None else f"--events {self._path}"
            raise UserError(f"{where}: {error.strerror}") from error
