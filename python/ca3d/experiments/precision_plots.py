"""The pictures of the precision study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ca3d.experiments.observer import EXPONENTS, UPDATE_EXPONENTS
from ca3d.experiments.statistics import bootstrap_interval
from ca3d.training.plots import BLUE, INK, ORANGE, new_figure, save_figure

if TYPE_CHECKING:
    from ca3d.experiments.precision_report import Condition

__all__ = ["draw"]

_COLORS = {"published": ORANGE, "nearest": BLUE, "stochastic": "#3f8f5b", "compensated": "#8a4fa3"}
_KIND_COLORS = {
    "weights": INK,
    "gradients": ORANGE,
    "momentum": "#8a4fa3",
    "activations": "#3f8f5b",
}


def draw(found: Sequence[Condition], folder: Path) -> dict[str, str]:
    """Draws what the conditions allow.

    Args:
        found: All conditions.
        folder: Where the pictures go.

    Returns:
        File name -> what the picture shows, without those that lack their rows.
    """
    pictures: dict[str, str] = {}
    models = list(dict.fromkeys(c.model for c in found if c.rows))
    for model in models:
        here = [c for c in found if c.model == model and c.rows]
        folder.mkdir(parents=True, exist_ok=True)
        name = f"precision-accuracy-{model}.png"
        _accuracies(here, folder / name, model)
        pictures[name] = (
            f"{model}: test accuracy of every condition, bootstrap over seeds and clips"
        )
        wide = next((c for c in here if c.regime == "float32"), None)
        half = _default(here)
        if wide is not None and half is not None:
            name = f"precision-range-{model}.png"
            _ranges(wide, half, folder / name, model)
            pictures[name] = (
                f"{model}: values by kind against float16's range, in float32 and in float16"
                " (c = v = 128)"
            )
            name = f"precision-updates-{model}.png"
            _updates(wide, half, folder / name, model)
            pictures[name] = f"{model}: updates in units of float16's spacing at theta"
    return pictures


def _default(conditions: Sequence[Condition]) -> Condition | None:
    wanted = {"constant": 128.0, "loss_factor": 128.0, "rounding": "nearest"}
    return next((c for c in conditions if dict(c.options) == wanted), None)


def _accuracies(conditions: Sequence[Condition], path: Path, title: str) -> None:
    figure = new_figure(7, 1.2 + 0.17 * len(conditions))
    axes = figure.subplots()
    for place, c in enumerate(reversed(conditions)):
        interval = bootstrap_interval(list(c.scores.values()))
        color = _COLORS.get(c.options.get("rounding", ""), INK)
        per_seed = [100 * float(np.mean(s)) for s in c.scores.values()]
        axes.plot(per_seed, [place] * len(per_seed), ".", color=color, alpha=0.35, markersize=4)
        if interval.inferred:
            axes.plot([100 * interval.low, 100 * interval.high], [place] * 2, color=color, lw=1.4)
        axes.plot(100 * interval.mean, place, "o", color=color, markersize=4)
        if c.regime == "float32":
            axes.axvline(100 * interval.mean, color=INK, lw=0.6, ls=":")
    axes.set_yticks(range(len(conditions)), [c.name for c in reversed(conditions)], fontsize=6)
    axes.set_xlabel("test accuracy, %", fontsize=8)
    axes.set_title(title, fontsize=9, color=INK)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_ylim(-0.7, len(conditions) - 0.3)
    save_figure(figure, path)


def _summed(c: Condition, pick: Any) -> np.ndarray:
    return np.sum([pick(row["observed"]) for row in c.rows.values() if "observed" in row], axis=0)


def _ranges(wide: Condition, half: Condition, path: Path, title: str) -> None:
    figure = new_figure(9, 3)
    figure.suptitle(title, fontsize=9, color=INK)
    for axes, c in zip(figure.subplots(1, 2, sharey=True), (wide, half), strict=True):
        for kind, color in _KIND_COLORS.items():
            counts = _summed(c, lambda o, kind=kind: o["kinds"][kind]["exponents"])
            if np.size(counts) and counts.sum():
                axes.plot(
                    EXPONENTS,
                    100 * counts / counts.sum(),
                    color=color,
                    label=kind,
                    drawstyle="steps",
                )
        _mark_range(axes)
        axes.set_title(c.name, fontsize=8, color=INK)
        axes.set_xlabel("log2 |value| (zeros left out)", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.legend(fontsize=6, frameon=False)
    figure.axes[0].set_ylabel("% of the values", fontsize=8)
    save_figure(figure, path)


def _mark_range(axes: Any) -> None:
    axes.axvspan(EXPONENTS.start, -25, color="#d9dde1", lw=0)
    axes.axvspan(-25, -14, color="#eef0f2", lw=0)
    axes.axvspan(16, EXPONENTS.stop - 1, color="#d9dde1", lw=0)
    axes.set_xlim(EXPONENTS.start, EXPONENTS.stop - 1)


def _updates(wide: Condition, half: Condition, path: Path, title: str) -> None:
    figure = new_figure(6, 3)
    axes = figure.subplots()
    for c, color in ((wide, INK), (half, BLUE)):
        counts = _summed(c, lambda o: o["updates"]["exponents"])
        if np.size(counts) and counts.sum():
            share = 100 * counts / counts.sum()
            axes.plot(UPDATE_EXPONENTS, share, color=color, label=c.name, drawstyle="steps")
    axes.axvspan(UPDATE_EXPONENTS.start, -1, color="#eef0f2", lw=0)
    axes.set_xlim(UPDATE_EXPONENTS.start, UPDATE_EXPONENTS.stop - 1)
    axes.set_xlabel(
        "log2 (|update| / spacing of float16 at theta); grey: rounds to nothing", fontsize=8
    )
    axes.set_ylabel("% of the updates", fontsize=8)
    axes.set_title(title, fontsize=9, color=INK)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7, frameon=False)
    save_figure(figure, path)
