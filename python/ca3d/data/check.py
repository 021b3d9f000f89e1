"""Looking over a data set before training on it."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ca3d.data.reader import VideoError, open_video
from ca3d.data.samples import (
    Sample,
    find_samples,
    load_info,
    load_samples,
    sided_classes,
    splits_of,
)
from ca3d.data.sampling import ClipSpec
from ca3d.data.splits import Overlap, Split, overlaps

Progress = Callable[[int, int, str], None]

_LISTED = 10


@dataclass(frozen=True)
class VideoFacts:
    """What the check found out about one readable video.

    Attributes:
        frames: Number of frames.
        frames_per_second: Mean frame rate.
        seconds: Duration.
        width: Pixels of an upright frame.
        height: Pixels of an upright frame.
    """

    frames: int
    frames_per_second: float
    seconds: float
    width: int
    height: int


@dataclass
class Report:
    """The state of a data set; `str()` is the text for the user.

    Attributes:
        root: The data set.
        classes: Number of videos of each class.
        splits: Number of videos of each class, in each split.
        facts: What is known of each readable video.
        repeated: Videos that are listed more than once in a split.
        missing: Listed videos that are not on the disk.
        unreadable: Videos that cannot be read, with the reason.
        short: Videos shorter than a clip, which are looped.
        overlaps: Files and groups that two splits share.
        notes: Further remarks that are no faults.
        faults: What must be put right before training, one sentence each.
        clips_per_second: Clips read per second, or None if nothing was decoded.
        workers: Videos that were read at a time.
    """

    root: Path
    classes: dict[str, int] = field(default_factory=dict)
    splits: dict[str, dict[str, int]] = field(default_factory=dict)
    facts: dict[Path, VideoFacts] = field(default_factory=dict)
    repeated: list[Path] = field(default_factory=list)
    missing: list[Path] = field(default_factory=list)
    unreadable: dict[Path, str] = field(default_factory=dict)
    short: list[Path] = field(default_factory=list)
    overlaps: list[Overlap] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    clips_per_second: float | None = None
    workers: int = 1

    @property
    def ok(self) -> bool:
        """Whether nothing needs to be put right."""
        return not self.faults

    @property
    def exit_status(self) -> int:
        """0 if `ok`, else 1."""
        return 0 if self.ok else 1

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain values, for JSON.

        Example:
            >>> check(dataset_root).to_dict()["classes"]
            {'jump': 5, 'walk': 5}
        """
        return {
            "root": str(self.root),
            "ok": self.ok,
            "videos": len(self.facts) + len(self.missing) + len(self.unreadable),
            "classes": self.classes,
            "splits": self.splits,
            "ranges": {name: list(values) for name, values in self.ranges().items()},
            "repeated": [str(p) for p in self.repeated],
            "missing": [str(p) for p in self.missing],
            "unreadable": {str(p): reason for p, reason in self.unreadable.items()},
            "short": [str(p) for p in self.short],
            "overlaps": [list(o) for o in self.overlaps],
            "clips_per_second": self.clips_per_second,
            "workers": self.workers,
            "faults": self.faults,
            "notes": self.notes,
        }

    def ranges(self) -> dict[str, tuple[float, float, float]]:
        """Returns (smallest, median, largest) of class sizes, frame rates, durations and sizes."""
        facts = list(self.facts.values())
        rows = {
            "videos a class": [float(n) for n in self.classes.values()],
            "frames per second": [f.frames_per_second for f in facts],
            "seconds": [f.seconds for f in facts],
            "frames": [float(f.frames) for f in facts],
            "width": [float(f.width) for f in facts],
            "height": [float(f.height) for f in facts],
        }
        return {
            name: (min(values), float(np.median(values)), max(values))
            for name, values in rows.items()
            if values
        }

    def __str__(self) -> str:
        ranges = [
            f"  {name}: {smallest:.4g} to {largest:.4g}, median {median:.4g}"
            for name, (smallest, median, largest) in self.ranges().items()
        ]
        remarks = [text for text, _ in self._remarks()]
        return "\n".join([self._title(), *ranges, *self._counts(), *remarks])

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(title=self._title(), title_justify="left", show_edge=False)
        for column in ("", "smallest", "median", "largest"):
            table.add_column(column, justify="right" if column else "left")
        for name, values in self.ranges().items():
            table.add_row(name, *(f"{v:.4g}" for v in values))
        remarks = [Text(text, style=style) for text, style in self._remarks()]
        return Group(table, *(Text(line) for line in self._counts()), *remarks)

    def _title(self) -> str:
        return f"{self.root}: {sum(self.classes.values())} videos in {len(self.classes)} classes"

    def _counts(self) -> list[str]:
        lines = [
            f"  {name}: {sum(of_class.values())} videos, {len(of_class)} classes"
            for name, of_class in self.splits.items()
        ]
        if self.clips_per_second is not None:
            lines.append(
                f"  reading: {self.clips_per_second:.1f} clips per second, "
                f"{self.workers} videos at a time"
            )
        return lines

    def _remarks(self) -> list[tuple[str, str]]:
        """Returns the closing lines with their Rich styles."""
        remarks = [(f"  note: {text}", "yellow") for text in self.notes]
        remarks += [(f"  FAULT: {text}", "bold red") for text in self.faults]
        verdict = "no faults found" if self.ok else f"faults: {len(self.faults)}"
        return [*remarks, (f"  {verdict}", "green" if self.ok else "bold red")]


def check(
    root: str | os.PathLike[str],
    *,
    clip: ClipSpec | None = None,
    quick: bool = False,
    workers: int = 2,
    decoder: str = "auto",
    progress: Progress | None = None,
    parts: Split | None = None,
) -> Report:
    """Looks over a data set: what is missing, unreadable, too short, or in two splits at once.

    Args:
        root: The data set, with or without splits.
        clip: The clip that training will read; None for the default.
        quick: Decode the first frame of every video only. Otherwise its centre clip is decoded,
            which also gives the reading speed.
        workers: Videos at a time.
        decoder: As in `ca3d.data.reader.open_video`.
        progress: Called after each video with (done, total, path).
        parts: The splits to look over instead of the data set's own.

    Returns:
        The report; `report.exit_status` is 1 if something must be put right.

    Raises:
        UserError: The data set is empty or its lists are malformed.
        ValueError: workers is below 1.

    Example:
        >>> report = check(dataset_root, clip=ClipSpec(4, 2))
        >>> report.ok, report.splits["val"], report.short
        (True, {'jump': 1, 'walk': 1}, [])
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    clip = clip or ClipSpec()
    if parts is None:
        parts = {name: load_samples(root, name)[0] for name in splits_of(root)}
    samples = [s for part in parts.values() for s in part] if parts else find_samples(root)
    report = Report(Path(root), workers=workers)
    unique = {s.path: s for s in samples}
    report.classes = _count(unique.values())
    report.splits = {name: _count(part) for name, part in parts.items()}
    rows = (Counter(s.path for s in part) for part in parts.values())
    report.repeated = sorted({p for counts in rows for p, n in counts.items() if n > 1})
    report.missing = sorted(p for p in unique if not p.is_file())
    present = sorted(set(unique) - set(report.missing))
    begin = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        jobs = {pool.submit(_look, path, clip, quick, decoder): path for path in present}
        try:
            for done, job in enumerate(as_completed(jobs), 1):
                path = jobs[job]
                try:
                    report.facts[path] = job.result()
                except VideoError as error:
                    report.unreadable[path] = str(error)
                if progress is not None:
                    progress(done, len(present), str(path))
        finally:
            pool.shutdown(cancel_futures=True)
    if not quick and report.facts:
        report.clips_per_second = len(present) / max(time.perf_counter() - begin, 1e-9)
    report.facts = dict(sorted(report.facts.items()))
    report.unreadable = dict(sorted(report.unreadable.items()))
    report.short = [
        path
        for path, facts in report.facts.items()
        if facts.seconds * (1 + 1e-6) < clip.span(facts.frames_per_second)
    ]
    report.overlaps = overlaps(parts)
    _judge(report, clip)
    return report


def _look(path: Path, clip: ClipSpec, quick: bool, decoder: str) -> VideoFacts:
    with open_video(path, decoder) as video:
        if not quick:
            where = clip.sample(video.num_frames, video.frames_per_second)
            clip.read(video, where, clip.resize)
        return VideoFacts(
            video.num_frames, video.frames_per_second, video.duration, video.width, video.height
        )


def _count(samples: Iterable[Sample]) -> dict[str, int]:
    return dict(sorted(Counter(s.label for s in samples).items()))


def _judge(report: Report, clip: ClipSpec) -> None:
    faults, notes = report.faults, report.notes
    if len(report.classes) < 2:
        faults.append("a single class: there is nothing to tell apart")
    if report.repeated:
        faults.append(
            f"{len(report.repeated)} videos are listed more than once in a split:"
            f" {_some(report.repeated)}; they would count as often"
        )
    if report.missing:
        faults.append(
            f"{len(report.missing)} listed videos are missing: {_some(report.missing)}; "
            "remove them from the lists, or bring them back"
        )
    for reason in list(report.unreadable.values())[:_LISTED]:
        faults.append(reason)
    if len(report.unreadable) > _LISTED:
        faults.append(f"and {len(report.unreadable) - _LISTED} more unreadable videos")
    files = [o for o in report.overlaps if o.kind == "file"]
    groups = [o for o in report.overlaps if o.kind == "group"]
    if files:
        one = files[0]
        faults.append(
            f"{len(files)} videos lie in two splits, for example {one.name} in {one.first} and "
            f"{one.second}"
        )
    if groups:
        one = groups[0]
        notes.append(
            f"{len(groups)} groups lie in two splits, for example {one.name} in {one.first} and "
            f"{one.second}: accuracy will look better than it is"
        )
    lacking = sorted(set(report.classes) - set(report.splits.get("train", report.classes)))
    if lacking:
        faults.append(f"the training split has no videos of: {', '.join(lacking)}")
    if report.splits and "val" not in report.splits:
        notes.append("no validation split: part of the training videos will be held back")
    if report.short:
        notes.append(
            f"{len(report.short)} videos are shorter than a clip ({clip.frames} frames, every "
            f"{clip.stride}.) and will be looped: {_some(report.short)}"
        )
    _note_transforms(report)


def _note_transforms(report: Report) -> None:
    info, sided = load_info(report.root), sided_classes(report.classes)
    if info.horizontal_flip and sided:
        report.notes.append(
            f"dataset.json allows mirroring, but the class name {sided[0]!r} speaks of a side"
        )
    elif info.horizontal_flip is None and sided:
        report.notes.append(
            f"no mirroring in training: the class name {sided[0]!r} speaks of a side"
        )
    rates = report.ranges().get("frames per second")
    if rates is not None and rates[2] > 1.2 * rates[0]:
        report.notes.append("frame rates differ: clips are resampled by time to one rate")


def _some(paths: list[Path]) -> str:
    more = f" and {len(paths) - _LISTED} more" if len(paths) > _LISTED else ""
    return ", ".join(str(p) for p in paths[:_LISTED]) + more
