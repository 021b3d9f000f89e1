"""What all studies have in common: their options, and where their report goes."""

# `option` returns dataclasses.field(...), which is what a default should be.

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from ca3d.errors import UserError
from ca3d.experiments.rows import Row, run_dates, today
from ca3d.experiments.runner import RunOptions
from ca3d.options import option

__all__ = ["Scale", "StudyOptions", "check_words", "words"]


@dataclass(frozen=True)
class Scale:
    """How large the runs of a study are.

    Args:
        data: Of every cell.
        recipe: Of every cell, without what the study chooses itself.
        models: Options of the models by name; one that is not in it has its defaults.
        observe: Steps between two looks at the tensors; 0 for none.

    Example:
        >>> Scale({"frames": 8}, {"epochs": 2}).models
        {}
    """

    data: Mapping[str, Any]
    recipe: Mapping[str, Any]
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    observe: int = 0


@dataclass
class StudyOptions:
    """The options of every study; a study adds its own.

    Raises:
        ca3d.errors.UserError: From `validate`.

    Example:
        >>> StudyOptions(seeds=0).validate()
        Traceback (most recent call last):
        ca3d.errors.UserError: --seeds must be at least 1, not 0
    """

    out: str = option("studies/NAME", "Folder of the study; the same one goes on", "Study")
    seeds: int = option(5, "Seeds of every condition; fewer than 5 infer nothing", "Study")
    report: str | None = option(
        None,
        "Markdown file to write the report to, the rest beside it (default: in --out)",
        "Study",
    )
    only_report: bool = option(False, "Train nothing: report what the folder has", "Study")
    jobs: int = option(1, "Runs at a time; more than one have one thread each", "Run")
    budget_hours: float | None = option(
        None, "CPU-hours, those of former calls included, after which no run is begun", "Run"
    )
    progress: Literal["auto", "rich", "plain", "none"] = option("auto", "Progress display", "Run")

    def validate(self) -> None:
        """Raises `UserError` for the first option whose value is not allowed."""
        if self.seeds < 1:
            raise UserError(f"--seeds must be at least 1, not {self.seeds}")
        self.run_options.validate()

    @property
    def folder(self) -> Path:
        """Where the rows of the study are."""
        return Path(self.out)

    @property
    def run_options(self) -> RunOptions:
        """How its grids are run."""
        return RunOptions(self.folder, self.jobs, self.budget_hours)

    def origin(self, study: str, rows: Mapping[str, Row]) -> str:
        """What a report says it was written by, and when, and of runs from when.

        Args:
            study: The study, as the command line names it.
            rows: All rows in its folder.

        Example:
            >>> StudyOptions(seeds=3, jobs=2).origin("results", {})    # doctest: +ELLIPSIS
            'Written by `ca3d study results --seeds 3 --only-report` on ....'
        """
        # These change nothing of what is reported.
        ignored = {x.name for x in fields(StudyOptions)} - {"seeds"}
        chosen = [
            f"--{x.name} {getattr(self, x.name)}"
            for x in fields(self)
            if x.name not in ignored and getattr(self, x.name) != x.default
        ]
        command = " ".join(["ca3d study", study, *chosen, "--only-report"])
        runs = run_dates(rows.values())
        return f"Written by `{command}` on {today()}{runs and f', from {runs}'}."

    @property
    def report_file(self) -> Path:
        """The report; its folder is there when this returns."""
        path = Path(self.report) if self.report else self.folder / "report.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def words(text: str) -> list[str]:
    """The different words of an option that takes several, separated by commas.

    Example:
        >>> words("a, b, a,")
        ['a', 'b']
    """
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def check_words(flag: str, text: str, known: Iterable[str], *, least: int = 1) -> None:
    """Raises `UserError` if a word of an option is not among the known ones.

    Args:
        flag: The option, as the user types it.
        text: Its value.
        known: What is allowed.
        least: How many words there must be.

    Example:
        >>> check_words("--models", "r3d", ["ca3d"])
        Traceback (most recent call last):
        ca3d.errors.UserError: --models: 'r3d' is none of ca3d
    """
    known = list(known)
    if len(words(text)) < least:
        raise UserError(f"{flag} must name at least {least} of {', '.join(known)}, not {text!r}")
    for word in words(text):
        if word not in known:
            raise UserError(f"{flag}: {word!r} is none of {', '.join(known)}")
