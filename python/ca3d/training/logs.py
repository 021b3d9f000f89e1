"""Metrics of a run as CSV, JSON lines and, on request, TensorBoard."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ca3d.errors import UserError
from ca3d.training.checkpoint import write_file

Row = dict[str, Any]


def summary_writer() -> Any:
    """TensorBoard's class that writes logs, which is not needed otherwise.

    Returns:
        `torch.utils.tensorboard.SummaryWriter`.

    Raises:
        ca3d.errors.UserError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            "--tensorboard needs a package that is missing; run: pip install tensorboard"
        ) from error
    return SummaryWriter


class MetricsLog:
    """One row of figures an epoch, in `metrics.csv` and `metrics.jsonl`.

    Both files are written anew from all rows, so that a resumed run, whose rows come from its
    resume file, leaves no row twice and none out.

    Args:
        folder: Where the files go.
        rows: The rows of the epochs that a resumed run has behind it.
        tensorboard: Whether to write TensorBoard logs to `folder/tensorboard` as well.

    Raises:
        ca3d.errors.UserError: TensorBoard is asked for and not installed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     log = MetricsLog(Path(folder))
        ...     log.add({"epoch": 0, "loss": 1.5})
        ...     Path(folder, "metrics.csv").read_text().split()
        ['epoch,loss', '0,1.5']
    """

    def __init__(
        self, folder: Path, rows: list[Row] | None = None, tensorboard: bool = False
    ) -> None:
        self.folder = folder
        self.rows = list(rows or [])
        self._writer: Any = None
        if tensorboard:
            self._writer = summary_writer()(str(folder / "tensorboard"))

    def add(self, row: Row) -> None:
        """Adds a row and writes the files.

        Args:
            row: Figures by name; every row has the same names.
        """
        self.rows.append(row)
        self.write()
        if self._writer is not None:
            for name, value in row.items():
                if isinstance(value, (int, float)) and name != "epoch":
                    self._writer.add_scalar(name, value, row["epoch"])
            self._writer.flush()

    def write(self) -> None:
        """Writes both files anew."""
        write_csv(self.folder / "metrics.csv", self.rows)
        lines = "".join(json.dumps(finite(row)) + "\n" for row in self.rows)
        write_file(self.folder / "metrics.jsonl", lines)

    def close(self) -> None:
        """Closes the TensorBoard writer."""
        if self._writer is not None:
            self._writer.close()


def write_csv(path: Path, rows: list[Row]) -> None:
    """Writes rows as CSV with a header line, atomically.

    Args:
        path: Where to.
        rows: At least one row; the first one's keys are the columns.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_csv(Path(folder, "a.csv"), [{"a": 1, "b": "x"}])
        ...     Path(folder, "a.csv").read_text()
        'a,b\\n1,x\\n'
    """
    write_file(path, as_csv(rows))


def as_csv(rows: Sequence[Row]) -> str:
    """Returns rows as CSV text with a header line.

    Args:
        rows: At least one row; the first one's keys are the columns.

    Example:
        >>> as_csv([{"a": 1, "b": "x"}])
        'a,b\\n1,x\\n'
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON, atomically; NaN and infinity become null.

    Args:
        path: Where to.
        value: Nested dicts, lists, numbers, strings, booleans and None.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_json(Path(folder, "a.json"), {"a": float("nan")})
        ...     json.loads(Path(folder, "a.json").read_text())
        {'a': None}
    """
    text = json.dumps(finite(value), indent=2, ensure_ascii=False) + "\n"
    write_file(path, text)


def finite(value: Any) -> Any:
    """Returns a value for JSON: NaN and infinity become None.

    Example:
        >>> finite({"a": [float("nan"), 1.0]})
        {'a': [None, 1.0]}
    """
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
