"""`ca3d study precision`: what training in float16 costs, and which of its parts repair what."""

# `option` returns dataclasses.field(...), which is what a default should be.

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ca3d.experiments.cells import Cell
from ca3d.experiments.display import Display
from ca3d.experiments.rows import Row
from ca3d.experiments.runner import run_cells
from ca3d.experiments.study import Scale, StudyOptions, check_words, words
from ca3d.options import option

__all__ = ["PrecisionStudyConfig", "main_cells", "run", "tuning_cells"]

CONSTANTS = (1.0, 100.0, 128.0)
LOSS_FACTORS = (0.1, 1.0, 128.0)
ROUNDINGS = ("published", "nearest", "stochastic", "compensated")

RATES = (0.01, 0.03, 0.1, 0.3)
DECAYS = (5e-4, 5e-3)
#: Other seeds than those of the study, so that nothing is tuned on the runs that count.
TUNING_SEEDS = (100, 101)
SEEDS = (0, 1, 2, 3, 4)

# Run first, so that a study that is not finished has whole comparisons: the package's regime, the
# roundings that repair it, what was published, plain float16, and master weights.
_FIRST: tuple[dict[str, Any], ...] = (
    {"constant": 128.0, "loss_factor": 128.0, "rounding": "nearest"},
    {"constant": 128.0, "loss_factor": 128.0, "rounding": "stochastic"},
    {"constant": 128.0, "loss_factor": 128.0, "rounding": "compensated"},
    {"constant": 100.0, "loss_factor": 0.1, "rounding": "published"},
    {"constant": 1.0, "loss_factor": 1.0, "rounding": "nearest"},
)


_RECIPE = {"batch_size": 32, "schedule": "cosine", "momentum": 0.9}
SCALES = {
    "tiny": Scale(
        data={"name": "mocap15", "frames": 8, "size": 16, "train": 1500, "val": 300, "test": 600},
        recipe={**_RECIPE, "epochs": 4},
        models={
            "ca3d_tiny": {
                "widths": [8, 16, 32],
                "spatial_depths": [0, 0, 1],
                "temporal_depths": [0, 0, 1],
                "spatial_heads": [1, 1, 1],
                "temporal_heads": [0, 2, 4],
                "stem_kernel": 3,
                "dropout": 0.0,
            },
            "r3d_tiny": {"widths": [6, 12, 16, 24], "depths": [1, 1, 1, 1]},
            "r2plus1d_tiny": {"widths": [6, 12, 16, 24], "depths": [1, 1, 1, 1]},
        },
        observe=40,
    ),
    "small": Scale(
        data={"name": "mocap30", "frames": 16, "size": 32, "train": 2700, "val": 240, "test": 480},
        recipe={**_RECIPE, "epochs": 12},
        models={"ca3d_tiny": {"dropout": 0.0}, "r3d_tiny": {}, "r2plus1d_tiny": {}},
        observe=100,
    ),
}


@dataclass
class PrecisionStudyConfig(StudyOptions):
    """Every option of `ca3d study precision`.

    Raises:
        ca3d.errors.UserError: From `validate`.

    Example:
        >>> PrecisionStudyConfig().scale
        'tiny'
    """

    out: str = option("studies/precision", "Folder of the study; the same one goes on", "Study")
    models: str = option(
        "ca3d_tiny,r3d_tiny,r2plus1d_tiny",
        "Models, separated by commas; the first goes first",
        "Study",
    )
    scale: Literal["tiny", "small"] = option(
        "tiny",
        "'tiny': 16x16 pixels and some 190 steps; 'small': 32x32 pixels and 1000 steps",
        "Study",
    )

    def validate(self) -> None:
        """Raises `UserError` for the first option whose value is not allowed."""
        super().validate()
        check_words("--models", self.models, SCALES[self.scale].models)

    @property
    def names(self) -> list[str]:
        """The models, in order."""
        return words(self.models)


def tuning_cells(scale: Scale, model: str) -> list[Cell]:
    """The float32 runs from whose validation accuracy learning rate and weight decay are chosen.

    Args:
        scale: How large they are.
        model: One of `scale.models`.

    Example:
        >>> len(tuning_cells(SCALES["tiny"], "ca3d_tiny"))
        16
    """
    return [
        _cell(scale, model, "float32", seed, lr=rate, weight_decay=decay, part="tune")
        for rate, decay, seed in itertools.product(RATES, DECAYS, TUNING_SEEDS)
    ]


def main_cells(
    scale: Scale, model: str, lr: float, weight_decay: float, seeds: Sequence[int] = SEEDS
) -> list[Cell]:
    """The runs that count: float32, qat, and the factorial of float16.

    Args:
        scale: How large they are.
        model: One of `scale.models`.
        lr: Chosen for this model, in float32.
        weight_decay: Likewise.
        seeds: The same for every condition, so that differences are paired.

    Returns:
        All seeds of a condition together; the conditions that matter most first.

    Example:
        >>> cells = main_cells(SCALES["tiny"], "ca3d_tiny", 0.1, 5e-4)
        >>> len(cells), len({cell.key for cell in cells})
        (190, 190)
    """
    grid = [
        {"constant": c, "loss_factor": v, "rounding": r}
        for c, v, r in itertools.product(CONSTANTS, LOSS_FACTORS, ROUNDINGS)
    ]
    conditions = [
        ("float32", {}),
        ("float16", _FIRST[0]),
        ("qat", {}),
        *(("float16", options) for options in _FIRST[1:]),
        *(("float16", options) for options in grid if options not in _FIRST),
    ]
    return [
        _cell(scale, model, regime, seed, options, lr=lr, weight_decay=weight_decay)
        for regime, options in conditions
        for seed in seeds
    ]


def first_conditions() -> int:
    """How many conditions `main_cells` puts first.

    Example:
        >>> first_conditions()
        7
    """
    return 2 + len(_FIRST)


def native_cells(scale: Scale, model: str, lr: float, weight_decay: float) -> list[Cell]:
    """The check: one short run in torch's own float16, and the same in ours.

    Args:
        scale: How large they are.
        model: One of `scale.models`.
        lr: Chosen for this model, in float32.
        weight_decay: Likewise.

    Example:
        >>> [cell.regime for cell in native_cells(SCALES["tiny"], "ca3d_tiny", 0.1, 0.0)]
        ['native-float16', 'float16', 'float32']
    """
    common: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "part": "native"}
    plain = {"constant": 1.0, "loss_factor": 1.0, "rounding": "nearest"}
    cells = [
        _cell(scale, model, "native-float16", 0, {}, **common),
        _cell(scale, model, "float16", 0, plain, **common),
        _cell(scale, model, "float32", 0, {}, **common),
    ]
    data = {**scale.data, "train": 240, "val": 120, "test": 120}
    recipe = {"epochs": 2}
    return [replace(cell, data=data, recipe={**cell.recipe, **recipe}, observe=0) for cell in cells]


def chosen(rows: Mapping[str, Row], cells: Sequence[Cell]) -> tuple[float, float] | None:
    """The learning rate and weight decay with the best mean validation accuracy.

    Args:
        rows: Rows by key.
        cells: What `tuning_cells` returned.

    Returns:
        Both, the first of equals; None while a row is missing.

    Example:
        >>> cells = tuning_cells(SCALES["tiny"], "ca3d_tiny")
        >>> chosen({cell.key: {"val_top1": cell.recipe["lr"]} for cell in cells}, cells)
        (0.3, 0.0005)
    """
    if any(cell.key not in rows for cell in cells):
        return None
    accuracy: dict[tuple[float, float], list[float]] = {}
    for cell in cells:
        pair = (cell.recipe["lr"], cell.recipe["weight_decay"])
        accuracy.setdefault(pair, []).append(rows[cell.key]["val_top1"])
    return max(accuracy, key=lambda pair: sum(accuracy[pair]))


@dataclass
class Study:
    """What a study planned and has.

    Args:
        tuning: Tuning cells by model.
        chosen: Learning rate and weight decay by model, where they are known.
        main: The cells that count by model, where learning rate and decay are known.
        native: The check in torch's own float16.
        rows: All rows by key.
    """

    tuning: dict[str, list[Cell]]
    chosen: dict[str, tuple[float, float]]
    main: dict[str, list[Cell]]
    native: list[Cell]
    rows: dict[str, Row]

    def done(self, model: str, **values: Any) -> dict[int, Row]:
        """The rows of one condition by seed.

        Args:
            model: Of the main cells.
            **values: Fields of the cell.
        """
        cells = [cell for cell in self.main.get(model, []) if cell.matches(**values)]
        return {cell.seed: self.rows[cell.key] for cell in cells if cell.key in self.rows}


def run(config: PrecisionStudyConfig) -> Path:
    """Runs what is missing of the study, and writes the report.

    Args:
        config: The options.

    Returns:
        The report.

    Raises:
        ca3d.errors.UserError: An option is not allowed, or a file can't be written.
        ca3d.training.interrupt.StoppedError: SIGINT or SIGTERM came; finished runs are kept.
    """
    from ca3d.experiments.precision_report import write_report

    config.validate()
    scale = SCALES[config.scale]
    display, options = Display(config.progress), config.run_options
    study = _read(config)
    if not config.only_report:
        border = first_conditions() * config.seeds
        for name in config.names:
            run_cells(study.tuning[name], options, display)
            study = _read(config)
            run_cells(study.main.get(name, [])[:border], options, display)
        rest = [cell for cells in study.main.values() for cell in cells[border:]]
        run_cells([*study.native, *rest], options, display)
        study = _read(config)
    report = config.report_file
    write_report(study, report, scale, config.origin("precision", study.rows))
    return report


def _read(config: PrecisionStudyConfig) -> Study:
    from ca3d.experiments.rows import read_rows
    from ca3d.experiments.runner import ROWS

    scale, rows = SCALES[config.scale], read_rows(config.folder / ROWS)
    tuning = {name: tuning_cells(scale, name) for name in config.names}
    best = {name: chosen(rows, cells) for name, cells in tuning.items()}
    found = {name: pair for name, pair in best.items() if pair is not None}
    seeds = range(config.seeds)
    return Study(
        tuning=tuning,
        chosen=found,
        main={name: main_cells(scale, name, *pair, list(seeds)) for name, pair in found.items()},
        native=[
            cell
            for name, pair in found.items()
            if name == "r3d_tiny"
            for cell in native_cells(scale, name, *pair)
        ],
        rows=rows,
    )


def _cell(
    scale: Scale,
    model: str,
    regime: str,
    seed: int,
    options: Mapping[str, Any] | None = None,
    *,
    lr: float,
    weight_decay: float,
    part: str = "main",
) -> Cell:
    return Cell(
        model=model,
        regime=regime,
        seed=seed,
        data={**scale.data, "score_train": False},
        model_options=scale.models[model],
        regime_options=options or {},
        recipe={**scale.recipe, "lr": lr, "weight_decay": weight_decay},
        part=part,
        observe=scale.observe if part == "main" else 0,
    )
