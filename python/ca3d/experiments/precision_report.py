"""The report of the precision study, made of its rows alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ca3d.experiments import precision_plots
from ca3d.experiments.markdown import machine, p_text, percent, table
from ca3d.experiments.observer import KINDS
from ca3d.experiments.precision_study import (
    CONSTANTS,
    LOSS_FACTORS,
    ROUNDINGS,
    Scale,
    Study,
)
from ca3d.experiments.rows import Row
from ca3d.experiments.statistics import (
    Interval,
    binomial_interval,
    bootstrap_interval,
    holm,
    paired_difference,
)
from ca3d.training.checkpoint import write_file
from ca3d.training.logs import write_csv

__all__ = ["write_report"]

Scores = dict[int, list[float]]


@dataclass(frozen=True)
class Condition:
    """One condition of one model: a regime with its options.

    Args:
        model: Of its cells.
        regime: Likewise.
        options: Of the regime.
        rows: By seed.
    """

    model: str
    regime: str
    options: Mapping[str, Any]
    rows: Mapping[int, Row]

    @property
    def name(self) -> str:
        """As it stands in a table."""
        if not self.options:
            return self.regime
        return (
            f"c {self.options['constant']:g}, v {self.options['loss_factor']:g},"
            f" {self.options['rounding']}"
        )

    @property
    def scores(self) -> Scores:
        """Seed -> 1 for each test clip that was right, else 0."""
        return {seed: [float(c) for c in row["correct"]] for seed, row in self.rows.items()}

    def observed(self, pick: Callable[[dict[str, Any]], tuple[float, float]]) -> float | None:
        """The ratio of two sums over the seeds; None where nothing was counted."""
        pairs = [pick(row["observed"]) for row in self.rows.values() if "observed" in row]
        whole = sum(pair[1] for pair in pairs)
        return sum(pair[0] for pair in pairs) / whole if whole else None

    @property
    def unchanged(self) -> float | None:
        """Share of the updates after which theta is what it was."""
        return self.observed(lambda o: (o["updates"]["unchanged"], o["updates"]["count"]))

    @property
    def lost(self) -> float | None:
        """Share of the updates that nothing keeps."""
        return self.observed(lambda o: (o["updates"]["lost"], o["updates"]["count"]))

    @property
    def realised(self) -> float | None:
        """What was done of the updates, in their direction."""
        return self.observed(lambda o: (o["updates"]["realised"], o["updates"]["intended"]))

    def kind(self, kind: str, what: str) -> float | None:
        """Share of the values of a kind that a tally counts under `what`."""
        return self.observed(lambda o: (o["kinds"][kind][what], o["kinds"][kind]["count"]))


def write_report(study: Study, path: Path, scale: Scale, origin: str) -> None:
    """Writes the report, a CSV file of all conditions and the pictures.

    Args:
        study: What was planned and what is there.
        path: The Markdown file; the CSV file stands beside it, pictures in `images/`.
        scale: How large the runs are.
        origin: What `StudyOptions.origin` says.

    Raises:
        ca3d.errors.UserError: A file can't be written.
    """
    found = _conditions(study)
    comparisons = _differences(found)
    effects = {model: _main_effects(found, model) for model in study.main}
    corrected = holm(
        {
            **{key: p for key, (_, p) in comparisons.items()},
            **{(m, name): p for m, rows in effects.items() for name, (_, p) in rows.items()},
        }
    )
    lines = ["# The precision study: results", "", *_summary(study, scale, origin)]
    lines += ["", "## Learning rate and weight decay", "", *_tuning(study)]
    for model in study.main:
        conditions = [c for c in found if c.model == model and c.rows]
        if not conditions:
            continue
        lines += ["", f"## {model}", "", *_accuracies(conditions, comparisons, corrected)]
        if effects[model]:
            lines += ["", "Main effects on test accuracy (points), averaged over the other two"]
            lines += ["factors within each seed:", "", *_effects(model, effects[model], corrected)]
        lines += ["", *_kinds(conditions)]
    if natives := [(c, study.rows[c.key]) for c in study.native if c.key in study.rows]:
        lines += ["", "## torch's native float16, one short run", ""]
        lines += table(
            ["regime", "steps", "skipped", "test, %"],
            [
                [c.regime, row["steps"], row["skipped"], percent(row["test_top1"])]
                for c, row in natives
            ],
        )
    pictures = precision_plots.draw(found, path.parent / "images")
    if pictures:
        lines += ["", "## Pictures", ""]
        lines += [f"![{about}](images/{file})\n" for file, about in pictures.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, "\n".join(lines).rstrip() + "\n")
    if any(c.rows for c in found):
        write_csv(path.with_suffix(".csv"), [_csv_row(c) for c in found if c.rows])


def _conditions(study: Study) -> list[Condition]:
    found: list[Condition] = []
    for model, cells in study.main.items():
        seen: list[tuple[str, Mapping[str, Any]]] = []
        for cell in cells:
            pair = (cell.regime, cell.regime_options)
            if pair not in seen:
                seen.append(pair)
                rows = study.done(model, regime=pair[0], regime_options=pair[1])
                found.append(Condition(model, *pair, rows))
    return found


def _summary(study: Study, scale: Scale, origin: str) -> list[str]:
    planned = sum(map(len, study.main.values()))
    done = sum(cell.key in study.rows for cells in study.main.values() for cell in cells)
    tuned = sum(cell.key in study.rows for cells in study.tuning.values() for cell in cells)
    every = [row for row in study.rows.values() if row["cell"]["part"] == "main"]
    taken = sum(row["cpu_seconds"] for row in study.rows.values()) / 3600
    data, recipe = scale.data, scale.recipe
    missing = [name for name in study.tuning if name not in study.main]
    lines = [
        f"{origin} The design, fixed before the first run, is in"
        " [precision-study.md](precision-study.md).",
        "",
        f"- Runs: **{done} of {planned} planned** in the models whose learning rate is chosen, and"
        f" {tuned} for choosing it; {taken:.2f} CPU-hours in all. {machine()}",
        f"- Data: {data['name']}, {data['train']} training, {data['val']} validation and"
        f" {data['test']} test clips of {data['frames']}x{data['size']}x{data['size']};"
        f" {recipe['epochs']} epochs, batch {recipe['batch_size']}, {recipe['schedule']} schedule.",
    ]
    if every:
        chance = 1 / every[0]["classes"]
        lines.append(f"- Guessing is right in {percent(chance)} % of the clips.")
    if missing:
        lines.append(f"- **Not run yet**: {', '.join(missing)}.")
    for model, cells in study.main.items():
        left = [cell for cell in cells if cell.key not in study.rows]
        if left:
            lines.append(
                f"- {model}: {len(cells) - len(left)} of {len(cells)} runs; what is missing has an"
                " empty row below."
            )
    return lines


def _tuning(study: Study) -> list[str]:
    rows = []
    for model, cells in study.tuning.items():
        accuracy: dict[tuple[float, float], list[float]] = {}
        for cell in cells:
            if cell.key in study.rows:
                pair = (cell.recipe["lr"], cell.recipe["weight_decay"])
                accuracy.setdefault(pair, []).append(study.rows[cell.key]["val_top1"])
        for (lr, decay), values in accuracy.items():
            mark = "chosen" if study.chosen.get(model) == (lr, decay) else ""
            rows.append([model, lr, decay, len(values), percent(float(np.mean(values))), mark])
    if not rows:
        return ["Not run yet."]
    return [
        "Mean validation accuracy in float32, on seeds that are not used below.",
        "",
        *table(["model", "lr", "weight decay", "runs", "validation, %", ""], rows),
    ]


def _differences(found: Sequence[Condition]) -> dict[tuple[str, str], tuple[Interval, float]]:
    """(model, condition) -> its paired difference to float32 and the p-value."""
    base = {c.model: c.scores for c in found if c.regime == "float32"}
    return {
        (c.model, c.name): paired_difference(c.scores, base[c.model])
        for c in found
        if c.regime != "float32" and set(c.rows) & set(base[c.model])
    }


def _main_effects(found: Sequence[Condition], model: str) -> dict[str, tuple[Interval, float]]:
    """Contrasts of the levels of each factor, over the seeds that have the whole factorial."""
    grid = {tuple(c.options.values()): c.scores for c in found if c.model == model and c.options}
    seeds = set.intersection(*(set(scores) for scores in grid.values())) if grid else set()
    if not seeds or len(grid) < len(CONSTANTS) * len(LOSS_FACTORS) * len(ROUNDINGS):
        return {}

    def mean(place: int, level: Any) -> Scores:
        return {
            seed: np.mean([s[seed] for k, s in grid.items() if k[place] == level], axis=0).tolist()
            for seed in seeds
        }

    contrasts: list[tuple[str, int, Any, Any]] = [
        *((f"{r} - nearest", 2, r, "nearest") for r in ROUNDINGS if r != "nearest"),
        *((f"c = {c:g} - c = 128", 0, c, 128.0) for c in CONSTANTS if c != 128),
        *((f"v = {v:g} - v = 128", 1, v, 128.0) for v in LOSS_FACTORS if v != 128),
    ]
    return {
        name: paired_difference(mean(place, level), mean(place, base))
        for name, place, level, base in contrasts
    }


def _accuracies(
    conditions: Sequence[Condition],
    comparisons: Mapping[tuple[str, str], tuple[Interval, float]],
    corrected: Mapping[Any, float],
) -> list[str]:
    rows = []
    for c in conditions:
        scores = list(c.scores.values())
        right = float(np.mean([sum(s) for s in scores]))
        difference, _ = comparisons.get((c.model, c.name), (None, 0.0))
        rows.append(
            [
                c.name,
                len(scores),
                binomial_interval(right, len(scores[0])).as_percent(),
                bootstrap_interval(scores).as_percent(),
                "" if difference is None else difference.as_percent(sign=True),
                p_text(corrected.get((c.model, c.name))),
                percent(c.unchanged),
                percent(c.lost),
                "-" if c.realised is None else f"{c.realised:.3f}",
                sum(row["skipped"] for row in c.rows.values()),
            ]
        )
    return [
        "Test accuracy in percent, with the binomial interval over clips (as the paper prints) and"
        " a bootstrap over seeds and clips; difference to float32, paired by seed and clip, with p"
        " by Holm over all comparisons of this report. Unchanged: updates that leave theta as it"
        " was; lost: those that no compensation keeps either; realised: what was done of the"
        " updates, in their direction. c is the constant, v the loss factor.",
        "",
        *table(
            [
                *("condition", "seeds", "test (binomial)", "test (bootstrap)", "- float32"),
                *("p", "unchanged, %", "lost, %", "realised", "skipped steps"),
            ],
            rows,
        ),
    ]


def _effects(
    model: str,
    effects: Mapping[str, tuple[Interval, float]],
    corrected: Mapping[Any, float],
) -> list[str]:
    return table(
        ["contrast", "difference", "p (Holm)"],
        [
            [name, interval.as_percent(2, sign=True), p_text(corrected[(model, name)])]
            for name, (interval, _) in effects.items()
        ],
    )


def _kinds(conditions: Sequence[Condition]) -> list[str]:
    """Overflow and underflow of each kind of tensor, for the conditions that differ in them."""
    rows = []
    for c in conditions:
        if c.options and c.options["rounding"] != "nearest":
            continue
        for kind in KINDS:
            cells = [
                percent(c.kind(kind, what), 3)
                for what in ("zero", "underflow", "subnormal", "above_bound", "overflow")
            ]
            rows.append([c.name, kind, *cells])
    return [
        "Values by kind of tensor, in percent of those that were looked at (the other roundings:"
        " see the CSV file). Underflow: 0 as stored, and not 0 in the float64 step or, for"
        " gradients, in the float32 pass. Subnormal: below 6.1e-5. Bound: 32768 and above. For"
        " float32 and qat the columns say how the values lie in float16's range.",
        "",
        *table(["condition", "kind", "zero", "underflow", "subnormal", "bound", "overflow"], rows),
    ]


def _csv_row(c: Condition) -> Row:
    scores = list(c.scores.values())
    row: Row = {
        "model": c.model,
        "regime": c.regime,
        "constant": c.options.get("constant", ""),
        "loss_factor": c.options.get("loss_factor", ""),
        "rounding": c.options.get("rounding", ""),
        "seeds": len(scores),
        "test_top1": round(float(np.mean(scores)), 6),
        "skipped": sum(r["skipped"] for r in c.rows.values()),
        "steps": sum(r["steps"] for r in c.rows.values()),
        "unchanged": c.unchanged,
        "lost": c.lost,
        "realised": c.realised,
    }
    for kind in KINDS:
        for what in ("zero", "underflow", "vanish", "subnormal", "above_bound", "overflow"):
            row[f"{kind}_{what}"] = c.kind(kind, what)
    return row
