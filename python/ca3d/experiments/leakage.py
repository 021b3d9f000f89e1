"""What a random split over clips adds to an accuracy: one model, two divisions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ca3d.experiments.comparison_report import entries
from ca3d.experiments.markdown import percent, table
from ca3d.experiments.plan import Plan
from ca3d.experiments.recordings import DIVISIONS
from ca3d.experiments.rows import Row
from ca3d.experiments.statistics import bootstrap_interval

__all__ = ["leakage_plans", "leakage_report"]

CUTS = 8


def leakage_plans(
    data: Mapping[str, Any],
    models: Mapping[str, Mapping[str, Any]],
    recipe: Mapping[str, Any],
    seeds: Sequence[int],
) -> dict[str, Plan]:
    """The same model on clips of recordings, divided over recordings and over clips.

    Args:
        data: Sizes and shape of the clips.
        models: Options of the model, by its name.
        recipe: Of every run.
        seeds: The same for both.

    Returns:
        A plan for each of `ca3d.experiments.recordings.DIVISIONS`.

    Example:
        >>> list(leakage_plans({}, {"ca3d_tiny": {}}, {"lr": 0.03}, range(5)))
        ['grouped', 'random']
    """
    return {
        division: Plan(
            data={**data, "name": "mocap15", "division": division, "cuts": CUTS},
            models=models,
            regimes=["float32"],
            seeds=seeds,
            recipe=recipe,
        )
        for division in DIVISIONS
    }


def leakage_report(plans: Mapping[str, Plan], rows: Mapping[str, Row]) -> list[str]:
    """The two accuracies as Markdown.

    Args:
        plans: What `leakage_plans` returned.
        rows: Rows by key.
    """
    lines = []
    for division, plan in plans.items():
        (entry,) = entries(plan, rows)
        if not entry.rows:
            lines.append([division, 0, "not run yet", ""])
            continue
        interval = bootstrap_interval(list(entry.scores.values()), entry.groups)
        lines.append(
            [division, len(entry.rows), interval.as_percent(), percent(entry.mean("val_top1"))]
        )
    return [
        f"Every {CUTS} clips are of one recording (one view, body and background; other moments)."
        " 'grouped' keeps the clips of a recording on one side, 'random' divides over clips, as the"
        " published protocol does. Same model, same clips in all, same recipe; intervals by"
        " bootstrap over seeds and recordings.",
        "",
        *table(["division", "seeds", "test, %", "validation, %"], lines),
    ]
