"""The rows that finished runs leave: one JSON object a line."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from ca3d.errors import UserError
from ca3d.experiments.cells import Cell
from ca3d.training.logs import finite

__all__ = ["Row", "RowFile", "cell_of", "check_same_clips", "read_rows", "run_dates", "today"]

Row = dict[str, Any]


class RowFile:
    """A JSON-lines file that is only ever appended to, a whole line at a time.

    A process that is killed in the middle of a line leaves half of one; it is cut off when the file
    is opened again. Two processes can't hold the same file.

    Args:
        path: The file; made when missing, with its folder.

    Attributes:
        rows: All rows, by key; of two with the same key the later one.

    Raises:
        ca3d.errors.UserError: The file can't be written, is held by another process, or has a line
            that is no row.

    Example:
        >>> with RowFile(scratch / "rows.jsonl") as file:
        ...     file.add({"key": "a", "accuracy": 0.5})
        >>> read_rows(scratch / "rows.jsonl")
        {'a': {'key': 'a', 'accuracy': 0.5}}
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "ab+")  # noqa: SIM115
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise UserError(f"{path} is in use by another process") from error
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            self._file.truncate(whole)
        try:
            self.rows = _parse(content[:whole].decode(), self.path)
        except UserError:
            self._file.close()
            raise

    def __enter__(self) -> RowFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def add(self, row: Row) -> None:
        """Appends a row; when this returns it is on the disk.

        Args:
            row: Plain values with a "key"; NaN and infinity are stored as null.

        Raises:
            ca3d.errors.UserError: The disk is full.
        """
        line = json.dumps(finite(row), ensure_ascii=False) + "\n"
        try:
            self._file.write(line.encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error
        self.rows[row["key"]] = json.loads(line)


def read_rows(path: str | Path) -> dict[str, Row]:
    """Reads the rows of a file by key.

    Args:
        path: A file that `RowFile` wrote; a missing one has no rows.

    Returns:
        The rows in the order in which they were written; half a line at the end is left out.

    Raises:
        ca3d.errors.UserError: A line is no row.

    Example:
        >>> read_rows("missing.jsonl")
        {}
    """
    path = Path(path)
    if not path.is_file():
        return {}
    content = path.read_bytes()
    return _parse(content[: content.rfind(b"\n") + 1].decode(), path)


def cell_of(row: Row) -> Cell:
    """The cell that a row is of.

    Args:
        row: A row of `ca3d.experiments.runner`.

    Example:
        >>> cell = Cell("m", "float32", 0, {})
        >>> cell_of({"key": cell.key, "cell": cell.to_dict()}) == cell
        True
    """
    return Cell.of(row["cell"])


def check_same_clips(rows: Iterable[Row]) -> None:
    """Raises `UserError` if runs on one data set were tested on different clips.

    Differences are paired clip by clip: files that were added, taken away or broken between two
    runs would pair different ones.

    Args:
        rows: Rows of cells.

    Example:
        >>> row = {"cell": {"data": {"folder": "videos"}}, "correct": "110", "date": "2026-12-01"}
        >>> check_same_clips([row, row])
        >>> check_same_clips([row, {**row, "correct": "11"}])
        Traceback (most recent call last):
        ca3d.errors.UserError: videos changed between two runs (2026-12-01: 3 test clips, ...
    """
    first: dict[str, Row] = {}
    for row in rows:
        # What a control does to a clip, and what else is scored, leaves the clips the same.
        data = {k: v for k, v in row["cell"]["data"].items() if k not in ("control", "score_train")}
        other = first.setdefault(json.dumps(data, sort_keys=True), row)
        counts = [len(x["correct"]) for x in (other, row)]
        lists = {x["test_clips"] for x in (other, row) if "test_clips" in x}
        if counts[0] != counts[1] or len(lists) > 1:
            raise UserError(
                f"{data.get('folder', data.get('name'))} changed between two runs"
                f" ({other.get('date', '?')}: {counts[0]} test clips, {row.get('date', '?')}:"
                f" {counts[1]}, not the same ones); begin anew in another --out"
            )


def today() -> str:
    """The date that a row keeps, and a report.

    Example:
        >>> len(today())
        10
    """
    return time.strftime("%Y-%m-%d")


def run_dates(rows: Iterable[Row]) -> str:
    """When runs ended, as a report says it.

    Args:
        rows: Their rows. Those that know no date, as it was not kept at first, are the oldest.

    Returns:
        Nothing where there are no rows.

    Example:
        >>> run_dates([{"date": "2026-11-28"}, {"date": "2026-11-27"}])
        'runs of 2026-11-27 to 2026-11-28'
    """
    dates = sorted({row.get("date", "") for row in rows})
    if not dates:
        return ""
    if not dates[0]:
        return f"runs until {dates[-1]}" if dates[-1] else "runs of unknown dates"
    return f"runs of {' to '.join(dict.fromkeys((dates[0], dates[-1])))}"


def _parse(text: str, path: Path) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
            if not isinstance(row["key"], str):
                raise TypeError
            rows[row["key"]] = row
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number}: no row of an experiment") from error
    return rows
