"""`ca3d study claims`: the paper's statements about its own parts, each as a comparison."""

# `option` returns dataclasses.field(...), which is what a default should be.

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ca3d.experiments.attention_cost import attention_cost, attention_report
from ca3d.experiments.comparison_report import Entry, comparison, csv_rows, entries
from ca3d.experiments.display import Display
from ca3d.experiments.leakage import leakage_plans, leakage_report
from ca3d.experiments.markdown import machine, percent, table
from ca3d.experiments.plan import Plan, run_plan
from ca3d.experiments.rows import Row, RowFile, read_rows, today
from ca3d.experiments.runner import ROWS
from ca3d.experiments.statistics import holm, paired_difference
from ca3d.experiments.study import Scale, StudyOptions, check_words, words
from ca3d.options import option
from ca3d.training.checkpoint import write_file
from ca3d.training.logs import write_csv

__all__ = ["CLAIMS", "Claim", "ClaimsConfig", "plan_of", "run", "verdict"]

_MODEL = "ca3d_variant"
_COST = "attention-cost"
#: Learning rates of which every variant takes the best on validation.
RATES = (0.03, 0.1)


@dataclass(frozen=True)
class Claim:
    """A statement that a part of the model helps.

    Args:
        name: As `--only` has it.
        statement: What is claimed: that the first of `variants` is better than the others.
        variants: Options of the model by name, the claimed one first.
        data: What differs from the data of the scale.
        recipe: What differs from the recipe of the scale.
        rates: Learning rates of which each variant takes the best on validation; a single one is
            taken by all.
    """

    name: str
    statement: str
    variants: Mapping[str, Mapping[str, Any]]
    data: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    rates: Sequence[float] = RATES


_MOCAP = {"name": "mocap30"}
_LONG = {"name": "motion-order", "segments": 3}
# After ten epochs at the tiny scale every kind of attention still guesses among its 48 classes.
_LONGER = {"epochs": 30}
CLAIMS = (
    Claim(
        "temporal-part",
        "the temporal halves' attention and convolutions each contribute",
        {
            "both": {},
            "convolutions only": {"attention": "none"},
            "attention only": {"temporal_depths": [0, 0, 0, 0]},
            "neither": {"temporal_heads": [0, 0, 0, 0], "temporal_depths": [0, 0, 0, 0]},
        },
    ),
    Claim(
        "attention-32",
        "local attention does as well as full attention, at linear cost (32 frames, 3 motions)",
        {
            "local": {},
            "full": {"attention": "full"},
            "shifted grid": {"attention": "grid"},
            "linear": {"attention": "linear"},
        },
        data={**_LONG, "frames": 32, "step": 1},
        recipe=_LONGER,
    ),
    Claim(
        "attention-64",
        "the same at 64 frames",
        {
            "local": {},
            "full": {"attention": "full"},
            "shifted grid": {"attention": "grid"},
            "linear": {"attention": "linear"},
        },
        data={**_LONG, "frames": 64, "step": 1},
        recipe=_LONGER,
        # All four kinds chose it at 32 frames, at the tiny scale; to choose again would cost two
        # CPU-hours.
        rates=(0.03,),
    ),
    Claim(
        "space-time",
        "attention along time alone is enough",
        {"time": {}, "space-time": {"attention": "space-time"}},
    ),
    Claim(
        "normalisation",
        "batch normalisation is better than layer normalisation",
        {"batch": {}, "layer": {"norm": "layer"}},
    ),
    Claim(
        "column",
        "a residual column is better than an MLP of width 1",
        {"residual": {}, "mlp": {"column": "mlp"}},
    ),
    Claim(
        "early-temporal",
        "temporal halves are not needed in blocks 1 and 2",
        {
            "blocks 3, 4": {},
            "blocks 1 to 4": {"temporal_heads": [1, 2, 4, 8], "temporal_depths": [2, 2, 2, 2]},
        },
        data={"frames": 16},
    ),
    Claim(
        "head",
        "a global mean does as well as a token that attends to all positions",
        {"mean": {}, "token": {"head": "token"}},
    ),
    Claim(
        "position",
        "the positional table helps",
        {"table": {}, "none": {"position": False}},
    ),
    Claim(
        "activation",
        "convolution, ReLU, normalisation is better than pre-activation blocks",
        {"post": {}, "pre": {"block": "pre"}},
    ),
    Claim(
        "projection",
        "a projection per head does as well as a dense one",
        {"per head": {}, "dense": {"dense_qkv": True}},
    ),
    Claim(
        "keys",
        "attention to a head's own keys is better than the published code's other heads' keys",
        # The published keys need zeros beyond the clip's ends; both have them.
        {"own": {"edge": "zero"}, "published": {"edge": "zero", "keys": "published"}},
    ),
    Claim(
        "edges",
        "windows that end at the clip's ends are better than padded or moved ones",
        {"truncate": {}, "zero": {"edge": "zero"}, "shift": {"edge": "shift"}},
    ),
    Claim(
        "pools",
        "time pools in front of the blocks (the paper's words) do as well as inside (its code)",
        {"paper": {}, "published": {"pool": "published"}},
    ),
)
#: Statements that say "as well as": a difference held against them must be a loss.
_AS_WELL = ("as well", "the same", "enough", "not needed")

SCALES: Mapping[str, Scale] = {
    "full": Scale(
        {**_MOCAP, "frames": 16, "size": 32, "step": 1, "train": 2700, "val": 240, "test": 480},
        {"epochs": 12, "batch_size": 32, "schedule": "cosine", "weight_decay": 5e-3},
    ),
    "tiny": Scale(
        {"name": "mocap15", "frames": 8, "size": 16, "train": 1500, "val": 300, "test": 600},
        {"epochs": 10, "batch_size": 32, "schedule": "cosine", "weight_decay": 5e-3},
        {
            _MODEL: {
                "widths": [8, 12, 24, 32],
                "spatial_depths": [0, 1, 1, 1],
                "stem_kernel": 3,
                "dropout": 0.0,
            }
        },
    ),
}


@dataclass
class ClaimsConfig(StudyOptions):
    """Every option of `ca3d study claims`.

    Raises:
        ca3d.errors.UserError: From `validate`.

    Example:
        >>> ClaimsConfig().scale
        'full'
    """

    out: str = option("studies/claims", "Folder of the study; the same one goes on", "Study")
    only: str = option(
        "", "Claims, separated by commas, 'leakage' and 'attention-cost' (default: all)", "Study"
    )
    scale: Literal["full", "tiny"] = option(
        "full", "'full': 16x32x32 clips, 2700 for training; 'tiny': 8x16x16, 1500", "Study"
    )

    def validate(self) -> None:
        """Raises `UserError` for the first option whose value is not allowed."""
        super().validate()
        known = [*(claim.name for claim in CLAIMS), "leakage", _COST]
        check_words("--only", self.only, known, least=0)


def plan_of(claim: Claim, config: ClaimsConfig) -> Plan:
    """The comparison that a claim stands for.

    Args:
        claim: One of `CLAIMS`.
        config: Scale and seeds.

    Example:
        >>> [name for name in plan_of(CLAIMS[-1], ClaimsConfig()).models]
        ['ca3d_variant#paper', 'ca3d_variant#published']
    """
    scale = SCALES[config.scale]
    base = scale.models.get(_MODEL, {})
    return Plan(
        data={**scale.data, **claim.data, "score_train": False},
        models={f"{_MODEL}#{name}": {**base, **own} for name, own in claim.variants.items()},
        regimes=["float32"],
        seeds=range(config.seeds),
        recipe={**scale.recipe, **claim.recipe},
        rates=claim.rates,
    )


def verdict(claim: Claim, found: list[Entry]) -> str:
    """What the rows say of a claim.

    Args:
        claim: The claim.
        found: Its lines, the claimed variant first.

    Returns:
        "held", "not held", "undecided", "no inference" or "not run yet". A claim that something is
        better holds if every other variant is worse with a corrected p below 0.05, and does not if
        one is better so; a claim that something does as well fails if another is better so, and is
        else only not contradicted.
    """
    ours, *others = found
    if not all(entry.rows for entry in found):
        return "not run yet"
    results = {other.title: paired_difference(ours.scores, other.scores) for other in others}
    if not all(interval.inferred for interval, _ in results.values()):
        return "no inference"
    corrected = holm({title: p for title, (_, p) in results.items()})
    sure = {title: results[title][0].mean for title, p in corrected.items() if p < 0.05}
    if any(mean < 0 for mean in sure.values()):
        return "not held"
    if any(word in claim.statement for word in _AS_WELL):
        return "not contradicted"
    return "held" if len(sure) == len(others) else "undecided"


def run(config: ClaimsConfig) -> Path:
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
    todo = {
        claim.name: (claim, plan_of(claim, config))
        for claim in CLAIMS
        if _asked(config, claim.name)
    }
    if not config.only_report:
        _run_missing(config, [plan for _, plan in todo.values()])
    rows = read_rows(config.folder / ROWS)
    report = config.report_file
    lines = _lines(config, todo, rows)
    every = [
        {"claim": name, **row}
        for name, (_, plan) in todo.items()
        for row in csv_rows(entries(plan, rows))
    ]
    if every:
        write_csv(report.with_suffix(".csv"), every)
    write_file(report, "\n".join(lines) + "\n")
    return report


def _asked(config: ClaimsConfig, name: str) -> bool:
    return name in (words(config.only) or [name])


def _leakage(config: ClaimsConfig) -> dict[str, Plan]:
    scale = SCALES[config.scale]
    model = {_MODEL: scale.models.get(_MODEL, {})}
    data = {**scale.data, "score_train": False}
    return leakage_plans(data, model, {**scale.recipe, "lr": RATES[-1]}, range(config.seeds))


def _run_missing(config: ClaimsConfig, plans: list[Plan]) -> None:
    options = config.run_options
    display = Display(config.progress)
    with RowFile(options.folder / ROWS) as file:
        if _asked(config, _COST) and _COST not in file.rows:
            display.message("measuring attention for clips of 8 to 1024 frames")
            began = time.process_time()
            figures = attention_cost()
            taken = time.process_time() - began
            row = {"key": _COST, "rows": figures, "cpu_seconds": taken, "date": today()}
            file.add(row)
    for plan in [*plans, *(_leakage(config).values() if _asked(config, "leakage") else [])]:
        run_plan(plan, options, display)


def _lines(
    config: ClaimsConfig, todo: Mapping[str, tuple[Claim, Plan]], rows: Mapping[str, Row]
) -> list[str]:
    taken = sum(row["cpu_seconds"] for row in rows.values()) / 3600
    summary, details = [], []
    for name, (claim, plan) in todo.items():
        found = entries(plan, rows)
        ours = found[0].mean("test_top1")
        summary.append([name, claim.statement, percent(ours), verdict(claim, found)])
        details += ["", f"## {name}: {claim.statement}", ""]
        data = plan.data
        rates = ", ".join(map(str, claim.rates))
        chosen = "" if len(claim.rates) == 1 else "chosen for each variant on validation from "
        details += [
            f"{data['name']}, {data['frames']}x{data['size']}x{data['size']}, float32; learning"
            f" rate {chosen}{rates}.",
            "",
            *comparison(found),
        ]
    return [
        "# The model's parts, one at a time",
        "",
        f"{config.origin('claims', rows)} Every row is a"
        " `ca3d_variant`, a `ca3d_tiny` with one part replaced, on clips rendered here: it says"
        f" nothing about the full-size model. {len(rows)} runs, {taken:.2f} CPU-hours. {machine()}",
        "",
        *table(["claim", "statement", "test, %", "verdict"], summary),
        *details,
        *_further(config, rows),
    ]


def _further(config: ClaimsConfig, rows: Mapping[str, Row]) -> list[str]:
    lines = []
    if _asked(config, "leakage"):
        lines += ["", "## leakage: a random split over clips flatters", ""]
        lines += leakage_report(_leakage(config), rows)
    if _asked(config, _COST):
        lines += ["", "## attention-cost: local attention is linear in the clip's length", ""]
        lines += attention_report(rows[_COST]["rows"] if _COST in rows else [])
    return lines
