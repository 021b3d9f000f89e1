"""The report of a comparison of models, made of its rows alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ca3d.experiments.markdown import p_text, percent, table
from ca3d.experiments.plan import Plan
from ca3d.experiments.rows import Row, check_same_clips
from ca3d.experiments.statistics import (
    LEAST_SEEDS,
    Interval,
    binomial_interval,
    bootstrap_interval,
    holm,
    paired_difference,
)
from ca3d.training.plots import BLUE, INK, ORANGE, new_figure, save_figure

__all__ = ["Entry", "comparison", "csv_rows", "draw", "entries"]

_CONTROLS = {"frames": "one frame, repeated", "shuffled": "frames shuffled"}


@dataclass(frozen=True)
class Entry:
    """One line of a comparison.

    Args:
        name: Of the model in the plan.
        regime: Of its runs.
        control: Of its runs, or None.
        planned: Runs that belong to it.
        rows: Those that are there, by seed.
    """

    name: str
    regime: str
    control: str | None
    planned: int
    rows: Mapping[int, Row]

    @property
    def title(self) -> str:
        """As it stands in the report."""
        model = self.name.replace("#", ", ")
        control = f", {_CONTROLS[self.control]}" if self.control else ""
        return f"{model}{control}, {self.regime}"

    @property
    def scores(self) -> dict[int, list[float]]:
        """Seed -> 1 for each test clip that was right, else 0."""
        return {seed: [float(c) for c in row["correct"]] for seed, row in self.rows.items()}

    @property
    def groups(self) -> list[str] | None:
        """What the test clips come from, where the data set says it."""
        for row in self.rows.values():
            return row.get("groups")
        return None

    def mean(self, what: str) -> float | None:
        """Mean of a figure of the rows; None without one."""
        values = [row[what] for row in self.rows.values() if row[what] is not None]
        return float(np.mean(values)) if values else None


def entries(plan: Plan, rows: Mapping[str, Row]) -> list[Entry]:
    """All lines of a comparison, those without a row included.

    Args:
        plan: What was planned.
        rows: Rows by key.
    """
    rates = plan.chosen(rows)
    found = []
    for name, regime, control in plan.conditions():
        cells = plan.condition(name, regime, control, rates)
        there = {cell.seed: rows[cell.key] for cell in cells if cell.key in rows}
        found.append(Entry(name, regime, control, len(plan.seeds), there))
    return found


def comparison(found: Sequence[Entry], reference: Entry | None = None) -> list[str]:
    """A comparison as Markdown.

    Args:
        found: Its lines.
        reference: What the others are compared with; None is the first line.

    Returns:
        Lines: what was not run, the table, and how to read it.

    Raises:
        ca3d.errors.UserError: The runs were tested on different clips.
    """
    reference = reference or found[0]
    check_same_clips(row for entry in found for row in entry.rows.values())
    differences = _differences(found, reference)
    corrected = holm({entry.title: p for entry, (_, p) in differences})
    by_title = {entry.title: interval for entry, (interval, _) in differences}
    rows = [
        _line(entry, by_title.get(entry.title), corrected.get(entry.title))
        for entry in found
        if entry.rows
    ]
    lines = []
    missing = [entry for entry in found if len(entry.rows) < entry.planned]
    if missing:
        names = "; ".join(
            f"{entry.title} ({len(entry.rows)} of {entry.planned} seeds)" for entry in missing
        )
        lines += [f"**Not run yet**: {names}.", ""]
    if not rows:
        return lines
    few = any(len(entry.rows) < LEAST_SEEDS for entry in found if entry.rows)
    return [
        *lines,
        *table(
            [
                *("", "parameters", "seeds", "train, %", "validation, %"),
                *("test, % (binomial)", "test, % (bootstrap)", "difference", "p", "skipped"),
            ],
            rows,
        ),
        "",
        "Binomial: over clips, as the paper prints it; it knows nothing of seeds. Bootstrap: over"
        " seeds and source groups (clips, where the data set names no groups). Difference: test"
        f" accuracy minus that of *{reference.title}*, in points, paired by seed and clip; p of a"
        f" paired t-test over seeds, corrected by Holm over the {len(differences)} comparisons of"
        " this table." + (f" Fewer than {LEAST_SEEDS} seeds: no inference." if few else ""),
    ]


def csv_rows(found: Sequence[Entry]) -> list[dict[str, Any]]:
    """One row for each run of a comparison.

    Args:
        found: Its lines.
    """
    return [
        {
            "model": entry.name,
            "regime": entry.regime,
            "control": entry.control or "",
            "seed": seed,
            "lr": row["cell"]["recipe"]["lr"],
            **{name: row[name] for name in ("parameters", "steps", "skipped")},
            "best_epoch": row["best_epoch"] + 1,  # people count from 1
            **{name: row[name] for name in ("train_top1", "val_top1", "test_top1")},
            "cpu_seconds": row["cpu_seconds"],
        }
        for entry in found
        for seed, row in sorted(entry.rows.items())
    ]


def draw(found: Sequence[Entry], path: Path, title: str, chance: float) -> None:
    """Draws the test accuracy of every line: seeds as dots, the bootstrap interval as a bar.

    Args:
        found: Lines of a comparison; those without a row are left out.
        path: The PNG.
        title: Above the picture.
        chance: Accuracy of guessing, dotted.
    """
    shown = [entry for entry in found if entry.rows]
    figure = new_figure(7, 1.1 + 0.24 * len(shown))
    axes = figure.subplots()
    for place, entry in enumerate(reversed(shown)):
        color = ORANGE if entry.control else (BLUE if "ca3d" in entry.name else INK)
        scores = list(entry.scores.values())
        interval = bootstrap_interval(scores, entry.groups)
        axes.plot(
            [100 * np.mean(s) for s in scores], [place] * len(scores), ".", color=color, alpha=0.4
        )
        if interval.inferred:
            axes.plot([100 * interval.low, 100 * interval.high], [place] * 2, color=color, lw=1.6)
        axes.plot(100 * interval.mean, place, "o", color=color, markersize=5)
    axes.axvline(100 * chance, color=INK, lw=0.8, ls=":")
    axes.set_yticks(range(len(shown)), [entry.title for entry in reversed(shown)], fontsize=7)
    axes.set_xlabel("test accuracy, % (dotted: guessing)", fontsize=8)
    axes.set_title(title, fontsize=9, color=INK)
    axes.tick_params(axis="x", labelsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)


def _differences(
    found: Sequence[Entry], reference: Entry
) -> list[tuple[Entry, tuple[Interval, float]]]:
    return [
        (entry, paired_difference(entry.scores, reference.scores, reference.groups))
        for entry in found
        if entry is not reference and set(entry.rows) & set(reference.rows)
    ]


def _line(entry: Entry, difference: Interval | None, p: float | None) -> list[Any]:
    scores = list(entry.scores.values())
    right = float(np.mean([sum(s) for s in scores]))
    first = next(iter(entry.rows.values()))
    return [
        entry.title,
        f"{first['parameters']:,}",
        len(scores),
        percent(entry.mean("train_top1")),
        percent(entry.mean("val_top1")),
        binomial_interval(right, len(scores[0])).as_percent(),
        bootstrap_interval(scores, entry.groups).as_percent(),
        "" if difference is None else difference.as_percent(sign=True),
        p_text(p),
        sum(row["skipped"] for row in entry.rows.values()),
    ]
