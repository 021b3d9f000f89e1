"""`ca3d compare`: models x regimes x seeds on one data set."""

# `option` returns dataclasses.field(...), which is what a default should be.
# ruff: noqa: RUF009

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ca3d import models, precision
from ca3d.data.embedded import maker
from ca3d.errors import UserError
from ca3d.experiments.comparison_report import Entry, comparison, csv_rows, draw, entries
from ca3d.experiments.display import Display
from ca3d.experiments.markdown import machine
from ca3d.experiments.plan import Plan, run_plan
from ca3d.experiments.rows import Row, read_rows, run_dates, today
from ca3d.experiments.runner import ROWS, RunOptions
from ca3d.experiments.study import check_words, words
from ca3d.options import option
from ca3d.training import TrainConfig
from ca3d.training.checkpoint import write_file
from ca3d.training.logs import write_csv

__all__ = ["PRESETS", "CompareConfig", "make_plan", "run"]

_TABLE_MODELS = (
    "ca3d,ca3d_l,r3d_18,r2plus1d_18,r2plus1d_18_15m,i3d,x3d_xl,stam_b,timesformer_b,vivit_2,"
    "swin3d_t,tubevit_b"
)
_PAPER: dict[str, Any] = {
    "models": _TABLE_MODELS,
    "regimes": "float32,qat,float16-published",
    "frames": 16,
    "stride": 2,
    "size": 112,
    "batch_size": 20,
    "schedule": "published",
    "rates": [1e-2, 5e-3, 1e-3],
    "published": True,
}
_SHORT = {"epochs": 50, "warmup_epochs": 10.0, "milestones": [25, 30, 35, 40, 45]}
_LONG = {
    "epochs": 120,
    "warmup_epochs": 20.0,
    "milestones": list(range(70, 120, 5)),
    "weight_decay": 5e-5,
}
#: What the paper's tables fix: table1a is UCF101, table1b HMDB51, table2 Kinetics400.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "table1a": {**_PAPER, **_SHORT, "dataset": "ucf101"},
    "table1b": {**_PAPER, **_SHORT, "dataset": "hmdb51"},
    "table2": {**_PAPER, **_LONG, "dataset": "kinetics400"},
}


@dataclass
class CompareConfig:
    """Every option of `ca3d compare`.

    Raises:
        ca3d.errors.UserError: From `validate`.

    Example:
        >>> CompareConfig(data="my_videos").seeds
        5
    """

    data: str = option(
        "",
        "Folder of videos, or mocap15, mocap30 or motion-order: clips rendered here and held in"
        " memory",
        "Comparison",
        positional=True,
    )
    models: str = option("ca3d,r3d_18", "Models, separated by commas", "Comparison")
    regimes: str = option("float32,float16", "Precision regimes, likewise", "Comparison")
    seeds: int = option(5, "Seeds of everything, from 0; fewer than 5 infer nothing", "Comparison")
    preset: Literal["table1a", "table1b", "table2"] | None = option(
        None,
        "The settings of a table of the paper: table1a UCF101, table1b HMDB51, table2 Kinetics400;"
        " the published protocol, recipe and models (--models, --regimes and --seeds stay free)",
        "Comparison",
    )
    reference: str | None = option(
        None,
        "MODEL or MODEL:REGIME that the rest is compared with (default: the first)",
        "Comparison",
    )
    controls: str = option(
        "",
        "'frames' (one frame, repeated) and 'shuffled' (frames in random order), separated by"
        " commas: every model is trained so too; data held in memory only",
        "Comparison",
    )
    out: str = option("comparison", "Folder of the comparison; the same one goes on", "Comparison")
    only_report: bool = option(False, "Train nothing: report what the folder has", "Comparison")

    clips: Literal["small", "default", "large"] = option(
        "default", "How many clips of data held in memory, as in `ca3d data make`", "Clips"
    )
    frames: int = option(16, "Frames in a clip", "Clips")
    stride: int = option(2, "Frames from one sampled frame to the next", "Clips")
    size: int = option(112, "Height and width of a clip in pixels", "Clips")

    epochs: int = option(50, "Passes over the training split", "Recipe")
    batch_size: int = option(20, "Clips in a batch", "Recipe")
    schedule: Literal["published", "cosine", "onecycle", "constant"] = option(
        "published", "Learning rate over time", "Recipe"
    )
    rates: list[float] | None = option(
        None,
        "Learning rates; of several, each model takes the best on validation in the first regime,"
        " over two seeds that don't count (default: 1e-3)",
        "Recipe",
        count="+",
    )
    weight_decay: float | None = option(
        None, "Weight decay (default: as published for each model)", "Recipe"
    )

    jobs: int = option(1, "Runs at a time; more than one have one thread each", "Run")
    budget_hours: float | None = option(
        None, "CPU-hours, those of former calls included, after which no run is begun", "Run"
    )
    device: str = option("auto", "cpu, cuda, cuda:1 ... (auto: cuda when there is one)", "Run")
    progress: Literal["auto", "rich", "plain", "none"] = option("auto", "Progress display", "Run")

    def validate(self) -> None:
        """Raises `UserError` for the first option whose value is not allowed."""
        if not self.data:
            raise UserError("DATA must name a folder of videos or one of the data sets made here")
        if self.seeds < 1:
            raise UserError(f"--seeds must be at least 1, not {self.seeds}")
        check_words("--models", self.models, models.names())
        check_words("--regimes", self.regimes, precision.names())
        check_words("--controls", self.controls, ("frames", "shuffled"), least=0)
        for rate in self.rates or ():
            if not (math.isfinite(rate) and rate > 0):
                raise UserError(f"--rates must be finite and above 0, not {rate}")
        embedded = self.data in maker.names()
        if self.controls and not embedded:
            raise UserError(f"--controls {self.controls}: {self.data} is not held in memory")
        if self.preset is not None and embedded:
            raise UserError(f"--preset {self.preset} is about videos, not about {self.data}")
        if self.preset is not None:
            self._check_free()

    def _check_free(self) -> None:
        """Raises `UserError` for an option that the preset fixes."""
        assert self.preset is not None
        defaults = {field.name: field.default for field in fields(self)}
        for name, value in PRESETS[self.preset].items():
            given = getattr(self, name, None)
            fixed = name not in ("models", "regimes", "published", "dataset", "rates")
            if fixed and name in defaults and given not in (defaults[name], value):
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} {given}: --preset {self.preset} has {value}; leave it out")


def make_plan(config: CompareConfig) -> Plan:
    """The runs of a comparison.

    Args:
        config: The options.

    Returns:
        What `ca3d compare` trains.

    Raises:
        ca3d.errors.UserError: An option is not allowed.

    Example:
        >>> plan = make_plan(CompareConfig(data="ucf101", preset="table1a", seeds=1))
        >>> plan.models["ca3d"], plan.own["i3d"]["weight_decay"], plan.recipe["epochs"]
        ({'preset': 'published'}, 0.0005, 50)
    """
    config.validate()
    preset = dict(PRESETS[config.preset]) if config.preset else {}
    defaults = {field.name: field.default for field in fields(config)}

    def setting(name: str) -> Any:
        given = getattr(config, name)
        return preset.get(name, given) if given == defaults[name] else given

    names = words(setting("models"))
    published = {"preset": "published"} if config.preset else {}
    data, recipe = _data(config, setting, preset)
    recipe |= {name: setting(name) for name in ("epochs", "batch_size", "schedule")}
    recipe |= {name: preset[name] for name in ("warmup_epochs", "milestones") if name in preset}
    rates = list(dict.fromkeys(setting("rates") or [TrainConfig().lr]))
    decay = setting("weight_decay")
    return Plan(
        data=data,
        models={name: published if name.startswith("ca3d") else {} for name in names},
        regimes=words(setting("regimes")),
        seeds=range(config.seeds),
        recipe={**recipe, "lr": rates[0]},
        own={
            name: {"weight_decay": models.recipe(name).weight_decay if decay is None else decay}
            for name in names
        },
        rates=rates,
        controls=words(config.controls),
    )


def run(config: CompareConfig) -> Path:
    """Trains what is missing of a comparison, and writes its report.

    Args:
        config: The options.

    Returns:
        The report: `report.md` in the folder, beside `runs.csv` and `accuracy.png`.

    Raises:
        ca3d.errors.UserError: An option is not allowed, data or model can't be used, or a file
            can't be written.
        ca3d.training.interrupt.StoppedError: SIGINT or SIGTERM came; everything is kept.
    """
    plan = make_plan(config)
    folder = Path(config.out)
    report = folder / "report.md"
    if report.exists() and not (folder / ROWS).exists():
        raise UserError(f"{report} is of no comparison: choose another --out")
    if config.only_report:
        rows = read_rows(folder / ROWS)
        found = entries(plan, rows)
        if rows and not any(entry.rows for entry in found):
            raise UserError(
                f"{folder} has {len(rows)} runs, but none of this comparison: give the options"
                " that they were made with"
            )
    else:
        keep = config.data not in maker.names()
        options = RunOptions(folder, config.jobs, config.budget_hours, keep, config.device)
        rows = run_plan(plan, options, Display(config.progress))
    found = entries(plan, rows)
    lines = [f"# Comparison on {config.data}", "", *_about(config, plan, rows), ""]
    lines += comparison(found, _reference(config, found))
    if any(entry.rows for entry in found):
        chance = 1 / next(row["classes"] for entry in found for row in entry.rows.values())
        draw(found, folder / "accuracy.png", config.data, chance)
        lines += ["", "![test accuracy](accuracy.png)"]
        write_csv(folder / "runs.csv", csv_rows(found))
    folder.mkdir(parents=True, exist_ok=True)
    write_file(report, "\n".join(lines) + "\n")
    return report


def _data(
    config: CompareConfig, setting: Any, preset: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What cells know of the data, and what their recipe says of it."""
    shape = {"frames": setting("frames"), "size": setting("size")}
    if config.data in maker.names():
        clips = maker.SIZES[config.clips]
        return {"name": config.data, **shape, "step": setting("stride"), **clips}, {}
    protocol = {"protocol": "published", "dataset": preset["dataset"]} if preset else {}
    return {"folder": config.data}, {**shape, "stride": setting("stride"), **protocol}


def _reference(config: CompareConfig, found: list[Entry]) -> Entry:
    if config.reference is None:
        return found[0]
    name, _, regime = config.reference.partition(":")
    for entry in found:
        if entry.name == name and regime in ("", entry.regime) and entry.control is None:
            return entry
    raise UserError(f"--reference {config.reference} is not among --models and --regimes")


def _about(config: CompareConfig, plan: Plan, rows: Mapping[str, Row]) -> list[str]:
    cells = plan.cells(plan.chosen(rows))
    done = [rows[cell.key] for cell in cells if cell.key in rows]
    runs = run_dates(done)
    taken = sum(row["cpu_seconds"] for row in rows.values()) / 3600
    planned = len(plan.seeds) * sum(1 for _ in plan.conditions())
    lines = [
        f"- Written on {today()}{runs and f', from {runs}'}: {len(done)} of {planned} runs,"
        f" {taken:.2f} CPU-hours. {machine()}"
    ]
    if config.preset is not None:
        lines.append(
            f"- Settings of the paper's {config.preset}, **published protocol**: a random split"
            " over clips, so that clips of one recording are on both sides. Not comparable with"
            " results on official splits."
        )
    lines += _tested(done)
    rates = plan.chosen(rows)
    if len(plan.rates) > 1:
        text = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
        lines.append(f"- Learning rates, chosen on validation in {plan.regimes[0]}: {text or '-'}.")
    return lines


def _tested(rows: list[Row]) -> list[str]:
    """What clips the runs were tested on, and which they had to do without."""
    if not rows:
        return []
    row = rows[0]
    line = f"- {len(row['correct'])} test clips of {row['classes']} classes"
    lacking = [f"{row[what]} {what}" for what in ("missing", "unreadable") if row.get(what)]
    if lacking:
        line += f"; videos left out: {', '.join(lacking)} (listed in each run's folder)"
    diverged = sum(row.get("unscored", 0) > 0 for row in rows)
    if diverged:
        line += f". **{diverged} runs diverged**: clips without finite scores count as wrong"
    return [f"{line}."]
