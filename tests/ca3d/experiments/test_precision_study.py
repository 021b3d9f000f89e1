"""The plan of the precision study, and its report from rows whose figures are known."""

import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from ca3d.errors import UserError
from ca3d.experiments import precision_study
from ca3d.experiments.cells import Cell
from ca3d.experiments.observer import KINDS, Observer
from ca3d.experiments.precision_study import (
    SCALES,
    SEEDS,
    TUNING_SEEDS,
    PrecisionStudyConfig,
    chosen,
    main_cells,
    tuning_cells,
)
from ca3d.experiments.rows import Row, RowFile
from ca3d.experiments.runner import ROWS
from ca3d.experiments.training import create_regime
from ca3d.precision import Float16, Float32

SCALE = SCALES["tiny"]
CLIPS = 40


def _row(cell: Cell, right: float, lost: float = 0.25) -> Row:
    rng = np.random.default_rng(cell.seed)
    correct = "".join("1" if x < right else "0" for x in rng.random(CLIPS))
    observer = Observer(Float32(), every=2)
    for kind in KINDS:
        observer.tallies[kind].count = 1000
        observer.tallies[kind].exponents[20] = 1000
    observer.tallies["gradients"].underflow = 125
    observer.updates.count, observer.updates.lost = 100, round(100 * lost)
    observer.updates.unchanged = 50
    observer.updates.exponents[3] = 100
    return {
        "key": cell.key,
        "cell": cell.to_dict(),
        "steps": 10,
        "skipped": 0,
        "val_top1": right,
        "test_top1": correct.count("1") / CLIPS,
        "correct": correct,
        "classes": 15,
        "cpu_seconds": 1.0,
        "seconds": 1.0,
        "observed": observer.to_dict(),
    }


def _write(folder: Path, rows: Iterable[Row]) -> None:
    with RowFile(folder / ROWS) as file:
        for row in rows:
            file.add(row)


def test_factorial_is_complete_and_paired() -> None:
    cells = main_cells(SCALE, "ca3d_tiny", 0.1, 5e-4)
    float16 = [cell for cell in cells if cell.regime == "float16"]
    levels = {tuple(cell.regime_options.values()) for cell in float16}
    assert len(levels) == 3 * 3 * 4
    assert len(float16) == 36 * len(SEEDS)
    assert {cell.regime for cell in cells} == {"float32", "qat", "float16"}
    # Learning rate and decay are the same for every regime, and no tuning seed counts.
    assert {(c.recipe["lr"], c.recipe["weight_decay"]) for c in cells} == {(0.1, 5e-4)}
    assert not {cell.seed for cell in cells} & set(TUNING_SEEDS)
    tuned = tuning_cells(SCALE, "ca3d_tiny")
    assert {cell.regime for cell in tuned} == {"float32"}
    assert len({cell.key for cell in [*cells, *tuned]}) == len(cells) + len(tuned)


def test_cells_get_the_regime_they_name() -> None:
    cells = main_cells(SCALE, "ca3d_tiny", 0.1, 5e-4)
    for cell in cells:
        regime = create_regime(cell)
        if cell.regime == "float16":
            assert isinstance(regime, Float16)
            assert regime.rounding == cell.regime_options["rounding"]
            assert regime.mapping.linear_scales == pytest.approx(
                (
                    cell.regime_options["constant"],
                    cell.regime_options["constant"] / cell.regime_options["loss_factor"],
                )
            )


def test_rate_is_chosen_on_validation_when_all_is_there() -> None:
    cells = tuning_cells(SCALE, "ca3d_tiny")
    rows = {c.key: {"val_top1": 0.5 if c.recipe["lr"] == 0.1 else 0.25} for c in cells}
    best = next(c for c in cells if c.recipe == {**c.recipe, "lr": 0.03, "weight_decay": 5e-3})
    # One lucky seed does not decide: the mean does.
    rows[best.key] = {"val_top1": 0.7}
    assert chosen(rows, cells) == (0.1, 5e-4)
    del rows[cells[0].key]
    assert chosen(rows, cells) is None


def test_report_of_known_rows(tmp_path: Path) -> None:
    tuned = tuning_cells(SCALE, "ca3d_tiny")
    rows = [_row(c, 0.6 if c.recipe["lr"] == 0.1 else 0.3) for c in tuned]
    cells = main_cells(SCALE, "ca3d_tiny", 0.1, 5e-4)
    quality = {"published": 0.2, "nearest": 0.5, "stochastic": 0.7, "compensated": 0.5}
    rows += [_row(c, quality.get(c.regime_options.get("rounding", ""), 0.5)) for c in cells]
    _write(tmp_path, rows)
    config = PrecisionStudyConfig(
        out=str(tmp_path), models="ca3d_tiny", only_report=True, progress="none"
    )
    text = precision_study.run(config).read_text()
    assert "190 of 190 planned" in text
    assert "| ca3d_tiny | 0.1 | 0.0005 | 2 | 60.0 | chosen |" in text

    def line(name: str) -> list[str]:
        found = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        return [cell.strip() for cell in found.strip("|").split("|")]

    # The draws of a seed are shared: nearest and compensated are float32, clip by clip.
    assert line("c 128, v 128, nearest")[4].startswith("+0.0 [+0.0, +0.0]")
    assert line("c 128, v 128, nearest")[6:9] == ["50.0", "25.0", "-"]
    assert line("compensated - nearest")[1].startswith("+0.00")
    assert line("stochastic - nearest")[1].startswith("+2")
    assert line("published - nearest")[1].startswith("-")
    assert line("c = 1 - c = 128")[1].startswith("+0.00")
    assert "12.500" in text  # underflow of gradients
    assert (tmp_path / "report.csv").read_text().count("\n") == 39
    assert len(list((tmp_path / "images").glob("*.png"))) == 3


def test_report_says_what_is_missing(tmp_path: Path) -> None:
    tuned = tuning_cells(SCALE, "ca3d_tiny")
    cells = main_cells(SCALE, "ca3d_tiny", 0.01, 5e-4)
    _write(tmp_path, [*(_row(c, 0.5) for c in tuned), *(_row(c, 0.5) for c in cells[:3])])
    config = PrecisionStudyConfig(
        out=str(tmp_path), models="ca3d_tiny,r3d_tiny", only_report=True, progress="none"
    )
    text = precision_study.run(config).read_text()
    assert "**Not run yet**: r3d_tiny." in text
    assert "3 of 190" in text
    assert "no inference" in text


def test_report_says_of_when_its_runs_are(tmp_path: Path) -> None:
    rows = [_row(cell, 0.5) for cell in tuning_cells(SCALE, "ca3d_tiny")]
    config = PrecisionStudyConfig(
        out=str(tmp_path), models="ca3d_tiny", only_report=True, progress="none"
    )

    def origin(*dates: str) -> str:
        file = tmp_path / ROWS
        file.unlink(missing_ok=True)
        _write(tmp_path, [{**row, "date": date} for row, date in zip(rows, dates, strict=False)])
        _write(tmp_path, rows[len(dates) :])
        return precision_study.run(config).read_text().splitlines()[2]

    written = f"on {time.strftime('%Y-%m-%d')}"
    assert f"{written}, from runs of unknown dates." in origin()
    assert f"{written}, from runs until 2026-11-19." in origin("2026-11-19", "2026-11-18")
    assert f"{written}, from runs of 2026-11-18." in origin(*["2026-11-18"] * len(rows))
    both = ["2026-11-18"] * (len(rows) - 1)
    assert f"{written}, from runs of 2026-11-17 to 2026-11-18." in origin(*both, "2026-11-17")


def test_options_are_checked() -> None:
    with pytest.raises(UserError, match="'resnet' is none of ca3d_tiny"):
        PrecisionStudyConfig(models="resnet").validate()
    with pytest.raises(UserError, match="--seeds must be at least 1"):
        PrecisionStudyConfig(seeds=0).validate()
