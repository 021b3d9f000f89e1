"""A grid is run once, whatever happens in between."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ca3d.errors import UserError
from ca3d.experiments.cells import Cell
from ca3d.experiments.rows import RowFile, read_rows
from ca3d.experiments.runner import ROWS, RunOptions, run_cells
from ca3d.experiments.training import train_cell

DATA = {"name": "motion-order", "train": 16, "val": 8, "test": 8, "frames": 4, "step": 4}
TINY = {
    "widths": [4, 8],
    "spatial_depths": [0, 0],
    "temporal_depths": [0, 0],
    "spatial_heads": [1, 1],
    "temporal_heads": [0, 2],
    "stem_kernel": 3,
}
RECIPE = {"epochs": 2, "batch_size": 8, "schedule": "constant", "lr": 0.05}


def _cell(seed: int = 0, regime: str = "float32", **values: object) -> Cell:
    return Cell(
        "ca3d_tiny",
        regime,
        seed,
        DATA,
        model_options=TINY,
        recipe=RECIPE,
        **values,  # type: ignore[arg-type]
    )


def _figures(row: dict) -> dict:
    """What another run of the cell has too."""
    return {k: value for k, value in row.items() if "seconds" not in k and k != "date"}


def test_key_is_of_all_values() -> None:
    cell = _cell()
    others = [
        replace(cell, seed=1),
        replace(cell, regime="qat"),
        replace(cell, recipe={**RECIPE, "lr": 0.1}),
        replace(cell, data={**DATA, "control": "frames"}),
        replace(cell, part="tune"),
    ]
    assert len({cell.key, *(other.key for other in others)}) == 6
    assert Cell.of(json.loads(json.dumps(cell.to_dict()))).key == cell.key


def test_finished_cells_are_not_run_again(tmp_path: Path) -> None:
    cells = [_cell(0), _cell(1), _cell(0, "float16", regime_options={"rounding": "stochastic"})]
    first = run_cells(cells[:1], RunOptions(tmp_path))
    everything = run_cells(cells, RunOptions(tmp_path))
    assert list(everything) == [cell.key for cell in cells]
    assert everything[cells[0].key] == first[cells[0].key]
    assert len((tmp_path / ROWS).read_text().splitlines()) == 3
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", row["date"]) for row in everything.values())
    # Seeds matter, and a run is repeatable.
    again = train_cell(cells[2], tmp_path / "elsewhere")
    assert _figures(json.loads(json.dumps(again))) == _figures(everything[cells[2].key])
    assert everything[cells[0].key]["cell"]["seed"] != everything[cells[1].key]["cell"]["seed"]


def test_half_a_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / ROWS
    with RowFile(path) as file:
        file.add({"key": "a", "x": 1})
    with path.open("a") as text:
        text.write('{"key": "b", "x"')
    assert list(read_rows(path)) == ["a"]
    with RowFile(path) as file:
        assert list(file.rows) == ["a"]
        file.add({"key": "c"})
    assert list(read_rows(path)) == ["a", "c"]


def test_damaged_and_shared_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / ROWS
    for line in ("no row", '{"key": 1}', '{"x": 1}', "[]"):
        path.write_text(line + "\n")
        with pytest.raises(UserError, match="line 1: no row of an experiment"):
            RowFile(path)
    script = f"from ca3d.experiments.rows import RowFile; RowFile({str(tmp_path / 'b')!r})"
    with RowFile(tmp_path / "b"):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "in use by another process" in done.stderr


def test_a_diverged_run_gets_no_clip_right(tmp_path: Path) -> None:
    # Scores that are all NaN have an argmax, the first class, which is right for some clips.
    cell = replace(_cell(), recipe={**RECIPE, "lr": 1e20})
    row = train_cell(cell, tmp_path)
    assert row["unscored"] == 8
    assert (row["test_top1"], row["correct"]) == (0.0, "0" * 8)


def test_budget_counts_what_was_spent_before(tmp_path: Path) -> None:
    cells = [_cell(seed) for seed in range(3)]
    (row,) = run_cells(cells[:1], RunOptions(tmp_path)).values()
    with RowFile(tmp_path / ROWS) as file:
        file.add({**row, "cpu_seconds": 1800.0})
    # Another run as long as the mean of those so far would end at an hour.
    assert list(run_cells(cells, RunOptions(tmp_path, budget_hours=0.9))) == [cells[0].key]
    found = run_cells(cells, RunOptions(tmp_path, budget_hours=1.0))
    assert len(found) == 3
    with pytest.raises(UserError, match="--budget-hours must be above 0"):
        run_cells(cells, RunOptions(tmp_path, budget_hours=0.0))


_GRID = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_runner import _cell
from ca3d.experiments.display import Display
from ca3d.experiments.runner import RunOptions, run_cells
run_cells([_cell(s) for s in range(4)], RunOptions(Path({folder!r}), jobs={jobs}), Display("plain"))
"""


@pytest.mark.slow
def test_killed_grid_goes_on(tmp_path: Path) -> None:
    script = _GRID.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "a"), jobs=1)
    process = subprocess.Popen([sys.executable, "-c", script])
    path = tmp_path / "a" / ROWS
    while not (path.is_file() and path.read_text().count("\n")) and process.poll() is None:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = path.read_text()
    assert 1 <= before.count("\n") < 4
    subprocess.run([sys.executable, "-c", script], check=True)
    assert path.read_text().startswith(before)
    whole = run_cells([_cell(seed) for seed in range(4)], RunOptions(tmp_path / "b"))
    assert {k: _figures(r) for k, r in read_rows(path).items()} == {
        k: _figures(r) for k, r in whole.items()
    }


@pytest.mark.slow
def test_processes_give_the_same_rows(tmp_path: Path) -> None:
    script = _GRID.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "a"), jobs=2)
    shown = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    assert b"[4/4]" in shown.stdout
    whole = run_cells([_cell(seed) for seed in range(4)], RunOptions(tmp_path / "b"))
    found = read_rows(tmp_path / "a" / ROWS)
    assert {k: _figures(found[k]) for k in whole} == {k: _figures(r) for k, r in whole.items()}
