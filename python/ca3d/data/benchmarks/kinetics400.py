"""Kinetics-400 (Kay et al., arXiv:1705.06950): 400 classes, by csv lists.

train.csv, val.csv (validate.csv), test.csv, in one of three forms:
    label,youtube_id,time_start,time_end,split      the official one
    path,label                                      with this header
    train/abseiling/0347ZoDXyP0_000095_000105.mp4 0 path and label, no header
train/abseiling/0347ZoDXyP0_000095_000105.mp4       a video may lie anywhere below the folder
"""

import csv
import re
from pathlib import Path

from ca3d.data.benchmarks.lists import OfficialLists, lines, videos_below
from ca3d.data.samples import Sample, read_list
from ca3d.errors import UserError

SPLIT_FOLDERS = ("annotations", "kinetics400_annotations", "kinetics400")
VIDEO_FOLDERS: tuple[str, ...] = ()
FOLDS = (1,)
_NAMES = {
    "train": ("train",),
    "val": ("val", "validate", "validation"),
    "test": ("test",),
}
_CLIP = re.compile(r"(.{11})_\d{6}_\d{6}$")
_PREFIXES = ("", "kinetics_", "kinetics400_", "kinetics_400_", "kinetics-400_")


def holds_split_files(folder: Path) -> bool:
    """Whether a folder holds official lists: a train.csv with the column youtube_id.

    Example:
        >>> holds_split_files(dataset_root)
        False
    """
    file = _list_file(folder, "train")
    return file is not None and "youtube_id" in _header(file)


def holds_lists(folder: Path) -> bool:
    """Whether a folder holds lists in any of the forms that `read` takes.

    Example:
        >>> holds_lists(dataset_root / "jump")
        False
    """
    return _list_file(folder, "train") is not None


def class_names(folder: Path) -> list[str]:
    """Returns the class names of the training list.

    Args:
        folder: The split files.
    """
    file = _list_file(folder, "train")
    if file is None or "youtube_id" not in _header(file):
        return []
    with file.open(encoding="utf-8-sig", newline="") as stream:
        return sorted({row["label"] for row in csv.DictReader(stream) if row.get("label")})


def group_of(path: Path, label: str) -> str:
    """Returns the YouTube video that a clip was cut from.

    Args:
        path: The clip, ID_START_END.mp4 or ID.mp4.
        label: Its class.

    Example:
        >>> group_of(Path("0347ZoDXyP0_000095_000105.mp4"), "abseiling")
        '0347ZoDXyP0'
    """
    match = _CLIP.match(path.stem)
    return match[1] if match else path.stem


def read(folder: Path, videos: Path, fold: int) -> OfficialLists:
    """Reads the lists.

    Where there is no test list (its labels were not published at first) the validation list is the
    test, as papers report it, and validation videos are held out of the training list.

    Args:
        folder: The lists.
        videos: The folder below which the videos lie.
        fold: 1: there is one split.

    Raises:
        UserError: A list is missing or malformed; the message names the line.
    """
    files = {part: _list_file(folder, part) for part in _NAMES}
    if files["train"] is None:
        raise UserError(f"{folder}: no train.csv")
    at = videos_below(videos)
    parts = {
        part: _read_list(file, part, videos, at) for part, file in files.items() if file is not None
    }
    notes = []
    if "test" not in parts and "val" in parts:
        parts["test"] = parts.pop("val")
        notes.append("no test list: the validation list is the test, and selects nothing")
    classes = sorted({s.label for samples in parts.values() for s in samples})
    return OfficialLists(parts, classes, tuple(notes))


def _list_file(folder: Path, part: str) -> Path | None:
    names = [f"{prefix}{name}.csv" for prefix in _PREFIXES for name in _NAMES[part]]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _header(file: Path) -> list[str]:
    first = next(lines(file), (1, ""))[1]
    return [word.strip().strip('"') for word in first.split(",")]


def _read_list(file: Path, part: str, videos: Path, at: dict[str, Path]) -> list[Sample]:
    header = _header(file)
    if "youtube_id" in header:
        return _read_official(file, part, videos, at)
    if {"path", "label"} <= set(header):
        samples = read_list(file, videos)
    else:
        samples = _read_pairs(file, videos)
    return [Sample(s.path, s.label, s.group or group_of(s.path, s.label)) for s in samples]


def _read_official(file: Path, part: str, videos: Path, at: dict[str, Path]) -> list[Sample]:
    samples = []
    with file.open(encoding="utf-8-sig", newline="") as stream:
        rows = csv.DictReader(stream, skipinitialspace=True)
        lacking = {"label", "time_start", "time_end"} - set(rows.fieldnames or ())
        if lacking:
            raise UserError(f"{file}: lacks the column {sorted(lacking)[0]}")
        for row in rows:
            try:
                start, end = int(float(row["time_start"])), int(float(row["time_end"]))
            except (TypeError, ValueError, OverflowError) as error:
                raise UserError(
                    f"{file}, line {rows.line_num}: time_start and time_end must be numbers"
                ) from error
            video, label = row["youtube_id"], row["label"]
            if not video or not label:
                raise UserError(f"{file}, line {rows.line_num}: needs a youtube_id and a label")
            clip = f"{video}_{start:06d}_{end:06d}"
            path = at.get(clip) or at.get(video) or videos / part / label / f"{clip}.mp4"
            samples.append(Sample(path, label, video))
    return samples


def _read_pairs(file: Path, videos: Path) -> list[Sample]:
    samples = []
    for number, line in lines(file):
        separator = "," if "," in line else None
        words = line.rsplit(separator, 1)
        if len(words) != 2 or not all(word.strip() for word in words):
            raise UserError(f"{file}, line {number}: must be a path and a label, got {line!r}")
        samples.append(Sample(videos / words[0].strip(), words[1].strip()))
    return samples
