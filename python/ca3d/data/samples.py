"""The samples of a data set on disk: class folders, split files, lists and `dataset.json`."""

import csv
import json
import logging
import math
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ca3d.data.reader import VIDEO_SUFFIXES
from ca3d.errors import UserError

SPLITS = ("train", "val", "test")
_LOG = logging.getLogger("ca3d.data")
_LIST_SUFFIXES = (".csv", ".jsonl")


@dataclass(frozen=True)
class Sample:
    """One labelled video.

    Attributes:
        path: The file.
        label: Name of its class.
        group: What it has in common with other files (a person, a recording), or None. Files of
            one group belong on one side of a split.

    Example:
        >>> Sample(Path("walk/a.mp4"), "walk").group is None
        True
    """

    path: Path
    label: str
    group: str | None = None


@dataclass(frozen=True)
class DatasetInfo:
    """What a data set says of itself in `dataset.json`; every key is optional.

    Attributes:
        name: Its name, else the folder's.
        description: A sentence or two.
        trained_on: How a model trained on it is to name its training data.
        horizontal_flip: Whether a mirrored video keeps its label; None if not said.
        reverse: Whether a video played backwards keeps its label; None if not said.
        frames_per_second: The rate of its videos; None if not said.
        extra: All other keys.
    """

    name: str
    description: str = ""
    trained_on: str = ""
    horizontal_flip: bool | None = None
    reverse: bool | None = None
    frames_per_second: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def find_samples(root: str | os.PathLike[str]) -> list[Sample]:
    """Finds the videos in class folders, ROOT/CLASS/**/*.{mp4,avi,mkv,webm,mov,...}.

    Args:
        root: A folder whose sub-folders are the classes. Names that begin with a dot are passed
            over, other files than videos too.

    Returns:
        The samples, sorted by path.

    Raises:
        UserError: No such folder, no class folders, a class folder without videos, or two class
            names that differ in upper and lower case only.

    Example:
        >>> [(s.label, s.path.name) for s in find_samples(dataset_root)][:2]
        [('jump', '0.avi'), ('jump', '1.avi')]
    """
    folder = data_folder(root)
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise UserError(
            f"{root}: no class folders: put the videos of each class into a folder of its own, "
            f"{root}/CLASS/VIDEO.mp4"
        )
    check_classes(names, root)
    samples = []
    for name in names:
        videos = [path for path in _videos(folder / name) if _is_text(path)]
        if not videos:
            raise UserError(
                f"{folder / name}: class folder without videos ({', '.join(VIDEO_SUFFIXES[:5])}, "
                "...): remove it or add some"
            )
        samples += [Sample(path, name) for path in videos]
    return samples


def _is_text(path: Path) -> bool:
    """Whether lists can hold a path; says so if not."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        shown = os.fsencode(path).decode(errors="backslashreplace")
        _LOG.warning("%s: its name is not UTF-8; it is left out: rename it", shown)
        return False
    return True


def check_classes(names: Sequence[str], where: str | os.PathLike[str]) -> None:
    """Checks that class names are at least one, not empty and different.

    Raises:
        UserError: They are not.

    Example:
        >>> check_classes(["walk", "Walk"], "videos")
        Traceback (most recent call last):
        ca3d.errors.UserError: videos: duplicate class names 'walk' and 'Walk'
    """
    seen: dict[str, str] = {}
    for name in names:
        key = name.strip().casefold()
        if not key:
            raise UserError(f"{where}: empty class name")
        if key in seen:
            raise UserError(f"{where}: duplicate class names {seen[key]!r} and {name!r}")
        seen[key] = name


def read_list(
    file: str | os.PathLike[str],
    root: str | os.PathLike[str] | None = None,
    group: str = "group",
) -> list[Sample]:
    """Reads a list of samples.

    Args:
        file: A .csv file with the header `path,label[,group]`, or a .jsonl file with one object of
            these keys on each line. Further columns are allowed.
        root: Folder from which relative paths count; None: the list's own folder.
        group: Column of the group.

    Returns:
        The samples in the order of the list; their files need not exist.

    Raises:
        UserError: The list is missing or malformed (the message names the line), or gives one file
            two labels.

    Example:
        >>> read_list(dataset_root / "train.csv")[0].label
        'jump'
    """
    path = Path(file)
    base = Path(root) if root is not None else path.parent
    samples: list[Sample] = []
    labels: dict[Path, str] = {}
    for line, row in _rows(path):
        name, label = row.get("path"), row.get("label")
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{file}, line {line}: needs a path")
        if label is None or not str(label).strip():
            raise UserError(f"{file}, line {line}: needs a label")
        video = base / name.strip()
        label = str(label).strip()
        if labels.setdefault(video, label) != label:
            raise UserError(f"{file}, line {line}: {name} is both {labels[video]!r} and {label!r}")
        key = row.get(group)
        samples.append(Sample(video, label, str(key) if key not in (None, "") else None))
    return samples


def write_list(
    file: str | os.PathLike[str], samples: Iterable[Sample], root: str | os.PathLike[str]
) -> None:
    """Writes a .csv list that `read_list` reads, in one step: never half a file.

    Args:
        file: Where to; an existing file is replaced.
        samples: What to write.
        root: Folder to which the paths are made relative, where they lie in it.
    """
    path, base = Path(file), Path(root)
    rows = list(samples)
    header = ["path", "label"] + (["group"] if any(s.group for s in rows) else [])
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        for s in rows:
            inside = s.path.is_relative_to(base)
            name = (s.path.relative_to(base) if inside else s.path.absolute()).as_posix()
            writer.writerow([name, s.label, s.group or ""][: len(header)])
    temporary.replace(path)


def splits_of(root: str | os.PathLike[str]) -> dict[str, Path]:
    """Returns the splits that a data set has, each as list file or folder of class folders.

    Example:
        >>> sorted(splits_of(dataset_root))
        ['test', 'train', 'val']
    """
    folder = data_folder(root)
    found: dict[str, Path] = {}
    for split in SPLITS:
        for suffix in _LIST_SUFFIXES:
            if (folder / f"{split}{suffix}").is_file():
                found.setdefault(split, folder / f"{split}{suffix}")
    if not found and _is_split_root(folder):
        found = {split: folder / split for split in SPLITS if (folder / split).is_dir()}
    return found


def load_samples(
    root: str | os.PathLike[str],
    split: str | None = None,
    list_file: str | os.PathLike[str] | None = None,
) -> tuple[list[Sample], list[str]]:
    """Returns the samples of a data set or of one of its splits, and the data set's class names.

    The class names come from the whole data set, so that every split numbers them alike.

    Args:
        root: The data set.
        split: "train", "val" or "test" (or the name of another list, ROOT/NAME.csv); None for all.
        list_file: A list to take instead; relative paths count from `root`.

    Returns:
        (samples, sorted class names).

    Raises:
        UserError: Missing or empty data set, unknown split, malformed list.

    Example:
        >>> samples, classes = load_samples(dataset_root, "val")
        >>> len(samples), classes
        (2, ['jump', 'walk'])
    """
    folder = data_folder(root)
    if list_file is not None:
        samples = read_list(list_file, folder)
        return _not_empty(samples, list_file), sorted({s.label for s in samples})
    splits = splits_of(folder)
    if split is None and not splits:
        samples = find_samples(folder)
        return samples, sorted({s.label for s in samples})
    for suffix in _LIST_SUFFIXES:
        if split is not None and split not in splits and (folder / f"{split}{suffix}").is_file():
            splits[split] = folder / f"{split}{suffix}"
    if split is not None and split not in splits:
        have = ", ".join(sorted(splits)) or "none"
        raise UserError(
            f"{root}: no split {split!r} (it has: {have}): write {split}.csv (path,label), or "
            f"divide the data set with: ca3d data split {shlex.quote(str(root))}"
        )
    parts = {
        name: read_list(path, folder) if path.is_file() else find_samples(path)
        for name, path in splits.items()
    }
    classes = sorted({s.label for part in parts.values() for s in part})
    if split is not None:
        return _not_empty(parts[split], splits[split]), classes
    return _not_empty([s for part in parts.values() for s in part], root), classes


def load_info(root: str | os.PathLike[str]) -> DatasetInfo:
    """Reads ROOT/dataset.json; a data set without one says nothing of itself.

    Raises:
        UserError: The file is no JSON object, or a value is of the wrong kind or out of range.

    Example:
        >>> load_info(dataset_root).horizontal_flip
        True
    """
    folder = Path(root)
    file = folder / "dataset.json"
    if not file.is_file():
        return DatasetInfo(name=folder.absolute().name)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: must be a JSON object, got {type(content).__name__}")
    known: dict[str, Any] = {"name": folder.absolute().name}
    kinds: dict[str, tuple[type, ...]] = {
        **dict.fromkeys(("name", "description", "trained_on"), (str,)),
        **dict.fromkeys(("horizontal_flip", "reverse"), (bool,)),
        "frames_per_second": (int, float),
    }
    for key, kind in kinds.items():
        value = content.pop(key, None)
        if value is None:
            continue
        if not isinstance(value, kind) or (kind != (bool,) and isinstance(value, bool)):
            wanted = " or ".join(k.__name__ for k in kind)
            raise UserError(f"{file}: {key} must be {wanted}, got {value!r}")
        known[key] = value
    rate = known.get("frames_per_second")
    if rate is not None and not (math.isfinite(rate) and rate > 0):
        raise UserError(f"{file}: frames_per_second must be finite and above 0, got {rate!r}")
    return DatasetInfo(**known, extra=content)


def sided_classes(names: Iterable[str]) -> list[str]:
    """Returns the class names that speak of left or right, which a mirrored video would belie.

    Example:
        >>> sided_classes(["turn_left", "TurnRight", "bright", "copyright", "walk"])
        ['turn_left', 'TurnRight']
    """
    found = []
    for name in names:
        words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)
        if any(w.lower().startswith(("left", "right", "clockwise")) for w in words):
            found.append(name)
    return found


def data_folder(root: str | os.PathLike[str]) -> Path:
    """Returns the folder of a data set, which must be there.

    Args:
        root: The folder.

    Raises:
        ca3d.errors.UserError: There is none, or it is a file.

    Example:
        >>> data_folder("missing")
        Traceback (most recent call last):
        ca3d.errors.UserError: missing: no such folder
    """
    folder = Path(root)
    if not folder.exists():
        raise UserError(f"{root}: no such folder")
    if not folder.is_dir():
        raise UserError(f"{root}: is a file, give the folder that holds the class folders")
    return folder


def _videos(folder: Path) -> list[Path]:
    found = []
    for where, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".")]
        found += [
            Path(where, f)
            for f in files
            if f.lower().endswith(VIDEO_SUFFIXES) and not f.startswith(".")
        ]
    return sorted(found)


def _is_split_root(folder: Path) -> bool:
    names = {p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")}
    return "train" in names and names <= set(SPLITS)


def _not_empty(samples: list[Sample], where: str | os.PathLike[str]) -> list[Sample]:
    if not samples:
        raise UserError(f"{where}: lists no videos")
    return samples


def _rows(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    """Yields (line number, row) of a list file."""
    if path.suffix.lower() not in _LIST_SUFFIXES:
        raise UserError(f"{path}: a list must end in .csv or .jsonl")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such list") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    lines = text.splitlines()
    if path.suffix.lower() == ".csv":
        reader = csv.DictReader(lines, skipinitialspace=True)
        if not {"path", "label"} <= set(reader.fieldnames or ()):
            raise UserError(f"{path}: the first line must be path,label[,group]")
        for row in reader:
            yield reader.line_num, row
        return
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: must be an object with path and label")
        yield number, row
