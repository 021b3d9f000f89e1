"""Dividing a data set into training, validation and test videos."""

import logging
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ca3d.data.samples import (
    Sample,
    find_samples,
    load_samples,
    read_list,
    splits_of,
    write_list,
)
from ca3d.errors import UserError

_LOG = logging.getLogger("ca3d.data")

Split = dict[str, list[Sample]]
SHARES: Mapping[str, float] = {"train": 0.7, "val": 0.15, "test": 0.15}


@dataclass(frozen=True)
class SplitReport:
    """A division of a data set and what is to be said about it; `str()` shows both.

    Attributes:
        splits: The samples of every part.
        warnings: Sentences for the user.
        files: The lists that were written.
    """

    splits: Split
    warnings: tuple[str, ...]
    files: tuple[Path, ...]

    def __str__(self) -> str:
        lines = []
        for name, samples in self.splits.items():
            classes = len({s.label for s in samples})
            groups = len({s.group for s in samples if s.group is not None})
            of_groups = f", {groups} groups" if groups else ""
            lines.append(f"{name}: {len(samples)} videos, {classes} classes{of_groups}")
        return "\n".join([*lines, *(f"warning: {text}" for text in self.warnings)])


def random_split(
    samples: Sequence[Sample],
    fractions: Mapping[str, float] = SHARES,
    seed: int = 0,
    group: str | None = None,
) -> Split:
    """Divides samples at random, by default into "train", "val" and "test".

    The result depends on the set of samples and the seed only, not on their order. Classes are
    divided one by one, so each has its share in every part as far as its videos go, and at least
    one in the first part, which is for training. With groups all samples of a group stay together:
    the largest are placed first, each where its classes are furthest below their share.

    Args:
        samples: What to divide.
        fractions: The share of each part; positive or zero, with a sum of 1.
        seed: Source of the draws.
        group: A regular expression on file names that gives the group, as in `with_groups`. None:
            the samples' own groups if all have one, else a plain random split, with a warning.

    Returns:
        The samples of every part, sorted by path.

    Raises:
        UserError: No samples, a part that would be empty, or an expression that does not match.
        ValueError: fractions are no shares, or seed is negative.

    Example:
        >>> clips = [Sample(Path(f"walk/person{i // 4}_{i}.mp4"), "walk") for i in range(20)]
        >>> parts = random_split(clips, {"train": 0.6, "val": 0.2, "test": 0.2}, 1, r"person\\d+")
        >>> {name: len(part) for name, part in parts.items()}
        {'train': 12, 'val': 4, 'test': 4}
    """
    parts, warnings = _divide(samples, fractions, seed, group)
    for text in warnings:
        _LOG.warning("%s", text)
    return parts


def with_groups(samples: Sequence[Sample], pattern: str) -> list[Sample]:
    r"""Derives each sample's group from its file name.

    Args:
        samples: Samples with any groups.
        pattern: A regular expression, searched in the file's name. Its groups "(...)", joined, or
            the whole match, are the key.

    Returns:
        The samples with new groups.

    Raises:
        UserError: The expression is malformed, or does not match a file.

    Example:
        >>> clip = Sample(Path("wave/v_wave_g08_c01.avi"), "wave")
        >>> with_groups([clip], r"_(g\d+)_")[0].group
        'g08'
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(f"group {pattern!r} is no regular expression: {error}") from error
    grouped = []
    for sample in samples:
        match = expression.search(sample.path.name)
        if match is None:
            raise UserError(f"group {pattern!r} does not match the file name {sample.path.name}")
        key = "-".join(g for g in match.groups() if g is not None) or match.group(0)
        grouped.append(replace(sample, group=key))
    return grouped


def split_dataset(
    root: str | os.PathLike[str],
    fractions: Mapping[str, float] = SHARES,
    seed: int = 0,
    *,
    group: str | None = None,
    out: str | os.PathLike[str] | None = None,
    list_file: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    parts: Split | None = None,
) -> SplitReport:
    """Divides a data set at random and writes train.csv, val.csv and test.csv.

    Args:
        root: A folder of class folders.
        fractions: The share of each part.
        seed: Source of the draws.
        group: What keeps files together: a column of `list_file`, or a regular expression on the
            file names; None: the column "group" of the list, if it has one.
        out: Folder of the lists; None for ROOT, where `VideoFolder` finds them.
        list_file: The videos to divide, instead of those in the class folders.
        overwrite: Replace existing lists.
        parts: Write these splits instead of drawing some.

    Returns:
        The split, its warnings and the files written.

    Raises:
        UserError: Empty data set, existing lists, or what `random_split` refuses.

    Example:
        >>> report = split_dataset(dataset_root, group=r"(\\d+)\\.avi", out=scratch, seed=2)
        >>> [file.name for file in report.files], report.warnings
        (['train.csv', 'val.csv', 'test.csv'], ())
    """
    folder = Path(out) if out is not None else Path(root)
    if (
        parts is None
        and list_file is None
        and any(path.is_dir() for path in splits_of(root).values())
    ):
        raise UserError(f"{root}: is divided into the folders train, val and test already")
    present = [name for name in parts or fractions if (folder / f"{name}.csv").exists()]
    if present and not overwrite:
        raise UserError(f"{folder}: has {present[0]}.csv already; nothing was changed")
    warnings: list[str] = []
    if parts is None:
        if list_file is None:
            samples = find_samples(root)
        else:
            samples = read_list(list_file, root, group or "group")
            if group is not None and any(s.group is not None for s in samples):
                _all_grouped(samples)
                group = None
        parts, warnings = _divide(samples, fractions, seed, group)
    files = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, part in parts.items():
            file = folder / f"{name}.csv"
            if part:
                write_list(file, part, root)
                files.append(file)
            else:
                file.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error
    return SplitReport(parts, tuple(warnings), tuple(files))


def load_splits(root: str | os.PathLike[str]) -> Split:
    """Reads all splits of a data set and checks that they share no sample and no group.

    Raises:
        UserError: There are none, or two share a file.

    Example:
        >>> {name: len(part) for name, part in load_splits(dataset_root).items()}
        {'train': 6, 'val': 2, 'test': 2}
    """
    splits = {name: load_samples(root, name)[0] for name in splits_of(root)}
    if not splits:
        raise UserError(f"{root}: has no splits, make them with: ca3d data split {root}")
    check_disjoint(splits)
    return splits


class Overlap(NamedTuple):
    """What two splits share.

    Attributes:
        first: Name of a split.
        second: Name of the other.
        kind: "file" or "group".
        name: The file as the first split writes it, or the group.
    """

    first: str
    second: str
    kind: str
    name: str


def overlaps(splits: Mapping[str, Sequence[Sample]]) -> list[Overlap]:
    """Finds the files and the groups that two splits share.

    A file counts as the same under any spelling of its path.

    Args:
        splits: The samples of every split.

    Returns:
        What is shared, files and groups; empty if the split is clean.

    Example:
        >>> clip = Sample(Path("walk/a.mp4"), "walk")
        >>> overlaps({"train": [clip], "test": [clip]})
        [Overlap(first='train', second='test', kind='file', name='walk/a.mp4')]
    """
    keys: dict[str, dict[tuple[str, str], str]] = {}
    for name, samples in splits.items():
        keys[name] = {}
        for s in samples:
            keys[name]["file", os.path.realpath(s.path)] = str(s.path)
            if s.group is not None:
                keys[name]["group", s.group] = s.group
    names = list(keys)
    return [
        Overlap(first, second, key[0], name)
        for i, first in enumerate(names)
        for second in names[i + 1 :]
        for key, name in keys[first].items()
        if key in keys[second]
    ]


def check_disjoint(splits: Mapping[str, Sequence[Sample]]) -> None:
    """Checks that no file lies in two splits; a group in two is only worth a warning.

    Raises:
        UserError: One does; the message names it.

    Example:
        >>> check_disjoint({"train": [Sample(Path("a.mp4"), "x")], "val": []})
    """
    shared = [o for o in overlaps(splits) if o.kind == "file"]
    if shared:
        one = shared[0]
        raise UserError(
            f"{len(shared)} videos lie in two splits, for example {one.name} in {one.first} and "
            f"{one.second}"
        )


def _divide(
    samples: Sequence[Sample], fractions: Mapping[str, float], seed: int, group: str | None
) -> tuple[Split, list[str]]:
    """Returns the parts and the warnings."""
    shares = [float(f) for f in fractions.values()]
    if not shares or not all(0 <= f <= 1 for f in shares) or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"fractions must be shares with the sum 1, got {dict(fractions)}")
    if shares[0] == 0:
        raise ValueError(f"the first of the fractions must not be 0, got {dict(fractions)}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    if not samples:
        raise UserError("no videos to divide")
    grouped_samples = with_groups(samples, group) if group is not None else samples
    ordered = _sorted(grouped_samples)
    rng = np.random.default_rng(seed)
    warnings = []
    names = list(fractions)
    if all(s.group is not None for s in ordered):
        parts = _by_group(ordered, names, shares, rng)
    else:
        parts = _by_class(ordered, names, shares, rng)
        warnings.append(
            "a plain random split: clips of one recording or person may lie on both sides, which "
            "makes the accuracy look better than it is; name a group (a regular expression or a "
            "column) to keep them together"
        )
    warnings += _check_parts(parts, dict(zip(names, shares, strict=True)))
    check_disjoint(parts)
    return parts, warnings


def _all_grouped(samples: Sequence[Sample]) -> None:
    without = [s for s in samples if s.group is None]
    if without:
        raise UserError(
            f"{len(without)} of {len(samples)} videos have no group, for example {without[0].path}"
        )


def _by_class(
    samples: list[Sample], names: list[str], shares: list[float], rng: np.random.Generator
) -> Split:
    classes: dict[str, list[Sample]] = defaultdict(list)
    for s in samples:
        classes[s.label].append(s)
    parts: Split = {name: [] for name in names}
    # What rounding left over in one class is made up for in the next.
    owed = np.zeros(len(names))
    for label in sorted(classes):
        videos = classes[label]
        wanted = np.asarray(shares) * len(videos) + owed
        counts = _whole(wanted, len(videos))
        owed = wanted - counts
        shuffled = [videos[i] for i in rng.permutation(len(videos))]
        for name, count in zip(names, counts, strict=True):
            parts[name] += shuffled[:count]
            shuffled = shuffled[count:]
    return {name: _sorted(part) for name, part in parts.items()}


def _whole(wanted: np.ndarray, total: int) -> np.ndarray:
    """Rounds shares to whole numbers with the given sum, the first at least 1."""
    counts = np.floor(wanted + 1e-9).clip(0).astype(int)
    counts[0] = max(1, counts[0])
    while counts.sum() < total:
        counts[int(np.argmax(wanted - counts))] += 1
    while counts.sum() > total:
        reducible = counts > (np.arange(len(counts)) == 0)
        counts[int(np.argmax(np.where(reducible, counts - wanted, -np.inf)))] -= 1
    return counts


def _by_group(
    samples: list[Sample], names: list[str], shares: list[float], rng: np.random.Generator
) -> Split:
    groups: dict[str, list[Sample]] = defaultdict(list)
    for s in samples:
        groups[str(s.group)].append(s)
    labels = sorted({s.label for s in samples})
    number = {label: i for i, label in enumerate(labels)}
    counts = {
        key: np.bincount([number[s.label] for s in group], minlength=len(labels))
        for key, group in groups.items()
    }
    total = np.sum(list(counts.values()), axis=0)
    wanted = np.outer(shares, total)
    have = np.zeros_like(wanted)
    keys = sorted(groups)
    shuffled = [keys[i] for i in rng.permutation(len(keys))]
    placed: dict[str, list[str]] = {name: [] for name in names}
    for key in sorted(shuffled, key=lambda k: -len(groups[k])):
        # The part in which this group's classes lack most, relative to what they should have.
        lack = ((wanted - have) * counts[key] / total).sum(axis=1)
        part = int(np.argmax(np.where(np.asarray(shares) > 0, lack, -np.inf)))
        placed[names[part]].append(key)
        have[part] += counts[key]
    _cover_training(placed, names, counts, total)
    return {
        name: _sorted([s for key in part for s in groups[key]]) for name, part in placed.items()
    }


def _cover_training(
    placed: dict[str, list[str]],
    names: list[str],
    counts: Mapping[str, np.ndarray],
    total: np.ndarray,
) -> None:
    """Moves groups until the first part has every class."""
    first, rest = names[0], names[1:]
    while True:
        have = np.sum([np.zeros_like(total), *(counts[k] for k in placed[first])], axis=0)
        lacking = np.flatnonzero(have == 0)
        if not len(lacking):
            return
        # The smallest group with the class: it disturbs the shares least.
        _, key, part = min(
            (int(counts[k].sum()), k, part)
            for part in rest
            for k in placed[part]
            if counts[k][lacking[0]]
        )
        placed[part].remove(key)
        placed[first].append(key)


def _check_parts(parts: Split, shares: Mapping[str, float]) -> list[str]:
    labels = {s.label for part in parts.values() for s in part}
    warnings = []
    for name, share in shares.items():
        lacking = sorted(labels - {s.label for s in parts[name]})
        if share > 0 and not parts[name]:
            raise UserError(
                f"too few videos or groups for a share of {share:g} in {name}: add some, or "
                "change the shares"
            )
        if share > 0 and lacking:
            listed = ", ".join(lacking[:5]) + (", ..." if len(lacking) > 5 else "")
            warnings.append(f"{name} has no videos of {len(lacking)} classes: {listed}")
    return warnings


def _sorted(samples: Sequence[Sample]) -> list[Sample]:
    return sorted(samples, key=lambda s: (s.path.as_posix(), s.label))
