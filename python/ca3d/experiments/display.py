"""What a running grid shows: a live table on a terminal, a line per finished cell elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ca3d.errors import UserError
from ca3d.experiments.cells import Cell
from ca3d.experiments.rows import Row, cell_of

__all__ = ["Display", "condition"]

_LINES = 24


def condition(cell: Cell) -> str:
    """What a cell is, apart from its seed, in words.

    Args:
        cell: Any cell.

    Example:
        >>> condition(Cell("r3d", "float16", 3, {}, regime_options={"rounding": "nearest"}))
        'r3d float16 rounding=nearest'
        >>> condition(Cell("r3d", "qat", 3, {"control": "shuffled"}, part="tune"))
        'tune r3d qat control=shuffled'
    """
    options = dict(cell.regime_options)
    if cell.part == "tune":
        options |= {key: cell.recipe[key] for key in ("lr", "weight_decay") if key in cell.recipe}
    if cell.data.get("control"):
        options["control"] = cell.data["control"]
    model = f"{cell.model}#{cell.variant}" if cell.variant else cell.model
    words = [model, cell.regime, *(f"{k}={_short(v)}" for k, v in options.items())]
    return " ".join(words if cell.part == "main" else [cell.part, *words])


class Display:
    """Shows how a grid goes.

    Args:
        kind: "rich", "plain", "none", or "auto": rich on a terminal, plain elsewhere.

    Raises:
        ca3d.errors.UserError: An unknown kind.

    Example:
        >>> display = Display("plain")
        >>> cell = Cell("ca3d_tiny", "float32", 0, {})
        >>> row = {"key": cell.key, "cell": cell.to_dict(), "val_top1": 0.5, "test_top1": 0.25}
        >>> with display.running([cell], {}):
        ...     display.finished({**row, "skipped": 0, "seconds": 3.0})
        0 of 1 runs are done
        [1/1] ca3d_tiny float32, seed 0: validation 50.0 %, test 25.0 % (3 s)
    """

    def __init__(self, kind: str = "auto") -> None:
        if kind == "auto":
            kind = "rich" if sys.stdout.isatty() else "plain"
        if kind not in ("rich", "plain", "none"):
            raise UserError(f"--progress must be auto, rich, plain or none, not {kind!r}")
        self.kind = kind
        self._rows: dict[str, list[Row]] = {}
        self._wanted: dict[str, int] = {}
        self._done = self._total = 0
        self._now: list[str] = []
        self._live: Any = None
        self._began = time.monotonic()
        self._done_before = 0

    @contextmanager
    def running(self, cells: Sequence[Cell], done: Mapping[str, Row]) -> Iterator[None]:
        """Shows the state while the grid runs.

        Args:
            cells: All cells of the grid.
            done: The rows that are there already, by key.
        """
        self._total, self._done, self._done_before = len(cells), len(done), len(done)
        self._began = time.monotonic()
        self._wanted, self._rows = {}, {}
        for cell in cells:
            name = condition(cell)
            self._wanted[name] = self._wanted.get(name, 0) + 1
            if cell.key in done:
                self._rows.setdefault(name, []).append(done[cell.key])
        if self.kind == "rich":
            from rich.live import Live

            with Live(get_renderable=self._table, refresh_per_second=2) as self._live:
                yield
            self._live = None
            return
        if cells:
            self.message(f"{self._done} of {self._total} runs are done")
        yield

    def message(self, line: str) -> None:
        """Shows a line."""
        if self._live is not None:
            self._live.console.print(line, highlight=False, markup=False)
        elif self.kind != "none":
            print(line, flush=True)

    def begins(self, cell: Cell) -> None:
        """Notes that a cell is being trained."""
        self._now.append(f"{condition(cell)}, seed {cell.seed}")

    def finished(self, row: Row) -> None:
        """Shows the figures of a finished cell."""
        cell = cell_of(row)
        name = f"{condition(cell)}, seed {cell.seed}"
        if name in self._now:
            self._now.remove(name)
        # Moved to the end: the table shows what was touched last.
        rows = self._rows.pop(condition(cell), [])
        self._rows[condition(cell)] = [*rows, row]
        self._done += 1
        if self.kind == "plain":
            skipped = f", {row['skipped']} steps skipped" if row["skipped"] else ""
            self.message(
                f"[{self._done}/{self._total}] {name}: validation {_percent(row['val_top1'])}, test"
                f" {_percent(row['test_top1'])}{skipped} ({row['seconds']:.0f} s{self._left()})"
            )

    def _left(self) -> str:
        trained = self._done - self._done_before
        left = self._total - self._done
        if not left or not trained:
            return ""
        minutes = (time.monotonic() - self._began) / trained * left / 60
        return f", about {minutes:.0f} min left"

    def _table(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False)
        table.add_column("condition")
        for name in ("runs", "validation", "test", "skipped"):
            table.add_column(name, justify="right")
        for name, rows in list(self._rows.items())[-_LINES:]:
            table.add_row(
                name,
                f"{len(rows)}/{self._wanted.get(name, len(rows))}",
                _percent(_mean([row["val_top1"] for row in rows])),
                _percent(_mean([row["test_top1"] for row in rows])),
                str(sum(row["skipped"] for row in rows) or ""),
            )
        now = Text("; ".join(self._now), style="dim")
        return Group(table, Text(f"{self._done} of {self._total} runs{self._left()}"), now)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
