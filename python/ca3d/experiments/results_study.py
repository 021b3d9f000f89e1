"""`ca3d study results`: small versions of the models at equal multiply-adds, on both data sets."""

# `option` returns dataclasses.field(...), which is what a default should be.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ca3d import models
from ca3d.experiments.comparison_report import comparison, csv_rows, draw, entries
from ca3d.experiments.display import Display
from ca3d.experiments.markdown import machine, table
from ca3d.experiments.plan import Plan, run_plan
from ca3d.experiments.rows import Row, read_rows
from ca3d.experiments.runner import ROWS
from ca3d.experiments.study import Scale, StudyOptions, check_words, words
from ca3d.options import option
from ca3d.training.checkpoint import write_file
from ca3d.training.logs import write_csv

__all__ = ["MODELS", "SCALES", "ResultsStudyConfig", "plans", "run"]

MODELS = ("ca3d_tiny", "r3d_tiny", "r2plus1d_tiny", "x3d_tiny", "timesformer_tiny")
REGIMES = ("float32", "qat", "float16")
RATES = (0.01, 0.03, 0.1)
CONTROLS = ("frames", "shuffled")

#: The data sets are "mocap30" and "motion-order"; models have about equal multiply-adds.
SCALES: Mapping[str, Scale] = {
    "full": Scale(
        {"frames": 16, "size": 32, "step": 1, "train": 2700, "val": 240, "test": 480},
        {"epochs": 12, "batch_size": 32, "schedule": "cosine"},
    ),
    "tiny": Scale(
        {"frames": 8, "size": 16, "train": 1500, "val": 300, "test": 600},
        {"epochs": 10, "batch_size": 32, "schedule": "cosine"},
        {
            "ca3d_tiny": {
                "widths": [8, 16, 32],
                "spatial_depths": [1, 1, 1],
                "temporal_depths": [0, 1, 1],
                "spatial_heads": [1, 1, 1],
                "temporal_heads": [0, 2, 4],
                "stem_kernel": 3,
                "dropout": 0.0,
            },
            "r3d_tiny": {"widths": [4, 6, 10, 16], "depths": [1, 1, 1, 1]},
            "r2plus1d_tiny": {"widths": [5, 10, 16, 24], "depths": [1, 1, 1, 1]},
            "x3d_tiny": {"width": 0.6, "depth": 1.0, "head_width": 64, "dropout": 0.0},
            "timesformer_tiny": {"width": 32, "depth": 2},
        },
    ),
}


@dataclass
class ResultsStudyConfig(StudyOptions):
    """Every option of `ca3d study results`.

    Raises:
        ca3d.errors.UserError: From `validate`.

    Example:
        >>> ResultsStudyConfig().seeds
        5
    """

    out: str = option("studies/results", "Folder of the study; the same one goes on", "Study")
    scale: Literal["full", "tiny"] = option(
        "full", "'full': 16x32x32 clips, 2700 for training; 'tiny': 8x16x16, 1500", "Study"
    )
    models: str = option(",".join(MODELS), "Models, separated by commas", "Study")
    datasets: str = option(
        "motion-order,mocap30", "Data sets, likewise; the first goes first", "Study"
    )
    regimes: str = option(
        ",".join(REGIMES), "Precision regimes, likewise; the first chooses rates", "Study"
    )

    def validate(self) -> None:
        """Raises `UserError` for the first option whose value is not allowed."""
        super().validate()
        check_words("--models", self.models, models.names())
        check_words("--datasets", self.datasets, ["mocap30", "motion-order"])
        check_words("--regimes", self.regimes, REGIMES)


def plans(config: ResultsStudyConfig) -> dict[str, Plan]:
    """The comparison on each data set.

    Args:
        config: The options.

    Example:
        >>> {name: len(plan.cells({m: 0.1 for m in MODELS}))
        ...  for name, plan in plans(ResultsStudyConfig()).items()}
        {'motion-order': 125, 'mocap30': 125}
    """
    scale = SCALES[config.scale]
    names = words(config.models)
    return {
        dataset: Plan(
            data={"name": dataset, **scale.data, "score_train": True},
            models={name: scale.models.get(name, {}) for name in names},
            regimes=words(config.regimes),
            seeds=range(config.seeds),
            recipe=scale.recipe,
            own={name: {"weight_decay": models.recipe(name).weight_decay} for name in names},
            rates=RATES,
            controls=CONTROLS,
        )
        for dataset in words(config.datasets)
    }


def run(config: ResultsStudyConfig) -> Path:
    """Runs what is missing of the study, and writes its report.

    Args:
        config: The options.

    Returns:
        The report.

    Raises:
        ca3d.errors.UserError: An option is not allowed, or a file can't be written.
        ca3d.training.interrupt.StoppedError: SIGINT or SIGTERM came; finished runs are kept.
    """
    config.validate()
    display = Display(config.progress)
    todo = plans(config)
    if not config.only_report:
        for plan in todo.values():
            run_plan(plan, config.run_options, display)
    rows = read_rows(config.folder / ROWS)
    report = config.report_file
    write_file(report, "\n".join(_lines(config, todo, rows, report)) + "\n")
    return report


def _lines(
    config: ResultsStudyConfig, todo: Mapping[str, Plan], rows: Mapping[str, Row], report: Path
) -> list[str]:
    scale = SCALES[config.scale]
    data, recipe = scale.data, scale.recipe
    taken = sum(row["cpu_seconds"] for row in rows.values()) / 3600
    lines = [
        "# Small models, compared",
        "",
        f"{config.origin('results', rows)} Every model is a"
        " small version (`*-tiny`) of its namesake with about the multiply-adds of `ca3d_tiny`, and"
        " none of these figures says anything about the full-size models. Clips are rendered here;"
        f" {data['train']} train, {data['val']} validate and {data['test']} test, of"
        f" {data['frames']}x{data['size']}x{data['size']}; {recipe['epochs']} epochs. The learning"
        f" rate is chosen for each model from {', '.join(map(str, RATES))} on validation in float32"
        " and kept in every regime. The controls are the same models given one frame of each clip"
        " (repeated), or its frames in random order: what they reach needs no motion, or no order.",
        "",
        f"{len(rows)} runs, {taken:.2f} CPU-hours. {machine()}",
        "",
        *_macs(config, scale),
    ]
    every: list[dict[str, Any]] = []
    for dataset, plan in todo.items():
        found = entries(plan, rows)
        lines += ["", f"## {dataset}", ""]
        rates = plan.chosen(rows)
        text = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
        lines += [f"Learning rates: {text or 'not chosen yet'}.", "", *comparison(found)]
        if any(entry.rows for entry in found):
            picture = report.parent / "images" / f"results-{dataset}.png"
            chance = 1 / next(row["classes"] for entry in found for row in entry.rows.values())
            draw(found, picture, dataset, chance)
            lines += ["", f"![{dataset}](images/{picture.name})"]
            every += [{"dataset": dataset, **row} for row in csv_rows(found)]
    if every:
        write_csv(report.with_suffix(".csv"), every)
    return lines


def _macs(config: ResultsStudyConfig, scale: Scale) -> list[str]:
    frames, size = scale.data["frames"], scale.data["size"]
    rows = []
    for name in words(config.models):
        options = scale.models.get(name, {})
        model = models.create_for_clips(name, 30, frames=frames, size=size, **options)
        count = models.count_macs(model, (1, 3, frames, size, size))["total"]
        parameters = sum(p.numel() for p in model.parameters())
        rows.append([name, f"{parameters:,}", f"{count / 1e6:.2f}"])
    return table(["model (30 classes)", "parameters", "million MACs a clip"], rows)
