"""Running a grid of cells, so that it can be killed at any moment and goes on where it was."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from ca3d.errors import UserError
from ca3d.experiments.cells import Cell
from ca3d.experiments.display import Display
from ca3d.experiments.rows import Row, RowFile, check_same_clips
from ca3d.training.logs import write_json
from ca3d.training.run_folder import environment

__all__ = ["ROWS", "RunOptions", "run_cells"]

#: Name of the file of rows in a grid's folder.
ROWS = "rows.jsonl"


@dataclass(frozen=True)
class RunOptions:
    """How a grid is run.

    Args:
        folder: Holds the rows, rendered clips and run folders.
        jobs: Cells that are trained at a time, each by one thread in a process of its own; 1 trains
            in this process.
        budget_hours: No cell is begun once the rows in the folder have taken so many CPU-hours, or
            would with one more cell as long as their mean; None is no limit.
        keep: Whether cells leave run folders and resume in the middle.
        device: As `ca3d train --device`.

    Raises:
        ca3d.errors.UserError: From `validate`.

    Example:
        >>> RunOptions(Path("grid"), jobs=0).validate()
        Traceback (most recent call last):
        ca3d.errors.UserError: --jobs must be at least 1, not 0
    """

    folder: Path
    jobs: int = 1
    budget_hours: float | None = None
    keep: bool = False
    device: str = "auto"

    def validate(self) -> None:
        """Raises `UserError` for the first value that is not allowed."""
        if self.jobs < 1:
            raise UserError(f"--jobs must be at least 1, not {self.jobs}")
        if self.budget_hours is not None and not self.budget_hours > 0:
            raise UserError(f"--budget-hours must be above 0, not {self.budget_hours}")


def run_cells(
    cells: Sequence[Cell], options: RunOptions, display: Display | None = None
) -> dict[str, Row]:
    """Trains the cells that have no row yet, in order.

    Args:
        cells: The grid.
        options: How to run it.
        display: Shows the progress.

    Returns:
        The rows of those cells that have one, by key, in the order of the cells. Fewer than cells:
        the budget is used up, and the same call with a larger one goes on.

    Raises:
        ca3d.errors.UserError: An option, or a cell's model, data or recipe can't be used, or the
            data changed since other cells were tested on it.
        ca3d.training.interrupt.StoppedError: SIGINT or SIGTERM came.

    Example:
        >>> run_cells([], RunOptions(scratch))
        {}
    """
    options.validate()
    display = display or Display("none")
    keys = [cell.key for cell in cells]
    with RowFile(options.folder / ROWS) as file:
        missing = [cell for cell, key in zip(cells, keys, strict=True) if key not in file.rows]
        if missing:
            write_json(options.folder / "environment.json", environment())
        with display.running(cells, {key: file.rows[key] for key in keys if key in file.rows}):
            train = _here if options.jobs == 1 else _in_processes
            for row in train(missing, options, lambda: _may_begin(file, options), display):
                check_same_clips([*(file.rows[key] for key in keys if key in file.rows), row])
                file.add(row)
                display.finished(row)
        return {key: file.rows[key] for key in keys if key in file.rows}


def _may_begin(file: RowFile, options: RunOptions) -> bool:
    if options.budget_hours is None or not file.rows:
        return True
    taken = [float(row["cpu_seconds"]) for row in file.rows.values()]
    return sum(taken) * (1 + 1 / len(taken)) <= 3600 * options.budget_hours


def _here(
    cells: Sequence[Cell], options: RunOptions, may_begin: Callable[[], bool], display: Display
) -> Iterator[Row]:
    from ca3d.experiments.training import train_cell

    for cell in cells:
        if not may_begin():
            return
        display.begins(cell)
        yield train_cell(
            cell, options.folder, keep=options.keep, device=options.device, say=display.message
        )


def _in_processes(
    cells: Sequence[Cell], options: RunOptions, may_begin: Callable[[], bool], display: Display
) -> Iterator[Row]:
    waiting = list(reversed(cells))
    # A fresh interpreter each: forked ones would share locks of torch's threads.
    pool = ProcessPoolExecutor(
        options.jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker
    )
    running: set[Future[Row]] = set()
    try:
        while True:
            while waiting and len(running) < options.jobs and may_begin():
                cell = waiting.pop()
                display.begins(cell)
                running.add(pool.submit(_train, cell, options))
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    finally:
        # Cells that are under way have no row: they are trained again, or resumed.
        for process in list(getattr(pool, "_processes", {}).values()):
            process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    import torch

    torch.set_num_threads(1)
    # Ctrl-C reaches the whole process group; the parent ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _train(cell: Cell, options: RunOptions) -> Row:
    from ca3d.experiments.training import train_cell

    return train_cell(cell, options.folder, keep=options.keep, device=options.device)
